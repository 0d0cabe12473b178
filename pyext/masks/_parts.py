"""Reordering: masks that become ranges of keys once queries and keys are sorted by residue, column or rank.

Strided and column patterns leave a visible diagonal in almost every tile, so that skipping empty tiles saves nothing.
But within one residue class they are ordinary causal attention, and sorted by class the keys of a query lie side by
side (the transposition of Child et al., "Generating long sequences with Sparse Transformers" (2019), section 5.4).
A mask is split into disjoint parts of that kind; `ops._passes` runs them one by one and merges them by their LSE.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .._primitives import BLOCK, UNBOUNDED, Sizes
from . import _tables

if TYPE_CHECKING:
    from ._base import Lowered


class Range(NamedTuple):
    """Keys of one class whose positions lie within `limits`."""

    limits: "Lowered"  # left, right and intervals only
    classes: Tensor | int = 0  # (B|1, Lq) int64 >= 0: the class each query looks at; a number: all the same


class Part(NamedTuple):
    """The union of disjoint ranges, contiguous in one common order: by class, and by position within a class."""

    ranges: tuple[Range, ...]  # queries are sorted by the class of the last one, if they differ in it
    classes: Tensor | int = 0  # (B|1, Lk) int64 >= 0: the class of each key
    ranks: tuple[Tensor, Tensor] | None = None  # (B|1, Lq), (B|1, Lk): what stands in for i and j in all `limits`

    def within(self, limits: "Lowered") -> "Part":
        """What these limits allow of it."""
        return self._replace(ranges=tuple(r._replace(limits=r.limits.meet(limits)) for r in self.ranges))


class Order(NamedTuple):
    """forward[n] is the position that comes n-th, (B|1, L) int64; inverse[position] is where it comes."""

    forward: Tensor
    inverse: Tensor


class Pass(NamedTuple):
    """A part as calls of the op on reordered queries and keys (None: as they are), within one of `limits` each."""

    limits: tuple["Lowered", ...]
    queries: Order | None = None
    keys: Order | None = None


def resolve(part: Part, sizes: Sizes, as_table: bool) -> Pass:
    """Sort a part.

    Key j has the place class * (Lk + 1) + j in the sorted order of keys; a range [low, high) of positions in a class
    holds the keys with places between class * (Lk + 1) + low and class * (Lk + 1) + high.

    Args:
        as_table: make one call of several ranges, by a block table of the new order. Otherwise there are only tensor
            operations of fixed shapes, which can be traced.
    """
    if isinstance(part.classes, int) and part.ranks is None:
        return Pass(tuple(r.limits for r in part.ranges))
    i, j = (torch.arange(length, device=sizes.device)[None] for length in (sizes.queries, sizes.keys))
    i, j = (i, j) if part.ranks is None else part.ranks
    place, by = _place(part.classes, j, sizes), part.ranges[-1].classes
    keys, queries = _sorted(place), None
    if part.ranks is not None or not isinstance(by, int):
        queries = _sorted(_place(by, i, sizes))
    place = place.gather(1, keys.forward)
    ranges = [_sorted_range(r, place, queries, sizes) for r in part.ranges]
    limits = part.ranges[0].limits
    if as_table and len(ranges) > 1:
        table = _tables.build(_Ranges(ranges), sizes)
        return Pass(
            (limits._replace(left=UNBOUNDED, right=UNBOUNDED, intervals=None, **table._asdict()),), queries, keys
        )
    intervals = (torch.stack(ends, dim=-1).to(torch.int32) for ends in ranges)
    limits = tuple(limits._replace(left=UNBOUNDED, right=UNBOUNDED, intervals=x) for x in intervals)
    return Pass(limits, queries, keys)


def _place(classes: Tensor | int, position: Tensor, sizes: Sizes) -> Tensor:
    return classes * (sizes.keys + 1) + position


def _sorted(place: Tensor) -> Order:
    forward = place.argsort(dim=1, stable=True)
    return Order(forward, forward.argsort(dim=1))


def _sorted_range(r: Range, places: Tensor, queries: Order | None, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """[low, high) in the order of keys, of the queries in their order, (B|1, Lq) each; places are in rising order."""
    stand = torch.arange(sizes.queries, device=sizes.device)[None] + (sizes.keys - sizes.queries)
    low, high = torch.zeros_like(stand), torch.full_like(stand, sizes.keys)
    if r.limits.left < UNBOUNDED:
        low = stand - r.limits.left
    if r.limits.right < UNBOUNDED:
        high = stand + r.limits.right + 1
    if r.limits.intervals is not None:
        low, high = torch.maximum(low, r.limits.intervals[..., 0]), torch.minimum(high, r.limits.intervals[..., 1])
    ends = [_place(r.classes, end.clamp(0, sizes.keys), sizes) for end in (low, high)]
    ends = [torch.broadcast_tensors(end, places[:, :1])[0].contiguous() for end in ends]
    batch = ends[0].shape[0]
    places = places.expand(batch, -1).contiguous()
    low, high = (torch.searchsorted(places, end) for end in ends)
    if queries is not None:
        low, high = (end.gather(1, queries.forward.expand(batch, -1)) for end in (low, high))
    return low, torch.maximum(low, high)


class _Ranges:
    """The union of ranges [low, high) of keys per query, as a mask for `_tables.build`."""

    label, closed = "ranges", False

    def __init__(self, ranges: list[tuple[Tensor, Tensor]]):
        self.ranges = ranges

    def visible(self, b, h, i, j, sizes):
        shown = False
        for low, high in self.ranges:
            row = b if low.shape[0] != 1 else 0
            shown = shown | ((j >= low[row, i]) & (j < high[row, i]))
        return shown

    def patterns(self, sizes):
        return _tables.evaluated(self, sizes)

    def kinds(self, sizes):
        """Blocks that no range touches, and blocks that one covers for all queries, need no look."""
        rows, columns = _tables.blocks(sizes.queries), _tables.blocks(sizes.keys)
        begin = torch.arange(columns) * BLOCK
        end = (begin + BLOCK).clamp(max=sizes.keys)
        row = torch.arange(rows * BLOCK).clamp(max=sizes.queries - 1)
        touched = covered = torch.zeros(rows, columns, dtype=torch.bool)
        for low, high in self.ranges:
            low, high = (x.cpu()[:, row].view(-1, rows, BLOCK) for x in (low, high))
            empty = low >= high
            first = low.masked_fill(empty, sizes.keys).amin((0, 2))[:, None]
            last = high.masked_fill(empty, 0).amax((0, 2))[:, None]
            touched = touched | ((first < end) & (last > begin))
            covered = covered | ((low.amax((0, 2))[:, None] <= begin) & (high.amin((0, 2))[:, None] >= end))
        every = torch.arange(rows * columns).view(rows, columns) + 2
        return torch.where(covered, 1, torch.where(touched, every, 0))
