"""Block tables: which blocks of `BLOCK` queries x `BLOCK` keys hold a visible pair, and bitmaps of the partial ones.

`AttentionProblem` describes the format. A table is built stripe by stripe (some blocks of a row at a time), so that
the Lq x Lk predicate never stands in memory; of blocks that a mask declares alike (`Mask.kinds`) only the first is
evaluated, and equal bitmaps are stored once.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._primitives import BLOCK, Sizes

_EMPTY, _FULL = -2, -1  # states of a block; from 0 on, rows of `block_bits`
_BYTES = BLOCK // 8
_STRIPE = 64  # blocks of a row that are evaluated together: 1 MiB of bools per batch row and head


#: (row of blocks, columns of blocks (C,)) -> their patterns, uint8 (B|1, Hq|1, C, BLOCK, BLOCK / 8); bit c % 8 of byte
#: c // 8 is key c, and what lies beyond the last query or key is 0.
Patterns = Callable[[int, Tensor], Tensor]


class BlockTable(NamedTuple):
    """The three tensors of `AttentionProblem`."""

    block_offsets: Tensor
    block_index: Tensor
    block_bits: Tensor


def _on_cpu(function):
    """Tables are put together on the CPU, whatever torch's default device is."""

    @functools.wraps(function)
    def wrapped(*args):
        there = torch.get_default_device().type == "cpu"  # each operation within a torch.device costs some microseconds
        with contextlib.nullcontext() if there else torch.device("cpu"):
            return function(*args)

    return wrapped


def blocks(length: int) -> int:
    """How many blocks hold `length` positions."""
    return (length + BLOCK - 1) // BLOCK


def joint(first: Tensor, second: Tensor) -> Tensor:
    """Numbers that are equal iff both numbers are: (r|1, c|1) int64 each -> (r, c) int64."""
    first, second = torch.broadcast_tensors(first, second)
    first, second = (torch.unique(x, return_inverse=True)[1] for x in (first, second))
    return first * (second.max() + 1) + second if second.numel() else first


def differences(sizes: Sizes) -> Tensor:
    """`kinds` of what depends on the distance only: column minus row."""
    row, column = (torch.arange(blocks(length)) for length in (sizes.queries, sizes.keys))
    return column - row[:, None]


@_on_cpu
def build(mask, sizes: Sizes) -> BlockTable:
    """The table of mask.visible."""
    home = sizes.device
    if mask.closed:  # its predicate needs no device, and reading a result from one would synchronise
        sizes = sizes._replace(device=torch.device("cpu"))
    rows, columns = blocks(sizes.queries), blocks(sizes.keys)
    kinds = mask.kinds(sizes) if rows and columns else None
    if kinds is None:
        kinds = torch.arange(rows * columns).view(rows, columns)
    else:
        # The last row and column, which may be cut off, are kinds of their own.
        edge = joint((torch.arange(rows) == rows - 1)[:, None].long(), (torch.arange(columns) == columns - 1).long())
        kinds = joint(kinds.expand(rows, columns), edge)
    number, kinds = torch.unique(kinds, return_inverse=True)
    every = torch.arange(rows * columns)
    first = torch.full(number.shape, rows * columns).scatter_reduce_(0, kinds.flatten(), every, "amin")
    first, order = first.sort()
    bitmaps, states, patterns = _Bitmaps(), [], mask.patterns(sizes)
    start = 0
    for row, size in enumerate(torch.bincount(first // max(columns, 1), minlength=rows).tolist()):
        for begin in range(start, start + size, _STRIPE):
            some = slice(begin, min(begin + _STRIPE, start + size))
            which = first[some] % columns
            states.append((order[some], bitmaps.states(patterns(row, which), _exists(row, which, sizes))))
        start += size
    batch, heads = (max((state.shape[d] for _, state in states), default=1) for d in (0, 1))
    state = torch.full((batch, heads, number.numel()), _EMPTY)
    for which, found in states:
        state[..., which] = found
    table = _table(state[..., kinds], bitmaps.stored())
    return BlockTable(*(tensor.to(home) for tensor in table))


def evaluated(mask, sizes: Sizes) -> Patterns:
    """The patterns of mask.visible, which is called on some blocks of a row at once."""
    device = sizes.device
    b, h = torch.arange(sizes.batch, device=device), torch.arange(sizes.heads, device=device)

    def patterns(row: int, columns: Tensor) -> Tensor:
        i = torch.arange(row * BLOCK, min((row + 1) * BLOCK, sizes.queries), device=device)
        j = _keys(columns)
        j = j[j < sizes.keys].to(device)  # only the last column can be cut off, and it comes last
        visible = mask.visible(
            b.view(-1, 1, 1, 1), h.view(1, -1, 1, 1), i.view(1, 1, -1, 1), j.view(1, 1, 1, -1), sizes
        )
        _checks.boolean(mask.label, visible)
        visible = _checks.broadcastable(mask.label, visible, (sizes.batch,), sizes.heads, i.numel(), j.numel())
        shape = (*visible.shape[:2], BLOCK, columns.numel() * BLOCK)
        if visible.shape != shape or not visible.is_contiguous() or visible.storage_offset() % 8:
            padded = visible.new_zeros(shape)
            padded[..., : i.numel(), : j.numel()] = visible
            visible = padded
        return _pack(visible).unflatten(-1, (-1, _BYTES)).transpose(2, 3).contiguous()

    return patterns


def ranges(values: Tensor, low: Tensor | None, high: Tensor, sizes: Sizes) -> Patterns:
    """The patterns of a mask in which query i sees the keys with low_i <= value <= high_i.

    With the keys of a column of blocks sorted by value, a query sees those from a first to a last one, and its row of
    the pattern is the difference of two of the 129 rows in which the first 0, 1, ... 128 of them are seen.

    Args:
        values: (B|1, Lk) integers.
        low, high: (B|1, Lq) integers, low <= high; low=None: no limit.
    """
    device, columns = values.device, blocks(sizes.keys)
    ends = [(x, past) for x, past in ((low, False), (high, True)) if x is not None]
    batch = max(values.shape[0], high.shape[0])
    values, order = values.expand(batch, -1).sort(dim=-1)
    # How many of the first n of all keys are in a column.
    number = torch.zeros((batch, columns, sizes.keys + 1), dtype=torch.uint8, device=device)
    number[:, :, 1:].scatter_(1, (order // BLOCK)[:, None], 1)
    number = number.cumsum(-1, dtype=torch.uint8).flatten()
    # The keys of a column in their order (those beyond the last come last), and the rows that the first of them make.
    place = torch.nn.functional.pad(order.argsort(dim=-1), (0, columns * BLOCK - sizes.keys), value=sizes.keys)
    key = place.view(batch, columns, BLOCK, 1).argsort(dim=2)
    seen = torch.zeros((batch, columns, BLOCK + 1, _BYTES), dtype=torch.uint8, device=device)
    seen[:, :, 1:].scatter_(3, key // 8, (1 << key % 8).to(torch.uint8))
    seen = seen.cumsum(2, dtype=torch.uint8).view(torch.int64).view(-1, _BYTES // 8)
    # How many of all keys come before the range, and up to its end; beyond the last query, none.
    ends = [torch.searchsorted(values, x.expand(batch, -1).contiguous(), right=past) for x, past in ends]
    ends = [torch.nn.functional.pad(x, (0, -sizes.queries % BLOCK)).unflatten(1, (1, -1, BLOCK)) for x in ends]
    offset = torch.arange(batch, device=device).view(-1, 1, 1) * columns

    def patterns(row: int, which: Tensor) -> Tensor:
        column = offset + which.to(device).view(1, -1, 1)
        rows = (seen[(column * (BLOCK + 1) + number[column * (sizes.keys + 1) + x[:, :, row]]).flatten()] for x in ends)
        return functools.reduce(torch.bitwise_xor, rows).view(torch.uint8).view(batch, 1, which.numel(), BLOCK, _BYTES)

    return patterns


def _keys(columns: Tensor) -> Tensor:
    return (columns[:, None] * BLOCK + torch.arange(BLOCK)).flatten()


def _exists(row: int, columns: Tensor, sizes: Sizes) -> Tensor:
    """Patterns (columns|1, BLOCK|1, BLOCK / 8) in which all queries see all keys."""
    keys = _pack(_keys(columns) < sizes.keys).view(-1, 1, _BYTES)
    queries = torch.arange(row * BLOCK, (row + 1) * BLOCK) < sizes.queries
    return (keys * queries[:, None]).to(sizes.device)


def _pack(visible: Tensor) -> Tensor:
    """bool (..., 8 n) -> uint8 (..., n): bit c % 8 of byte c // 8 is number c."""
    # Eight bools are eight bytes of 0 or 1; the product moves bit 8 c to bit 56 + c, without carries on the way.
    eight = visible.view(torch.uint8).view(torch.int64)
    return ((eight * 0x0102040810204080) >> 56).to(torch.uint8)


class _Bitmaps:
    """Distinct bitmaps in the order in which they come.

    They are told apart by two independent 64-bit sums of their 32-bit words times random 64-bit weights. Two that
    differ agree in one sum with a probability of at most 2^-33: a difference of words is divisible by 2^31 at most.
    """

    def __init__(self):
        random = torch.Generator().manual_seed(1)
        words = BLOCK * _BYTES // 4
        self.weights = torch.randint(-(2**63), 2**63 - 1, (2, words), generator=random)
        self.rows: dict[tuple[int, int], int] = {}
        self.kept: list[Tensor] = []

    def states(self, bits: Tensor, exists: Tensor) -> Tensor:
        """States (...) of the blocks (..., BLOCK, BLOCK / 8), of whose bits those in `exists` could be set."""
        words = bits.flatten(-2).view(torch.int64)
        full = (words == exists.flatten(-2).view(torch.int64)).all(-1)
        empty = (words == 0).all(-1)
        state = torch.where(full, _FULL, _EMPTY)
        partial = ~(full | empty)
        chosen = bits[partial]
        values = chosen.flatten(-2).view(torch.int32).to(torch.int64)
        weights = self.weights.to(bits.device)
        sums = torch.stack([(values * weight).sum(-1) for weight in weights], dim=-1)
        rows, fresh = [], []
        for n, key in enumerate(map(tuple, sums.tolist())):
            if key not in self.rows:
                self.rows[key] = len(self.rows)
                fresh.append(n)
            rows.append(self.rows[key])
        state[partial] = torch.tensor(rows, dtype=state.dtype, device=state.device)
        self.kept.append(chosen[fresh] if len(fresh) < len(rows) else chosen)
        return state.cpu()

    def stored(self) -> Tensor:
        return torch.cat(self.kept) if self.kept else torch.empty((0, BLOCK, _BYTES), dtype=torch.uint8)


def _table(state: Tensor, bits: Tensor) -> BlockTable:
    """CSR from the states (B|1, Hq|1, rows, columns) of all blocks."""
    batch, heads, rows, _ = state.shape
    listed = state != _EMPTY
    ends = listed.sum(-1).flatten().cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
    first = torch.arange(batch * heads).view(batch, heads, 1) * rows
    offsets = starts[first + torch.arange(rows + 1)]
    index = torch.stack([listed.nonzero()[:, -1], state[listed]], dim=-1).to(torch.int32)
    return BlockTable(offsets, index, bits)


def _states(table: BlockTable, columns: int) -> Tensor:
    """(B|1, Hq|1, rows, columns) states: the inverse of `_table`."""
    offsets, index, _ = table
    offsets, index = offsets.long(), index.long()
    counts = offsets.diff(dim=-1)
    state = torch.full((counts.numel(), columns), _EMPTY, device=offsets.device)
    row = torch.repeat_interleave(torch.arange(counts.numel(), device=offsets.device), counts.flatten())
    state[row, index[:, 0]] = index[:, 1]
    return state.view(*counts.shape, columns)


@_on_cpu
def intersect(first: BlockTable, second: BlockTable) -> BlockTable:
    """The table of what both show."""
    home = first.block_offsets.device
    first, second = (BlockTable(*(tensor.cpu() for tensor in table)) for table in (first, second))
    columns = 1 + max((int(t.block_index[:, 0].max()) for t in (first, second) if len(t.block_index)), default=-1)
    a, b = torch.broadcast_tensors(_states(first, columns), _states(second, columns))
    nothing, everything = (first.block_bits.new_full((1, BLOCK, _BYTES), value) for value in (0, 255))
    # Rows -2 and -1 of these lists are what the states of the same numbers stand for.
    lists = [torch.cat([table.block_bits, nothing, everything]) for table in (first, second)]
    pair = torch.where((a == _EMPTY) | (b == _EMPTY), 0, (a - _EMPTY) * len(lists[1]) + b - _EMPTY)
    pairs, which = torch.unique(pair, return_inverse=True)
    bitmaps, found = _Bitmaps(), []
    for some in pairs.split(1024):
        rows = some // len(lists[1]) + _EMPTY, some % len(lists[1]) + _EMPTY
        met = lists[0][rows[0]] & lists[1][rows[1]]
        found.append(bitmaps.states(met, everything))
    state = torch.cat(found)[which] if found else pair
    return BlockTable(*(tensor.to(home) for tensor in _table(state, bitmaps.stored())))
