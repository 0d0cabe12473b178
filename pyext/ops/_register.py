"""How the ops become torch operators: one schema each, in one namespace per family of kernels.

`torch.ops.pyext.<name>` are the native kernels (schema and kernels in csrc/<op>.cpp: CPU, and CUDA where it was built
in); `torch.ops.pyext_triton.<name>` are the Triton launchers of the same name in kernels/triton, with the same schema,
fakes and derivatives. A launcher's module is imported by the first call that needs it.
"""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

_BELOW_AUTOGRAD = torch._C._after_autograd_keyset
_native = torch.library.Library("pyext", "IMPL")  # the registrations live as long as these objects
_triton = torch.library.Library("pyext_triton", "DEF")
_operators: dict[tuple[str, str], torch._ops.OpOverload] = {}


def call(backend: str, name: str, arguments: tuple):
    """Run the operator `name` of a backend (any but the reference, which is no operator)."""
    operator = _operators[backend, name]
    if torch.compiler.is_compiling() or is_recorded(arguments):
        return operator(*arguments)
    # Past the Python autograd kernel, which would do nothing here: 4 of 10 us of a tiny call (Zen 5, torch 2.13).
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def is_recorded(arguments: tuple) -> bool:
    """Whether autograd records a call with these arguments."""
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in arguments)


def register(name: str, fake: Callable, autograd: Callable, launchers: str | None = None) -> None:
    """Attach a fake and derivatives to an op whose schema the native module has defined.

    Args:
        fake: shapes, dtypes and strides of the results.
        autograd: autograd(sibling, run, *args), the kernel of the Autograd key. `sibling(name)` is another op of the
            same namespace; `run(*args)` is the op's own kernel. It is registered directly: what
            `torch.library.register_autograd` adds costs 5 us a call, and time quadratic in the number of arguments
            (70 us for 17 of them; torch 2.13, Zen 5).
        launchers: the module of kernels/triton that holds a launcher of this name, or None if there is none.
    """
    _attach("pyext", _native, name, fake, autograd, ("cpu", "cuda"))
    if launchers is not None:
        schema = str(getattr(torch.ops.pyext, name).default._schema)
        _triton.define(schema.partition("::")[2])
        _triton.impl(name, _launcher(launchers, name), "CompositeExplicitAutograd")
        _attach("pyext_triton", _triton, name, fake, autograd, ("triton",))


def _attach(namespace, library, name, fake, autograd, backends) -> None:
    operators = getattr(torch.ops, namespace)
    operator = getattr(operators, name).default

    def sibling(other: str):
        return getattr(operators, other).default

    def kernel(keys, *args):
        def run(*args):
            with torch._C._AutoDispatchBelowAutograd():
                return operator.redispatch(keys & _BELOW_AUTOGRAD, *args)

        return autograd(sibling, run, *args)

    torch.library.register_fake(f"{namespace}::{name}", fake)
    library.impl(name, kernel, "Autograd", with_keyset=True)
    _operators.update({(backend, name): operator for backend in backends})


def _launcher(module: str, name: str) -> Callable:
    def launch(*args):
        return getattr(importlib.import_module(f"pyext.kernels.{module}"), name)(*args)

    return launch


def once_differentiable(op: str, why: str | None = None) -> Callable:
    """The `autograd` of a backward op that has no derivative: an error that says so, where one is asked for."""
    why = why or (
        "the kernels have no second derivative (double backward); "
        "call it with impl='reference' where gradients of gradients are needed"
    )

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, run, *args):
            return run(*args)

        @staticmethod
        def backward(ctx, *grads):
            raise RuntimeError(f"pyext.{op}: {why}")

    return lambda sibling, run, *args: Backward.apply(run, *args)


def with_saved(ctx, out: Tensor, pre: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """The results of an op that returns what its backward needs, `pre`, only if `save`; `pre` has no derivative."""
    pre = pre if save else pre.new_empty((0,))
    ctx.mark_non_differentiable(pre)
    ctx.set_materialize_grads(False)  # no zeros for pre
    return out, pre


def wanted(grads: tuple[Tensor, ...], needed: tuple[bool, ...]) -> list[Tensor | None]:
    """Gradients of inputs, None for those that autograd does not ask for."""
    return [grad if need else None for grad, need in zip(grads, needed, strict=True)]
