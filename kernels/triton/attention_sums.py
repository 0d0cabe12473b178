"""Gradients of attention that are sums over tiles: of a dense bias, of diagonal strips, of relative rows.

A sum along diagonals has a program per band of distances, all tiles on one diagonal of tiles: they share their skew, so
that tiles of dS are added up as they are, or multiplied skewed, and nothing is added twice or by atomics. Bands overlap
by one tile: their halves are added in order, then distances that share a row of a table are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import on, power_of_two

TERMS = 64  # positions of a strip that are added at a time


@triton.jit
def _row_sums_kernel(strips, order, offsets, sums, length, rows, width, TERMS: tl.constexpr, COLUMNS: tl.constexpr):
    """sums[n, r] = the sum of strips[n, order[t]] over offsets[r] <= t < offsets[r + 1], for strips (n, length, width);
    one program per n, row and block of columns."""
    program = tl.program_id(0)
    steps = tl.cdiv(width, COLUMNS)
    column = program % steps * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = program // steps % rows
    n = (program // steps // rows).to(tl.int64)
    end = tl.load(offsets + row + 1)
    total = tl.zeros((TERMS, COLUMNS), tl.float32)  # short sums side by side: more exact than one long one
    for first in range(tl.load(offsets + row), end, TERMS):
        place = first + tl.arange(0, TERMS)
        position = tl.load(order + place, mask=place < end, other=0)  # int64
        at = (n * length + position)[:, None] * width + column
        total += tl.load(strips + at, mask=(place < end)[:, None] & (column < width), other=0.0)
    tl.store(sums + (n * rows + row) * width + column, tl.sum(total, 0)[None, :], mask=column < width)


def sum_rows(strips: Tensor, index: Tensor, rows: int) -> Tensor:
    """Row r of the result, (..., rows, D), is the sum of strips (..., S, D) over the positions where index (S,) is r."""
    *lead, length, width = strips.shape
    sums = strips.new_zeros((*lead, rows, width))
    if sums.numel() == 0 or length == 0:
        return sums
    row, order = index.sort(stable=True)
    offsets = torch.searchsorted(row, torch.arange(rows + 1, device=row.device, dtype=row.dtype))
    columns = power_of_two(width, 1, 64)
    count = sums.numel() // (rows * width)
    grid = (count * rows * triton.cdiv(width, columns),)
    with on(strips.device):
        _row_sums_kernel[grid](
            strips.contiguous(), order, offsets, sums, length, rows, width, TERMS=TERMS, COLUMNS=columns
        )
    return sums


def join_bands(partial: Tensor, first: int, length: int) -> Tensor:
    """The strips (n, length, D) that overlapping bands make up, from position `first` of the first one on.

    partial: (n, bands, 2 * step, D); band e covers positions e * step to (e + 2) * step.
    """
    count, bands, both, width = partial.shape
    step = both // 2
    strips = partial.new_zeros((count, bands + 1, step, width))
    strips[:, :-1] = partial[:, :, :step]
    strips[:, 1:] += partial[:, :, step:]
    return strips.flatten(1, 2)[:, first : first + length]
