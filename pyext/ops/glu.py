"""`geglu`, `swiglu`, `reglu`: validate, lower, choose a backend, call it.

The op `glu_forward` (schema in csrc/glu.cpp) saves its inputs only; `glu_backward` computes the activation again.
"""

import torch
from torch import Tensor

from .. import _checks, _dispatch, _native
from .._primitives import ACTIVATIONS, GluProblem
from ..reference.glu import glu as _reference
from . import _register

_APPROXIMATE = {"none": "geglu", "tanh": "geglu_tanh"}


def geglu(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    approximate: str = "none",
    gate_first: bool = True,
    interleaved: bool = False,
    impl: str = "auto",
) -> Tensor:
    """GELU(gate) * up, with GELU(x) = x Phi(x).

    Args:
        gate: (..., N); or, without `up`, packed (..., 2N). float32, bfloat16, float16 or float64; any strides.
        up: like gate.
        approximate: "none" for Phi by the error function, "tanh" for 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
        gate_first: the order in a packed tensor.
        interleaved: a packed tensor holds gate and up as even and odd features; else as two halves.
        impl: "auto", "reference", "cpu", "triton" or "cuda"; see `pyext.explain`.
    Returns:
        a new contiguous (..., N) of gate's dtype, computed in fp32 (fp64 for fp64) and rounded once. Differentiable:
        the backward saves the inputs only and computes the activation again.
    Raises:
        TypeError, ValueError naming the argument; NotImplementedError if the forced backend refuses the call.
    Source: Shazeer, "GLU variants improve Transformer" (2020), section 2.
    """
    return _run("geglu", _prepare_geglu(gate, up, approximate, gate_first, interleaved), impl)


def swiglu(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    gate_first: bool = True,
    interleaved: bool = False,
    impl: str = "auto",
) -> Tensor:
    """SiLU(gate) * up, with SiLU(x) = x / (1 + exp(-x)). Everything else as in `geglu`."""
    return _run("swiglu", _prepare_swiglu(gate, up, gate_first, interleaved), impl)


def reglu(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    gate_first: bool = True,
    interleaved: bool = False,
    impl: str = "auto",
) -> Tensor:
    """max(gate, 0) * up, with derivative 0 at 0. Everything else as in `geglu`."""
    return _run("reglu", _prepare_reglu(gate, up, gate_first, interleaved), impl)


def _run(op: str, problem: GluProblem, impl: str) -> Tensor:
    backend = _dispatch.choose(op, impl, problem)
    return _reference(problem) if backend == "reference" else _register.call(backend, "glu_forward", problem)


def _prepare_geglu(gate, up, approximate, gate_first, interleaved) -> GluProblem:
    if approximate not in _APPROXIMATE:
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    return _prepare(gate, up, _APPROXIMATE[approximate], gate_first, interleaved)


def _prepare_swiglu(gate, up, gate_first, interleaved) -> GluProblem:
    return _prepare(gate, up, "swiglu", gate_first, interleaved)


def _prepare_reglu(gate, up, gate_first, interleaved) -> GluProblem:
    return _prepare(gate, up, "reglu", gate_first, interleaved)


def _prepare(gate, up, activation: str, gate_first, interleaved) -> GluProblem:
    """Validate and lower a call."""
    if _checks.floating("gate", gate).dim() == 0:
        raise _checks.shape_error("gate", "(..., N), or packed (..., 2N)," if up is None else "(..., N)", "", gate)
    gate_first, interleaved = _checks.flag("gate_first", gate_first), _checks.flag("interleaved", interleaved)
    if up is None:
        if gate.shape[-1] % 2:
            raise _checks.shape_error("gate", "(..., 2N)", "without up", gate)
    else:
        if _checks.floating("up", up).shape != gate.shape:
            raise _checks.shape_error("up", _checks.shape_text(gate.shape), "to match gate", up)
        if up.dtype != gate.dtype:
            raise TypeError(f"up must have dtype {gate.dtype} to match gate, got {up.dtype}")
        if up.device != gate.device:
            raise ValueError(f"up must be on {gate.device} like gate, got {up.device}")
        if interleaved or not gate_first:
            name = "interleaved must be False" if interleaved else "gate_first must be True"
            raise ValueError(f"{name} with up: it describes a packed gate, got {interleaved if interleaved else False}")
    return GluProblem(gate, up, ACTIVATIONS.index(activation), gate_first, interleaved)


# --- The ops as torch sees them: fakes and derivatives ---


def _forward_fake(gate, up, activation, gate_first, interleaved):
    return gate.new_empty(gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2))


def _backward_fake(grad, gate, up, activation, gate_first, interleaved):
    return gate.new_empty(gate.shape), gate.new_empty((0,) if up is None else up.shape)


class _Glu(torch.autograd.Function):
    """`glu_forward` with its gradient."""

    @staticmethod
    def forward(ctx, sibling, run, gate, up, *numbers):
        ctx.save_for_backward(gate, up)
        ctx.sibling, ctx.numbers = sibling, numbers
        return run(gate, up, *numbers)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = ctx.sibling("glu_backward")(grad, gate, up, *ctx.numbers)
        return None, None, grad_gate, None if up is None else grad_up, None, None, None


for _function, _prepare_call in ((geglu, _prepare_geglu), (swiglu, _prepare_swiglu), (reglu, _prepare_reglu)):
    _dispatch.register(_function, _prepare_call, ("cuda", "cpu", "triton"))
if _native.module() is not None:
    _register.register("glu_forward", _forward_fake, _Glu.apply, "glu")
    _register.register("glu_backward", _backward_fake, _register.once_differentiable("geglu, swiglu, reglu"), "glu")
