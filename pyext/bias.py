"""Position biases: what is added to the attention score. Small value objects; combine them with `+`.

    out = pyext.attention(q, k, v, bias=pyext.bias.t5(table, bidirectional=True) + pyext.bias.dense(pair))

Every tensor inside a bias gets its gradient. Biases that depend on the distance only cost O(Lq + Lk) memory.
Positions: distance = j - (i + Lk - Lq), so the last query stands at the last key.

A bias lowers to the primitives of `AttentionProblem` with ordinary differentiable torch ops: `dense`
(B|1, H|1, Lq|1, Lk), or a strip `diag` (H|1, R) with the index of the entry that each distance reads.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._primitives import Sizes


class Lowered(NamedTuple):
    """The primitives a bias lowers to; see `AttentionProblem` for their shapes."""

    dense: Tensor | None = None
    diag: Tensor | None = None
    diag_index: Tensor | None = None


class Bias:
    """Base of all biases. `a + b` adds their scores."""

    def __add__(self, other: "Bias") -> "Bias":
        if not isinstance(other, Bias):
            return NotImplemented
        return Sum((*self.terms(), *other.terms()))

    def __radd__(self, other) -> "Bias":
        # sum([a, b]) starts from 0
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def terms(self) -> tuple["Bias", ...]:
        """The summands."""
        return (self,)

    def lower(self, sizes: Sizes) -> Lowered:
        """The primitives of this bias in a call of these sizes; raises ValueError where its tensors do not fit."""
        raise TypeError(f"{type(self).__name__} does not define lower()")


@dataclass(frozen=True, eq=False)
class Sum(Bias):
    """The sum of several biases (made by `+`)."""

    parts: tuple[Bias, ...]

    def terms(self) -> tuple[Bias, ...]:
        return self.parts

    def lower(self, sizes: Sizes) -> Lowered:
        lowered = [part.lower(sizes) for part in self.parts]
        dense = [low.dense for low in lowered if low.dense is not None]
        strips = [(low.diag, low.diag_index) for low in lowered if low.diag is not None]
        if len(dense) > 1:  # in the accumulation dtype: a sum of bf16 biases must not be rounded to bf16
            dense = [functools.reduce(torch.add, [term.to(sizes.acc) for term in dense])]
        if len(strips) > 1:
            strips = [(functools.reduce(torch.add, [_expand(*strip) for strip in strips]), None)]
        diag, diag_index = strips[0] if strips else (None, None)
        return Lowered(dense[0] if dense else None, diag, diag_index)


def _expand(diag: Tensor, diag_index: Tensor | None) -> Tensor:
    """A strip with one value per distance."""
    return diag if diag_index is None else diag.index_select(1, diag_index)


def _heads(name: str, value: Tensor, dim: int, expected: str, sizes: Sizes) -> None:
    """Raise unless dimension `dim` counts the query heads, or is 1 (the same for all heads)."""
    if value.shape[dim] != sizes.heads and value.shape[dim] != 1:
        raise _checks.shape_error(name, expected, "to match query", value)
    _checks.same_device(name, value, sizes.device)


@dataclass(frozen=True, eq=False)
class Dense(Bias):
    """See `dense`."""

    values: Tensor
    name: str = "bias.dense values"

    def __post_init__(self):
        _checks.floating(self.name, self.values)

    def lower(self, sizes: Sizes) -> Lowered:
        if sizes.varlen:
            raise ValueError(
                f"{self.name}: a dense bias has no meaning in varlen_attention, where every sequence has its own score "
                "matrix; use bias.diagonal, bias.alibi or bias.t5 there, or pyext.attention on padded tensors"
            )
        _checks.same_device(self.name, self.values, sizes.device)
        view = _checks.broadcastable(self.name, self.values, sizes.lead, sizes.heads, sizes.queries, sizes.keys)
        if view.dtype == torch.float64:  # no kernel adds in more than the accumulator's precision
            view = view.to(sizes.acc)
        return Lowered(dense=view)


@dataclass(frozen=True, eq=False)
class Diagonal(Bias):
    """See `diagonal`."""

    values: Tensor

    def __post_init__(self):
        if _checks.floating("bias.diagonal values", self.values).dim() != 2:
            raise _checks.shape_error("bias.diagonal values", "(H, Lq + Lk - 1)", "", self.values)

    def lower(self, sizes: Sizes) -> Lowered:
        total = "total_q + total_k" if sizes.varlen else "Lq + Lk"
        expected = f"({sizes.heads}, {sizes.strip}), that is (H, {total} - 1),"
        if self.values.shape[1] != sizes.strip:
            raise _checks.shape_error("bias.diagonal values", expected, "to match query and key", self.values)
        _heads("bias.diagonal values", self.values, 0, expected, sizes)
        return Lowered(diag=self.values.to(sizes.acc).contiguous())


@dataclass(frozen=True, eq=False)
class Alibi(Bias):
    """See `alibi`."""

    slopes: Tensor
    symmetric: bool = False

    def __post_init__(self):
        if _checks.floating("bias.alibi slopes", self.slopes).dim() != 1:
            raise _checks.shape_error("bias.alibi slopes", "(H,)", "", self.slopes)

    def lower(self, sizes: Sizes) -> Lowered:
        _heads("bias.alibi slopes", self.slopes, 0, f"({sizes.heads},)", sizes)
        distance = _strip_distances(sizes).to(sizes.acc)
        if self.symmetric:
            distance = -distance.abs()
        return Lowered(diag=self.slopes.to(sizes.acc)[:, None] * distance)


@dataclass(frozen=True, eq=False)
class T5(Bias):
    """See `t5`."""

    table: Tensor
    bidirectional: bool
    max_distance: int = 128

    def __post_init__(self):
        if _checks.floating("bias.t5 table", self.table).dim() != 2:
            raise _checks.shape_error("bias.t5 table", "(num_buckets, H)", "", self.table)
        _checks.length("bias.t5 max_distance", self.max_distance)
        exact = _exact_buckets(self.table.shape[0], self.bidirectional)
        if exact < 1:
            least = 4 if self.bidirectional else 2
            raise _checks.shape_error("bias.t5 table", f"(num_buckets >= {least}, H)", "", self.table)
        if self.max_distance <= exact:
            raise ValueError(
                f"bias.t5 max_distance must be greater than {exact}, the number of distances with a bucket of their "
                f"own in a table of {self.table.shape[0]} buckets, got {self.max_distance}"
            )

    def lower(self, sizes: Sizes) -> Lowered:
        _heads("bias.t5 table", self.table, 1, f"(num_buckets, {sizes.heads})", sizes)
        index = _bucket_index(self.table.shape[0], bool(self.bidirectional), self.max_distance, sizes)
        return Lowered(diag=self.table.to(sizes.acc).t().contiguous(), diag_index=index)


def dense(t: Tensor) -> Bias:
    """score(h, i, j) += t[b, h, i, j].

    Args:
        t: float tensor, broadcastable to (..., Hq, Lq, Lk) with the leading dimensions of the query; any float
            dtype. Its gradient is reduced over the broadcast dimensions inside the backward kernel.
    Raises:
        TypeError if t is not a float tensor; ValueError at the call if it does not broadcast.
    Source: SDPA's float `attn_mask`.
    """
    return Dense(t)


def diagonal(values: Tensor) -> Bias:
    """score(h, i, j) += values[h, distance + Lk - 1]: any Toeplitz bias.

    Args:
        values: (H, Lq + Lk - 1) or (1, Lq + Lk - 1), any float dtype. Index 0 stands for the smallest distance,
            -(Lk - 1), the last for Lq - 1. In `varlen_attention`: (H, total_q + total_k - 1) with distance 0 at
            index total_k - 1.
    Raises:
        TypeError if values is not a float tensor; ValueError if it has another shape.
    """
    return Diagonal(values)


def alibi(slopes: Tensor, symmetric: bool = False) -> Bias:
    """score(h, i, j) += slopes[h] * distance, or -slopes[h] * |distance| if symmetric.

    Keys before the query have negative distances, so positive slopes favour near keys.

    Args:
        slopes: (H,) or (1,), any float dtype; may be learned.
    Raises:
        TypeError if slopes is not a float tensor; ValueError if it has another shape.
    Source: Press, Smith and Lewis, "Train short, test long" (ALiBi, ICLR 2022), section 3; BLOOM.
    """
    return Alibi(slopes, _checks.flag("bias.alibi symmetric", symmetric))


def t5(table: Tensor, bidirectional: bool, max_distance: int = 128) -> Bias:
    """score(h, i, j) += table[bucket(distance), h].

    Near distances have a bucket each, far ones share logarithmically growing buckets up to `max_distance`, beyond
    which all share the last. The rule equals Transformers' `_relative_position_bucket` to the bit, its float32
    logarithm included.

    Args:
        table: (num_buckets, H) or (num_buckets, 1), any float dtype: the layout of T5's
            `relative_attention_bias.weight`.
        bidirectional: True in encoders (half of the buckets for keys after the query), False in decoders (keys after
            the query share bucket 0 with distance 0).
        max_distance: int > num_buckets // 2 (// 4 if bidirectional).
    Raises:
        TypeError if table is not a float tensor; ValueError for another shape, too few buckets or too small a
        max_distance.
    Source: Raffel et al., T5 (JMLR 2020), section 2.1, and the Mesh TensorFlow code it points to.
    """
    return T5(table, _checks.flag("bias.t5 bidirectional", bidirectional), max_distance)


def _strip_distances(sizes: Sizes) -> Tensor:
    """The distance that each strip position stands for, int64 (Lq + Lk - 1,)."""
    return torch.arange(sizes.strip, device=sizes.device) - (sizes.keys - 1)


def _exact_buckets(num_buckets: int, bidirectional: bool) -> int:
    """How many distances have a bucket of their own (on each side)."""
    return num_buckets // 4 if bidirectional else num_buckets // 2


def t5_bucket(distance: Tensor, num_buckets: int, bidirectional: bool, max_distance: int) -> Tensor:
    """The T5 bucket of each distance (key position minus query position), int64 of the same shape.

    Logarithm, division, product and truncation happen in float32 and in the order of the original: some borders
    between buckets fall on integers, where rounding decides.
    """
    side = num_buckets // 2 if bidirectional else num_buckets
    offset = (distance > 0).to(torch.int64) * side if bidirectional else 0
    distance = distance.abs() if bidirectional else -distance.clamp(max=0)
    exact = side // 2
    # clamp: log(0) would be -inf, whose conversion to an integer is undefined; near distances do not use the value
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (side - exact)).to(torch.int64)).clamp(max=side - 1)
    return offset + torch.where(distance < exact, distance, far)


@functools.lru_cache(maxsize=16)
def _bucket_table(num_buckets: int, bidirectional: bool, max_distance: int, reach: int, device: torch.device) -> Tensor:
    """Buckets of the distances -(reach - 1) ... reach - 1 as int32. Not an inference tensor: autograd saves it."""
    with torch.inference_mode(False):
        distance = torch.arange(1 - reach, reach, device=device)
        return t5_bucket(distance, num_buckets, bidirectional, max_distance).to(torch.int32)


def _bucket_index(num_buckets: int, bidirectional: bool, max_distance: int, sizes: Sizes) -> Tensor:
    """`diag_index` of a T5 bias: int32 (Lq + Lk - 1,)."""
    if not _checks.is_eager():
        distance = _strip_distances(sizes)
        return t5_bucket(distance, num_buckets, bidirectional, max_distance).to(torch.int32)
    # One table per power of two: the calls of a growing KV cache read slices of the same one.
    reach = 1 << max(sizes.queries, sizes.keys, 64).bit_length()
    first = reach - sizes.keys
    return _bucket_table(num_buckets, bidirectional, max_distance, reach, sizes.device)[first : first + sizes.strip]
