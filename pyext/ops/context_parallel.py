"""`context_parallel_attention`: each process holds a part of the sequence, keys and values travel around a ring.

    lse = log sum_p exp(lse_p),  out = sum_p exp(lse_p - lse) out_p

over the parts p of the keys. Backward sends keys and values around once more, with their gradients behind them, and
computes each part again: with w_p = exp(lse_p - lse), delta = <dout, out> - dlse,

    dout_p = w_p dout,  dlse_p = w_p (<dout, out_p> - delta).

Source: Liu et al., "Ring attention with blockwise transformers for near-infinite context" (2023), section 3; why causal
masks need another layout: Brandon et al., "Striped attention" (2023), section 3, which cuts finer.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _checks, _dispatch
from .. import bias as _bias
from .. import masks as _masks
from .._primitives import UNBOUNDED, AttentionProblem, Sizes, acc_dtype
from ..bias._relative import TransformerXL
from ..masks import Mask
from ..masks._base import Lowered, once
from . import _register
from ._collectives import place as _place
from ._shapes import four_dims
from .attention import _as_mask, _factors, _inputs, _lower, attend

# What may need a gradient, besides key and value. `query` and `rel_query` are this process' rows; the others are those
# of the whole sequence.
_LEAVES = ("query", "dense", "diag", "rel_query", "rel_q", "rel_k", "segment", "sinks")


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: "dist.ProcessGroup | None" = None,
    balanced: bool = True,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    bias: _bias.Bias | None = None,
    mask: _masks.Mask | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`pyext.attention` over a sequence of which every process of a group holds an equal part.

    Memory is that of the parts; what travels is keys and values, and in backward their gradients. All processes must
    make the same calls in the same order, backward calls included.

    Args:
        query: (B, Hq, Lq / R, D), this process' part for R processes, as `shard_sequence` cuts it.
        key, value: (B, Hkv, Lk / R, D), (B, Hkv, Lk / R, Dv), cut likewise.
        group: the processes; None = all.
        balanced: each process holds one piece of the first half of the sequence and its mirror image of the second, so
            that causal masks leave all the same work; else one range. Lq / R and Lk / R must then be even.
        bias, mask: as for the whole sequence, the same on each process: a `masks.padding` has the whole lengths, a
            `bias.dense` is broadcastable to (B, Hq, Lq, Lk). The gradients of their tensors and of `sinks` are this
            process' share: sum them over the group, as those of all parameters.
        is_causal, scale, enable_gqa, softcap, sinks, return_lse: as in `pyext.attention`.
        impl: "auto", "reference", "cpu", "triton" or "cuda"; see `pyext.explain`.
    Returns:
        out (B, Hq, Lq / R, Dv), this process' part; with `return_lse` also lse (B, Hq, Lq / R). Differentiable once.
    Raises:
        TypeError, ValueError naming the argument; NotImplementedError if the forced backend refuses the call.
    Source: see above.
    """
    query, key, value = _inputs(("query", "key", "value"), query, key, value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise _checks.shape_error(name, "(B, H, L, D)", "with four dimensions", tensor)
    query, key, value, *_ = four_dims(query, key, value, _checks.flag("enable_gqa", enable_gqa))
    ranks, rank = _place(group)
    balanced = _checks.flag("balanced", balanced)
    queries, keys = (_Layout(ranks, x.shape[2], balanced) for x in (query, key))
    queries.check("query", query), keys.check("key", key)
    scale, softcap = _factors(scale, softcap, query.shape[3])
    batch, heads, acc = query.shape[0], query.shape[1], acc_dtype(query.dtype)
    sizes = Sizes((batch,), heads, queries.total, keys.total, query.device, acc)
    right = queries.total - keys.total if _checks.flag("is_causal", is_causal) else UNBOUNDED
    if softcap and any(isinstance(term, TransformerXL) and term.u is not None for term in _terms(bias)):
        raise ValueError("softcap must be None beside bias.transformer_xl with u, which reads all keys, got a number")
    fields = _lower(bias, None, sinks, right, sizes, (query, key, scale, softcap))
    mask = _as_mask(mask)
    if mask is not None:
        limits = mask.lower(sizes)
        if limits.is_range:
            fields.update(left=limits.left, right=min(right, limits.right), intervals=limits.intervals)
            mask = None
    fields = {"query": query, "key": key, "value": value, "scale": scale, "softcap": softcap, **fields}
    problem = AttentionProblem(**fields)
    # Of a mask that is no range the parts have tables of blocks.
    asked = problem if mask is None else problem._replace(block_offsets=query.new_empty(0, dtype=torch.int32))
    backend = _dispatch.choose("attention", impl, asked)
    bare = problem._replace(**dict.fromkeys((*_LEAVES, "key", "value")))  # what autograd saves is not kept twice
    ring = _Ring(group, rank, queries, keys, sizes, None, backend, bare)
    if mask is not None:
        areas = tuple(area for source in range(ranks) for _, _, area in ring.areas(source))
        ring = ring._replace(tables=once(_tables, mask, sizes, areas))
    out, lse = _Attend.apply(ring, key, value, *(getattr(problem, name) for name in _LEAVES))
    return (out, lse) if _checks.flag("return_lse", return_lse) else out


def shard_sequence(
    x: Tensor, dim: int = -2, *, group: "dist.ProcessGroup | None" = None, balanced: bool = True
) -> Tensor:
    """This process' part of a sequence along one dimension, as `context_parallel_attention` wants it.

    Of `torch.arange(L)` with dim=0 it is the positions of the part, which `pyext.rotary` takes.

    Args:
        x: any tensor whose size along `dim` the number of processes divides, with `balanced` twice that number.
        group, balanced: as there.
    Returns:
        a view where the part is one range, else a copy.
    Raises:
        TypeError, ValueError naming the argument.
    """
    ranks, rank = _place(group)
    length = _checks.tensor("x", x).shape[_checks.whole("dim", dim)]
    pieces = ranks * (2 if _checks.flag("balanced", balanced) else 1)
    if length % pieces != 0:
        raise ValueError(f"x must have a multiple of {pieces} positions along dim {dim}, got {length}")
    parts = [x.narrow(dim, first, count) for _, first, count in _Layout(ranks, length // ranks, balanced).pieces(rank)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _terms(bias) -> tuple:
    return bias.terms() if isinstance(bias, _bias.Bias) else ()


class _Layout(NamedTuple):
    """Which positions of a sequence each process holds."""

    ranks: int
    length: int  # of one process' part
    balanced: bool

    @property
    def total(self) -> int:
        return self.ranks * self.length

    def pieces(self, rank: int) -> list[tuple[int, int, int]]:
        """(first row in the part, first position in the sequence, count) of what process `rank` holds."""
        if not self.balanced:
            return [(0, rank * self.length, self.length)]
        half = self.length // 2
        return [(0, rank * half, half), (half, (2 * self.ranks - 1 - rank) * half, half)]

    def check(self, name: str, tensor: Tensor) -> None:
        if self.balanced and self.length % 2:
            raise _checks.shape_error(name, "(B, H, L, D) with L even", "for balanced=True", tensor)


class _Ring(NamedTuple):
    """A call: what every part of it has in common."""

    group: "dist.ProcessGroup | None"
    rank: int
    queries: _Layout
    keys: _Layout
    sizes: Sizes  # of the whole sequence
    tables: "dict[_Area, Lowered] | None"  # the mask where it is more than a range, which the problem holds
    backend: str
    problem: AttentionProblem  # of the whole sequence, without key, value and _LEAVES

    def areas(self, source: int) -> Iterator[tuple[int, int, "_Area"]]:
        """(first row here, first row there, area) of each pair of a piece of queries here and of keys of `source`.

        Left out are pairs that a window leaves empty, but not those of a piece and the keys of its own place.
        """
        for n, (row, query_at, rows) in enumerate(self.queries.pieces(self.rank)):
            for m, (column, key_at, columns) in enumerate(self.keys.pieces(source)):
                own = source == self.rank and m == n
                area = _Area(query_at, rows, key_at, columns, own)
                if own or area.reachable(self.problem, self.sizes):
                    yield row, column, area

    def parts(
        self, problem: AttentionProblem, key: Tensor, value: Tensor, source: int
    ) -> Iterator[tuple[slice, AttentionProblem]]:
        """The rows of this process and the problem of each part that meets the keys of `source`."""
        for row, column, area in self.areas(source):
            rows = slice(row, row + area.rows)
            fields = area.cut(problem, rows, self.sizes)
            fields["key"], fields["value"] = (x.narrow(2, column, area.columns) for x in (key, value))
            if self.tables is not None:
                fields.update(self.tables[area].meet(Lowered(fields["left"], fields["right"]))._asdict())
            yield rows, problem._replace(**fields)


class _Area(NamedTuple):
    """Some queries and some keys of a whole sequence."""

    query_at: int
    rows: int
    key_at: int
    columns: int
    own: bool  # both are at the same place in their sequences; these areas, which have all queries, take the sinks

    def shift(self, sizes: Sizes) -> int:
        """The distance in the whole sequence, less the distance within the area."""
        return self.key_at - self.query_at + (self.columns - self.rows) - (sizes.keys - sizes.queries)

    def window(self, problem: AttentionProblem, sizes: Sizes) -> tuple[int, int]:
        """left and right of the whole sequence, as distances within the area."""
        shift = self.shift(sizes)
        return problem.left + shift, problem.right - shift

    def reachable(self, problem: AttentionProblem, sizes: Sizes) -> bool:
        """Whether the window lets any query see any key."""
        left, right = self.window(problem, sizes)
        return right >= 1 - self.columns and -left <= self.rows - 1

    def cut(self, problem: AttentionProblem, own: slice, sizes: Sizes) -> dict:
        """The fields of the problem that depend on positions; `own` are the queries among this process' rows."""
        queries, keys = slice(self.query_at, self.query_at + self.rows), slice(self.key_at, self.key_at + self.columns)
        begin = self.shift(sizes) + sizes.keys - self.columns  # of the area's strip in the whole one
        strip = slice(begin, begin + max(self.rows + self.columns - 1, 0))
        left, right = self.window(problem, sizes)
        fields = {
            "query": problem.query[:, :, own],
            "sinks": problem.sinks if self.own else None,
            "left": left if left < self.columns - 1 else UNBOUNDED,
            "right": right if right < self.rows - 1 else UNBOUNDED,
        }
        if problem.dense is not None:
            dense = problem.dense if problem.dense.shape[2] == 1 else problem.dense[:, :, queries]
            fields["dense"] = dense[..., keys]
        if problem.diag_index is not None:
            fields["diag_index"] = problem.diag_index[strip]
        elif problem.diag is not None:
            fields["diag"] = problem.diag[:, strip]
        if problem.rel_index is not None:
            fields["rel_index"] = problem.rel_index[strip]
        if problem.rel_query is not None:
            fields["rel_query"] = problem.rel_query[:, :, own]
        if problem.segment is not None:
            fields["segment"] = problem.segment[:, :, queries]
            fields["segment_q"], fields["segment_k"] = problem.segment_q[:, queries], problem.segment_k[:, keys]
        if problem.intervals is not None:
            fields["intervals"] = (problem.intervals[:, queries] - self.key_at).clamp(0, self.columns)
        return fields


@dataclass(frozen=True, eq=False)
class _Part(Mask):
    """A mask on an area of its sequence."""

    mask: Mask
    area: _Area
    whole: Sizes

    def visible(self, b, h, i, j, sizes):
        return self.mask.visible(b, h, i + self.area.query_at, j + self.area.key_at, self.whole)


def _tables(mask: Mask, sizes: Sizes, areas: tuple[_Area, ...]) -> dict[_Area, Lowered]:
    """A mask that is no range, on each area."""
    local = (sizes._replace(queries=area.rows, keys=area.columns) for area in areas)
    return {area: _Part(mask, area, sizes).lower(part) for area, part in zip(areas, local, strict=True)}


class _Attend(torch.autograd.Function):
    """All parts; saves the inputs, out and lse."""

    @staticmethod
    def forward(ctx, ring: _Ring, key: Tensor, value: Tensor, *leaves: Tensor | None):
        problem = ring.problem._replace(**dict(zip(_LEAVES, leaves, strict=True)))
        query, acc = problem.query, acc_dtype(problem.query.dtype)
        out = query.new_zeros((*query.shape[:3], value.shape[3]), dtype=acc)
        lse = query.new_full(query.shape[:3], -torch.inf, dtype=acc)
        for source, (k, v) in _around(ring.group, (key, value)):
            for rows, part in ring.parts(problem, k, v, source):
                part_out, part_lse = attend(part, ring.backend)
                both = torch.logaddexp(lse[:, :, rows], part_lse.to(acc))
                kept, added = _weight(lse[:, :, rows], both), _weight(part_lse.to(acc), both)
                out[:, :, rows] = kept[..., None] * out[:, :, rows] + added[..., None] * part_out.to(acc)
                lse[:, :, rows] = both
        out = out.to(query.dtype)
        ctx.ring = ring
        ctx.save_for_backward(key, value, out, lse, *leaves)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out: Tensor, grad_lse: Tensor):
        run = functools.partial(_gradients, ctx.ring, ctx.needs_input_grad[1:])
        return None, *_once(None, run, grad_out, grad_lse, *ctx.saved_tensors)


_once = _register.once_differentiable(
    "distributed.context_parallel_attention", "there is no second derivative (double backward)"
)


def _gradients(ring: _Ring, needed, grad_out, grad_lse, key, value, out, lse, *leaves) -> tuple[Tensor | None, ...]:
    """The gradients of key, value and leaves: all parts once more."""
    acc, need_kv = lse.dtype, any(needed[:2])
    leaves = [x if x is None else x.detach().requires_grad_(n) for x, n in zip(leaves, needed[2:], strict=True)]
    problem = ring.problem._replace(**dict(zip(_LEAVES, leaves, strict=True)))
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    sums = [torch.zeros_like(x, dtype=acc) for x in wanted]
    sums_kv = [torch.zeros_like(x, dtype=acc) for x in (key, value)]
    grad_out = grad_out.to(acc)
    delta = (grad_out * out.to(acc)).sum(-1) - grad_lse
    for source, kv in _around(ring.group, (key, value)):
        kv = [x.detach().requires_grad_(need_kv) for x in kv]
        inputs, totals = [*wanted, *(kv if need_kv else [])], [*sums, *sums_kv]
        with torch.enable_grad():
            parts = [(rows, attend(part, ring.backend)) for rows, part in ring.parts(problem, *kv, source)]
        for rows, results in parts:
            grads = _part_gradients(results, inputs, grad_out[:, :, rows], lse[:, :, rows], delta[:, :, rows])
            for total, grad in zip(totals, grads, strict=False):
                if grad is not None:
                    total += grad
        if need_kv:
            sums_kv = _sent(ring.group, sums_kv, tag=1)()
    found = iter(sums)
    grads = [None if x is None or not x.requires_grad else next(found).to(x.dtype) for x in leaves]
    return *(x.to(key.dtype) if need_kv else None for x in sums_kv), *grads


def _part_gradients(results, inputs, grad_out, lse, delta) -> tuple[Tensor | None, ...]:
    """The gradients of one part, whose out and lse `results` are, to the inputs; the rest is that of the whole."""
    out, part_lse = results
    if not out.requires_grad:
        return (None,) * len(inputs)
    weight = _weight(part_lse.to(lse.dtype), lse)
    grad_lse = weight * ((grad_out * out.to(lse.dtype)).sum(-1) - delta)
    grads = (weight[..., None] * grad_out).to(out.dtype), grad_lse.to(part_lse.dtype)
    return torch.autograd.grad(results, inputs, grads, allow_unused=True)


def _weight(lse: Tensor, whole: Tensor) -> Tensor:
    """exp(lse - whole), the share of a part; 0 for a query that sees nothing."""
    return torch.exp(lse - whole.masked_fill(whole == -torch.inf, 0.0))


# --- The ring ---


def _around(group, tensors: tuple[Tensor, ...]) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """(process, its tensors) for all processes of the group, this one first; the next are under way meanwhile."""
    ranks, rank = _place(group)
    for step in range(ranks):
        arrive = _sent(group, tensors, tag=0) if step + 1 < ranks else None
        yield (rank - step) % ranks, tensors
        if arrive is not None:
            tensors = arrive()


def _sent(group, tensors, tag: int) -> Callable[[], tuple[Tensor, ...]]:
    """Send tensors to the next process; returns what waits for those of the process before, of the same shapes."""
    ranks, rank = _place(group)
    if ranks == 1:
        return lambda: tuple(tensors)
    # As bytes in one message: a backend need not know the dtype.
    packed = torch.cat([x.contiguous().view(-1).view(torch.uint8) for x in tensors])
    received = torch.empty_like(packed)
    peers = [rank + 1, rank - 1]
    if group is not None:
        peers = [dist.get_global_rank(group, peer % ranks) for peer in peers]
    after, before = (peer % dist.get_world_size() for peer in peers)
    transfers = [
        dist.P2POp(dist.isend, packed, after, group, tag),
        dist.P2POp(dist.irecv, received, before, group, tag),
    ]
    works = dist.batch_isend_irecv(transfers)

    def arrive() -> tuple[Tensor, ...]:
        for work in works:
            work.wait()
        parts = received.split([x.numel() * x.element_size() for x in tensors])
        return tuple(part.view(x.dtype).view(x.shape) for part, x in zip(parts, tensors, strict=True))

    return arrive
