"""Masks of one range of keys per query (a window, or intervals), and dense ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks
from .._primitives import UNBOUNDED, Sizes
from . import _tables
from ._base import Lowered, Mask, not_packed


@dataclass(frozen=True)
class Window(Mask):
    """See `window` and `causal`."""

    label = "masks.window"
    closed = True
    left: int | None
    right: int | None

    def __post_init__(self):
        for name, value in (("left", self.left), ("right", self.right)):
            if value is not None:
                _checks.length(f"masks.window {name}", value, " or None (unbounded)")

    def visible(self, b, h, i, j, sizes):
        i = i + (sizes.keys - sizes.queries)
        low, high = self._limits()
        return (j >= i - low) & (j <= i + high)  # rather than their difference, which takes Lq x Lk integers

    def lower(self, sizes):
        return Lowered(*self._limits())

    def kinds(self, sizes):
        return _tables.differences(sizes)

    def _limits(self):
        return (UNBOUNDED if self.left is None else self.left, UNBOUNDED if self.right is None else self.right)


@dataclass(frozen=True, eq=False)
class Padding(Mask):
    """See `padding`."""

    label = "masks.padding"
    key_lengths: Tensor
    query_lengths: Tensor | None = None

    def __post_init__(self):
        _vector("masks.padding key_lengths", self.key_lengths)
        if self.query_lengths is not None:
            _vector("masks.padding query_lengths", self.query_lengths)

    def visible(self, b, h, i, j, sizes):
        inside = j < self.key_lengths[b]
        return inside if self.query_lengths is None else inside & (i < self.query_lengths[b])

    def lower(self, sizes):
        if sizes.varlen:
            raise ValueError(not_packed(self.label))
        high = _per_batch("masks.padding key_lengths", self.key_lengths, sizes)
        if self.query_lengths is None:
            high = high.expand(sizes.batch, sizes.queries)
        else:
            query_lengths = _per_batch("masks.padding query_lengths", self.query_lengths, sizes)
            high = torch.where(torch.arange(sizes.queries, device=sizes.device) < query_lengths, high, 0)
        return Lowered(intervals=_intervals(torch.zeros_like(high), high, sizes))


@dataclass(frozen=True, eq=False)
class Documents(Mask):
    """See `documents`."""

    label = "masks.documents"
    ids_q: Tensor
    ids_k: Tensor

    def __post_init__(self):
        for name, ids in (("ids_q", self.ids_q), ("ids_k", self.ids_k)):
            if _checks.integer(f"masks.documents {name}", ids).dim() not in (1, 2):
                raise _checks.shape_error(f"masks.documents {name}", "(L,) or (B, L)", "", ids)

    def visible(self, b, h, i, j, sizes):
        return self._at(self.ids_q, b, i) == self._at(self.ids_k, b, j)

    @staticmethod
    def _at(ids, b, position):
        return ids[position] if ids.dim() == 1 else ids[b if ids.shape[0] != 1 else 0, position]

    def patterns(self, sizes):
        own = self._ids("ids_q", self.ids_q, sizes.queries, sizes)
        return _tables.ranges(self._ids("ids_k", self.ids_k, sizes.keys, sizes), own, own, sizes)

    def lower(self, sizes):
        if sizes.varlen:
            raise ValueError(not_packed(self.label))
        ids_q = self._ids("ids_q", self.ids_q, sizes.queries, sizes)
        ids_k = self._ids("ids_k", self.ids_k, sizes.keys, sizes)
        if sizes.keys == 0:
            none = torch.zeros((1, sizes.queries), dtype=torch.int32, device=sizes.device)
            return Lowered(intervals=_intervals(none, none, sizes))
        low, high, contiguous = _runs(ids_q, ids_k)
        if not _checks.is_readable(contiguous):
            message = "masks.documents: keys with equal ids must be contiguous here, use masks.dense(ids_q == ids_k)"
            torch._assert_async(contiguous.all(), message)
        elif not contiguous.all():
            return super().lower(sizes)
        return Lowered(intervals=_intervals(low, high, sizes))

    def _ids(self, name, ids, length, sizes):
        """ids as (B|1, L) int64, checked against the call."""
        batch = f"({length},) or ({sizes.batch}, {length})"
        if ids.shape[-1] != length or (ids.dim() == 2 and ids.shape[0] != sizes.batch and ids.shape[0] != 1):
            against = "query" if name == "ids_q" else "key"
            raise _checks.shape_error(f"masks.documents {name}", batch, f"to match {against}", ids)
        _checks.same_device(f"masks.documents {name}", ids, sizes.device)
        return (ids if ids.dim() == 2 else ids[None]).to(torch.int64)


def _runs(ids_q: Tensor, ids_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each query the first and the past-the-last key with its id, and whether these keys are contiguous.

    A stable sort keeps keys of equal ids in order, so a group of n keys is contiguous iff its last key minus its
    first is n - 1.
    """
    batch = max(ids_q.shape[0], ids_k.shape[0])
    ids_q = ids_q.expand(batch, -1).contiguous()
    ids, order = torch.sort(ids_k.expand(batch, -1), dim=-1, stable=True)
    begin = torch.searchsorted(ids, ids_q)
    end = torch.searchsorted(ids, ids_q, right=True)
    found = end > begin
    first = order.gather(-1, begin.clamp(max=ids.shape[-1] - 1))
    last = order.gather(-1, (end - 1).clamp(min=0))
    low, high = torch.where(found, first, 0), torch.where(found, last + 1, 0)
    return low, high, ~found | (high - low == end - begin)


@dataclass(frozen=True, eq=False)
class Prefix(Mask):
    """See `prefix`."""

    label = "masks.prefix"
    lengths: Tensor

    def __post_init__(self):
        _vector("masks.prefix lengths", self.lengths)

    def visible(self, b, h, i, j, sizes):
        return (j <= i + sizes.keys - sizes.queries) | (j < self.lengths[b])

    def lower(self, sizes):
        lengths = _per_batch("masks.prefix lengths", self.lengths, sizes)
        row = torch.arange(sizes.queries, device=sizes.device)
        if not sizes.varlen:
            high = torch.maximum(row + (sizes.keys - sizes.queries + 1), lengths)
        else:
            ends = sizes.cu_seqlens_q[1:].contiguous()
            n = torch.searchsorted(ends, row, right=True).clamp(max=max(sizes.batch - 1, 0))
            # row - start + Lk - Lq + 1 with the sequence's own lengths, where start + Lq is its end
            high = torch.maximum((row + 1 - ends[n]) + sizes.cu_seqlens_k.diff()[n], lengths[n, 0])[None]
        return Lowered(intervals=_intervals(torch.zeros_like(high), high, sizes))


@dataclass(frozen=True, eq=False)
class Dense(Mask):
    """See `dense`."""

    label = "masks.dense"
    values: Tensor
    name: str = "masks.dense values"

    def __post_init__(self):
        _checks.boolean(self.name, self.values)

    def visible(self, b, h, i, j, sizes):
        view = self._view(sizes)
        b, h, i = (x if size != 1 else 0 for x, size in zip((b, h, i), view.shape[:3], strict=True))
        return view[b, h, i, j]

    def lower(self, sizes):
        if sizes.varlen:
            raise ValueError(not_packed(self.label))
        return Lowered(mask=self._view(sizes))

    def _view(self, sizes):
        _checks.same_device(self.name, self.values, sizes.device)
        return _checks.broadcastable(self.name, self.values, sizes.lead, sizes.heads, sizes.queries, sizes.keys)


def _vector(name: str, value: Tensor) -> None:
    if _checks.integer(name, value).dim() != 1:
        raise _checks.shape_error(name, "(B,)", "", value)


def _per_batch(name: str, value: Tensor, sizes: Sizes) -> Tensor:
    """(B,) integers as an int64 column (B, 1), checked against the call."""
    if value.shape[0] != sizes.batch:
        against = "cu_seqlens_q" if sizes.varlen else "query"
        raise _checks.shape_error(name, f"({sizes.batch},)", f"to match {against}", value)
    _checks.same_device(name, value, sizes.device)
    return value.to(torch.int64)[:, None]


def _intervals(low: Tensor, high: Tensor, sizes: Sizes) -> Tensor:
    """int32 (B|1, Lq, 2). Clipped first: a length beyond int32 must not wrap around."""
    return torch.stack((low, high), dim=-1).clamp(0, sizes.keys).to(torch.int32)


def causal() -> Mask:
    """Keys up to the query's own position: distance <= 0 (lower-right aligned: the last query sees all keys).

    SDPA's `is_causal=True` is upper-left aligned instead; the two agree where Lq == Lk. Costs no memory.
    """
    return Window(None, 0)


def window(left: int | None, right: int | None) -> Mask:
    """Keys around the query: -left <= distance <= right, both ends included. Costs no memory.

    Args:
        left, right: non-negative ints, or None for no limit on that side.
    Raises:
        TypeError or ValueError for anything else; flash-attn's -1 is None here.
    Source: Beltagy et al., Longformer (2020), section 3.1; Mistral 7B (2023), section 2.
    """
    return Window(left, right)


def padding(key_lengths: Tensor, query_lengths: Tensor | None = None) -> Mask:
    """Keys j < key_lengths[b], for queries i < query_lengths[b] (None: all queries); other queries give output 0.

    Args:
        key_lengths, query_lengths: (B,) integers; values outside [0, Lk] and [0, Lq] are clipped. B is the product
            of all leading batch dimensions.
    Raises:
        TypeError for other dtypes, ValueError for another shape or device.
    """
    return Padding(key_lengths, query_lengths)


def documents(ids_q: Tensor, ids_k: Tensor | None = None) -> Mask:
    """Keys of the query's own document: ids_q[b, i] == ids_k[b, j] (packed sequences).

    Where the keys of each document are contiguous the mask is one interval per query, elsewhere a block table. That
    choice looks at the values; under `torch.compile` and off the CPU, where looking would break the graph or
    synchronise, contiguous keys are taken for granted and asserted.

    Args:
        ids_q: (L,) or (B, L) integers, any order.
        ids_k: the same for the keys; None = ids_q (self-attention).
    Raises:
        TypeError for other dtypes, ValueError for another shape or device; RuntimeError where contiguity is asserted
        and does not hold (`masks.dense(ids_q[..., :, None] == ids_k[..., None, :])` has no such condition).
    Source: Krell et al., "Efficient sequence packing without cross-contamination" (2021), section 3.2.
    """
    return Documents(ids_q, ids_q if ids_k is None else ids_k)


def prefix(lengths: Tensor) -> Mask:
    """Causal (lower-right), and every query also sees the first lengths[b] keys (prefix-LM).

    Args:
        lengths: (B,) integers; in `varlen_attention` one per sequence.
    Raises:
        TypeError for other dtypes, ValueError for another shape or device.
    Source: Raffel et al., T5 (JMLR 2020), section 3.2.1, figure 4.
    """
    return Prefix(lengths)


def dense(values: Tensor) -> Mask:
    """Keys where `values` is True.

    Args:
        values: bool tensor, broadcastable to (..., Hq, Lq, Lk) with the leading dimensions of the query.
    Raises:
        TypeError for other dtypes; ValueError at the call if it does not broadcast.
    """
    return Dense(values)
