"""Masks that are run part by part, on reordered positions, and merged by LSE (see `masks._parts`)."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._primitives import AttentionProblem, Sizes, acc_dtype
from ..masks._parts import Order, Pass

#: Below so many queries gathering the keys costs more than the tiles it saves.
LEAST_QUERIES = 256


def of(mask, sizes: Sizes, right: int, dropout_p: float) -> tuple[Pass, ...] | None:
    """The passes that compute a call with this mask and no bias exactly, or None where the flat problem is the way."""
    if mask is None or not mask.reorders or dropout_p or sizes.queries < LEAST_QUERIES or sizes.keys == 0:
        return None
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return None
    return mask.passes(sizes, right)


def attend(problem: AttentionProblem, passes: tuple[Pass, ...], run: Callable) -> tuple[Tensor, Tensor]:
    """out and lse of `problem` under the mask that the passes make up; run(problem) computes one pass.

    out = sum_p exp(lse_p - lse) out_p, lse = log sum_p exp(lse_p): the parts are disjoint. The sinks, one more logit
    per row, take part in the first pass.
    """
    outs, lses = [], []
    for n, step in enumerate(passes):
        query, key, value = problem.query, problem.key, problem.value
        if step.queries is not None:
            query = _reordered(query, step.queries)
            key, value = _reordered(key, step.keys), _reordered(value, step.keys)
        sinks = problem.sinks if n == 0 else None
        part = problem._replace(query=query, key=key, value=value, sinks=sinks, **step.limits._asdict())
        out, lse = run(part)
        if step.queries is not None:
            back = Order(step.queries.inverse, step.queries.forward)
            out, lse = _reordered(out, back), _reordered(lse[..., None], back)[..., 0]
        outs.append(out)
        lses.append(lse)
    return (outs[0], lses[0]) if len(outs) == 1 else _merged(outs, lses, acc_dtype(problem.query.dtype))


def _merged(outs: list[Tensor], lses: list[Tensor], acc: torch.dtype) -> tuple[Tensor, Tensor]:
    # The maximum cancels, so it takes no part in differentiation. Where no part sees a key it is -inf: 0 stands in.
    top = functools.reduce(torch.maximum, [lse.detach() for lse in lses])
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = [torch.exp(lse - top) for lse in lses]
    total = sum(weights)
    unseen = total == 0
    total = total.masked_fill(unseen, 1.0)
    lse = (top + torch.log(total)).masked_fill(unseen, -torch.inf)
    out = sum((weight / total).to(acc)[..., None] * part for weight, part in zip(weights, outs, strict=True))
    return out.to(outs[0].dtype), lse


class _Reorder(torch.autograd.Function):
    """x (B, L, H, D) with its positions in another order.

    Its gradient is a selection too; those of index_select and gather add row by row, in no fixed order on a GPU.
    """

    @staticmethod
    def forward(ctx, x, forward, inverse):
        ctx.save_for_backward(forward, inverse)
        if forward.shape[0] == 1:
            return x.index_select(1, forward[0])
        return x.gather(1, forward[:, :, None, None].expand_as(x))

    @staticmethod
    def backward(ctx, grad):
        forward, inverse = ctx.saved_tensors
        return _Reorder.apply(grad, inverse, forward), None, None


def _reordered(x: Tensor, order: Order) -> Tensor:
    """x (B, H, L, D), laid out as (B, L, H, D) afterwards."""
    return _Reorder.apply(x.transpose(1, 2), *order).transpose(1, 2)
