"""Which backend takes a call, and why the others refuse.

An op names mathematics, `impl` names who computes it. `auto` takes the first backend that accepts the call, in the
order of `BACKENDS`; a forced backend never falls back. The choice is made once, before the op runs.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from . import _checks, _native


def _cuda(op: str, problem: tuple) -> str | None:
    return f"no CUDA kernel in this build for {op}"


def _triton(op: str, problem: tuple) -> str | None:
    return f"no Triton kernel in this build for {op}"


def _cpu(op: str, problem: tuple) -> str | None:
    first = problem[0]
    if not _native.available():
        return _native.reason()
    if not first.is_cpu:
        return f"the tensors are on {first.device}"
    if first.dtype not in _checks.FLOATING:
        return f"dtype {first.dtype} is not supported"
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return "the CPU kernels do not support torch.func transforms (grad, vmap, jvp)"
    if forward_ad._current_level >= 0 and any(map(_has_tangent, problem)):
        return "the CPU kernels have no forward-mode derivative"
    return None


def _reference(op: str, problem: tuple) -> str | None:
    return None


def _has_tangent(value) -> bool:
    return isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None


#: Every backend, fastest first: its name, and why it refuses a problem (a tuple whose first tensor settles device
#: and dtype).
BACKENDS: tuple[tuple[str, Callable[[str, tuple], str | None]], ...] = (
    ("cuda", _cuda),
    ("triton", _triton),
    ("cpu", _cpu),
    ("reference", _reference),
)
NAMES = tuple(name for name, _ in BACKENDS)


def choose(op: str, impl: str, problem: tuple) -> str:
    """The name of the backend that computes this call.

    Args:
        op: name of the op, for messages.
        impl: "auto", or one of `NAMES` to force it.
        problem: the flat problem.
    Raises:
        NotImplementedError listing each backend and why it refuses, if the forced one (or every one) does.
        ValueError if impl is no such name.
    """
    for name, refuse in BACKENDS:
        if (impl == "auto" or impl == name) and refuse(op, problem) is None:
            return name
    check_impl(impl)
    refusals = _refusals(op, problem)
    rows = "".join(f"\n  {name}: {why or 'accepts'}" for name, why in refusals.items())
    what = "no backend accepts this call" if impl == "auto" else f"impl={impl!r} refuses this call"
    raise NotImplementedError(f"pyext.{op}: {what}{rows}")


def check_impl(impl: str) -> None:
    if impl != "auto" and impl not in NAMES:
        raise ValueError(f"impl must be one of {', '.join(map(repr, ('auto', *NAMES)))}, got {impl!r}")


def _refusals(op: str, problem: tuple) -> dict[str, str | None]:
    return {name: refuse(op, problem) for name, refuse in BACKENDS}


class Explanation(Mapping):
    """What `explain` returns: backend -> "accepts" or why it refuses. `auto` is what impl="auto" picks, or None."""

    def __init__(self, op: str, refusals: dict[str, str | None]):
        self.op = op
        self.auto = next((name for name, why in refusals.items() if why is None), None)
        self._rows = {name: why or "accepts" for name, why in refusals.items()}

    def __getitem__(self, backend: str) -> str:
        return self._rows[backend]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __str__(self) -> str:
        rows = [f"  {'*' if name == self.auto else ' '} {name:<10} {why}" for name, why in self._rows.items()]
        return "\n".join([f"pyext.{self.op} (* = impl='auto')", *rows])

    __repr__ = __str__


class _Op(NamedTuple):
    function: Callable
    prepare: Callable  # the op's arguments (all but impl) as keywords -> the flat problem


_OPS: dict[str, _Op] = {}


def register(function: Callable, prepare: Callable) -> None:
    """Make `explain` know a public op. `prepare` validates and lowers a call without running it."""
    _OPS[function.__name__] = _Op(function, prepare)


def explain(op: Callable | str, *args, **kwargs) -> Explanation:
    """Which backends would take this call, and why the others refuse it, without running it.

    >>> print(pyext.explain(pyext.attention, q, k, v, is_causal=True))

    Args:
        op: a public op of this package, or its name.
        *args, **kwargs: the call. It is validated and lowered as a real one is.
    Returns:
        a printable mapping from backend to "accepts" or the reason; its attribute `auto` names the one impl="auto"
        picks.
    Raises:
        what the call itself would raise for bad arguments; ValueError for an unknown op.
    """
    problem = lower(op, *args, **kwargs)
    name = op if isinstance(op, str) else op.__name__
    return Explanation(name, _refusals(name, problem))


def lower(op: Callable | str, *args, **kwargs) -> tuple:
    """The flat problem of a call. See `explain`."""
    entry = _OPS.get(op if isinstance(op, str) else getattr(op, "__name__", ""))
    if entry is None or not (isinstance(op, str) or op is entry.function):
        raise ValueError(f"op must be a pyext op or one of {', '.join(map(repr, _OPS))}, got {op!r}")
    call = inspect.signature(entry.function).bind(*args, **kwargs)
    call.apply_defaults()
    check_impl(call.arguments.pop("impl"))
    return entry.prepare(**call.arguments)
