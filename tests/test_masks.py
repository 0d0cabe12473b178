"""pyext.masks: which keys each constructor shows, what it lowers to, how masks combine, and what they refuse."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses import FakeTensorMode

import pyext
from pyext import _dispatch, masks
from pyext._primitives import UNBOUNDED
from pyext.reference.attention import visibility

B, H = 3, 2
LENGTHS = [(1, 1), (6, 6), (4, 9), (9, 4), (1, 13), (13, 1), (0, 3), (3, 0), (0, 0)]


def lower(mask, lq=6, lk=6, batch=B, **options):
    """The flat problem of a call with this mask."""
    query, key = torch.zeros(batch, H, lq, 4), torch.zeros(batch, H, lk, 4)
    return _dispatch.lower(pyext.attention, query, key, key, mask=mask, **options)


def seen(mask, lq, lk, **options):
    return visibility(lower(mask, lq, lk, **options)).expand(B, H, lq, lk)


def written_out(predicate, lq, lk):
    """The predicate evaluated one (b, h, i, j) at a time."""
    result = torch.zeros(B, H, lq, lk, dtype=torch.bool)
    for b, h, i, j in itertools.product(range(B), range(H), range(lq), range(lk)):
        result[b, h, i, j] = bool(predicate(b, h, i, j, j - (i + lk - lq)))
    return result


def document_ids(length, mixed=False, rows=None):
    """Ids with runs of length 1 to 4, in no order; mixed: the first id comes back at the end."""
    size = (length,) if rows is None else (rows, length)
    runs = torch.randint(0, 3, size).cumsum(-1) * 7 % 11
    ids = (torch.arange(length) // 3 * 5 % 7).expand(size).clone() if not mixed else runs % 2
    return ids


def cases(lq, lk):
    """name -> (mask, predicate(b, h, i, j, distance), the primitives it may use)."""
    lengths, rows = torch.tensor([lk, 2, 0]), torch.tensor([lq, 1, 0])
    odd = torch.tensor([-3, lk + 10, 2**40])
    q1, k1 = document_ids(lq), document_ids(lk)
    q2, k2 = document_ids(lq, rows=B), document_ids(lk, rows=B)
    qm, km = document_ids(lq, mixed=True), document_ids(lk, mixed=True)
    allowed = torch.rand(B, 1, lq, lk) < 0.5
    row = torch.rand(lk) < 0.5
    return {
        "causal": (masks.causal(), lambda b, h, i, j, d: d <= 0, "window"),
        "window": (masks.window(2, 1), lambda b, h, i, j, d: -2 <= d <= 1, "window"),
        "window left": (masks.window(2, None), lambda b, h, i, j, d: d >= -2, "window"),
        "window none": (masks.window(None, None), lambda b, h, i, j, d: True, "window"),
        "window 0": (masks.window(0, 0), lambda b, h, i, j, d: d == 0, "window"),
        "padding": (masks.padding(lengths), lambda b, h, i, j, d: j < lengths[b], "intervals"),
        "padding both": (
            masks.padding(lengths.int(), rows),
            lambda b, h, i, j, d: j < lengths[b] and i < rows[b],
            "intervals",
        ),
        "padding clipped": (masks.padding(odd), lambda b, h, i, j, d: j < odd[b], "intervals"),
        "documents": (masks.documents(q1, k1), lambda b, h, i, j, d: q1[i] == k1[j], "intervals blocks"),
        "documents batched": (masks.documents(q2, k2), lambda b, h, i, j, d: q2[b, i] == k2[b, j], "intervals blocks"),
        "documents crossed": (masks.documents(q1, k2), lambda b, h, i, j, d: q1[i] == k2[b, j], "intervals blocks"),
        "documents mixed": (masks.documents(qm, km), lambda b, h, i, j, d: qm[i] == km[j], "intervals blocks"),
        "prefix": (masks.prefix(lengths), lambda b, h, i, j, d: d <= 0 or j < lengths[b], "intervals"),
        "dense": (masks.dense(allowed), lambda b, h, i, j, d: allowed[b, 0, i, j], "mask"),
        "dense row": (masks.dense(row), lambda b, h, i, j, d: row[j], "mask"),
        "function": (
            masks.from_function(lambda b, h, i, j: (b + h + i * j) % 3 == 0, lq, lk),
            lambda b, h, i, j, d: (b + h + i * j) % 3 == 0,
            "blocks",
        ),
        "strided": (masks.strided(3), lambda b, h, i, j, d: -d < 3 or d % 3 == 0, "blocks"),
        "fixed": (
            masks.fixed(4, 2),
            lambda b, h, i, j, d: (j - d) // 4 == j // 4 or j % 4 >= 2,
            "blocks",
        ),
        "rows": (masks.image_rows(2, 3), image(2, 3, lambda r, c, s, e: r == s), "blocks"),
        "columns": (masks.image_columns(2, 3), image(2, 3, lambda r, c, s, e: c == e), "blocks"),
        "conv": (
            masks.image_conv(1, 3, 3),
            image(1, 3, lambda r, c, s, e: max(abs(r - s), abs(c - e)) <= 1),
            "blocks",
        ),
    }


def image(text, side, near):
    """The contract's words: every query sees the text, an image query also what is near it and not later."""

    def predicate(b, h, i, j, d):
        query, key = j - d, j
        if key < text:
            return True
        if query < text or key > query:
            return False
        return near(*divmod(query - text, side), *divmod(key - text, side))

    return predicate


NAMES = list(cases(3, 3))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_shows(name, lengths):
    mask, predicate, primitives = cases(*lengths)[name]
    problem = lower(mask, *lengths)
    assert torch.equal(visibility(problem).expand(B, H, *lengths), written_out(predicate, *lengths))
    used = {
        "window": (problem.left, problem.right) != (UNBOUNDED, UNBOUNDED),
        "intervals": problem.intervals is not None,
        "mask": problem.mask is not None,
        "blocks": problem.block_offsets is not None,
    }
    assert {kind for kind, is_used in used.items() if is_used} <= set(primitives.split())


@pytest.mark.parametrize("lengths", [(5, 5), (4, 7), (7, 4)], ids=str)
@pytest.mark.parametrize("pair", list(itertools.combinations(NAMES, 2)), ids=lambda pair: "-".join(pair))
def test_and_or(pair, lengths):
    (a, p, _), (b, q, _) = (cases(*lengths)[name] for name in pair)
    first, second = written_out(p, *lengths), written_out(q, *lengths)
    assert torch.equal(seen(a & b, *lengths), first & second)
    assert torch.equal(seen(a | b, *lengths), first | second)
    causal = written_out(lambda b, h, i, j, d: d <= 0, *lengths)
    assert torch.equal(seen((a | b) & masks.causal(), *lengths), (first | second) & causal)
    assert torch.equal(seen((a & b) | masks.causal(), *lengths), (first & second) | causal)


def test_closed_forms_build_no_tensor():
    mask = masks.causal() & masks.window(5, None) & masks.window(None, 3) & masks.window(7, 2)
    problem = lower(mask)
    assert (problem.left, problem.right) == (5, 0)
    assert problem.intervals is None and problem.mask is None
    for one, wanted in ((masks.causal(), (UNBOUNDED, 0)), (masks.window(3, 4), (3, 4))):
        assert (lower(one).left, lower(one).right) == wanted


def test_intersections_stay_intervals():
    lengths, ids = torch.tensor([6, 4, 1]), torch.tensor([4, 4, 9, 9, 9, 2])
    mask = masks.padding(lengths) & masks.causal() & masks.documents(ids) & masks.prefix(torch.tensor([1, 2, 3]))
    problem = lower(mask)
    assert problem.mask is None and (problem.left, problem.right) == (UNBOUNDED, 0)
    assert problem.intervals.shape == (B, 6, 2) and problem.intervals.dtype == torch.int32
    assert problem.intervals.is_contiguous()
    assert ((problem.intervals >= 0) & (problem.intervals <= 6)).all()


def test_intervals_cost_linear_memory():
    length = 2**16
    ids = torch.arange(length) // 1000
    for mask in (
        masks.padding(torch.tensor([5])),
        masks.documents(ids),
        masks.prefix(torch.tensor([9])),
        masks.causal(),
    ):
        problem = lower(mask, length, length, batch=1)
        assert problem.mask is None
        assert problem.intervals is None or problem.intervals.numel() == 2 * length


def test_documents_stay_intervals_only_where_contiguous():
    ids = torch.tensor([[3, 3, 1, 1, 1, 8], [5, 4, 3, 2, 1, 0], [7, 7, 7, 7, 7, 7]])
    assert lower(masks.documents(ids)).block_offsets is None
    ids[1, 5] = 5
    problem = lower(masks.documents(ids))
    assert problem.intervals is None and problem.block_offsets.shape == (B, 1, 2)
    # keys of documents that no query asks for may lie anywhere
    assert (
        lower(masks.documents(torch.tensor([1, 1, 1, 1, 1, 1]), torch.tensor([0, 1, 1, 0, 2, 0]))).intervals is not None
    )


def test_documents_where_values_cannot_be_read():
    """Off the CPU and in a trace contiguity is asserted instead of tested."""
    problem = _dispatch.lower(
        pyext.attention,
        *(torch.zeros(B, H, 6, 4, device="meta") for _ in range(3)),
        mask=masks.documents(torch.zeros(6, dtype=torch.long, device="meta")),
    )
    assert problem.mask is None and problem.intervals.device.type == "meta"
    with FakeTensorMode():
        assert lower(masks.documents(torch.tensor([0, 0, 1, 1, 2, 2]))).mask is None


@pytest.mark.parametrize("backend_name", ["eager", "aot_eager"])
def test_documents_under_compile(backend_name):
    q = torch.randn(1, 2, 6, 4)

    def call(ids):
        return pyext.attention(q, q, q, mask=masks.documents(ids))

    compiled = torch.compile(call, fullgraph=True, backend=backend_name)
    ids = torch.tensor([0, 0, 1, 1, 2, 2])
    torch.testing.assert_close(compiled(ids), call(ids))
    with pytest.raises(RuntimeError, match=r"masks\.documents: keys with equal ids must be contiguous"):
        compiled(torch.tensor([0, 1, 0, 1, 2, 2]))


def test_batch_counts_all_leading_dimensions():
    """(2, 3, H, L, D) has a batch of 6 for per-batch masks, while dense ones keep the caller's dimensions."""
    lengths, allowed = torch.tensor([6, 5, 4, 3, 2, 1]), torch.rand(2, 1, 1, 6, 6) < 0.5
    q = torch.zeros(2, 3, H, 6, 4)
    problem = _dispatch.lower(pyext.attention, q, q, q, mask=masks.padding(lengths) & masks.dense(allowed))
    wanted = (torch.arange(6) < lengths.view(2, 3, 1, 1, 1)) & allowed
    assert torch.equal(visibility(problem).expand(6, H, 6, 6), wanted.expand(2, 3, H, 6, 6).flatten(0, 1))
    union = _dispatch.lower(pyext.attention, q, q, q, mask=masks.padding(lengths) | masks.dense(allowed))
    wanted = (torch.arange(6) < lengths.view(2, 3, 1, 1, 1)) | allowed
    assert torch.equal(visibility(union).expand(6, H, 6, 6), wanted.expand(2, 3, H, 6, 6).flatten(0, 1))


def test_mask_meets_attn_mask_and_is_causal():
    allowed = torch.rand(6, 6) < 0.5
    got = seen(masks.window(2, None), 6, 6, attn_mask=allowed)
    assert torch.equal(got, seen(masks.window(2, None), 6, 6) & allowed)
    problem = lower(masks.window(2, 5), 4, 6, is_causal=True)
    assert (problem.left, problem.right) == (2, -2)  # upper-left: the first query sees the first key only
    got = visibility(problem).expand(B, H, 4, 6)
    assert torch.equal(got, written_out(lambda b, h, i, j, d: -2 <= d <= 5 and j <= i, 4, 6))


def test_function_is_called_with_broadcasting_indices():
    shapes = []

    def fn(b, h, i, j):
        shapes.extend(tuple(x.shape) for x in (b, h, i, j))
        return i >= j

    problem = lower(masks.from_function(fn, 4, 5), 4, 5)
    assert shapes == [(B, 1, 1, 1), (1, H, 1, 1), (1, 1, 4, 1), (1, 1, 1, 5)]
    assert problem.block_offsets.shape == (1, 1, 2)
    shapes.clear()
    lower(masks.from_function(fn, 200, 9000), 200, 9000)
    assert shapes[2::4] == [(1, 1, n, 1) for n in (128, 128, 72, 72)]
    assert shapes[3::4] == [(1, 1, 1, n) for n in (8192, 808, 8192, 808)]


def test_broadcast_masks_take_no_memory():
    """(B, 1, 1, Lk) stays that small; only the last dimension, which kernels read in place, is filled in."""
    assert lower(masks.dense(torch.ones(B, 1, 1, 6, dtype=torch.bool))).mask.shape == (B, 1, 1, 6)
    column = lower(masks.dense(torch.ones(6, 1, dtype=torch.bool))).mask
    assert column.shape == (1, 1, 6, 6) and column.stride(-1) == 1
    crossed = lower(masks.dense(torch.ones(6, 6, dtype=torch.bool).t())).mask
    assert crossed.stride(-1) == 1


ONES = torch.ones(B, dtype=torch.long)
REFUSED = {
    "window, negative": (
        lambda: masks.window(-1, 0),
        ValueError,
        r"masks\.window left must be a non-negative int or None",
    ),
    "window, float": (lambda: masks.window(0, 1.5), TypeError, r"masks\.window right must be an int or None"),
    "window, bool": (lambda: masks.window(True, 1), TypeError, r"masks\.window left"),
    "padding, float": (
        lambda: masks.padding(torch.ones(B)),
        TypeError,
        r"masks\.padding key_lengths must be an integer",
    ),
    "padding, list": (lambda: masks.padding([1, 2, 3]), TypeError, r"masks\.padding key_lengths.*got list"),
    "padding, 2-D": (
        lambda: masks.padding(ONES[None]),
        ValueError,
        r"key_lengths must have shape \(B,\), got \(1, 3\)",
    ),
    "padding, batch": (
        lambda: lower(masks.padding(ONES[:2])),
        ValueError,
        r"masks\.padding key_lengths must have shape \(3,\) to match query, got \(2,\)",
    ),
    "padding, queries": (
        lambda: lower(masks.padding(ONES, ONES[:1])),
        ValueError,
        r"query_lengths must have shape \(3,\)",
    ),
    "padding, device": (lambda: lower(masks.padding(ONES.to("meta"))), ValueError, r"key_lengths must be on cpu"),
    "documents, float": (lambda: masks.documents(torch.ones(6)), TypeError, r"masks\.documents ids_q"),
    "documents, 3-D": (
        lambda: masks.documents(ONES[None, None]),
        ValueError,
        r"ids_q must have shape \(L,\) or \(B, L\)",
    ),
    "documents, length": (
        lambda: lower(masks.documents(torch.ones(5).long())),
        ValueError,
        r"masks\.documents ids_q must have shape \(6,\) or \(3, 6\) to match query, got \(5,\)",
    ),
    "documents, keys": (
        lambda: lower(masks.documents(torch.ones(4).long()), 4, 6),
        ValueError,
        r"ids_k must.* match key",
    ),
    "documents, batch": (lambda: lower(masks.documents(torch.ones(2, 6).long())), ValueError, r"got \(2, 6\)"),
    "prefix, batch": (
        lambda: lower(masks.prefix(ONES[:1])),
        ValueError,
        r"masks\.prefix lengths must have shape \(3,\)",
    ),
    "dense, float": (lambda: masks.dense(torch.ones(6, 6)), TypeError, r"masks\.dense values must be a bool tensor"),
    "dense, shape": (
        lambda: lower(masks.dense(torch.ones(6, 5, dtype=torch.bool))),
        ValueError,
        r"masks\.dense values must be broadcastable to \(3, 2, 6, 6\), got \(6, 5\)",
    ),
    "function, not callable": (lambda: masks.from_function(1, 6, 6), TypeError, r"from_function fn must be callable"),
    "function, lengths": (
        lambda: lower(masks.from_function(lambda b, h, i, j: i >= j, 6, 7)),
        ValueError,
        r"made for \(Lq, Lk\) = \(6, 7\), got query and key with \(6, 6\)",
    ),
    "function, dtype": (
        lambda: lower(masks.from_function(lambda b, h, i, j: i - j, 6, 6)),
        TypeError,
        r"result of masks\.from_function's fn must be a bool tensor",
    ),
    "and": (lambda: masks.causal() & torch.ones(6, 6, dtype=torch.bool), TypeError, "unsupported operand"),
    "or": (lambda: masks.causal() | pyext.bias.alibi(torch.ones(2)), TypeError, "unsupported operand"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


ROWS, COLS = [0, 4, 4, 11], [0, 6, 9, 14]


def packed(mask, impl, dtype=torch.float64, **options):
    q, k = torch.randn(11, H, 8, dtype=dtype), torch.randn(14, H, 8, dtype=dtype)
    out = pyext.varlen_attention(q, k, k, torch.tensor(ROWS), torch.tensor(COLS), mask=mask, impl=impl, **options)
    return out, [tuple(x[a[n] : a[n + 1]].transpose(0, 1)[None] for x, a in ((q, ROWS), (k, COLS))) for n in range(3)]


PACKED = {
    "causal": lambda n: masks.causal(),
    "window": lambda n: masks.window(2, 1),
    "prefix": lambda n: masks.prefix(torch.tensor([3, 1, 5])[slice(None) if n is None else slice(n, n + 1)]),
}


@pytest.mark.parametrize("names", [*((n,) for n in PACKED), *itertools.combinations(PACKED, 2)], ids="-".join)
def test_packed(names, backend):
    """Each sequence sees what it would see alone."""

    def make(n):
        first, *others = (PACKED[name](n) for name in names)
        for other in others:
            first = first & other
        return first

    out, parts = packed(make(None), backend.impl, backend.widest)
    each = [
        pyext.attention(q, k, k, mask=make(n), impl=backend.impl)[0].transpose(0, 1) for n, (q, k) in enumerate(parts)
    ]
    close = {"rtol": 1e-10, "atol": 1e-12} if out.dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out, torch.cat(each), **close)


def test_packed_is_causal_is_lower_right(backend):
    out, parts = packed(None, backend.impl, backend.widest, is_causal=True)
    each = [pyext.attention(q, k, k, mask=masks.causal(), impl=backend.impl)[0].transpose(0, 1) for q, k in parts]
    close = {"rtol": 1e-10, "atol": 1e-12} if out.dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out, torch.cat(each), **close)


@pytest.mark.parametrize(
    "mask",
    [
        masks.padding(ONES),
        masks.documents(torch.ones(11).long(), torch.ones(14).long()),
        masks.dense(torch.ones(1, 1, dtype=torch.bool)),
        masks.from_function(lambda b, h, i, j: i >= j, 11, 14),
        masks.causal() | masks.window(1, 1),
    ],
    ids=lambda mask: mask.label,
)
def test_packed_refuses(mask):
    with pytest.raises(
        ValueError, match=rf"{mask.label.replace('|', '.')}: not available in varlen_attention.*use masks"
    ):
        packed(mask & masks.causal(), "reference")
