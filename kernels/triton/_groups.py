"""Products of rows grouped by expert: who computes which tile, found on the device from the offsets.

A schedule lists the blocks of rows, none of which crosses from one expert to the next. How many there are only the
device knows, but a bound follows from sizes alone; a fixed number of programs walks them. So nothing waits for the
device, and an expert with most of the tokens is shared by all programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gemm import place
from ._launch import on

SLOTS, EXPERTS = 64, 64  # of a tile of the schedule
PROGRAMS = 4  # of a launch where no GPU says how many it runs at once: few, so that each has several tiles
PER_PROCESSOR = 2  # programs for each multiprocessor: one computes while another loads or stores


@triton.jit
def _schedule_kernel(
    offsets, schedule, rows, experts, groups, slots,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Entry 1 + s of the schedule: the expert, the first row and the last row + 1 of block s (0 for none); entry 0: the
    number of blocks. Group `experts` is that of the unused rows. Offsets that fit no tensor are cut to fit."""
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    expert = tl.zeros((SLOTS,), tl.int32)
    first = tl.zeros((SLOTS,), tl.int32)  # block of this expert
    total = 0
    for start in range(0, groups, EXPERTS):
        e = start + tl.arange(0, EXPERTS)
        begin = tl.load(offsets + e, mask=e < groups, other=0)
        end = tl.load(offsets + e + 1, mask=e < tl.minimum(groups, experts), other=rows)
        begin, end = tl.minimum(tl.maximum(begin, 0), rows), tl.minimum(tl.maximum(end, 0), rows)
        blocks = tl.where(e < groups, tl.cdiv(tl.maximum(end - begin, 0), ROWS), 0)
        last = total + tl.cumsum(blocks, 0)
        before = (last[None, :] <= slot[:, None]) & (e < groups)[None, :]  # [SLOTS, EXPERTS]
        expert += tl.sum(before.to(tl.int32), 1)
        first += tl.sum(tl.where(before, blocks[None, :], 0), 1)
        total += tl.sum(blocks, 0)
    used = slot < tl.minimum(total, slots)
    begin = tl.load(offsets + expert, mask=used, other=0)
    end = tl.load(offsets + expert + 1, mask=used & (expert < experts), other=rows)
    at = schedule + (1 + slot) * 3
    inside = slot < slots
    tl.store(at, tl.where(used, expert, 0), mask=inside)
    tl.store(at + 1, tl.where(used, tl.maximum(begin, 0) + (slot - first) * ROWS, 0), mask=inside)
    tl.store(at + 2, tl.where(used, tl.minimum(end, rows), 0), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(schedule, tl.minimum(total, slots))


@triton.jit
def rows_of(schedule, block, ROWS: tl.constexpr):
    """(expert, rows [ROWS], whether they are the expert's) of a block of the schedule."""
    entry = schedule + (1 + block) * 3
    row = tl.load(entry + 1).to(tl.int64) + tl.arange(0, ROWS)
    return tl.load(entry).to(tl.int64), row, row < tl.load(entry + 2)


@triton.jit
def locate(schedule, tile, across, ROWS: tl.constexpr, BAND: tl.constexpr):
    """The same for a tile, and its block of columns, of which there are `across`."""
    block, part = place(tile, tl.load(schedule).to(tl.int64), across, BAND)
    expert, row, inside = rows_of(schedule, block, ROWS)
    return expert, row, inside, part


@triton.jit
def tokens_of(source, row, inside, tokens):
    """The token of each row and whether there is one; without `source` the row itself."""
    if source is None:
        token, known = row, inside
    else:
        token = tl.load(source + row, mask=inside, other=-1).to(tl.int64)
        known = (token >= 0) & (token < tokens)
    return token, known


@triton.jit
def bounds(offsets, expert, rows):
    """The first row of an expert, and the last + 1."""
    begin = tl.maximum(tl.load(offsets + expert), 0)
    return begin, tl.minimum(tl.load(offsets + expert + 1), rows)


class Schedules:
    """The schedules of one routing, one for each height of a block."""

    def __init__(self, offsets: Tensor, rows: int, unused: bool):
        """unused: whether the rows after the last expert's are computed, too (as 0)."""
        self.offsets, self.rows, self.experts = offsets, rows, offsets.shape[0] - 1
        self.groups = self.experts + unused
        self.made: dict[int, tuple[Tensor, int]] = {}

    def of(self, height: int) -> tuple[Tensor, int]:
        """The schedule for blocks of that many rows, and the largest number of blocks."""
        if height not in self.made:
            slots = most_blocks(self.rows, self.groups, height)
            schedule = self.offsets.new_empty((1 + slots, 3))
            with on(schedule.device):
                _schedule_kernel[(max(triton.cdiv(slots, SLOTS), 1),)](
                    self.offsets, schedule, self.rows, self.experts, self.groups, slots,
                    ROWS=height, SLOTS=SLOTS, EXPERTS=EXPERTS,
                )  # fmt: skip
            self.made[height] = schedule, slots
        return self.made[height]


def most_blocks(rows: int, groups: int, height: int) -> int:
    """Of `height` rows of one group each: all groups but one have a single row, if there are enough."""
    return rows if rows <= groups else triton.cdiv(rows - groups + 1, height) + groups - 1


def programs(device: torch.device, tiles: int) -> tuple[int]:
    """The grid of a launch whose programs walk the tiles."""
    if device.type != "cuda":
        return (min(tiles, PROGRAMS),)
    return (min(tiles, PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count),)
