"""Biases in which queries or keys meet rows of the distance (Transformer-XL, XLNet, Shaw, DeBERTa), and segments."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks
from .._primitives import Sizes
from ._base import Bias, Lowered, Rule, check_heads, not_packed, one_row_each


@dataclass(frozen=True, eq=False)
class TransformerXL(Bias):
    """See `transformer_xl`."""

    r: Tensor
    u: Tensor | None = None
    v: Tensor | None = None
    first_distance: int | None = None

    def __post_init__(self):
        if _checks.floating("bias.transformer_xl r", self.r).dim() not in (3, 4):
            raise _checks.shape_error("bias.transformer_xl r", "(Lr, H, D) or (B, Lr, H, D)", "", self.r)
        for name in ("u", "v"):
            shift = getattr(self, name)
            if shift is not None and _checks.floating(f"bias.transformer_xl {name}", shift).dim() != 2:
                raise _checks.shape_error(f"bias.transformer_xl {name}", "(H, D)", "", shift)
        if self.first_distance is not None:
            _checks.whole("bias.transformer_xl first_distance", self.first_distance)

    def lower(self, sizes: Sizes) -> Lowered:
        heads, width = sizes.heads, sizes.query.shape[3]
        batch = "" if self.r.dim() == 3 else f"{sizes.batch}, "
        _check_rows("bias.transformer_xl r", self.r, self.r.dim() - 2, f"({batch}Lr, {heads}, {width})", sizes)
        for name in ("u", "v"):
            if getattr(self, name) is not None:
                _check_rows(f"bias.transformer_xl {name}", getattr(self, name), 0, f"({heads}, {width})", sizes)
        r = (self.r if self.r.dim() == 4 else self.r[None]).transpose(1, 2).to(sizes.query.dtype)
        rows, rule = _row_per_distance(r, self.first_distance, sizes)
        return Lowered(rel_q=rows, rel_rule=rule, rel_shift=self.v, **self._content(rows, sizes))

    def _content(self, rows: Tensor, sizes: Sizes) -> dict:
        """scale * u.k. Without a softcap the query takes u in; a softcap would bend it, so it enters beside."""
        if self.u is None:
            return {}
        if not sizes.softcap:
            return {"key_shift": self.u}
        if sizes.varlen:  # which has no dense term: every row that keys meet is u
            u = self.u.to(rows.dtype)[None, :, None]
            return {"rel_k": u.expand(-1, -1, rows.shape[2], -1)}
        kv_heads, width = sizes.key.shape[1], sizes.key.shape[3]
        u = self.u.to(sizes.acc).expand(sizes.heads, width)
        u = u.reshape(kv_heads, sizes.heads // max(kv_heads, 1), 1, width)
        # not a matmul, which autocast would take to half precision
        content = (u * sizes.key.to(sizes.acc)[:, :, None]).sum(-1)  # (B, Hkv, Hq / Hkv, Lk)
        return {"dense": sizes.scale * content.flatten(1, 2)[:, :, None]}


def _check_rows(name: str, value: Tensor, head_dim: int, expected: str, sizes: Sizes) -> None:
    """Raise unless heads and features fit the query, and the batch where there is one."""
    fits = value.shape[-1] == sizes.query.shape[3] and (value.dim() < 4 or value.shape[0] in (1, sizes.batch))
    if not fits:
        raise _checks.shape_error(name, expected, "to match query", value)
    check_heads(name, value, head_dim, expected, sizes)
    if sizes.varlen and value.dim() == 4:
        raise not_packed(name, "tensor with a batch")


def _row_per_distance(rows: Tensor, first: int | None, sizes: Sizes) -> tuple[Tensor, Rule]:
    """Rows (B|1, H|1, R, D) and their rule, from rows that stand for the distances `first`, first + 1, ..."""
    low, high = 1 - sizes.keys, 1 - sizes.keys + sizes.strip  # the distances of the call: low <= distance < high
    first = low if first is None else first
    length = rows.shape[2]
    if first <= low and high <= first + length:
        return rows.narrow(2, low - first, sizes.strip), Rule(one_row_each, first=low)
    zeros = rows.new_zeros((rows.shape[0], rows.shape[1], 1, rows.shape[3]))
    return torch.cat([rows, zeros], dim=2), Rule(_row_or_zeros, (length,), first)


def _row_or_zeros(position: Tensor, length: int) -> Tensor:
    """The rule of `length` rows followed by a row of zeros, which all other positions read."""
    return torch.where((position >= 0) & (position < length), position, length)


@dataclass(frozen=True, eq=False)
class Shaw(Bias):
    """See `shaw`."""

    rel_key: Tensor
    max_distance: int

    def __post_init__(self):
        rows = 2 * _checks.length("bias.shaw max_distance", self.max_distance) + 1
        rel_key = _checks.floating("bias.shaw rel_key", self.rel_key)
        if rel_key.dim() not in (2, 3) or rel_key.shape[-2] != rows:
            expected = f"({rows}, D) or (H, {rows}, D), that is 2 * max_distance + 1 rows"
            raise _checks.shape_error("bias.shaw rel_key", expected, "", rel_key)

    def lower(self, sizes: Sizes) -> Lowered:
        rows = self.rel_key if self.rel_key.dim() == 3 else self.rel_key[None]
        expected = f"({sizes.heads}, {rows.shape[1]}, {sizes.query.shape[3]}), with or without heads,"
        _check_rows("bias.shaw rel_key", rows, 0, expected, sizes)
        return Lowered(rel_q=rows[None].to(sizes.query.dtype), rel_rule=Rule(_clipped, (self.max_distance,)))


def _clipped(distance: Tensor, max_distance: int) -> Tensor:
    return distance.clamp(-max_distance, max_distance) + max_distance


@dataclass(frozen=True, eq=False)
class Disentangled(Bias):
    """See `disentangled`."""

    pos_key: Tensor | None
    pos_query: Tensor | None
    buckets: int | None
    max_position: int
    scale: float | None

    def __post_init__(self):
        if self.pos_key is None and self.pos_query is None:
            raise ValueError("bias.disentangled pos_key must be a tensor where pos_query is None, got None for both")
        span = self._span()
        for name in ("pos_key", "pos_query"):
            rows = getattr(self, name)
            if rows is None:
                continue
            if _checks.floating(f"bias.disentangled {name}", rows).dim() not in (3, 4) or rows.shape[-2] != 2 * span:
                why = "(2 * buckets rows)" if self.buckets else "(2 * max_position rows)"
                expected = f"(H, {2 * span}, D) or (B, H, {2 * span}, D)"
                raise _checks.shape_error(f"bias.disentangled {name}", expected, why, rows)
        if self.scale is not None:
            _checks.real("bias.disentangled scale", self.scale)

    def _span(self) -> int:
        """How many rows each side of distance 0 has."""
        if _checks.length("bias.disentangled max_position", self.max_position) < 1:
            raise ValueError(f"bias.disentangled max_position must be positive, got {self.max_position}")
        if self.buckets is None:
            return self.max_position
        if _checks.length("bias.disentangled buckets", self.buckets) < 2:
            raise ValueError(f"bias.disentangled buckets must be at least 2 (or None), got {self.buckets}")
        if self.max_position - 1 <= self.buckets // 2:  # the logarithm would run from this distance to that one
            raise ValueError(
                f"bias.disentangled max_position must be greater than {self.buckets // 2 + 1} with {self.buckets} "
                f"buckets, got {self.max_position}"
            )
        return self.buckets

    def lower(self, sizes: Sizes) -> Lowered:
        rule = Rule(_disentangled_row, (self.buckets, self.max_position))
        return Lowered(rel_q=self._rows("pos_key", sizes), rel_k=self._rows("pos_query", sizes), rel_rule=rule)

    def _rows(self, name: str, sizes: Sizes) -> Tensor | None:
        """(B|1, H|1, 2 span, D), multiplied by what this bias' scale is more than attention's."""
        rows = getattr(self, name)
        if rows is None:
            return None
        name = f"bias.disentangled {name}"
        batch = "" if rows.dim() == 3 else f"{sizes.batch}, "
        expected = f"({batch}{sizes.heads}, {rows.shape[-2]}, {sizes.query.shape[3]})"
        _check_rows(name, rows, rows.dim() - 3, expected, sizes)
        if self.scale is not None and self.scale != sizes.scale:
            if sizes.scale == 0.0:
                raise ValueError(f"bias.disentangled scale must be None or 0 where attention's is 0, got {self.scale}")
            rows = rows.to(sizes.acc) * (self.scale / sizes.scale)
        return (rows if rows.dim() == 4 else rows[None]).to(sizes.query.dtype)


def deberta_bucket(position: Tensor, buckets: int, max_position: int) -> Tensor:
    """DeBERTa's log bucket of a relative position (query minus key), int64 of the same shape; an odd function.

    Up to buckets // 2 positions have a bucket each, then `buckets - 1` is reached at max_position - 1. Logarithm,
    division, product and ceiling happen in float32 and in the order of Transformers' `make_log_bucket_position`.
    """
    middle = buckets // 2
    # what lies nearer has no use for the logarithm, and log(0) * 0 would be NaN, which no integer holds
    distance = position.abs().clamp(min=max(middle, 1))
    whole = torch.log(torch.tensor((max_position - 1) / middle, dtype=torch.float32, device=position.device))
    far = torch.ceil(torch.log(distance.float() / middle) / whole * (middle - 1)) + middle
    return torch.where(position.abs() <= middle, position, far.to(torch.int64) * position.sign())


def _disentangled_row(distance: Tensor, buckets: int | None, max_position: int) -> Tensor:
    """clamp(bucket(i - j) + span, 0, 2 span - 1) for distance = j - i.

    The published code reads p2c's rows at clamp(span - bucket(j - i)): the same, as the bucket is odd.
    """
    span = buckets or max_position
    bucket = -distance if buckets is None else deberta_bucket(-distance, buckets, max_position)
    return (bucket + span).clamp(0, 2 * span - 1)


@dataclass(frozen=True, eq=False)
class Segment(Bias):
    """See `segment`."""

    scores: Tensor
    seg_q: Tensor
    seg_k: Tensor

    def __post_init__(self):
        scores = _checks.floating("bias.segment scores", self.scores)
        if scores.dim() < 2 or scores.shape[-1] != 2:
            raise _checks.shape_error("bias.segment scores", "(B, H, Lq, 2)", "", scores)
        for name in ("seg_q", "seg_k"):
            ids = _checks.integer(f"bias.segment {name}", getattr(self, name))
            if ids.dim() not in (1, 2):
                raise _checks.shape_error(f"bias.segment {name}", "(L,) or (B, L)", "", ids)

    def lower(self, sizes: Sizes) -> Lowered:
        if sizes.varlen:
            raise not_packed("bias.segment", "segment bias")
        _checks.same_device("bias.segment scores", self.scores, sizes.device)
        scores = _checks.broadcastable("bias.segment scores", self.scores, sizes.lead, sizes.heads, sizes.queries, 2)
        scores = scores.to(sizes.acc).expand(sizes.batch, sizes.heads, sizes.queries, 2)
        seg_q = self._ids("seg_q", "query", sizes.queries, sizes)
        seg_k = self._ids("seg_k", "key", sizes.keys, sizes)
        if seg_q.dtype == torch.int64 or seg_k.dtype == torch.int64:
            # int32 may not hold the ids, but it holds their ranks, which are equal where the ids are
            ordered = torch.cat([seg_q.flatten(), seg_k.flatten()]).to(torch.int64).sort().values
            seg_q, seg_k = (
                torch.searchsorted(ordered, ids.to(torch.int64).contiguous(), out_int32=True) for ids in (seg_q, seg_k)
            )
        return Lowered(segment=scores, segment_q=seg_q.to(torch.int32), segment_k=seg_k.to(torch.int32))

    def _ids(self, name: str, against: str, length: int, sizes: Sizes) -> Tensor:
        """Ids as (B|1, L)."""
        ids = getattr(self, name)
        if ids.shape[-1] != length or (ids.dim() == 2 and ids.shape[0] not in (1, sizes.batch)):
            expected = f"({length},) or ({sizes.batch}, {length})"
            raise _checks.shape_error(f"bias.segment {name}", expected, f"to match {against}", ids)
        _checks.same_device(f"bias.segment {name}", ids, sizes.device)
        return ids if ids.dim() == 2 else ids[None]


def transformer_xl(
    r: Tensor, u: Tensor | None = None, v: Tensor | None = None, first_distance: int | None = None
) -> Bias:
    """score(h, i, j) += scale * (u[h].k_j + (q_i + v[h]).r[distance - first_distance, h]), scale being attention's own.

    Row p of r stands for distance first_distance + p. A distance without a row adds the u term alone. The u term is
    never softcapped, as no bias is.

    Args:
        r: (Lr, H, D) or (Lr, 1, D), any float dtype; with a batch (B, Lr, H, D). Only the rows of distances that
            occur are read.
        u, v: (H, D) or (1, D), any float dtype, or None for zero. They are cast to the query's dtype.
        first_distance: int; None = -(Lk - 1), the smallest distance of the call (XLNet: -Lk). In `varlen_attention`
            distances are those of each sequence, and None = -(total_k - 1).
    Raises:
        TypeError if r, u or v is no float tensor or first_distance no int; ValueError for other shapes, and for an r
        with a batch in `varlen_attention`.
    Source: Dai et al., Transformer-XL (ACL 2019), section 3.3; Yang et al., XLNet (NeurIPS 2019).
    """
    return TransformerXL(r, u, v, first_distance)


def shaw(rel_key: Tensor, max_distance: int) -> Bias:
    """score(h, i, j) += scale * q_i.rel_key[clip(distance, -max_distance, max_distance) + max_distance].

    Args:
        rel_key: (2 * max_distance + 1, D), or per head (H, 2 * max_distance + 1, D); any float dtype, cast to the
            query's.
        max_distance: int >= 0.
    Raises:
        TypeError if rel_key is no float tensor or max_distance no int; ValueError for another shape.
    Source: Shaw, Uszkoreit and Vaswani, "Self-attention with relative position representations" (NAACL 2018), eq. 5.
    """
    return Shaw(rel_key, max_distance)


def disentangled(
    pos_key: Tensor | None,
    pos_query: Tensor | None = None,
    *,
    buckets: int | None = None,
    max_position: int,
    scale: float | None = None,
) -> Bias:
    """score(h, i, j) += scale * (q_i.pos_key[h, row] + k_j.pos_query[h, row]): c2p and p2c of DeBERTa.

    row = clamp(bucket(-distance) + span, 0, 2 span - 1). Without `buckets` (v1) the bucket is the distance itself and
    span = max_position; with them (v2, v3) near distances have a bucket each, far ones share logarithmically growing
    buckets up to max_position, and span = buckets. The rule equals Transformers' `make_log_bucket_position` to the
    bit, its float32 logarithm included.

    Args:
        pos_key, pos_query: (H, 2 span, D) or (1, 2 span, D), with a batch (B, H, 2 span, D); any float dtype, cast to
            the query's. None leaves the term out; not both.
        buckets: int >= 2, the models' `position_buckets`; None for clipped distances (where the models' is <= 0).
        max_position: int, the models' `max_relative_positions` (their `max_position_embeddings` where that is < 1).
        scale: factor on both terms; None = attention's own. DeBERTa divides both and q.k by sqrt(D * (1 + number of
            terms)), so pass that scale to attention.
    Raises:
        TypeError if a tensor or number is none; ValueError for other shapes, for numbers that do not fit together, and
        for a batch in `varlen_attention`.
    Source: He et al., DeBERTa (ICLR 2021), eq. 4, and DeBERTaV3 (ICLR 2023).
    """
    return Disentangled(pos_key, pos_query, buckets if buckets is None else _positive(buckets), max_position, scale)


def _positive(buckets: int) -> int | None:
    """None for the models' way to say no buckets, a number <= 0."""
    return None if isinstance(buckets, int) and not isinstance(buckets, bool) and buckets <= 0 else buckets


def segment(scores: Tensor, seg_q: Tensor, seg_k: Tensor) -> Bias:
    """score(h, i, j) += scores[b, h, i, 1 if seg_q[b, i] == seg_k[b, j] else 0]: XLNet's `ef` term.

    Args:
        scores: (B, H, Lq, 2), or broadcastable to it; any float dtype. XLNet's (q_i + r_s_bias).seg_embed * scale,
            where its seg_embed[0] is for equal segments: flip it.
        seg_q, seg_k: (B, Lq) and (B, Lk), or (Lq,) and (Lk,), integers of any size.
    Raises:
        TypeError if scores is no float tensor or ids are no integers; ValueError for other shapes and in
        `varlen_attention`.
    Source: Yang et al., XLNet (NeurIPS 2019), section 2.5.
    """
    return Segment(scores, seg_q, seg_k)
