"""Masks given by a function of indices: `from_function`, and FlexAttention's `BlockMask`."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from . import _tables
from ._base import Mask

_NONE, _PARTIAL, _FULL = 0, 1, 2  # what a BlockMask says of a block
_kept_of_block_masks: weakref.WeakKeyDictionary[Any, dict] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Function(Mask):
    """See `from_function`."""

    label = "masks.from_function"
    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    queries: int
    keys: int

    def __post_init__(self):
        if not callable(self.function):
            raise TypeError(f"masks.from_function fn must be callable, got {type(self.function).__name__}")
        _checks.length("masks.from_function Lq", self.queries)
        _checks.length("masks.from_function Lk", self.keys)

    def visible(self, b, h, i, j, sizes):
        return _checks.boolean("the result of masks.from_function's fn", self.function(b, h, i, j))

    def lower(self, sizes):
        _check_lengths(self.label, (self.queries, self.keys), sizes)
        return super().lower(sizes)


def _check_lengths(name, made, sizes) -> None:
    came = (sizes.queries, sizes.keys)
    if not sizes.varlen and tuple(made) != came:
        raise ValueError(f"{name} was made for (Lq, Lk) = {tuple(made)}, got query and key with {came}")


@dataclass(frozen=True, eq=False)
class Flex(Mask):
    """A `torch.nn.attention.flex_attention.BlockMask`, with its own positions: i is the number of the query."""

    label = "a FlexAttention BlockMask"
    source: Any

    def kept(self):
        """With the BlockMask: this object is made anew for every call."""
        return _kept_of_block_masks.setdefault(self.source, {})

    def visible(self, b, h, i, j, sizes):
        says = self._blocks(sizes)
        batch, heads = (index if size != 1 else 0 for index, size in zip((b, h), says.shape[:2], strict=True))
        said = says[batch, heads, i // self.source.BLOCK_SIZE[0], j // self.source.BLOCK_SIZE[1]]
        return (said == _FULL) | (said == _PARTIAL) & self._by_function(b, h, i, j)

    def _by_function(self, b, h, i, j):
        """mask_mod is written for four numbers, so it is mapped over the four indices."""
        function = self.source.mask_mod
        for dim in reversed(range(4)):
            function = torch.vmap(function, in_dims=tuple(0 if d == dim else None for d in range(4)))
        return function(b.flatten(), h.flatten(), i.flatten(), j.flatten())

    def kinds(self, sizes):
        """Blocks of ours that lie within blocks of theirs which are all empty, or all full, need no look."""
        says = self._blocks(sizes).cpu()
        low, high = says.amin((0, 1)), says.amax((0, 1))
        for dim, (length, block) in enumerate(zip((sizes.queries, sizes.keys), self.source.BLOCK_SIZE, strict=True)):
            position = torch.arange(_tables.blocks(length) * _tables.BLOCK).clamp(max=length - 1) // block
            low, high = (x.index_select(dim, position).unflatten(dim, (-1, _tables.BLOCK)) for x in (low, high))
            low, high = low.amin(dim + 1), high.amax(dim + 1)
        every = torch.arange(low.numel()).view(low.shape) + 3
        return torch.where((low == high) & (low != _PARTIAL), low.long(), every)

    def lower(self, sizes):
        _check_lengths(self.label, self.source.seq_lengths, sizes)
        return super().lower(sizes)

    def _blocks(self, sizes):
        """What the BlockMask says of each of its blocks, uint8 (B|1, Hq|1, rows, columns)."""
        source = self.source
        listed = [(_PARTIAL, source.kv_num_blocks, source.kv_indices)]
        if source.full_kv_num_blocks is not None:
            listed.append((_FULL, source.full_kv_num_blocks, source.full_kv_indices))
        made, came = tuple(source.kv_num_blocks.shape[:2]), (sizes.batch, sizes.heads)
        if any(size != 1 and size != wanted for size, wanted in zip(made, came, strict=True)):
            raise ValueError(f"{self.label} must be made for (batch, heads) = {came} (or 1), got {made}")
        rows, columns = (-(-n // block) for n, block in zip(source.seq_lengths, source.BLOCK_SIZE, strict=True))
        says = torch.zeros((*made, rows, columns + 1), dtype=torch.uint8, device=sizes.device)
        for value, count, index in listed:
            _checks.same_device(self.label, index, sizes.device)
            used = torch.arange(index.shape[-1], device=sizes.device) < count[..., None]
            # What is not used goes to a column of its own, which is cut off.
            says = says.scatter(-1, torch.where(used, index, columns).long()[:, :, :rows], value)
        return says[..., :columns]


def from_function(fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], Lq: int, Lk: int) -> Mask:
    """Keys where fn(b, h, i, j) is True.

    fn is looked at once per mask, batch and heads, by stripes of up to 128 queries and 8192 keys, and what it said is
    kept: make a new mask where it would say something else. In a trace it is called on all indices at once.

    Args:
        fn: takes int64 index tensors b (B, 1, 1, 1), h (1, Hq, 1, 1), i (1, 1, m, 1) and j (1, 1, 1, n), with i the
            number of the query (not its absolute position); returns a bool tensor that broadcasts to (B, Hq, m, n).
        Lq, Lk: the lengths fn is meant for.
    Raises:
        TypeError if fn is not callable or returns another dtype, ValueError for other lengths at the call.
    """
    return Function(fn, Lq, Lk)
