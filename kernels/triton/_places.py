"""The places of choices among those of their expert: slots, where experts have a capacity, and rows.

They are counted, not sorted: each block of choices is ranked within itself, the counts of experts per block are summed
from the first block on, and a place is a rank and the counts of earlier blocks. No atomics, so the same bits every
time, and no number is read back.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, OTHERS = 128, 32  # choices that are ranked together, each against each, so many at a time
TILES, EXPERTS = 32, 64  # of a tile of counts


@triton.jit
def _entry(g, place, order, tokens, choices, QUEUE: tl.constexpr):
    """Which choice comes at a place: choices in order, or in a queue the first ones of all tokens of group g (in their
    order, if there is one) before any second."""
    if QUEUE:
        s = place % tokens
        if order is not None:
            s = tl.load(order + g * tokens + s)
        entry = (g * tokens + s) * choices + place // tokens
    else:
        entry = place
    return entry


@triton.jit
def _experts_at(index, g, place, length, order, tokens, choices, QUEUE: tl.constexpr):
    """The choices at these places (-1 for none), and where they are in memory."""
    inside = place < length
    entry = _entry(g, tl.where(inside, place, 0), order, tokens, choices, QUEUE)
    return tl.load(index + entry, mask=inside, other=-1), entry


@triton.jit
def _count_kernel(
    index, order, rank, counts, length, tiles, tokens, choices, experts,
    QUEUE: tl.constexpr, BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """The rank of each choice among those of its expert in its block, and how many each expert has in the block (where
    it has none, `counts` holds 0)."""
    g, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    place = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert, entry = _experts_at(index, g, place, length, order, tokens, choices, QUEUE)
    earlier = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, BLOCK, OTHERS):
        at = tile.to(tl.int64) * BLOCK + start + tl.arange(0, OTHERS)
        other, _ = _experts_at(index, g, at, length, order, tokens, choices, QUEUE)
        same = expert[:, None] == other[None, :]  # [BLOCK, OTHERS]
        earlier += tl.sum((same & (at[None, :] < place[:, None])).to(tl.int32), 1)
        total += tl.sum(same.to(tl.int32), 1)
    tl.store(rank + entry, earlier, mask=place < length)
    last = (expert >= 0) & (earlier == total - 1)
    tl.store(counts + (g * tiles + tile) * experts + expert, total, mask=last)


@triton.jit
def _scan_kernel(counts, before, totals, tiles, experts, TILES: tl.constexpr, EXPERTS: tl.constexpr):
    """before[g, tile, e] = the sum of the counts of earlier tiles, totals[g, e] that of all; one program per group and
    block of experts."""
    across = tl.cdiv(experts, EXPERTS)
    g = (tl.program_id(0) // across).to(tl.int64)
    expert = tl.program_id(0) % across * EXPERTS + tl.arange(0, EXPERTS)
    sum = tl.zeros((EXPERTS,), tl.int32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        at = (g * tiles + tile)[:, None] * experts + expert[None, :]
        valid = (tile < tiles)[:, None] & (expert < experts)[None, :]
        count = tl.load(counts + at, mask=valid, other=0)
        tl.store(before + at, sum[None, :] + tl.cumsum(count, 0) - count, mask=valid)
        sum += tl.sum(count, 0)
    tl.store(totals + g * experts + expert, sum, mask=expert < experts)


@triton.jit
def _claim_kernel(
    index, weights, order, rank, before, length, tiles, tokens, choices, experts, capacity, BLOCK: tl.constexpr
):
    """Drop the choices that come after the last slot of their expert."""
    g, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    place = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert, entry = _experts_at(index, g, place, length, order, tokens, choices, True)
    known = expert >= 0
    slot = tl.load(rank + entry, mask=known, other=0)
    slot += tl.load(before + (g * tiles + tile) * experts + expert, mask=known, other=0)
    late = known & (slot >= capacity)
    tl.store(index + entry, tl.full((BLOCK,), -1, tl.int32), mask=late)
    tl.store(weights + entry, tl.zeros((BLOCK,), tl.float32), mask=late)


@triton.jit
def _place_kernel(index, rank, before, offsets, position, source, length, choices, experts, rows, BLOCK: tl.constexpr):
    """The row of each choice, and the token of each row."""
    tile = tl.program_id(0).to(tl.int64)
    entry = tile * BLOCK + tl.arange(0, BLOCK)
    inside = entry < length
    expert = tl.load(index + entry, mask=inside, other=-1)
    known = expert >= 0
    row = tl.load(rank + entry, mask=known, other=0)
    row += tl.load(before + tile * experts + expert, mask=known, other=0)
    row += tl.load(offsets + expert, mask=known, other=0)
    tl.store(position + entry, tl.where(known, row, -1), mask=inside)
    tl.store(source + row, (entry // choices).to(tl.int32), mask=known & (row < rows))


# --- Launches ---


class Places(NamedTuple):
    """For choices (T, K): the rank of each in its block, and the numbers of choices of each expert before each of the
    `tiles` blocks of a group, and in all."""

    rank: Tensor  # (T, K) int32
    before: Tensor  # (G, tiles, E) int32
    totals: Tensor  # (G, E) int32

    @property
    def tiles(self) -> int:
        return self.before.shape[1]


def find(index: Tensor, order: Tensor | None, groups: int, experts: int, queue: bool) -> Places:
    """The places of the choices (T, K) in their own order (groups is 1) or in the queue of each group, see `_entry`."""
    tokens, choices = index.shape[0] // groups, index.shape[1]
    length = tokens * choices
    tiles = triton.cdiv(length, BLOCK)
    counts = index.new_zeros((groups, tiles, experts))
    places = Places(torch.empty_like(index), torch.empty_like(counts), index.new_empty((groups, experts)))
    _count_kernel[(groups * tiles,)](
        index, order, places.rank, counts, length, tiles, tokens, choices, experts,
        QUEUE=queue, BLOCK=BLOCK, OTHERS=OTHERS,
    )  # fmt: skip
    _scan_kernel[(groups * triton.cdiv(experts, EXPERTS),)](
        counts, places.before, places.totals, tiles, experts, TILES=TILES, EXPERTS=EXPERTS
    )
    return places


def claim(index: Tensor, weights: Tensor, order: Tensor | None, groups: int, experts: int, capacity: int) -> None:
    """Drop what finds no slot: -1 in index, 0 in weights. First choices of all tokens of a group claim before second
    ones; among them tokens in their own order, or in that of `order` (groups, T / groups) int64."""
    places = find(index, order, groups, experts, queue=True)
    tokens, choices = index.shape[0] // groups, index.shape[1]
    _claim_kernel[(groups * places.tiles,)](
        index, weights, order, places.rank, places.before,
        tokens * choices, places.tiles, tokens, choices, experts, capacity, BLOCK=BLOCK,
    )  # fmt: skip


def fill(index: Tensor, places: Places, offsets: Tensor, position: Tensor, source: Tensor) -> None:
    """Fill position (T, K), and source (N,) in the rows that are used."""
    experts, choices = offsets.shape[0] - 1, index.shape[1]
    _place_kernel[(places.tiles,)](
        index, places.rank, places.before, offsets, position, source,
        index.numel(), choices, experts, source.shape[0], BLOCK=BLOCK,
    )  # fmt: skip
