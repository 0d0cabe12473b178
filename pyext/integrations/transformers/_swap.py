"""Modules that compute otherwise: the class of one instance becomes a subclass of itself with other methods.

Parameters, buffers, hooks, names and `isinstance` stay as they are.
"""

import copy
import functools
from collections.abc import Callable, Mapping

from torch import nn


def original_class(module: nn.Module) -> type:
    """The class that Transformers gave the module."""
    return getattr(type(module), "_pyext_original", type(module))


def replace(module: nn.Module, methods: Mapping[str, Callable | property]) -> None:
    """Give this instance these methods. Inside of them `self._pyext_original.forward(self, ...)` is the former one."""
    module.__class__ = _subclass(original_class(module), tuple(sorted(methods.items(), key=lambda item: item[0])))


def restore(module: nn.Module) -> None:
    module.__class__ = original_class(module)


@functools.cache
def _subclass(original: type, methods: tuple) -> type:
    names = ("__module__", "__qualname__", "__doc__")
    body = {
        **{name: getattr(original, name) for name in names},
        "_pyext_original": original,
        "__deepcopy__": _deepcopy,
        "__reduce_ex__": _reduce,
        **dict(methods),
    }
    return type(original.__name__, (original,), body)


def _deepcopy(self, memo):
    twin = self.__class__.__new__(self.__class__)
    memo[id(self)] = twin
    twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
    return twin


def _reduce(self, protocol):
    return _blank, (self._pyext_original,), self.__getstate__(), None, None, _loaded


def _blank(cls: type) -> nn.Module:
    return cls.__new__(cls)


def _loaded(module: nn.Module, state) -> None:
    """A module that was saved whole is patched again, as the functions in its class have no names to save."""
    from . import register
    from ._patch import methods_of

    register()
    module.__setstate__(state)
    replace(module, methods_of(module))


def same_code(function: Callable, template: Callable) -> bool:
    """Whether two functions are the same text, whatever the classes around them are called."""
    a, b = (getattr(f, "__code__", None) for f in (function, template))
    if a is None or b is None:
        return False
    return _text(a) == _text(b)


def _text(code) -> tuple:
    """What a function does: its code, names and constants but for docstrings and nested functions."""
    constants = tuple(c for c in code.co_consts if not isinstance(c, str) and not hasattr(c, "co_code"))
    return code.co_code, code.co_names, code.co_varnames, constants


def rebind(function: Callable, **others) -> Callable:
    """The same function, for which these names of its module stand for something else."""
    # without __name__, by which torch.compile would look the names up in the module itself
    names = {name: value for name, value in function.__globals__.items() if name != "__name__"}
    names.update(others)
    twin = type(function)(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin
