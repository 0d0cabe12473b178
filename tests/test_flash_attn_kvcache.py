"""flash_attn_with_kvcache against a cache kept as a list of rows in plain PyTorch, and `bert_padding`."""

from __future__ import annotations

import pytest
import torch

from pyext import bert_padding
from pyext import flash_attn_interface as flash
from support import oracle

HEADS, GROUPS, WIDTH, CAPACITY, PAGE = 4, 2, 16, 24, 4
LENGTHS = (3, 0, 17)  # in use before the call
TOLERANCE = {torch.float64: dict(rtol=1e-10, atol=1e-11), torch.float32: dict(rtol=2e-4, atol=2e-4)}


def turn(x, cos, sin, positions, interleaved):
    """Rotary embedding of x (L, H, D) by the formula."""
    half = cos.shape[1]
    c, s = (table[positions][:, None] for table in (cos, sin))
    if interleaved:
        first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    else:
        first, second = x[..., :half], x[..., half : 2 * half]
    pair = first * c - second * s, second * c + first * s
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((turned, x[..., 2 * half :]), -1)


class Plain:
    """What flash-attn's docstring says, one sequence at a time. `rows` holds (keys, values) of (capacity, H, D)."""

    def __init__(self, rows, lengths, leftpad=None):
        self.rows, self.lengths = [tuple(x.clone() for x in row) for row in rows], list(lengths)
        self.leftpad = leftpad or [0] * len(self.rows)

    def call(self, q, k=None, v=None, cos=None, sin=None, interleaved=True, causal=False, window=(-1, -1), **options):
        outs, lses = [], []
        for b, (keys, values) in enumerate(self.rows):
            length, own = self.lengths[b], q[b]
            if k is not None:
                new, rotated = k.shape[1], k[b]
                if cos is not None:
                    rotated = turn(rotated, cos, sin, length + torch.arange(new), interleaved)
                    steps = torch.arange(q.shape[1]) * (causal or tuple(window) != (-1, -1))
                    own = turn(own, cos, sin, length + steps, interleaved)
                keys[length : length + new], values[length : length + new] = rotated, v[b]
                length += new
            used = slice(min(self.leftpad[b], length), length)
            out, lse = self._attend(own, keys[used], values[used], b, causal, window, **options)
            outs.append(out), lses.append(lse)
        return torch.stack(outs), torch.stack(lses)

    @staticmethod
    def _attend(q, k, v, b, causal, window, slopes=None, scale=None, softcap=None):
        d = oracle.distance(q.shape[0], k.shape[0])
        left, right = window[0], 0 if causal else window[1]
        allowed = ((d >= -left) | (left < 0)) & ((d <= right) | (right < 0))
        score = None
        if slopes is not None:
            score = -(slopes if slopes.dim() == 1 else slopes[b]).view(-1, 1, 1) * d.abs()
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        out, lse = oracle.attention(*heads_first, scale=scale, softcap=softcap, score=score, allowed=allowed)
        return out[0].transpose(0, 1), lse[0]


class Stored:
    """The same caches as flash-attn stores them, NaN wherever nothing was written."""

    def __init__(self, rows, lengths, layout):
        self.layout, batch = layout, len(rows)
        poisoned = [torch.stack(x).clone() for x in zip(*rows)]
        for x in poisoned:
            for b, length in enumerate(lengths):
                x[b, length:] = torch.nan
        self.arguments = {}
        if layout == "indexed":
            self.index = torch.randperm(batch + 2)[:batch].int()
            self.tensors = [x.new_full((batch + 2, *x.shape[1:]), torch.nan) for x in poisoned]
            for into, x in zip(self.tensors, poisoned):
                into[self.index.long()] = x
            self.arguments["cache_batch_idx"] = self.index
        elif layout == "paged":
            pages = CAPACITY // PAGE
            self.table = torch.randperm(batch * pages + 3)[: batch * pages].view(batch, pages).int()
            self.tensors = [x.new_full((batch * pages + 3, PAGE, *x.shape[2:]), torch.nan) for x in poisoned]
            for into, x in zip(self.tensors, poisoned):
                into[self.table.long()] = x.unflatten(1, (pages, PAGE))
            self.arguments["block_table"] = self.table
        else:
            self.tensors = poisoned

    def rows(self):
        """(keys, values), each (B, capacity, H, D)."""
        if self.layout == "indexed":
            return [x[self.index.long()] for x in self.tensors]
        return [x[self.table.long()].flatten(1, 2) for x in self.tensors] if self.layout == "paged" else self.tensors


def draw(lengths, queries, new, dtype):
    def normal(*size):
        return torch.randn(*size, dtype=dtype)

    rows = [(normal(CAPACITY, GROUPS, WIDTH), normal(CAPACITY, GROUPS, WIDTH)) for _ in lengths]
    q = normal(len(lengths), queries, HEADS, WIDTH)
    k, v = (normal(len(lengths), new, GROUPS, WIDTH) if new else None for _ in range(2))
    return rows, q, k, v


def check(backend, layout, lengths, seqlens, queries, new, plain, given, leftpad=None, call=None):
    """One call on stored caches against the plain one: out, lse, and the caches afterwards.

    plain, given: the same options for `Plain.call` and for flash-attn's function.
    """
    dtype = backend.widest
    rows, q, k, v = draw(lengths, queries, new, dtype)
    stored, expected = Stored(rows, lengths, layout), Plain(rows, lengths, leftpad)
    wanted = expected.call(q, k, v, **plain)
    if leftpad is not None:
        given = {**given, "cache_leftpad": torch.tensor(leftpad, dtype=torch.int32)}
    call = call or flash.flash_attn_with_kvcache
    got = call(
        q, *stored.tensors, k, v, cache_seqlens=seqlens, **stored.arguments, **given, return_softmax_lse=True,
        impl=backend.impl,
    )  # fmt: skip
    for name, a, b in zip(("out", "lse"), got, wanted):
        torch.testing.assert_close(a, b, **TOLERANCE[dtype], msg=lambda m, n=name: f"{n}: {m}")
    for found, kept in zip(stored.rows(), zip(*expected.rows)):
        for b, length in enumerate(lengths):
            torch.testing.assert_close(found[b, : length + new], kept[b][: length + new], **TOLERANCE[dtype])
            assert found[b, length + new :].isnan().all()


def tables(dtype, half=5):
    angle = torch.randn(CAPACITY + 8, half, dtype=dtype)
    return angle.cos(), angle.sin()


def seqlens_of(lengths, kind):
    return lengths[0] if kind == "int" else torch.tensor(lengths, dtype=torch.int32)


LAYOUTS = ("rows", "indexed", "paged")
OPTIONS = {
    "plain": ({}, {}),
    "causal": (dict(causal=True),) * 2,
    "window": (dict(window=(4, 1)), dict(window_size=(4, 1))),
    "softcap, scale": (dict(softcap=2.0, scale=0.5), dict(softcap=2.0, softmax_scale=0.5)),
}


@pytest.mark.parametrize("queries, new", [(1, 1), (3, 3), (5, 2), (2, 0)])
@pytest.mark.parametrize("kind", ["int", "tensor"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_append_and_attend(name, layout, kind, queries, new, fp64_backend):
    lengths = LENGTHS if kind == "tensor" else (9, 9)
    check(fp64_backend, layout, lengths, seqlens_of(lengths, kind), queries, new, *OPTIONS[name])


@pytest.mark.parametrize("shared", [True, False], ids=["(H,)", "(B, H)"])
@pytest.mark.parametrize("kind", ["int", "tensor"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_alibi(layout, kind, shared, fp64_backend):
    lengths = LENGTHS if kind == "tensor" else (9, 9)
    slopes = torch.rand((HEADS,) if shared else (len(lengths), HEADS), dtype=torch.float64)
    options = dict(slopes=slopes, causal=True), dict(alibi_slopes=slopes, causal=True)
    check(fp64_backend, layout, lengths, seqlens_of(lengths, kind), 3, 3, *options)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("order", [{}, dict(causal=True), dict(window=(6, 0))], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotary(layout, order, interleaved, fp64_backend):
    """Without an order among them, all queries stand at the first new position."""
    cos, sin = tables(torch.float64)
    plain = dict(cos=cos, sin=sin, interleaved=interleaved, **order)
    given = dict(rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved)
    given.update({"window_size" if name == "window" else name: value for name, value in order.items()})
    check(fp64_backend, layout, LENGTHS, torch.tensor(LENGTHS), 3, 2, plain, given)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["int", "tensor"])
def test_leftpad(kind, layout, fp64_backend):
    """Keys before leftpad[b] do not exist; one beyond the length leaves none."""
    lengths = LENGTHS if kind == "tensor" else (9, 9, 9)
    seqlens = seqlens_of(lengths, kind)
    cos, sin = tables(torch.float64)
    plain, given = dict(causal=True, cos=cos, sin=sin), dict(causal=True, rotary_cos=cos, rotary_sin=sin)
    check(fp64_backend, layout, lengths, seqlens, 2, 2, plain, given, leftpad=[1, 5, 11])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled(layout, family):
    """In a trace the lengths are not known: one call with intervals serves all sequences."""
    torch._dynamo.reset()
    call = torch.compile(flash.flash_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    cos, sin = tables(family.widest)
    plain, given = dict(causal=True, window=(7, 0)), dict(causal=True, window_size=(7, 0))
    plain.update(cos=cos, sin=sin)
    given.update(rotary_cos=cos, rotary_sin=sin)
    check(family, layout, LENGTHS, torch.tensor(LENGTHS), 3, 3, plain, given, leftpad=[0, 1, 4], call=call)


def test_whole_cache_is_the_default(fp64_backend):
    q, cache = torch.randn(2, 3, HEADS, WIDTH), torch.randn(3, 10, GROUPS, WIDTH)
    out = flash.flash_attn_with_kvcache(q, cache, cache, causal=True, num_splits=4, impl=fp64_backend.impl)
    wanted = flash.flash_attn_func(q, cache[:2], cache[:2], causal=True, impl=fp64_backend.impl)
    torch.testing.assert_close(out, wanted)


def test_generation_equals_one_pass(family):
    """Prefill, then tokens one by one, give the rows of one causal call."""
    dtype = family.widest
    q, k, v = (torch.randn(2, CAPACITY, h, WIDTH, dtype=dtype) for h in (HEADS, GROUPS, GROUPS))
    wanted = flash.flash_attn_func(q, k, v, causal=True, impl=family.impl)
    caches = [torch.full_like(x, torch.nan) for x in (k, v)]
    outs, length = [], 0
    for step in (9, *(1,) * (CAPACITY - 9)):
        new = (x[:, length : length + step] for x in (q, k, v))
        now, *keys = new
        seqlens = torch.full((2,), length) if step == 1 else length
        options = dict(cache_seqlens=seqlens, causal=True, impl=family.impl)
        outs.append(flash.flash_attn_with_kvcache(now, *caches, *keys, **options))
        length += step
    torch.testing.assert_close(torch.cat(outs, 1), wanted, **TOLERANCE[dtype])
    assert torch.equal(caches[0], k) and torch.equal(caches[1], v)


Q, CACHE, NEW = torch.zeros(2, 1, 4, 16), torch.zeros(2, 8, 2, 16), torch.zeros(2, 1, 2, 16)
COS, TABLE = torch.zeros(8, 4), torch.tensor([[0, 1], [-1, -1]])


def bad(q=Q, k_cache=CACHE, v_cache=CACHE, **options):
    return flash.flash_attn_with_kvcache(q, k_cache, v_cache, **options)


BAD = {
    "q must have shape (B, L, H, D)": dict(q=Q[0]),
    "k_cache must have dtype torch.float32 to match q": dict(k_cache=CACHE.double()),
    "k_cache must have shape (rows, capacity, Hkv, 16)": dict(k_cache=CACHE[..., :8]),
    "k_cache must have shape (2 or more, capacity, Hkv, D)": dict(k_cache=CACHE[:1], v_cache=CACHE[:1]),
    "v_cache must have shape (2, 8, 2, D)": dict(v_cache=CACHE[:, :5]),
    "k and v must be given together, got k alone": dict(k=NEW, cache_seqlens=1),
    "k must have shape (2, 1, 2, 16)": dict(k=NEW[:1], v=NEW, cache_seqlens=1),
    "v must have shape (2, 1, 2, 16)": dict(k=NEW, v=NEW[..., :8], cache_seqlens=1),
    "cache_seqlens must be given with k and v": dict(k=NEW, v=NEW),
    "cache_seqlens must lie in [0, 7], the capacity of 8 less the 1 keys": dict(k=NEW, v=NEW, cache_seqlens=8),
    "cache_seqlens must lie in [0, 8], the capacity of 8, got -1": dict(cache_seqlens=torch.tensor([3, -1])),
    "cache_seqlens must have shape (2,)": dict(cache_seqlens=torch.tensor([3])),
    "cache_seqlens must be an int": dict(cache_seqlens=1.5),
    "cache_leftpad must have shape (2,)": dict(cache_leftpad=torch.tensor([3])),
    "cache_leftpad must not be negative": dict(cache_leftpad=torch.tensor([3, -1])),
    "cache_batch_idx must have shape (2,)": dict(cache_batch_idx=torch.tensor([0])),
    "cache_batch_idx must lie in [0, 2), got 2": dict(cache_batch_idx=torch.tensor([0, 2])),
    "cache_batch_idx must be None with block_table": dict(cache_batch_idx=torch.tensor([0, 1]), block_table=TABLE),
    "block_table must have shape (2, pages)": dict(block_table=TABLE[:1], cache_seqlens=1),
    "block_table must lie in [0, 2), got -1": dict(block_table=TABLE, cache_seqlens=torch.tensor([9, 3])),
    "rotary_cos and rotary_sin must be given together": dict(k=NEW, v=NEW, cache_seqlens=1, rotary_cos=COS),
    "k and v must be given with rotary_cos": dict(rotary_cos=COS, rotary_sin=COS),
    "rotary_cos must have shape (L_max, R/2) with R/2 <= 8": dict(
        k=NEW, v=NEW, cache_seqlens=1, rotary_cos=torch.zeros(8, 9), rotary_sin=torch.zeros(8, 9)
    ),
    "positions must lie in [0, 8)": dict(
        k_cache=CACHE.repeat(1, 2, 1, 1), v_cache=CACHE.repeat(1, 2, 1, 1), k=NEW, v=NEW, cache_seqlens=9,
        rotary_cos=COS, rotary_sin=COS,
    ),
    "num_splits must be a non-negative int": dict(num_splits=-1),
    "return_softmax_lse must be a bool": dict(return_softmax_lse="yes"),
    "impl must be one of": dict(k=NEW, v=NEW, cache_seqlens=1, impl="fast"),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    options = {**BAD[message]}
    caches = {name: options.get(name, CACHE).clone() for name in ("k_cache", "v_cache")}
    before = {name: cache.clone() for name, cache in caches.items()}
    with pytest.raises((TypeError, ValueError)) as caught:
        bad(**{**options, **caches})
    assert str(caught.value).startswith(message), caught.value
    assert all(torch.equal(caches[name], cache) for name, cache in before.items())


# --- bert_padding ---


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.int32], ids=str)
def test_unpad_and_pad(kind):
    x = torch.randn(3, 5, 2, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).to(kind)
    packed, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask)
    where = mask.bool()
    assert torch.equal(packed, x[where]) and indices.tolist() == [0, 1, 3, 10, 11, 12, 13, 14]
    assert cu_seqlens.tolist() == [0, 3, 3, 8] and cu_seqlens.dtype == torch.int32
    assert longest == 5 and isinstance(longest, int)
    assert used.tolist() == [3, 0, 5] and used.dtype == torch.int32
    back = bert_padding.pad_input(packed, indices, 3, 5)
    assert torch.equal(back, x * where[..., None, None])
    weight = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((back * weight).sum(), x)
    assert torch.equal(gradient, weight * where[..., None, None])


def test_unused_places_are_kept():
    x = torch.arange(8.0).view(2, 4, 1)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    unused = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 1]])
    packed, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask, unused)
    assert packed.flatten().tolist() == [0, 1, 2, 4, 7] and indices.tolist() == [0, 1, 2, 4, 7]
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 3, 5], 3, [2, 1])


def test_index_first_axis():
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([4, 0, 4])
    got = bert_padding.index_first_axis(x, rows)
    assert torch.equal(got, x[rows])
    (gradient,) = torch.autograd.grad(got.sum(), x)
    assert gradient[:, 0, 0].tolist() == [1, 0, 0, 0, 2, 0]
    assert flash.index_first_axis is bert_padding.index_first_axis


def test_empty_batches():
    for size in ((0, 5), (3, 0)):
        x = torch.randn(*size, 4)
        packed, indices, cu_seqlens, longest, _ = bert_padding.unpad_input(x, torch.ones(size).bool())
        assert packed.shape == (0, 4) and longest == 0 and cu_seqlens.tolist() == [0] * (size[0] + 1)
        assert torch.equal(bert_padding.pad_input(packed, indices, *size), x)


def test_padding_through_varlen():
    """Leaving padding out, attending and putting it back is attention under a padding mask."""
    q = torch.randn(3, 7, 4, 16, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([7, 2, 5])[:, None]
    packed, indices, cu_seqlens, longest, _ = flash.unpad_input(q, mask)
    out = flash.flash_attn_varlen_func(packed, packed, packed, cu_seqlens, cu_seqlens, longest, longest, causal=True)
    got = flash.pad_input(out, indices, 3, 7)
    wanted = flash.flash_attn_func(q, q, q, causal=True) * mask[..., None, None]
    torch.testing.assert_close(got, wanted)


X, MASK = torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
BAD_PADDING = {
    "hidden_states must have shape (B, L, ...)": lambda: bert_padding.unpad_input(X[0, 0], MASK),
    "attention_mask must have shape (2, 3)": lambda: bert_padding.unpad_input(X, MASK[:1]),
    "attention_mask must be a bool or integer": lambda: bert_padding.unpad_input(X, MASK.float()),
    "unused_mask must have shape (2, 3)": lambda: bert_padding.unpad_input(X, MASK, MASK[:1]),
    "indices must have shape (2,)": lambda: bert_padding.pad_input(X, torch.arange(3), 2, 3),
    "indices must be an integer": lambda: bert_padding.index_first_axis(X, torch.zeros(2)),
    "batch must be a non-negative int": lambda: bert_padding.pad_input(X, torch.arange(2), -1, 3),
}


@pytest.mark.parametrize("message", BAD_PADDING)
def test_bad_padding(message):
    with pytest.raises((TypeError, ValueError)) as caught:
        BAD_PADDING[message]()
    assert str(caught.value).startswith(message), caught.value
