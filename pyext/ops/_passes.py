"""Masks that the kernels run part by part, on reordered positions (see `masks._parts`).

    lse = log sum_p exp(lse_p),  out = sum_p exp(lse_p - lse) out_p:

the parts are disjoint, so their softmax denominators add up. Backward needs no derivative of that merge: with the
probabilities P = exp(S - lse) of the whole, dS = P (dP - delta), delta = <dout, out> - dlse, holds for every pair of
query and key, so each part runs the ordinary backward with the out and lse of the whole, and the gradients add up.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._primitives import UNBOUNDED, AttentionProblem, Sizes, acc_dtype
from ..masks import Mask
from ..masks._parts import Order, Pass
from ..masks._tables import BlockTable
from . import _autograd, _register

#: Below so many queries gathering the keys costs more than the tiles it saves. The kernels for very few queries take
#: the lse of their own tiles in backward, so that it cannot become fewer than those (8).
LEAST_QUERIES = 256
_CHUNK = 2**18  # elements that are merged at a time, so that they stay in the cache


class Reordered(NamedTuple):
    """A mask as passes, and as itself for a backend that does not reorder."""

    passes: tuple[Pass, ...]
    mask: Mask
    sizes: Sizes

    def tables(self) -> list[BlockTable]:
        """The tables of blocks in the passes."""
        found = (limits.table for step in self.passes for limits in step.limits)
        return [table for table in found if table is not None]

    def masked(self, problem: AttentionProblem) -> AttentionProblem:
        """The problem, made without this mask, with it."""
        lowered = self.mask.lower(self.sizes)
        return problem._replace(**{**lowered._asdict(), "right": min(lowered.right, problem.right)})


def reordered(mask: Mask, sizes: Sizes, right: int = UNBOUNDED) -> Reordered | None:
    """The passes that compute a call with this mask, without bias and dropout; None where the flat problem is the way.

    Args:
        right: the largest visible distance, besides the mask.
    """
    if not mask.reorders or sizes.queries < LEAST_QUERIES or sizes.keys == 0:
        return None
    passes = mask.passes(sizes, right)
    return None if passes is None else Reordered(passes, mask, sizes)


def attend(problem: AttentionProblem, passes: tuple[Pass, ...], backend: str) -> tuple[Tensor, Tensor]:
    """out and lse of `problem` under the mask that the passes make up."""
    return _Attend.apply(backend, passes, problem.scale, problem.softcap, *problem[:3], problem.sinks)


class _Attend(torch.autograd.Function):
    """All passes; saves the inputs, out and lse."""

    @staticmethod
    def forward(ctx, backend, passes, scale, softcap, query, key, value, sinks):
        problem = AttentionProblem(query, key, value, sinks=sinks, scale=scale, softcap=softcap)
        outs, lses = [], []
        for part, step in _parts(problem, passes):
            out, lse = _register.call(backend, "attention_forward", part)
            back = _inverse(step.queries)
            outs.append(_reordered(out, back))
            lses.append(_reordered(lse[..., None], back)[..., 0])
        out, lse = (outs[0], lses[0]) if len(outs) == 1 else _merged(outs, lses)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.passes, ctx.scale, ctx.softcap = backend, passes, scale, softcap
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        query, key, value, sinks, out, lse = ctx.saved_tensors
        if grad_out is None:
            if grad_lse is None:
                return (None,) * 8
            grad_out = torch.zeros_like(out)
        problem = AttentionProblem(query, key, value, sinks=sinks, scale=ctx.scale, softcap=ctx.softcap)
        total, grad_sinks = None, None
        for step in ctx.passes:
            outer = [_reordered(x, step.queries) for x in (grad_out, out)]
            rows = [None if x is None else _reordered(x[..., None], step.queries)[..., 0] for x in (grad_lse, lse)]
            grads = None
            for part, _ in _parts(problem, (step,)):
                unneeded = (False for _ in _autograd.OPTIONAL_GRADIENTS)
                arguments = (outer[0], rows[0], *part[:3], outer[1], rows[1], *part[3:], *unneeded)
                found = _register.call(ctx.backend, "attention_backward", arguments)
                named = dict(zip(_autograd.GRADIENTS, found, strict=True))
                grads = _sum(grads, [named[name] for name in ("query", "key", "value")])
                grad_sinks = named["sinks"] if grad_sinks is None else grad_sinks
            orders = (step.queries, step.keys, step.keys)
            total = _sum(total, [_reordered(x, _inverse(order)) for x, order in zip(grads, orders, strict=True)])
            problem = problem._replace(sinks=None)
        need = ctx.needs_input_grad[4:]
        found = (*total, grad_sinks)
        return None, None, None, None, *(grad if needed else None for grad, needed in zip(found, need, strict=True))


def _parts(problem: AttentionProblem, passes: tuple[Pass, ...]) -> Iterator[tuple[AttentionProblem, Pass]]:
    """The problem of each part. The sinks, one more logit per row, are with the first."""
    for step in passes:
        query = _reordered(problem.query, step.queries)
        key, value = (_reordered(x, step.keys) for x in (problem.key, problem.value))
        for limits in step.limits:
            yield problem._replace(query=query, key=key, value=value, **limits._asdict()), step
            problem = problem._replace(sinks=None)


def _sum(total: list[Tensor] | None, more: list[Tensor]) -> list[Tensor]:
    return more if total is None else [a + b for a, b in zip(total, more, strict=True)]


def _merged(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    top = functools.reduce(torch.maximum, lses)
    top = top.masked_fill(top == -torch.inf, 0.0)  # no part sees a key
    weights = [torch.exp(lse - top) for lse in lses]
    total = sum(weights[1:], weights[0])
    lse = top + torch.log(total)
    dtype = acc_dtype(outs[0].dtype)
    total = total.masked_fill(total == 0, 1.0)
    weights = [(weight / total).to(dtype)[..., None] for weight in weights]
    if torch.compiler.is_compiling():  # which fuses this itself
        return _weighted(outs, weights).to(outs[0].dtype), lse
    out = torch.empty_like(outs[0])
    length = out.shape[2]
    step = max(1, _CHUNK * length // max(out.numel(), 1))
    for begin in range(0, length, step):
        rows = slice(begin, begin + step)
        out[:, :, rows] = _weighted([x[:, :, rows] for x in outs], [x[:, :, rows] for x in weights])
    return out, lse


def _weighted(outs: list[Tensor], weights: list[Tensor]) -> Tensor:
    """sum_p weights[p] outs[p] in the dtype of the weights."""
    result = outs[0].to(weights[0].dtype) * weights[0]
    for out, weight in zip(outs[1:], weights[1:], strict=True):
        result = torch.addcmul(result, out.to(weight.dtype), weight)
    return result


def _inverse(order: Order | None) -> Order | None:
    return None if order is None else Order(order.inverse, order.forward)


def _reordered(x: Tensor, order: Order | None) -> Tensor:
    """x (B, H, L, D) with its positions in another order, laid out as (B, L, H, D); None: as it is."""
    if order is None:
        return x
    x, forward = x.transpose(1, 2), order.forward
    if forward.shape[0] == 1:
        return x.index_select(1, forward[0]).transpose(1, 2)
    return x.gather(1, forward[:, :, None, None].expand_as(x)).transpose(1, 2)
