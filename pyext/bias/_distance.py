"""Biases that are values: dense ones, and functions of the distance alone (diagonal strips, ALiBi, T5)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks
from .._primitives import Sizes
from ._base import Bias, Lowered, Rule, check_heads, not_packed


@dataclass(frozen=True, eq=False)
class Dense(Bias):
    """See `dense`."""

    values: Tensor
    name: str = "bias.dense values"

    def __post_init__(self):
        _checks.floating(self.name, self.values)

    def lower(self, sizes: Sizes) -> Lowered:
        if sizes.varlen:
            raise not_packed(self.name, "dense bias")
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
        check_heads("bias.diagonal values", self.values, 0, expected, sizes)
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
        check_heads("bias.alibi slopes", self.slopes, 0, f"({sizes.heads},)", sizes)
        distance = sizes.distances.to(sizes.acc)
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
        check_heads("bias.t5 table", self.table, 1, f"(num_buckets, {sizes.heads})", sizes)
        rule = Rule(t5_bucket, (self.table.shape[0], bool(self.bidirectional), self.max_distance))
        return Lowered(diag=self.table.to(sizes.acc).t().contiguous(), diag_index=rule.index(sizes))


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
