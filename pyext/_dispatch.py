"""Which backend takes a call, and why the others refuse.

An op names mathematics, `impl` names who computes it. `auto` takes the first backend that accepts the call, in the
order of `BACKENDS`; a forced backend never falls back. The choice is made once, before the op runs.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from . import _checks, _native, _triton_runtime


def _cuda(op: str, problem: tuple) -> str | None:
    if "cuda" not in _kernels(op):
        return f"no CUDA kernel in this build for {op}"
    why = _native.cuda_reason(problem[0]) or _unsupported("CUDA", problem, _checks.GPU_FLOATING)
    return why or _limited(op, "cuda", problem)


def _cpu(op: str, problem: tuple) -> str | None:
    if "cpu" not in _kernels(op):
        return f"no CPU kernel in this build for {op}"
    if not _native.available():
        return _native.reason()
    if not problem[0].is_cpu:
        return f"the tensors are on {problem[0].device}"
    return _unsupported("CPU", problem, _checks.FLOATING)


def _triton(op: str, problem: tuple) -> str | None:
    if "triton" not in _kernels(op):
        return f"no Triton kernel in this build for {op}"
    why = _triton_runtime.reason(problem[0]) or _unsupported("Triton", problem, _checks.GPU_FLOATING)
    return why or _limited(op, "triton", problem)


def _limited(op: str, backend: str, problem: tuple) -> str | None:
    """What the op says against the problem on this backend."""
    limits = _OPS[op].limits.get(backend)
    return None if limits is None else limits(problem)


def _reference(op: str, problem: tuple) -> str | None:
    return None


def _kernels(op: str) -> tuple[str, ...]:
    return _OPS[op].kernels


def _unsupported(kernels: str, problem: tuple, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why these kernels cannot take the dtype, or what surrounds the call."""
    if problem[0].dtype not in dtypes:
        return f"dtype {problem[0].dtype} is not supported"
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return f"the {kernels} kernels do not support torch.func transforms (grad, vmap, jvp)"
    if forward_ad._current_level >= 0 and any(map(_has_tangent, problem)):
        return f"the {kernels} kernels have no forward-mode derivative"
    return None


def _has_tangent(value) -> bool:
    return isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None


#: Every backend, fastest first (the CPU's kernels before interpreted Triton): its name, and why it refuses a problem, a
#: tuple whose first tensor settles device and dtype.
BACKENDS: tuple[tuple[str, Callable[[str, tuple], str | None]], ...] = (
    ("cuda", _cuda),
    ("cpu", _cpu),
    ("triton", _triton),
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
    kernels: tuple[str, ...]  # the backends that have kernels for it, besides the reference
    limits: dict[str, Callable]  # why a backend refuses a problem, beyond what holds for all ops


_OPS: dict[str, _Op] = {}


def register(
    function: Callable,
    prepare: Callable,
    kernels: tuple[str, ...],
    name: str | None = None,
    limits: dict[str, Callable[[tuple], str | None]] | None = None,
) -> None:
    """Make a public op known.

    Args:
        prepare: validates and lowers a call without running it.
        kernels: names of backends.
        name: what follows `pyext.`, if it is more than the function's name.
        limits: for backends that do not take every problem, why they refuse one, or None.
    """
    _OPS[name or function.__name__] = _Op(function, prepare, kernels, limits or {})


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
    name = _name(op)
    return Explanation(name, _refusals(name, lower(name, *args, **kwargs)))


def lower(op: Callable | str, *args, **kwargs) -> tuple:
    """The flat problem of a call. See `explain`."""
    entry = _OPS[_name(op)]
    call = inspect.signature(entry.function).bind(*args, **kwargs)
    call.apply_defaults()
    check_impl(call.arguments.pop("impl"))
    return entry.prepare(**call.arguments)


def _name(op: Callable | str) -> str:
    for name, entry in _OPS.items():
        if op is entry.function or op == name:
            return name
    raise ValueError(f"op must be a pyext op or one of {', '.join(map(repr, _OPS))}, got {op!r}")
