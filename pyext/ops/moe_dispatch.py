"""`moe.dispatch`, `moe.combine`: validate, lower, choose a backend, call it.

The derivative of the op `moe_dispatch_forward` (csrc/moe_dispatch.cpp) is `moe_combine_forward` without weights; that
of combine is `moe_combine_backward`; and the derivatives of this one, which is bilinear in grad and (ys, weights), are
these two again. So derivatives of every order are right.
"""

import torch
from torch import Tensor

from .. import _checks, _dispatch, _native
from .._primitives import CombineProblem, DispatchProblem, Routing, acc_dtype
from ..reference import moe_dispatch as _reference
from . import _register


def dispatch(x: Tensor, routing: Routing, *, impl: str = "auto") -> Tensor:
    """xs[n] = x[routing.source[n]], 0 in rows that no choice uses: the tokens of each expert side by side.

    Args:
        x: (T, H). float32, bfloat16, float16 or float64; any strides.
        routing: what `route` returned.
        impl: "auto", "reference", "cpu", "triton" or "cuda"; see `pyext.explain`.
    Returns:
        (N, H) in x's dtype, rows sorted by expert, then by token. Differentiable: a token's gradient is the sum over
        its rows, taken in fp32 (fp64 for fp64) and rounded once.
    Raises:
        TypeError, ValueError naming the argument; NotImplementedError if the forced backend refuses the call.
    Source: Shazeer et al., "Outrageously large neural networks" (2017), section 3.
    """
    problem = _prepare_dispatch(x, routing)
    backend = _dispatch.choose("moe.dispatch", impl, problem)
    if backend == "reference":
        return _reference.dispatch(problem)
    return _register.call(backend, "moe_dispatch_forward", problem)


def combine(ys: Tensor, routing: Routing, *, impl: str = "auto") -> Tensor:
    """out[t] = sum_k routing.weights[t, k] ys[routing.position[t, k]]; a token without a row gets 0.

    Args:
        ys: (N, J), rows as `dispatch` orders them. float32, bfloat16, float16 or float64; any strides.
        routing: what `route` returned.
        impl: "auto", "reference", "cpu", "triton" or "cuda"; see `pyext.explain`.
    Returns:
        (T, J) in the dtype of ys; the sum is taken in fp32 (fp64 for fp64), in the order of k. Differentiable with
        respect to ys and the weights.
    Raises:
        TypeError, ValueError naming the argument; NotImplementedError if the forced backend refuses the call.
    Source: Shazeer et al., "Outrageously large neural networks" (2017), eq. 1.
    """
    problem = _prepare_combine(ys, routing)
    backend = _dispatch.choose("moe.combine", impl, problem)
    if backend == "reference":
        return _reference.combine(problem)
    return _register.call(backend, "moe_combine_forward", problem)


def _prepare_dispatch(x, routing) -> DispatchProblem:
    """Validate and lower a call of `dispatch`."""
    routing = checked_routing(routing, x, "x")
    check_rows("x", x, "T, H", routing.position.shape[0], "the tokens of routing")
    return DispatchProblem(x, routing.source, routing.position)


def _prepare_combine(ys, routing) -> CombineProblem:
    """Validate and lower a call of `combine`."""
    routing = checked_routing(routing, ys, "ys")
    check_rows("ys", ys, "N, J", routing.source.shape[0], "the rows of routing")
    return CombineProblem(ys, routing.weights.to(acc_dtype(ys.dtype)), routing.position)


def checked_routing(value, like: Tensor, name: str) -> Routing:
    """A `Routing` whose tensors fit one another, on the device of `like`; its maps in int32."""
    if not isinstance(value, Routing):
        raise TypeError(f"routing must be a pyext.moe.Routing, got {type(value).__name__}")
    _checks.floating(name, like)
    weights = _checks.floating("routing.weights", value.weights)
    if weights.dim() != 2:
        raise _checks.shape_error("routing.weights", "(T, K)", "", weights)
    maps = {
        name: _checks.integer(f"routing.{name}", getattr(value, name)) for name in ("offsets", "source", "position")
    }
    if maps["position"].shape != weights.shape:
        expected = _checks.shape_text(weights.shape)
        raise _checks.shape_error("routing.position", expected, "to match routing.weights", maps["position"])
    for key, expected in (("offsets", "(E + 1,)"), ("source", "(N,)")):
        if maps[key].dim() != 1 or (key == "offsets" and maps[key].shape[0] == 0):
            raise _checks.shape_error(f"routing.{key}", expected, "", maps[key])
    for key, tensor in (("weights", weights), *maps.items()):
        _checks.same_device(f"routing.{key}", tensor, like.device, name)
    return value._replace(**{key: tensor.to(torch.int32) for key, tensor in maps.items()})


def check_rows(name: str, value: Tensor, sizes: str, rows: int, why: str) -> None:
    """A matrix of that many rows; `sizes` names both sizes."""
    if value.dim() != 2 or value.shape[0] != rows:
        expected = f"({rows}, {sizes.partition(', ')[2]})"
        raise _checks.shape_error(name, expected, f"to match {why}", value)


# --- The ops as torch sees them: fakes and derivatives ---


def _dispatch_fake(x, source, position):
    return x.new_empty((source.shape[0], x.shape[1]))


def _combine_fake(ys, weights, position):
    return ys.new_empty((position.shape[0], ys.shape[1]))


def _combine_backward_fake(grad, ys, weights, position, need_ys, need_weights):
    dweights = ys.new_empty(position.shape if need_weights else (0,), dtype=acc_dtype(ys.dtype))
    return ys.new_empty(ys.shape if need_ys else (0,)), dweights


class _Dispatch(torch.autograd.Function):
    """`moe_dispatch_forward` with its gradient. Saves the positions only."""

    @staticmethod
    def forward(ctx, sibling, run, x, source, position):
        ctx.save_for_backward(position)
        ctx.sibling = sibling
        return run(x, source, position)

    @staticmethod
    def backward(ctx, grad):
        (position,) = ctx.saved_tensors
        return None, None, ctx.sibling("moe_combine_forward")(grad, None, position), None, None


class _Combine(torch.autograd.Function):
    """`moe_combine_forward` with its gradient. Saves its inputs."""

    @staticmethod
    def forward(ctx, sibling, run, ys, weights, position):
        ctx.save_for_backward(ys, weights, position)
        ctx.sibling = sibling
        return run(ys, weights, position)

    @staticmethod
    def backward(ctx, grad):
        need_ys, need_weights = ctx.needs_input_grad[2:4]
        grads = ctx.sibling("moe_combine_backward")(grad, *ctx.saved_tensors, need_ys, need_weights)
        return None, None, grads[0] if need_ys else None, grads[1] if need_weights else None, None


class _CombineBackward(torch.autograd.Function):
    """`moe_combine_backward` with its gradient: dys = weights grad and dweights = <grad, ys>, row by row."""

    @staticmethod
    def forward(ctx, sibling, run, grad, ys, weights, position, need_ys, need_weights):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, ys, weights, position)
        ctx.sibling, ctx.found = sibling, (need_ys, need_weights)
        return run(grad, ys, weights, position, need_ys, need_weights)

    @staticmethod
    def backward(ctx, of_dys, of_dweights):
        grad, ys, weights, position = ctx.saved_tensors
        # What was not asked for is an empty tensor, whatever its gradient.
        of_dys, of_dweights = (
            of if found else None for of, found in zip((of_dys, of_dweights), ctx.found, strict=True)
        )
        need_grad, need_ys, need_weights = ctx.needs_input_grad[2:5]
        combine, backward = ctx.sibling("moe_combine_forward"), ctx.sibling("moe_combine_backward")
        to_grad = to_ys = to_weights = None
        if need_grad:
            parts = (of_dys, weights), (ys, of_dweights)
            sums = [
                combine(*part, position)
                for part, of in zip(parts, (of_dys, of_dweights), strict=True)
                if of is not None
            ]
            to_grad = sum(sums[1:], sums[0]) if sums else None
        if need_ys and of_dweights is not None:
            to_ys = backward(grad, ys, of_dweights, position, True, False)[0]
        if need_weights and of_dys is not None:
            to_weights = backward(grad, of_dys, weights, position, False, True)[1]
        return None, None, to_grad, to_ys, to_weights, None, None, None


for _function, _prepare in ((dispatch, _prepare_dispatch), (combine, _prepare_combine)):
    _dispatch.register(_function, _prepare, ("cuda", "cpu", "triton"), f"moe.{_function.__name__}")
if _native.module() is not None:
    _register.register("moe_dispatch_forward", _dispatch_fake, _Dispatch.apply, "moe_dispatch")
    _register.register("moe_combine_forward", _combine_fake, _Combine.apply, "moe_dispatch")
    _register.register("moe_combine_backward", _combine_backward_fake, _CombineBackward.apply, "moe_dispatch")
