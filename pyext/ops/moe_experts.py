"""`moe.grouped_linear`, `experts`, `forward`: validate, lower, choose a backend, call it.

The ops (schemas in csrc/moe_experts.cpp) save the rows or tokens they got and the pre-activations; their backwards
compute the activations again, and keep no output of an expert for the gradient of routing.weights.
"""

import torch
from torch import Tensor

from .. import _checks, _dispatch, _native
from .._primitives import (
    ACTIVATIONS,
    EXPERT_ACTIVATIONS,
    ExpertsProblem,
    GroupedLinearProblem,
    MoEProblem,
    Routing,
    acc_dtype,
)
from ..reference import moe_experts as _reference
from . import _register
from .moe_dispatch import check_rows, checked_routing


def grouped_linear(xs: Tensor, w: Tensor, offsets: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """out[n] = xs[n] w[e]^T + bias[e] for the rows offsets[e] <= n < offsets[e + 1], 0 in rows of no expert.

    Args:
        xs: (N, I). float32, bfloat16, float16 or float64; any strides; inside autocast it is cast as a linear layer's.
        w: (E, O, I); bias: (E, O) or None; of the dtype of xs.
        offsets: (E + 1,) integers that rise from 0 to N or less.
        impl: "auto", "reference", "cpu", "triton" or "cuda"; see `pyext.explain`.
    Returns:
        (N, O) in the dtype of xs; sums in fp32 (fp64 for fp64). Differentiable with respect to xs, w and bias.
    Raises:
        TypeError, ValueError naming the argument; NotImplementedError if the forced backend refuses the call.
    Source: Gale et al., "MegaBlocks" (2022), section 5, where it is a block-diagonal product.
    """
    problem = _prepare_grouped(xs, w, offsets, bias)
    backend = _dispatch.choose("moe.grouped_linear", impl, problem)
    if backend == "reference":
        return _reference.grouped_linear(problem)
    return _register.call(backend, "moe_grouped_linear_forward", problem)


def experts(
    xs: Tensor,
    routing: Routing,
    w_gate_up: Tensor,
    w_down: Tensor,
    activation: str = "swiglu",
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """ys[n] = act(xs[n] w_gate_up[e]^T + b_gate_up[e]) w_down[e]^T + b_down[e] for the rows n of expert e.

    Args:
        xs: (N, H), rows as `dispatch` orders them. float32, bfloat16, float16 or float64; any strides; inside autocast
            it is cast as a linear layer's.
        routing: what `route` returned.
        w_gate_up: (E, 2I, H), the rows of the gate first; (E, I, H) for an activation that is not gated.
        w_down: (E, J, I), usually with J = H.
        activation: "geglu", "geglu_tanh", "swiglu", "reglu"; not gated: "gelu", "gelu_tanh", "silu", "relu".
        b_gate_up, b_down: (E, 2I) or (E, I), and (E, J); or None, each.
        impl: "auto", "reference", "cpu", "triton" or "cuda"; see `pyext.explain`.
    Returns:
        (N, J) in the dtype of xs, 0 in unused rows; sums and activation in fp32 (fp64 for fp64). Differentiable with
        respect to every tensor but the routing.
    Raises:
        TypeError, ValueError naming the argument; NotImplementedError if the forced backend refuses the call.
    Source: Shazeer, "GLU variants improve Transformer" (2020), eq. 6; biases as in section 2.
    """
    problem = _prepare_experts(xs, routing, w_gate_up, w_down, activation, b_gate_up, b_down)
    backend = _dispatch.choose("moe.experts", impl, problem)
    if backend == "reference":
        return _reference.experts(problem)
    return _register.call(backend, "moe_experts_forward", problem)[0]


def forward(
    x: Tensor,
    routing: Routing,
    w_gate_up: Tensor,
    w_down: Tensor,
    activation: str = "swiglu",
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """combine(experts(dispatch(x))) in one, rounded once.

    Args:
        x: (T, H). The others as in `experts`.
    Returns:
        (T, J) in x's dtype. Differentiable with respect to x, weights and biases, and through routing.weights to the
        logits.
    Raises:
        as `experts`.
    Source: as `experts` and `combine`.
    """
    problem = _prepare_forward(x, routing, w_gate_up, w_down, activation, b_gate_up, b_down)
    backend = _dispatch.choose("moe.forward", impl, problem)
    if backend == "reference":
        return _reference.forward(problem)
    return _register.call(backend, "moe_forward", problem)[0]


def _prepare_grouped(xs, w, offsets, bias) -> GroupedLinearProblem:
    """Validate and lower a call of `grouped_linear`."""
    xs, w, bias = _operands(xs=xs, w=w, bias=bias)
    if xs.dim() != 2:
        raise _checks.shape_error("xs", "(N, I)", "", xs)
    _check_weight("w", w, "E", "O", xs.shape[1], "xs")
    _check_bias("bias", bias, w, "w")
    return GroupedLinearProblem(xs, w, bias, _offsets(offsets, xs, w.shape[0]))


def _prepare_experts(xs, routing, w_gate_up, w_down, activation, b_gate_up, b_down) -> ExpertsProblem:
    """Validate and lower a call of `experts`."""
    xs, *layer = _operands(xs=xs, w_gate_up=w_gate_up, w_down=w_down, b_gate_up=b_gate_up, b_down=b_down)
    routing = checked_routing(routing, xs, "xs")
    check_rows("xs", xs, "N, H", routing.source.shape[0], "the rows of routing")
    number = _check_layer(xs, "xs", routing, *layer, activation)
    return ExpertsProblem(xs, *layer, routing.offsets, number)


def _prepare_forward(x, routing, w_gate_up, w_down, activation, b_gate_up, b_down) -> MoEProblem:
    """Validate and lower a call of `forward`."""
    x, *layer = _operands(x=x, w_gate_up=w_gate_up, w_down=w_down, b_gate_up=b_gate_up, b_down=b_down)
    routing = checked_routing(routing, x, "x")
    check_rows("x", x, "T, H", routing.position.shape[0], "the tokens of routing")
    number = _check_layer(x, "x", routing, *layer, activation)
    weights = routing.weights.to(acc_dtype(x.dtype))
    return MoEProblem(x, *layer, weights, routing.offsets, routing.source, routing.position, number)


def _operands(**named) -> tuple[Tensor | None, ...]:
    """The tensors after autocast, biases (b...) or None: of one floating dtype on one device, those of the first."""
    for name, value in named.items():
        if value is not None or not name.startswith("b"):
            _checks.floating(name, value)
    tensors = _checks.autocast(*named.values())
    first, like = tensors[0], next(iter(named))
    for name, value in zip(named, tensors, strict=True):
        if value is not None:
            _checks.same_dtype(name, value, first.dtype, like)
            _checks.same_device(name, value, first.device, like)
    return tensors


def _check_layer(xs: Tensor, name: str, routing: Routing, w_gate_up, w_down, b_gate_up, b_down, activation) -> int:
    """Weights and biases of the experts against xs and one another; returns the number of the activation."""
    number = EXPERT_ACTIVATIONS.index(_checks.one_of("activation", activation, EXPERT_ACTIVATIONS))
    count = routing.offsets.shape[0] - 1
    is_gated = number < len(ACTIVATIONS)
    _check_weight("w_gate_up", w_gate_up, count, "2I" if is_gated else "I", xs.shape[1], f"routing and {name}")
    width = w_gate_up.shape[1]
    if is_gated:
        if width % 2:
            expected = f"({count}, 2I, {xs.shape[1]})"
            raise _checks.shape_error("w_gate_up", expected, f"with activation={activation!r}", w_gate_up)
        width //= 2
    _check_weight("w_down", w_down, count, "J", width, "routing and w_gate_up")
    _check_bias("b_gate_up", b_gate_up, w_gate_up, "w_gate_up")
    _check_bias("b_down", b_down, w_down, "w_down")
    return number


def _check_weight(name: str, value: Tensor, count: int | str, rows: str, columns: int, why: str) -> None:
    """(count, any, columns); a name for count allows any number."""
    fits = value.dim() == 3 and value.shape[2] == columns and (isinstance(count, str) or value.shape[0] == count)
    if not fits:
        raise _checks.shape_error(name, f"({count}, {rows}, {columns})", f"to match {why}", value)


def _check_bias(name: str, bias: Tensor | None, weight: Tensor, weight_name: str) -> None:
    if bias is not None and bias.shape != weight.shape[:2]:
        raise _checks.shape_error(name, _checks.shape_text(weight.shape[:2]), f"to match {weight_name}", bias)


def _offsets(value, xs: Tensor, count: int) -> Tensor:
    """offsets as int32 (E + 1,); its contents are checked where that needs no device sync."""
    if _checks.integer("offsets", value).shape != (count + 1,):
        raise _checks.shape_error("offsets", f"({count + 1},)", "to match w", value)
    _checks.same_device("offsets", value, xs.device, "xs")
    if _checks.is_readable(value):
        offsets = value.tolist()
        if offsets[0] != 0 or offsets[-1] > xs.shape[0] or offsets != sorted(offsets):
            raise ValueError(f"offsets must rise from 0 to {xs.shape[0]}, the rows of xs, or less, got {offsets}")
    return value.to(torch.int32)


# --- The ops as torch sees them: fakes and derivatives ---


def _grouped_fake(xs, w, bias, offsets):
    return xs.new_empty((xs.shape[0], w.shape[1]))


def _experts_fake(xs, w_gate_up, w_down, b_gate_up, b_down, offsets, activation, save):
    rows = xs.shape[0]
    return xs.new_empty((rows, w_down.shape[1])), xs.new_empty((rows, w_gate_up.shape[1]) if save else (0,))


def _moe_fake(x, w_gate_up, w_down, b_gate_up, b_down, weights, offsets, source, position, activation, save):
    pre = x.new_empty((source.shape[0], w_gate_up.shape[1]) if save else (0,))
    return x.new_empty((x.shape[0], w_down.shape[1])), pre


def _fresh(x: Tensor, needed: bool, *shape: int) -> Tensor:
    return x.new_empty(shape if needed else (0,))


def _grouped_backward_fake(grad, xs, w, offsets, need_xs, need_w, need_bias):
    return _fresh(xs, need_xs, *xs.shape), _fresh(xs, need_w, *w.shape), _fresh(xs, need_bias, *w.shape[:2])


def _experts_backward_fake(
    grad, xs, pre, w_gate_up, w_down, offsets, activation, need_xs, need_gate_up, need_down, need_b_gate_up, need_b_down
):
    return (
        _fresh(xs, need_xs, *xs.shape),
        _fresh(xs, need_gate_up, *w_gate_up.shape),
        _fresh(xs, need_down, *w_down.shape),
        _fresh(xs, need_b_gate_up, *w_gate_up.shape[:2]),
        _fresh(xs, need_b_down, *w_down.shape[:2]),
    )


def _moe_backward_fake(
    grad, x, pre, w_gate_up, w_down, b_down, weights, offsets, source, position, activation, *needs
):  # fmt: skip
    grads = _experts_backward_fake(grad, x, pre, w_gate_up, w_down, offsets, activation, *needs[:5])
    return *grads, _fresh(weights, needs[5], *weights.shape)


class _GroupedLinear(torch.autograd.Function):
    """`moe_grouped_linear_forward` with its gradient; saves xs and w."""

    @staticmethod
    def forward(ctx, sibling, run, xs, w, bias, offsets):
        ctx.save_for_backward(xs, w, offsets)
        ctx.sibling = sibling
        return run(xs, w, bias, offsets)

    @staticmethod
    def backward(ctx, grad):
        needed = ctx.needs_input_grad[2:5]
        grads = ctx.sibling("moe_grouped_linear_backward")(grad, *ctx.saved_tensors, *needed)
        return None, None, *_register.wanted(grads, needed), None


class _Experts(torch.autograd.Function):
    """`moe_experts_forward` with its gradient; saves xs and the pre-activations (and weights and offsets)."""

    @staticmethod
    def forward(ctx, sibling, run, xs, w_gate_up, w_down, b_gate_up, b_down, offsets, activation, save):
        keep = save or any(ctx.needs_input_grad)
        out, pre = run(xs, w_gate_up, w_down, b_gate_up, b_down, offsets, activation, keep)
        ctx.save_for_backward(xs, pre, w_gate_up, w_down, offsets)
        ctx.sibling, ctx.activation = sibling, activation
        return _register.with_saved(ctx, out, pre, save)

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 10
        needed = ctx.needs_input_grad[2:7]
        grads = ctx.sibling("moe_experts_backward")(grad, *ctx.saved_tensors, ctx.activation, *needed)
        return None, None, *_register.wanted(grads, needed), None, None, None


class _MoE(torch.autograd.Function):
    """`moe_forward` with its gradient; saves x, the pre-activations and the routing (and weights and b_down)."""

    @staticmethod
    def forward(
        ctx, sibling, run, x, w_gate_up, w_down, b_gate_up, b_down, weights, offsets, source, position, activation, save
    ):
        keep, layer = save or any(ctx.needs_input_grad), (x, w_gate_up, w_down, b_gate_up, b_down)
        out, pre = run(*layer, weights, offsets, source, position, activation, keep)
        ctx.save_for_backward(x, pre, w_gate_up, w_down, b_down, weights, offsets, source, position)
        ctx.sibling, ctx.activation = sibling, activation
        return _register.with_saved(ctx, out, pre, save)

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 13
        needed = ctx.needs_input_grad[2:8]
        grads = ctx.sibling("moe_backward")(grad, *ctx.saved_tensors, ctx.activation, *needed)
        return None, None, *_register.wanted(grads, needed), *(None,) * 5


for _function, _prepare in (
    (grouped_linear, _prepare_grouped),
    (experts, _prepare_experts),
    (forward, _prepare_forward),
):
    _dispatch.register(_function, _prepare, ("cpu", "triton"), f"moe.{_function.__name__}")
if _native.module() is not None:
    _no_derivative = _register.once_differentiable("moe.grouped_linear, experts and forward")
    for _name, _fake, _autograd in (
        ("moe_grouped_linear_forward", _grouped_fake, _GroupedLinear.apply),
        ("moe_grouped_linear_backward", _grouped_backward_fake, _no_derivative),
        ("moe_experts_forward", _experts_fake, _Experts.apply),
        ("moe_experts_backward", _experts_backward_fake, _no_derivative),
        ("moe_forward", _moe_fake, _MoE.apply),
        ("moe_backward", _moe_backward_fake, _no_derivative),
    ):
        _register.register(_name, _fake, _autograd, "moe_experts")
