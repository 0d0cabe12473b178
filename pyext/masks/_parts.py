"""Reordering: masks that become ranges of keys once queries and keys are sorted by residue, column or rank.

Strided and column patterns leave a visible diagonal in almost every tile, so that skipping empty tiles saves nothing.
But within one residue class they are ordinary causal attention, and sorted by class the keys of a query lie side by
side (the transposition of Child et al., "Generating long sequences with Sparse Transformers" (2019), section 5.4).
A mask is split into disjoint parts of that kind; `ops._passes` runs them one by one and merges them by their LSE.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .._primitives import UNBOUNDED, Sizes

if TYPE_CHECKING:
    from ._base import Lowered


class Part(NamedTuple):
    """Keys of the query's own class whose positions lie within `limits`."""

    limits: "Lowered"  # left, right and intervals only
    classes: tuple[Tensor, Tensor] | None = None  # (B|1, Lq), (B|1, Lk) int64 >= 0; None = one class of all
    ranks: tuple[Tensor, Tensor] | None = None  # the same, distinct in each row: what stands in for i and j in `limits`


class Order(NamedTuple):
    """forward[n] is the position that comes n-th, (B|1, L) int64; inverse[position] is where it comes."""

    forward: Tensor
    inverse: Tensor


class Pass(NamedTuple):
    """A part as a call of the op: on reordered queries and keys (None: as they are), within `limits` of that order."""

    limits: "Lowered"
    queries: Order | None = None
    keys: Order | None = None


def resolve(part: Part, sizes: Sizes) -> Pass:
    """Sort a part.

    Key j has the place class * (Lk + 1) + j in the sorted order of keys; the visible keys of query i are those whose
    places lie between class * (Lk + 1) + low and class * (Lk + 1) + high, for the range [low, high) of its limits.
    Only tensor operations of fixed shapes, so that it can be traced.
    """
    if part.classes is None and part.ranks is None:
        return Pass(part.limits)
    i, j = (torch.arange(length, device=sizes.device)[None] for length in (sizes.queries, sizes.keys))
    low, high = _range(part.limits, i, sizes)
    group_q, group_k = (0, 0) if part.classes is None else part.classes
    i, j = (i, j) if part.ranks is None else part.ranks
    stride = sizes.keys + 1
    place = group_k * stride + j
    keys = _sorted(place)
    queries = _sorted(group_q * (sizes.queries + sizes.keys) + i)
    ends = [torch.broadcast_tensors(group_q * stride + x, place[:, :1])[0].contiguous() for x in (low, high)]
    batch = ends[0].shape[0]
    place = place.gather(1, keys.forward).expand(batch, -1).contiguous()
    ends = [torch.searchsorted(place, x).gather(1, queries.forward.expand(batch, -1)) for x in ends]
    intervals = torch.stack(ends, dim=-1)
    limits = part.limits._replace(left=UNBOUNDED, right=UNBOUNDED, intervals=intervals.to(torch.int32))
    return Pass(limits, queries, keys)


def _sorted(place: Tensor) -> Order:
    forward = place.argsort(dim=1)
    return Order(forward, forward.argsort(dim=1))


def _range(limits: "Lowered", i: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Limits as one range [low, high) of keys per query, (B|1, Lq) each."""
    stand = i + (sizes.keys - sizes.queries)
    low, high = (torch.zeros_like(i), torch.full_like(i, sizes.keys))
    if limits.left < UNBOUNDED:
        low = stand - limits.left
    if limits.right < UNBOUNDED:
        high = stand + limits.right + 1
    if limits.intervals is not None:
        low, high = torch.maximum(low, limits.intervals[..., 0]), torch.minimum(high, limits.intervals[..., 1])
    return low.clamp(0, sizes.keys), high.clamp(0, sizes.keys)
