"""Caches of keys and values: rows of a tensor, or pages that a table strings together."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._primitives import Sizes
from .masks import Lowered, Mask
from .masks._intervals import _intervals


class Cache(NamedTuple):
    """Keys and values (rows, page, Hkv, D): position j of sequence b is row table[b, j // page], column j % page."""

    keys: Tensor
    values: Tensor
    table: Tensor | None  # (B, pages) int64; None: one page per sequence, row b
    capacity: int  # positions per sequence

    def _where(self, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of these positions into the first two dimensions of `keys` and `values`."""
        if self.table is None:
            return rows, positions
        page = self.keys.shape[1]
        return self.table[rows, positions // page], positions % page

    def append(self, before: Tensor, k: Tensor, v: Tensor) -> None:
        """Write k and v (B, L_new, Hkv, D) to the positions from before[b] on."""
        positions = before[:, None] + torch.arange(k.shape[1], device=k.device)
        where = self._where(torch.arange(k.shape[0], device=k.device)[:, None].expand_as(positions), positions)
        self.keys.index_put_(where, k)
        self.values.index_put_(where, v)

    def read(self, length: int, row: int | None = None) -> tuple[Tensor, Tensor]:
        """The first `length` positions of all sequences, (B, length, Hkv, D), or of one of them."""
        rows = slice(None) if row is None else slice(row, row + 1)
        if self.table is None:
            return self.keys[rows, :length], self.values[rows, :length]
        size = self.keys.shape[1]
        if row is not None and self.table.shape[1] == 1:  # a view
            index = int(self.table[row, 0])
            return self.keys[index : index + 1, :length], self.values[index : index + 1, :length]
        # What no sequence uses of the table may be any number.
        pages = self.table[rows, : -(-length // size)].clamp(0, self.keys.shape[0] - 1)
        return tuple(x[:, :length][pages].flatten(1, 2)[:, :length] for x in (self.keys, self.values))


def cache_of(q: Tensor, k_cache: Tensor, v_cache: Tensor, batch_idx, block_table) -> Cache:
    """The cache that the arguments of `flash_attn_with_kvcache` describe."""
    batch, (rows, size) = q.shape[0], k_cache.shape[:2]
    if block_table is not None:
        if batch_idx is not None:
            raise ValueError("cache_batch_idx must be None with block_table, which says where each sequence is")
        if size == 0 or rows == 0:
            raise _checks.shape_error("k_cache", "(num_pages, page_size, Hkv, D)", "without a 0", k_cache)
        table = _page_table(block_table, k_cache, batch, torch.zeros(batch, dtype=torch.int64, device=q.device))
        return Cache(k_cache, v_cache, table, table.shape[1] * size)
    if batch_idx is not None:
        _vector("cache_batch_idx", batch_idx, q)
        # One page per sequence, as long as the cache.
        table = _page_table(batch_idx[:, None], k_cache, batch, torch.ones_like(batch_idx), "cache_batch_idx")
        return Cache(k_cache, v_cache, table, size)
    if rows < batch:
        raise _checks.shape_error("k_cache", f"({batch} or more, capacity, Hkv, D)", "to match q", k_cache)
    return Cache(k_cache[:batch], v_cache[:batch], None, size)


def gather_pages(k: Tensor, v: Tensor, table, cu_seqlens_k) -> tuple[Tensor, Tensor]:
    """Packed keys and values (total_k, Hkv, D) out of pages (num_pages, page_size, Hkv, D)."""
    cu = _checks.integer("cu_seqlens_k", cu_seqlens_k).long()
    if cu.dim() != 1 or cu.shape[0] < 1:
        raise _checks.shape_error("cu_seqlens_k", "(N + 1,)", "", cu_seqlens_k)
    for name, pages in (("k", k), ("v", v)):
        if pages.dim() != 4 or pages.shape[:2] != k.shape[:2] or pages.shape[1] == 0:
            raise _checks.shape_error(name, "(num_pages, page_size, Hkv, D)", "with block_table", pages)
    table = _page_table(table, k, cu.shape[0] - 1, cu.diff())
    place = torch.arange(int(cu[-1]), device=k.device)
    sequence = torch.bucketize(place, cu[1:].contiguous(), right=True)
    place = place - cu[sequence]
    where = table[sequence, place // k.shape[1]], place % k.shape[1]
    return k[where], v[where]


def _page_table(table, pages: Tensor, batch: int, lengths: Tensor, name: str = "block_table") -> Tensor:
    """The table as int64; the entries that these lengths use are checked where that needs no device sync."""
    if _checks.integer(name, table).dim() != 2 or table.shape[0] != batch:
        raise _checks.shape_error(name, f"({batch}, pages)", "", table)
    _checks.same_device(name, table, pages.device, "the cache")
    table = table.long()
    if _checks.is_readable(table) and batch:
        size = pages.shape[1]
        if int(lengths.max()) > table.shape[1] * size:
            wanted = -(-int(lengths.max()) // size)
            raise _checks.shape_error(name, f"({batch}, {wanted} or more)", f"for pages of {size}", table)
        used = torch.arange(table.shape[1], device=table.device) * size < lengths[:, None]
        wrong = used & ((table < 0) | (table >= pages.shape[0]))
        if wrong.any():
            raise ValueError(f"{name} must lie in [0, {pages.shape[0]}), got {int(table[wrong][0])}")
    return table


def _vector(name: str, value, q: Tensor) -> Tensor:
    if _checks.integer(name, value).shape != q.shape[:1]:
        raise _checks.shape_error(name, f"({q.shape[0]},)", "to match q", value)
    _checks.same_device(name, value, q.device, "q")
    return value.long()


def lengths_before(cache: Cache, q: Tensor, seqlens, new: int | None) -> Tensor:
    """cache_seqlens as (B,) int64; they are checked where that needs no device sync."""
    if seqlens is None:
        if new is not None:
            raise ValueError("cache_seqlens must be given with k and v: it says where to write them, got None")
        return torch.full(q.shape[:1], cache.capacity, device=q.device)
    if isinstance(seqlens, Tensor):
        lengths = _vector("cache_seqlens", seqlens, q)
    else:
        lengths = torch.full(q.shape[:1], _checks.length("cache_seqlens", seqlens), device=q.device)
    limit = cache.capacity - (new or 0)
    if _checks.is_readable(lengths) and lengths.numel():
        low, high = (int(bound) for bound in lengths.aminmax())
        if low < 0 or high > limit:
            what = f"the capacity of {cache.capacity}" + (f" less the {new} keys to append" if new else "")
            raise ValueError(f"cache_seqlens must lie in [0, {limit}], {what}, got {low if low < 0 else high}")
        if cache.table is not None and cache.keys.shape[1] != cache.capacity:
            _page_table(cache.table, cache.keys, q.shape[0], lengths + (new or 0))
    return lengths


def starts_of(leftpad, ends: Tensor) -> Tensor:
    """cache_leftpad as (B,) int64, at most the lengths."""
    if leftpad is None:
        return torch.zeros_like(ends)
    if _checks.integer("cache_leftpad", leftpad).shape != ends.shape:
        raise _checks.shape_error("cache_leftpad", f"({ends.shape[0]},)", "to match q", leftpad)
    _checks.same_device("cache_leftpad", leftpad, ends.device, "q")
    if _checks.is_readable(leftpad) and (leftpad < 0).any():
        raise ValueError(f"cache_leftpad must not be negative, got {int(leftpad.min())}")
    return torch.minimum(leftpad.long(), ends)


@dataclass(frozen=True, eq=False)
class Span(Mask):
    """Keys starts[b] <= j < ends[b], and of these what `window` allows if the last query stands at key ends[b] - 1."""

    label = "flash_attn_with_kvcache"
    starts: Tensor
    ends: Tensor
    window: Mask | None

    def lower(self, sizes: Sizes) -> Lowered:
        near = Lowered() if self.window is None else self.window.lower(sizes)
        place = torch.arange(sizes.queries, device=sizes.device) + (self.ends - sizes.queries)[:, None]
        low = torch.maximum(self.starts[:, None], place - near.left)
        high = torch.minimum(self.ends[:, None], place + near.right + 1)
        return Lowered(intervals=_intervals(low, high, sizes))
