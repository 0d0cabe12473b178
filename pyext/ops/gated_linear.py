"""`gated_linear`, `gated_mlp`: validate, lower, choose a backend, call it.

The ops (schemas in csrc/gated_linear.cpp) save x and the pre-activations (M, 2N); their backwards compute the
activations again.
"""

import torch
from torch import Tensor

from .. import _checks, _dispatch, _native
from .._primitives import ACTIVATIONS, GatedLinearProblem, GatedMLPProblem
from ..reference import gated_linear as _reference
from . import _register


def gated_linear(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    activation: str = "geglu",
    *,
    impl: str = "auto",
) -> Tensor:
    """act(x w_gate^T + b_gate) * (x w_up^T + b_up): a gated linear unit with the activation fused into the products.

    Args:
        x: (..., K). float32, bfloat16, float16 or float64; any strides; inside autocast it is cast as a linear layer's.
        w_gate, w_up: (N, K) as `nn.Linear` keeps them; or w_gate (2N, K), the rows of the gate first, and w_up None.
        b_gate, b_up: (N,) or None, each; with a packed w_gate b_gate is (2N,) or None.
        activation: "geglu", "geglu_tanh", "swiglu" or "reglu", as `pyext.geglu`, `swiglu`, `reglu`.
        impl: "auto", "reference", "cpu", "triton" or "cuda"; see `pyext.explain`.
    Returns:
        (..., N) in x's dtype; sums and activation in fp32 (fp64 for fp64). Differentiable with respect to every tensor:
        the backward saves x and the pre-activations, and its gradients are accumulated in fp32 and rounded once.
    Raises:
        TypeError, ValueError naming the argument; NotImplementedError if the forced backend refuses the call.
    Source: Shazeer, "GLU variants improve Transformer" (2020), eq. 5.
    """
    problem = _prepare_linear(x, w_gate, w_up, b_gate, b_up, activation)
    return _run("gated_linear", problem, impl, x.shape[:-1])


def gated_mlp(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor | None,
    w_down: Tensor,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "swiglu",
    *,
    impl: str = "auto",
) -> Tensor:
    """gated_linear(x, w_gate, w_up, b_gate, b_up) w_down^T + b_down: the gated feed-forward layer.

    Args:
        w_down: (J, N), b_down: (J,) or None. The others as in `gated_linear`.
    Returns:
        (..., J) in x's dtype; as `gated_linear`.
    Raises:
        as `gated_linear`.
    Source: Shazeer, "GLU variants improve Transformer" (2020), eq. 6.
    """
    problem = _prepare_mlp(x, w_gate, w_up, w_down, b_gate, b_up, b_down, activation)
    return _run("gated_mlp", problem, impl, x.shape[:-1])


def _run(op: str, problem: GatedLinearProblem | GatedMLPProblem, impl: str, lead: tuple[int, ...]) -> Tensor:
    backend = _dispatch.choose(op, impl, problem)
    if backend == "reference":
        out = getattr(_reference, op)(problem)
    else:
        out, _ = _register.call(backend, f"{op}_forward", problem)
    return out.view(*lead, out.shape[1])


def _prepare_linear(x, w_gate, w_up, b_gate, b_up, activation) -> GatedLinearProblem:
    """Validate and lower a call of `gated_linear`."""
    named = {"x": x, "w_gate": w_gate, "w_up": w_up, "b_gate": b_gate, "b_up": b_up}
    *tensors, _ = _check(named, activation)
    return GatedLinearProblem(*tensors, ACTIVATIONS.index(activation))


def _prepare_mlp(x, w_gate, w_up, w_down, b_gate, b_up, b_down, activation) -> GatedMLPProblem:
    """Validate and lower a call of `gated_mlp`."""
    named = {
        "x": x, "w_gate": w_gate, "w_up": w_up, "w_down": w_down, "b_gate": b_gate, "b_up": b_up, "b_down": b_down,
    }  # fmt: skip
    *tensors, width = _check(named, activation)
    w_down = tensors[3]
    if w_down.dim() != 2 or w_down.shape[1] != width:
        raise _checks.shape_error("w_down", f"(J, {width})", "to match w_gate", w_down)
    _check_bias("b_down", tensors[6], w_down.shape[0], "w_down")
    return GatedMLPProblem(*tensors, ACTIVATIONS.index(activation))


def _check(named: dict[str, Tensor | None], activation) -> tuple:
    """The tensors after autocast, x as (M, K), and then N."""
    _checks.one_of("activation", activation, ACTIVATIONS)
    for name, value in named.items():
        if value is not None or name in ("x", "w_gate", "w_down"):
            _checks.floating(name, value)
    named = dict(zip(named, _checks.autocast(*named.values()), strict=True))
    x, w_gate, w_up = named["x"], named["w_gate"], named["w_up"]
    for name, value in named.items():
        if value is not None:
            _checks.same_dtype(name, value, x.dtype, "x")
            _checks.same_device(name, value, x.device, "x")
    if x.dim() == 0:
        raise _checks.shape_error("x", "(..., K)", "", x)
    features = x.shape[-1]
    if w_gate.dim() != 2 or w_gate.shape[1] != features:
        raise _checks.shape_error("w_gate", f"(N, {features}), or (2N, {features}) without w_up,", "to match x", w_gate)
    height = width = w_gate.shape[0]
    if w_up is None:
        if height % 2:
            raise _checks.shape_error("w_gate", f"(2N, {features})", "without w_up", w_gate)
        if named["b_up"] is not None:
            raise ValueError("b_up must be None without w_up: a packed w_gate takes both biases in b_gate")
        width = height // 2
    elif w_up.shape != w_gate.shape:
        raise _checks.shape_error("w_up", _checks.shape_text(w_gate.shape), "to match w_gate", w_up)
    _check_bias("b_gate", named["b_gate"], height, "w_gate")
    _check_bias("b_up", named["b_up"], height, "w_up")
    rows = x[None] if x.dim() == 1 else x.flatten(0, -2)
    return (*{**named, "x": rows}.values(), width)


def _check_bias(name: str, bias: Tensor | None, rows: int, weight: str) -> None:
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != rows):
        raise _checks.shape_error(name, f"({rows},)", f"to match {weight}", bias)


# --- The ops as torch sees them: fakes and derivatives ---


def _linear_fake(x, w_gate, w_up, b_gate, b_up, activation, save):
    both = w_gate.shape[0] * (1 if w_up is None else 2)
    return x.new_empty((x.shape[0], both // 2)), x.new_empty((x.shape[0], both) if save else (0,))


def _mlp_fake(x, w_gate, w_up, w_down, b_gate, b_up, b_down, activation, save):
    _, pre = _linear_fake(x, w_gate, w_up, b_gate, b_up, activation, save)
    return x.new_empty((x.shape[0], w_down.shape[0])), pre


def _linear_backward_fake(grad, x, pre, w_gate, w_up, activation, need_x, need_w, need_b):
    rows, second = w_gate.shape[0], w_up is not None

    def fresh(needed, *shape):
        return x.new_empty(shape if needed else (0,))

    return (
        fresh(need_x, *x.shape),
        fresh(need_w, *w_gate.shape),
        fresh(need_w and second, *w_gate.shape),
        fresh(need_b, rows),
        fresh(need_b and second, rows),
    )


def _mlp_backward_fake(grad, x, pre, w_gate, w_up, w_down, activation, need_x, need_w, need_b, need_down, need_b_down):
    first = _linear_backward_fake(grad, x, pre, w_gate, w_up, activation, need_x, need_w, need_b)
    down = x.new_empty(w_down.shape if need_down else (0,))
    b_down = x.new_empty((w_down.shape[0] if need_b_down else 0,))
    return *first[:3], down, *first[3:], b_down


class _GatedLinear(torch.autograd.Function):
    """`gated_linear_forward` with its gradient; saves x and the pre-activations (and the weights)."""

    @staticmethod
    def forward(ctx, sibling, run, x, w_gate, w_up, b_gate, b_up, activation, save):
        out, pre = run(x, w_gate, w_up, b_gate, b_up, activation, save or any(ctx.needs_input_grad))
        ctx.save_for_backward(x, pre, w_gate, w_up)
        ctx.sibling, ctx.activation = sibling, activation
        return _register.with_saved(ctx, out, pre, save)

    @staticmethod
    def backward(ctx, grad, _):
        need_x, need_gate, need_up, need_b_gate, need_b_up = ctx.needs_input_grad[2:7]
        x, pre, w_gate, w_up = ctx.saved_tensors
        grads = ctx.sibling("gated_linear_backward")(
            grad, x, pre, w_gate, w_up, ctx.activation, need_x, need_gate or need_up, need_b_gate or need_b_up
        )
        return None, None, *_register.wanted(grads, ctx.needs_input_grad[2:7]), None, None


class _GatedMLP(torch.autograd.Function):
    """`gated_mlp_forward` with its gradient; saves x and the pre-activations (and the weights)."""

    @staticmethod
    def forward(ctx, sibling, run, x, w_gate, w_up, w_down, b_gate, b_up, b_down, activation, save):
        keep = save or any(ctx.needs_input_grad)
        out, pre = run(x, w_gate, w_up, w_down, b_gate, b_up, b_down, activation, keep)
        ctx.save_for_backward(x, pre, w_gate, w_up, w_down)
        ctx.sibling, ctx.activation = sibling, activation
        return _register.with_saved(ctx, out, pre, save)

    @staticmethod
    def backward(ctx, grad, _):
        needed = ctx.needs_input_grad[2:9]
        need_x, need_gate, need_up, need_down, need_b_gate, need_b_up, need_b_down = needed
        x, pre, w_gate, w_up, w_down = ctx.saved_tensors
        grads = ctx.sibling("gated_mlp_backward")(
            grad, x, pre, w_gate, w_up, w_down, ctx.activation, need_x, need_gate or need_up,
            need_b_gate or need_b_up, need_down, need_b_down,
        )  # fmt: skip
        return None, None, *_register.wanted(grads, needed), None, None


_dispatch.register(gated_linear, _prepare_linear, ("cpu", "triton"))
_dispatch.register(gated_mlp, _prepare_mlp, ("cpu", "triton"))
if _native.module() is not None:
    _no_derivative = _register.once_differentiable("gated_linear, gated_mlp")
    _register.register("gated_linear_forward", _linear_fake, _GatedLinear.apply, "gated_linear")
    _register.register("gated_linear_backward", _linear_backward_fake, _no_derivative, "gated_linear")
    _register.register("gated_mlp_forward", _mlp_fake, _GatedMLP.apply, "gated_linear")
    _register.register("gated_mlp_backward", _mlp_backward_fake, _no_derivative, "gated_linear")
