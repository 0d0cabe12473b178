"""Biases and masks as pairs: what the user passes to pyext, and what it means densely, written from the contract."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from . import layouts, oracle

Tensor = torch.Tensor


@dataclass(frozen=True)
class Shape:
    """B, Hq, Hkv, Lq, Lk, D, Dv of one attention call."""

    b: int = 2
    hq: int = 4
    hkv: int = 4
    lq: int = 33
    lk: int = 33
    d: int = 16
    dv: int = 16

    def __str__(self) -> str:
        heads = f"{self.hq}" if self.hq == self.hkv else f"{self.hq}/{self.hkv}"
        return f"{self.b}x{heads}x{self.lq}x{self.lk}x{self.d}" + (f"-{self.dv}" if self.dv != self.d else "")


@dataclass
class Term:
    """keyword: where the object goes (bias, mask, attn_mask, is_causal). build(leaves) makes that object;
    score(leaves) is its dense value and allowed its dense bool mask, either None. score also finds the call's "query"
    and "key" among the leaves."""

    keyword: str
    build: Callable[[dict[str, Tensor]], object]
    leaves: dict[str, Tensor] = field(default_factory=dict)
    score: Callable[[dict[str, Tensor]], Tensor] | None = None
    allowed: Tensor | None = None
    rename: dict[str, str] = field(default_factory=dict)  # own leaf names to those of the case, set when drawn


@dataclass
class Context:
    """What parts draw from: numbers of the generator, on the default device."""

    shape: Shape
    dtype: torch.dtype
    generator: torch.Generator
    scale: float  # attention's

    def normal(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(*size, generator=self.generator, dtype=torch.float64, device="cpu")
        return values.to(torch.get_default_device(), self.dtype if dtype is None else dtype)

    def integers(self, low: int, high: int, *size: int) -> Tensor:
        """Uniform in low..high, both included."""
        return torch.randint(low, high + 1, size, generator=self.generator, device="cpu").to(torch.get_default_device())

    def bernoulli(self, p: float, *size: int) -> Tensor:
        return (torch.rand(*size, generator=self.generator, device="cpu") < p).to(torch.get_default_device())


Part = Callable[[Context], Term]


def part(function) -> Callable[..., Part]:
    """Turn f(context, *args) into f(*args) -> Part with a readable name, so that lists of cases read like user code."""

    @functools.wraps(function)
    def named(*args, **kwargs):
        bound = functools.partial(lambda context, a, k: function(context, *a, **k), a=args, k=kwargs)
        inner = [getattr(a, "label", str(a)).replace(" ", "") for a in args] + [
            f"{k}={v}".replace(" ", "") for k, v in kwargs.items()
        ]
        bound.label = function.__name__ + (f"({','.join(inner)})".replace(" ", "") if inner else "")
        return bound

    del named.__wrapped__  # its signature has the context, which callers of `named` do not pass
    return named


def _pyext():
    import pyext

    return pyext


def _broadcast_size(shape: Shape, which: str) -> tuple[int, ...]:
    """'bhqk' keeps every dimension, a '1' broadcasts it: '1h1k' is (1, H, 1, Lk); 'qk' and 'hqk' have fewer of them."""
    sizes = {"b": shape.b, "h": shape.hq, "q": shape.lq, "k": shape.lk, "1": 1}
    return tuple(sizes[letter] for letter in which)


# ---------------------------------------------------------------- masks


@part
def is_causal(c: Context) -> Term:
    """SDPA's own flag: upper-left aligned, key j is visible to query i if j <= i."""
    i, j = torch.arange(c.shape.lq).view(-1, 1), torch.arange(c.shape.lk).view(1, -1)
    return Term("is_causal", lambda _: True, allowed=j <= i)


@part
def causal(c: Context) -> Term:
    return Term("mask", lambda _: _pyext().masks.causal(), allowed=oracle.distance(c.shape.lq, c.shape.lk) <= 0)


@part
def torch_causal(c: Context, corner: str) -> Term:
    """torch.nn.attention.bias.causal_lower_right / causal_upper_left passed as attn_mask."""
    from torch.nn.attention import bias as torch_bias

    lq, lk = c.shape.lq, c.shape.lk
    i, j = torch.arange(lq).view(-1, 1), torch.arange(lk).view(1, -1)
    allowed = j <= i if corner == "upper_left" else j <= i + lk - lq
    return Term("attn_mask", lambda _: getattr(torch_bias, f"causal_{corner}")(lq, lk), allowed=allowed)


@part
def window(c: Context, left, right) -> Term:
    d = oracle.distance(c.shape.lq, c.shape.lk)
    allowed = torch.ones_like(d, dtype=torch.bool)
    if left is not None:
        allowed &= d >= -left
    if right is not None:
        allowed &= d <= right
    return Term("mask", lambda _: _pyext().masks.window(left, right), allowed=allowed)


@part
def padding(c: Context, keys=None, queries=None) -> Term:
    """Key lengths (and query lengths if `queries` is not None), random or as given; the first batch entry is full."""
    s = c.shape

    def lengths(given, longest):
        drawn = c.integers(0, longest, s.b) if given in (None, "random") else torch.tensor(given)
        if given in (None, "random") and s.b:
            drawn[0] = longest
        return drawn

    key_lengths = lengths(keys, s.lk)
    query_lengths = None if queries is None else lengths(queries, s.lq)
    allowed = (torch.arange(s.lk).view(1, -1) < key_lengths.view(-1, 1)).view(s.b, 1, 1, s.lk)
    if query_lengths is not None:
        allowed = allowed & (torch.arange(s.lq).view(1, -1) < query_lengths.view(-1, 1)).view(s.b, 1, s.lq, 1)
    return Term("mask", lambda _: _pyext().masks.padding(key_lengths, query_lengths), allowed=allowed)


@part
def documents(c: Context, batched=False, cross=False, count=4, mixed=False, rolled=False) -> Term:
    """Ids of packed sequences, contiguous unless mixed; with cross the keys have their own, not all on both sides.

    Then the first query's document has no key. Rolled, queries of the last document stand before all others, too.
    """
    s = c.shape
    rows = s.b if batched else 1

    def ids(n):
        drawn = c.integers(0, count - 1, rows, n)
        return drawn if mixed else drawn.sort(-1, descending=True).values

    ids_q = ids(s.lq)
    ids_k = ids(s.lk) if cross else ids_q.clone()
    if rolled:
        ids_q = ids_q.roll(s.lq // 3, -1)
    if cross:
        ids_q[:, :1] = count
    allowed = (ids_q.unsqueeze(-1) == ids_k.unsqueeze(-2)).unsqueeze(1)
    if not batched:
        ids_q, ids_k = ids_q[0], ids_k[0]
    return Term("mask", lambda _: _pyext().masks.documents(ids_q, ids_k if cross else None), allowed=allowed)


@part
def either(c: Context, length: int) -> Term:
    """A union: the first `length` keys or the query's own position."""
    s = c.shape
    lengths = torch.full((s.b,), length)
    allowed = (torch.arange(s.lk) < length).view(1, -1) | (oracle.distance(s.lq, s.lk) == 0)
    return Term("mask", lambda _: _pyext().masks.padding(lengths) | _pyext().masks.window(0, 0), allowed=allowed)


@part
def prefix(c: Context, lengths=None) -> Term:
    s = c.shape
    lengths = c.integers(0, s.lk, s.b) if lengths is None else torch.tensor(lengths)
    allowed = torch.arange(s.lk).view(1, 1, 1, -1) < lengths.view(-1, 1, 1, 1)
    allowed = allowed | (oracle.distance(s.lq, s.lk) <= 0)
    return Term("mask", lambda _: _pyext().masks.prefix(lengths), allowed=allowed)


def _positions(s: Shape) -> tuple[Tensor, Tensor]:
    """(Lq, 1) and (1, Lk): where queries and keys stand; the last query stands at the last key."""
    return torch.arange(s.lq).view(-1, 1) + s.lk - s.lq, torch.arange(s.lk).view(1, -1)


@part
def strided(c: Context, stride: int) -> Term:
    i, j = _positions(c.shape)
    back = i - j
    return Term(
        "mask", lambda _: _pyext().masks.strided(stride), allowed=(back < stride) | (back.remainder(stride) == 0)
    )


@part
def fixed(c: Context, stride: int, summary: int = 1) -> Term:
    i, j = _positions(c.shape)
    own = torch.div(i, stride, rounding_mode="floor") == torch.div(j, stride, rounding_mode="floor")
    allowed = own | (j.remainder(stride) >= stride - summary)
    return Term("mask", lambda _: _pyext().masks.fixed(stride, summary), allowed=allowed)


@part
def image(c: Context, kind: str, text: int, side: int, kernel: int = 3) -> Term:
    """kind: rows, columns or conv."""
    i, j = _positions(c.shape)
    row_i, column_i = torch.div(i - text, side, rounding_mode="floor"), (i - text).remainder(side)
    row_j, column_j = torch.div(j - text, side, rounding_mode="floor"), (j - text).remainder(side)
    near = {
        "rows": row_i == row_j,
        "columns": column_i == column_j,
        "conv": torch.maximum((row_i - row_j).abs(), (column_i - column_j).abs()) <= kernel // 2,
    }[kind]
    allowed = (j < text) | ((i >= text) & (j >= text) & (j <= i) & near)
    more = (kernel,) if kind == "conv" else ()
    return Term("mask", lambda _: getattr(_pyext().masks, f"image_{kind}")(text, side, *more), allowed=allowed)


@part
def permutation(c: Context, batched=False, exclude_self=False) -> Term:
    """Needs Lq <= Lk."""
    s = c.shape
    order = c.normal(s.b if batched else 1, s.lk, dtype=torch.float64).argsort(-1)
    rank = torch.zeros_like(order).scatter_(-1, order, torch.arange(s.lk).expand_as(order))
    own, every = rank[:, s.lk - s.lq :, None], rank[:, None, :]
    allowed = (every < own if exclude_self else every <= own).unsqueeze(1)
    order = order if batched else order[0]
    return Term("mask", lambda _: _pyext().masks.permutation(order, exclude_self), allowed=allowed)


@part
def function(c: Context, which="bhqk", density=0.6) -> Term:
    """from_function of a random table: it depends on what `which` names, as in dense_mask."""
    s = c.shape
    table = c.bernoulli(density, *_broadcast_size(s, which))

    def fn(b, h, i, j):
        return table[tuple(x if n != 1 else 0 for x, n in zip((b, h, i, j), table.shape))]

    return Term("mask", lambda _: _pyext().masks.from_function(fn, s.lq, s.lk), allowed=table)


@part
def block_mask(c: Context, size: int | tuple[int, int] = 128, batch=False, heads=False) -> Term:
    """FlexAttention's own object, with empty, partial and full blocks; batch, heads: whether these matter."""
    from torch.nn.attention.flex_attention import create_block_mask

    s = c.shape

    def fn(b, h, i, j):
        return (j <= i + (5 * b if batch else 0)) | ((i + 2 * j + (h if heads else 0)) % 7 == 0) & (j < i + 100)

    b = torch.arange(s.b if batch else 1).view(-1, 1, 1, 1)
    h = torch.arange(s.hq if heads else 1).view(1, -1, 1, 1)
    allowed = fn(b, h, torch.arange(s.lq).view(-1, 1), torch.arange(s.lk))
    made = create_block_mask(fn, s.b if batch else None, s.hq if heads else None, s.lq, s.lk, "cpu", size)
    return Term("mask", lambda _: made, allowed=allowed)


@part
def union(c: Context, *parts: Part) -> Term:
    """`|` of masks."""
    terms = [make(c) for make in parts]
    allowed = functools.reduce(operator.or_, (term.allowed for term in terms))
    return Term("mask", lambda _: functools.reduce(operator.or_, (term.build({}) for term in terms)), allowed=allowed)


def _bool_mask(c: Context, which: str, density: float) -> Tensor:
    values = c.bernoulli(density, *_broadcast_size(c.shape, which))
    if values.dim() == 4:
        values = layouts.place(values, "padded_rows")
    return values


@part
def dense_mask(c: Context, which="bhqk", density=0.7) -> Term:
    allowed = _bool_mask(c, which, density)
    return Term("mask", lambda _: _pyext().masks.dense(allowed), allowed=allowed)


@part
def bool_attn_mask(c: Context, which="bhqk", density=0.7) -> Term:
    allowed = _bool_mask(c, which, density)
    return Term("attn_mask", lambda _: allowed, allowed=allowed)


# ---------------------------------------------------------------- biases


def _dense_values(c: Context, which: str, layout: str, dtype) -> Tensor:
    values = c.normal(*_broadcast_size(c.shape, which), dtype=dtype)
    if values.dim() == 4:
        values = layouts.place(values, layout)
    return values.requires_grad_()


@part
def float_attn_mask(c: Context, which="bhqk", layout="contiguous") -> Term:
    values = _dense_values(c, which, layout, None)
    return Term("attn_mask", lambda t: t["attn_mask"], {"attn_mask": values}, lambda t: t["attn_mask"])


@part
def frozen_attn_mask(c: Context, value: float, which="bhqk", density=0.7) -> Term:
    """The additive mask that libraries build: 0 where visible, `value` (-inf, "min") elsewhere, without gradient."""
    value = torch.finfo(c.dtype).min if value == "min" else value
    values = torch.zeros(_broadcast_size(c.shape, which), dtype=c.dtype)
    values.masked_fill_(~c.bernoulli(density, *values.shape), value)
    return Term("attn_mask", lambda _: values, score=lambda _: values)


@part
def dense(c: Context, which="bhqk", layout="contiguous", dtype=None, holes=False) -> Term:
    """holes: a fifth of the entries is -inf, and they too have a gradient: zero."""
    values = _dense_values(c, which, layout, dtype)
    if holes:
        values = values.detach().masked_fill(c.bernoulli(0.2, *values.shape), -math.inf).requires_grad_()
    return Term("bias", lambda t: _pyext().bias.dense(t["dense"]), {"dense": values}, lambda t: t["dense"])


@part
def diagonal(c: Context, heads="h", dtype=None) -> Term:
    s = c.shape
    values = c.normal(s.hq if heads == "h" else 1, max(s.lq + s.lk - 1, 0), dtype=dtype).requires_grad_()
    index = oracle.distance(s.lq, s.lk) + s.lk - 1
    return Term(
        "bias", lambda t: _pyext().bias.diagonal(t["diagonal"]), {"diagonal": values}, lambda t: t["diagonal"][:, index]
    )


@part
def alibi(c: Context, symmetric=False, learned=True, dtype=None) -> Term:
    """BLOOM's slopes 2^(-8 (h+1) / H), perturbed so that no two runs see the same ones."""
    s = c.shape
    slopes = 2.0 ** (-8.0 * torch.arange(1, s.hq + 1, dtype=torch.float64) / s.hq)
    slopes = (slopes * (1.0 + 0.1 * c.normal(s.hq, dtype=torch.float64))).to(c.dtype if dtype is None else dtype)
    d = oracle.distance(s.lq, s.lk)

    def score(leaves):
        values = leaves["slopes"] if learned else slopes.to(torch.float64)
        return values.view(-1, 1, 1) * (-d.abs() if symmetric else d)

    if learned:
        leaves = {"slopes": slopes.requires_grad_()}
        return Term("bias", lambda t: _pyext().bias.alibi(t["slopes"], symmetric=symmetric), leaves, score)
    return Term("bias", lambda _: _pyext().bias.alibi(slopes, symmetric=symmetric), {}, score)


@part
def t5(c: Context, bidirectional=True, buckets=32, max_distance=128, dtype=None) -> Term:
    s = c.shape
    table = c.normal(buckets, s.hq, dtype=dtype).requires_grad_()
    bucket = oracle.t5_bucket(oracle.distance(s.lq, s.lk), bidirectional, buckets, max_distance)
    return Term(
        "bias",
        lambda t: _pyext().bias.t5(t["table"], bidirectional, max_distance=max_distance),
        {"table": table},
        lambda t: t["table"][bucket].permute(2, 0, 1),
    )


# ---------------------------------------------------------------- relative rows and segments


def query_rows(queries: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """queries (B,H,Lq,D) times rows (..., H|1, R, D): pair (i, j) reads row index[i, j], and zero where that is < 0."""
    product = oracle.matmul(queries, rows.to(queries.dtype).transpose(-1, -2).expand(*queries.shape[:2], -1, -1))
    if product.shape[-1] == 0:
        return product.new_zeros(*product.shape[:2], *index.shape) * rows.sum()
    i = torch.arange(index.shape[0]).view(-1, 1)
    return product[:, :, i, index.clamp(min=0)].masked_fill(index < 0, 0.0)


def key_rows(keys: Tensor, rows: Tensor, index: Tensor, heads: int) -> Tensor:
    """The same for keys (B,Hkv,Lk,D)."""
    keys = keys.repeat_interleave(heads // keys.shape[1], 1)
    return query_rows(keys, rows, index.t()).transpose(-1, -2)


@part
def transformer_xl(c: Context, rows="all", u=True, v=True, heads="h", dtype=None, batched=False) -> Term:
    """rows: one for each distance ("all"), for those up to 0 ("past"), for -Lk ... Lq - 1 ("xlnet"), or for a few."""
    s = c.shape
    first, length, given = {
        "all": (1 - s.lk, max(s.lq + s.lk - 1, 0), None),
        "past": (1 - s.lk, s.lk, None),
        "xlnet": (-s.lk, s.lq + s.lk, -s.lk),
        "few": (-4, 7, -4),
    }[rows]
    h = s.hq if heads == "h" else 1
    leaves = {"r": c.normal(*((s.b,) if batched else ()), length, h, s.d, dtype=dtype)}
    leaves.update({name: c.normal(h, s.d, dtype=dtype) for name, there in (("u", u), ("v", v)) if there})
    row = oracle.distance(s.lq, s.lk) - first
    row = row.masked_fill((row < 0) | (row >= length), -1)

    def score(t):
        zero = t["query"].new_zeros(())
        queries = t["query"] + (t["v"].to(c.dtype).to(t["query"].dtype).unsqueeze(1) if v else zero)
        value = query_rows(queries, t["r"].transpose(-2, -3), row)
        if u:
            shift = t["u"].to(t["key"].dtype).expand(s.hq, s.d).view(1, s.hq, 1, s.d)
            keys = t["key"].repeat_interleave(s.hq // s.hkv, 1)
            value = value + oracle.matmul(shift.expand(s.b, -1, -1, -1), keys.transpose(-1, -2))
        return value * c.scale

    def build(t):
        return _pyext().bias.transformer_xl(t["r"], t.get("u"), t.get("v"), given)

    return Term("bias", build, {name: leaf.requires_grad_() for name, leaf in leaves.items()}, score)


@part
def shaw(c: Context, max_distance=5, heads="", dtype=None) -> Term:
    s = c.shape
    size = {"": (), "h": (s.hq,), "1": (1,)}[heads]
    rel_key = c.normal(*size, 2 * max_distance + 1, s.d, dtype=dtype).requires_grad_()
    row = oracle.distance(s.lq, s.lk).clamp(-max_distance, max_distance) + max_distance
    return Term(
        "bias",
        lambda t: _pyext().bias.shaw(t["rel_key"], max_distance),
        {"rel_key": rel_key},
        lambda t: query_rows(t["query"], t["rel_key"], row) * c.scale,
    )


@part
def disentangled(
    c: Context, terms="both", buckets=None, max_position=12, heads="h", batched=False, scale=None, dtype=None
) -> Term:
    """terms: c2p, p2c or both. scale: its own, or attention's."""
    s, span = c.shape, buckets or max_position
    size = *((s.b,) if batched else ()), s.hq if heads == "h" else 1, 2 * span, s.d
    names = [name for name, term in (("pos_key", "c2p"), ("pos_query", "p2c")) if terms in ("both", term)]
    leaves = {name: c.normal(*size, dtype=dtype).requires_grad_() for name in names}
    position = -oracle.distance(s.lq, s.lk)
    if buckets:
        position = oracle.deberta_bucket(position, buckets, max_position)
    row = (position + span).clamp(0, 2 * span - 1)

    def score(t):
        value = t["query"].new_zeros(())
        if "pos_key" in t:
            value = value + query_rows(t["query"], t["pos_key"], row)
        if "pos_query" in t:
            value = value + key_rows(t["key"], t["pos_query"], row, s.hq)
        return value * (c.scale if scale is None else scale)

    def build(t):
        numbers = dict(buckets=buckets, max_position=max_position, scale=scale)
        return _pyext().bias.disentangled(t.get("pos_key"), t.get("pos_query"), **numbers)

    return Term("bias", build, leaves, score)


@part
def segment(c: Context, which="bhq", batched=True, count=2, dtype=None) -> Term:
    s = c.shape
    values = c.normal(*_broadcast_size(s, which), 2, dtype=dtype).requires_grad_()
    size = (s.b,) if batched else ()
    seg_q, seg_k = c.integers(0, count - 1, *size, s.lq), c.integers(0, count - 1, *size, s.lk)
    same = (seg_q.unsqueeze(-1) == seg_k.unsqueeze(-2)).view(s.b if batched else 1, 1, s.lq, s.lk)
    return Term(
        "bias",
        lambda t: _pyext().bias.segment(t["scores"], seg_q, seg_k),
        {"scores": values},
        lambda t: torch.where(same, t["scores"][..., 1:], t["scores"][..., :1]),
    )
