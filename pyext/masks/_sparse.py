"""Sparse patterns of published models: Sparse Transformer (GPT-3), DALL-E, XLNet."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks
from .._primitives import BLOCK, Sizes
from . import _tables
from ._base import Lowered, Mask, once
from ._parts import Part, Range


@dataclass(frozen=True)
class _Closed(Mask):
    """A closed form of absolute positions: that of query i is i + Lk - Lq, that of key j is j."""

    closed = True

    def __post_init__(self):
        for name, value in self.__dict__.items():
            label = f"{self.label} {name}"
            if _checks.length(label, value) < self._least(name):
                raise ValueError(f"{label} must be a positive int, got {value}")

    def _least(self, name: str) -> int:
        return 1

    def visible(self, b, h, i, j, sizes):
        return self.shows(i + (sizes.keys - sizes.queries), j)

    def shows(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether the query at position i sees the key at position j."""
        raise TypeError(f"{type(self).__name__} does not define shows()")


def _corners(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Positions of the first query of each row of blocks (rows, 1) and of the first key of each column (1, columns)."""
    row, column = (torch.arange(_tables.blocks(length)) * BLOCK for length in (sizes.queries, sizes.keys))
    return row[:, None] + (sizes.keys - sizes.queries), column[None]


@dataclass(frozen=True)
class Strided(_Closed):
    """See `strided`."""

    label = "masks.strided"
    reorders = True
    stride: int

    def shows(self, i, j):
        return (i - j < self.stride) | ((i - j) % self.stride == 0)

    def kinds(self, sizes):
        return _tables.differences(sizes)

    def parts(self, sizes):
        """Everything less than a stride back, and the earlier keys of the query's residue class."""
        i, j = _positions(sizes)
        near, far = Range(Lowered(left=self.stride - 1)), Range(Lowered(right=-self.stride), i % self.stride)
        return Part((near,)), Part((far,), j % self.stride)


def _positions(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Positions of all queries (1, Lq) and keys (1, Lk)."""
    i, j = (torch.arange(length, device=sizes.device)[None] for length in (sizes.queries, sizes.keys))
    return i + (sizes.keys - sizes.queries), j


@dataclass(frozen=True)
class Fixed(_Closed):
    """See `fixed`."""

    label = "masks.fixed"
    reorders = True
    stride: int
    summary: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.summary > self.stride:
            raise ValueError(f"masks.fixed summary must be at most stride = {self.stride}, got {self.summary}")

    def shows(self, i, j):
        return (i // self.stride == j // self.stride) | (j % self.stride >= self.stride - self.summary)

    def kinds(self, sizes):
        """Periodic in j, and where a query may meet its own stretch of `stride` positions also in i."""
        i, j = _corners(sizes)
        last = BLOCK - 1
        meet = (i // self.stride <= (j + last) // self.stride) & (j // self.stride <= (i + last) // self.stride)
        near = _tables.joint(i % self.stride, j - i)
        return torch.where(meet, near, near.max() + 1 + j % self.stride)

    def parts(self, sizes):
        """With the summaries gathered before the other keys: all of them, and the rest of the query's stretch."""
        i, j = _positions(sizes)
        start = i - i % self.stride
        stretch = torch.stack((start, start + self.stride), dim=-1).clamp(0, sizes.keys).to(torch.int32)
        rest = (j % self.stride < self.stride - self.summary).long()
        return (Part((Range(Lowered()), Range(Lowered(intervals=stretch), 1)), rest),)


@dataclass(frozen=True)
class _Image(_Closed):
    """Text positions, then a side x side image in raster order."""

    text_len: int
    side: int

    def _least(self, name):
        return 0 if name == "text_len" else 1

    def shows(self, i, j):
        t, u = i - self.text_len, j - self.text_len
        return (u < 0) | (t >= 0) & (u <= t) & self.near(t, u)

    def near(self, t: Tensor, u: Tensor) -> Tensor:
        """Whether image position t sees the earlier (or equal) image position u."""
        raise TypeError(f"{type(self).__name__} does not define near()")

    def pattern(self, t: Tensor, u: Tensor) -> Tensor:
        """`kinds` of blocks that start at image positions t and u."""
        raise TypeError(f"{type(self).__name__} does not define pattern()")

    def reaching(self, t: Tensor, u: Tensor, reach: int) -> Tensor:
        """`pattern` of what looks back at most `reach` positions and depends on rows and columns of the image."""
        touch = (u <= t + BLOCK - 1) & (u + BLOCK - 1 >= t - reach)
        return torch.where(touch, 1 + _tables.joint(t % self.side, u - t), 0)

    def kinds(self, sizes):
        """Text keys: all visible. Image keys of text queries: none. Blocks with both kinds are looked at one by one."""
        t, u = (corner - self.text_len for corner in _corners(sizes))
        mixed = ((t < 0) & (t > -BLOCK)) | ((u < 0) & (u > -BLOCK))
        pattern = 2 + self.pattern(t, u)
        every = pattern.max() + 1 + torch.arange(pattern.numel()).view(pattern.shape)
        return torch.where(mixed, every, torch.where(u < 0, 0, torch.where(t < 0, 1, pattern)))


@dataclass(frozen=True)
class ImageRows(_Image):
    """See `image_rows`."""

    label = "masks.image_rows"

    def near(self, t, u):
        return t // self.side == u // self.side

    def pattern(self, t, u):
        return self.reaching(t, u, self.side - 1)


@dataclass(frozen=True)
class ImageColumns(_Image):
    """See `image_columns`."""

    label = "masks.image_columns"
    reorders = True

    def near(self, t, u):
        return (t - u) % self.side == 0

    def pattern(self, t, u):
        return u - t - (u - t).min()

    def parts(self, sizes):
        """The text, which everybody sees, and the earlier keys of the query's column: sorted, two ranges."""
        i, j = _positions(sizes)
        # The text is class 0. Its queries look for a column in it too, within an empty range.
        column, of_key = (torch.where(x < self.text_len, 0, 1 + (x - self.text_len) % self.side) for x in (i, j))
        own = torch.stack((torch.where(column > 0, 0, sizes.keys).expand_as(i), i + 1), dim=-1)
        own = own.clamp(0, sizes.keys).to(torch.int32)
        return (Part((Range(Lowered()), Range(Lowered(intervals=own), column)), of_key),)


@dataclass(frozen=True)
class ImageConv(_Image):
    """See `image_conv`."""

    label = "masks.image_conv"
    kernel: int

    def near(self, t, u):
        reach = self.kernel // 2
        rows, columns = t // self.side - u // self.side, t % self.side - u % self.side
        return (rows.abs() <= reach) & (columns.abs() <= reach)

    def pattern(self, t, u):
        return self.reaching(t, u, self.kernel // 2 * (self.side + 1))


@dataclass(frozen=True, eq=False)
class Permutation(Mask):
    """See `permutation`."""

    label = "masks.permutation"
    reorders = True
    order: Tensor
    exclude_self: bool = False

    def __post_init__(self):
        if _checks.integer("masks.permutation order", self.order).dim() not in (1, 2):
            raise _checks.shape_error("masks.permutation order", "(L,) or (B, L)", "", self.order)
        _checks.flag("masks.permutation exclude_self", self.exclude_self)
        if _checks.is_readable(self.order):
            places = torch.arange(self.order.shape[-1])
            if not (self.order.sort(dim=-1).values == places).all():
                raise ValueError("masks.permutation order must list each of the positions 0 to L - 1 once")

    def visible(self, b, h, i, j, sizes):
        rank = self._ranks(sizes)
        b = b if rank.shape[0] != 1 else 0
        earlier, own = rank[b, j], rank[b, i + (sizes.keys - sizes.queries)]
        return earlier < own if self.exclude_self else earlier <= own

    def patterns(self, sizes):
        rank = self._ranks(sizes)
        own = rank[:, sizes.keys - sizes.queries :]
        return _tables.ranges(rank, None, own - 1 if self.exclude_self else own, sizes)

    def parts(self, sizes):
        """Causal attention, in factorisation order."""
        rank = self._ranks(sizes)
        own = rank[:, sizes.keys - sizes.queries :]
        high = own if self.exclude_self else own + 1
        seen = torch.stack((torch.zeros_like(high), high), dim=-1).to(torch.int32)
        return (Part((Range(Lowered(intervals=seen)),), ranks=(own, rank)),)

    def _ranks(self, sizes):
        """(B|1, Lk) int32: the rank of each position, checked against the call."""
        order = self.order if self.order.dim() == 2 else self.order[None]
        if order.shape[1] != sizes.keys or (order.shape[0] != 1 and order.shape[0] != sizes.batch):
            expected = f"({sizes.keys},) or ({sizes.batch}, {sizes.keys})"
            raise _checks.shape_error("masks.permutation order", expected, "to match key", self.order)
        if sizes.queries > sizes.keys:
            raise ValueError(f"{self.label} must have no more queries than keys, got {sizes.queries} and {sizes.keys}")
        _checks.same_device("masks.permutation order", self.order, sizes.device)
        return once(_ranks, self, sizes) if _checks.is_eager() else _ranks(self, sizes)


def _ranks(mask: Permutation, sizes: Sizes) -> Tensor:
    order = mask.order if mask.order.dim() == 2 else mask.order[None]
    return order.argsort(dim=1).to(torch.int32)  # int32 compares faster than int64


def strided(stride: int) -> Mask:
    """Keys less than `stride` back or a multiple of it back: i - j < stride or (i - j) % stride == 0.

    i is the absolute position i + Lk - Lq of the query: the last query stands at the last key. Keys ahead of the query
    are all visible; combine it with `causal()`. Then, without a bias or dropout, attention sorts the positions by
    residue and costs what the visible pairs cost.

    Args:
        stride: a positive int.
    Raises:
        TypeError or ValueError for anything else.
    Source: Child et al., "Generating long sequences with Sparse Transformers" (2019), section 4.2; both heads of its
        strided pattern at once, as in section 4.3's merged head. Its A1 also has i - j == stride, which is in A2.
    """
    return Strided(stride)


def fixed(stride: int, summary: int = 1) -> Mask:
    """Keys in the query's own stretch of `stride` positions, or among the last `summary` of any stretch.

    i // stride == j // stride or j % stride >= stride - summary, where i is the absolute position i + Lk - Lq of the
    query. Combine it with `causal()`. Then, without a bias or dropout, attention gathers the summaries first.

    Args:
        stride, summary: positive ints, summary <= stride.
    Raises:
        TypeError or ValueError for anything else.
    Source: Child et al. (2019), section 4.2 (c is `summary`); GPT-3 (2020), section 2.1.
    """
    return Fixed(stride, summary)


def image_rows(text_len: int, side: int) -> Mask:
    """All of the text, and earlier image positions of the query's row.

    Position p = j, or i + Lk - Lq for a query: p < text_len is text, p - text_len = t is at row t // side and column
    t % side of the image. Every query sees all keys of the text (combine it with `causal()` for its order), text
    queries see nothing else; an image query also sees the image keys of its row up to itself.

    DALL-E's own row mask goes on across the border of the row, back to the same column of the row above (figure 11a):
    that is `image_rows(text_len, side) | window(side, 0)`.

    Args:
        text_len: a non-negative int.
        side: a positive int; positions beyond side * side go on with further rows.
    Raises:
        TypeError or ValueError for anything else.
    Source: Ramesh et al., "Zero-shot text-to-image generation" (2021), appendix B.1.
    """
    return ImageRows(text_len, side)


def image_columns(text_len: int, side: int) -> Mask:
    """All of the text, and earlier image positions of the query's column. See `image_rows` for positions and text.

    DALL-E transposes the image to get here (figure 11b and c); this mask does not ask for that: without a bias or
    dropout, attention sorts the positions by column itself.

    Args, Raises, Source: as in `image_rows`.
    """
    return ImageColumns(text_len, side)


def image_conv(text_len: int, side: int, kernel: int) -> Mask:
    """All of the text, and earlier image positions at most kernel // 2 rows and columns away from the query.

    See `image_rows` for positions and text. DALL-E's neighbourhood wraps around the border of a row (figure 11d); this
    one ends there, as a convolution's does.

    Args:
        kernel: a positive int; 11 in DALL-E.
    The others, Raises, Source: as in `image_rows`.
    """
    return ImageConv(text_len, side, kernel)


def permutation(order: Tensor, exclude_self: bool = False) -> Mask:
    """Keys that come no later than the query in a factorisation order: rank[j] <= rank[i], rank[order[n]] = n.

    i is the absolute position i + Lk - Lq of the query. Alone, and without a bias or dropout, attention sorts the
    positions by rank and costs what causal attention costs.

    Args:
        order: (L,) or (B, L) integers with L = Lk, the positions in factorisation order.
        exclude_self: strictly earlier keys only: XLNet's query stream (False: its content stream).
    Raises:
        TypeError for other dtypes; ValueError for another shape or device, more queries than keys, or an order that is
        no permutation (where that can be read).
    Source: Yang et al., XLNet (2019), section 2.3.
    """
    return Permutation(order, exclude_self)
