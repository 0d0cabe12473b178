"""pyext.bias: what each constructor adds to the score, its gradient, what it lowers to, and what it refuses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

import pyext
from pyext import _dispatch
from pyext import bias as module
from pyext.bias._base import row_table
from pyext.reference.attention import scores
from support import oracle

LENGTHS = [(1, 1), (7, 7), (5, 9), (9, 5), (1, 300), (300, 1), (130, 257), (0, 4), (4, 0), (0, 0)]


def lower(bias, heads=3, lq=5, lk=9, batch=2, dtype=torch.float64, **options):
    """The flat problem of a call with this bias and with queries of 0, so that its scores are the bias alone."""
    query, key = torch.zeros(batch, heads, lq, 4, dtype=dtype), torch.zeros(batch, heads, lk, 4, dtype=dtype)
    return _dispatch.lower(pyext.attention, query, key, key, bias=bias, **options)


def bias_scores(bias, **call):
    return scores(lower(bias, **call))


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def written_out(name, leaf, distance):
    """The score of the contract's table, (H, Lq, Lk)."""
    h = leaf.shape[1] if name == "t5" else leaf.shape[0]
    head = torch.arange(h).view(-1, 1, 1)
    if name == "diagonal":
        return leaf[head, distance + (distance.shape[1] - 1)]
    if name == "alibi":
        return leaf[head] * distance
    if name == "alibi symmetric":
        return -leaf[head] * distance.abs()
    return leaf[oracle.t5_bucket(distance, True, leaf.shape[0], 128), head]


MAKE = {
    "diagonal": (pyext.bias.diagonal, lambda heads, lq, lk: (heads, max(lq + lk - 1, 0))),
    "alibi": (pyext.bias.alibi, lambda heads, lq, lk: (heads,)),
    "alibi symmetric": (lambda slopes: pyext.bias.alibi(slopes, symmetric=True), lambda heads, lq, lk: (heads,)),
    "t5": (lambda table: pyext.bias.t5(table, True), lambda heads, lq, lk: (32, heads)),
}


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("heads", [3, 1], ids=["per head", "one head"])
@pytest.mark.parametrize("name", MAKE)
def test_score_and_gradient(name, heads, lengths):
    make, shape = MAKE[name]
    leaf = normal(*shape(heads, *lengths))
    got = bias_scores(make(leaf), lq=lengths[0], lk=lengths[1])
    wanted = written_out(name, leaf, oracle.distance(*lengths)).expand_as(got)
    torch.testing.assert_close(got, wanted, rtol=1e-14, atol=0)
    weight = torch.randn_like(got)
    (gradient,) = torch.autograd.grad(got, leaf, weight)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, leaf, weight)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("names", list(itertools.combinations_with_replacement(MAKE, 2)), ids="+".join)
def test_sum_of_two(names):
    leaves = [normal(*MAKE[name][1](heads, 6, 8)) for name, heads in zip(names, (3, 1))]
    got = bias_scores(sum(MAKE[name][0](leaf) for name, leaf in zip(names, leaves)), lq=6, lk=8)
    distance = oracle.distance(6, 8)
    wanted = sum(written_out(name, leaf, distance) for name, leaf in zip(names, leaves)).expand_as(got)
    torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-13)
    weight = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, leaves, weight), torch.autograd.grad(wanted, leaves, weight)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_sum_of_dense_terms_and_attn_mask():
    a, b, mask, table = normal(2, 1, 5, 9), normal(3, 1, 9), normal(5, 1), normal(32, 3)
    bias = pyext.bias.dense(a) + pyext.bias.t5(table, True) + pyext.bias.dense(b)
    got = bias_scores(bias, attn_mask=mask)
    wanted = a + b + mask + written_out("t5", table, oracle.distance(5, 9))
    torch.testing.assert_close(got, wanted, rtol=1e-14, atol=1e-14)
    weight, leaves = torch.randn_like(got), (a, b, mask, table)
    for x, y in zip(torch.autograd.grad(got, leaves, weight), torch.autograd.grad(wanted, leaves, weight)):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_sum_is_not_rounded_to_half_precision():
    terms = [torch.full((1, 1), value).bfloat16() for value in (256.0, 1.0, -256.0)]
    bias = sum(pyext.bias.dense(term) for term in terms)
    assert (bias_scores(bias, dtype=torch.float32) == 1.0).all()


def test_sum_builtin_and_nesting():
    a, b, c = (pyext.bias.alibi(torch.full((3,), float(n))) for n in (1, 2, 4))
    wanted = bias_scores(pyext.bias.alibi(torch.full((3,), 7.0)))
    for bias in (sum([a, b, c]), (a + b) + c, a + (b + c)):
        assert len(bias.terms()) == 3
        torch.testing.assert_close(bias_scores(bias), wanted)
    for wrong in (1, torch.ones(3), pyext.masks.causal()):
        with pytest.raises(TypeError):
            a + wrong


BUCKETS = [8, 9, 16, 20, 32, 33, 64, 128]
REACH = torch.arange(-5000, 5001)


@pytest.mark.parametrize("bidirectional", [True, False], ids=["both ways", "one way"])
@pytest.mark.parametrize("buckets", BUCKETS)
def test_t5_bucket_equals_transformers_rule(buckets, bidirectional):
    for max_distance in (65, 100, 128, 129, 256, 1000, 4096):
        if max_distance <= (buckets // 4 if bidirectional else buckets // 2):
            continue
        got = module.t5_bucket(REACH, buckets, bidirectional, max_distance)
        assert torch.equal(got, oracle.t5_bucket(REACH, bidirectional, buckets, max_distance))
        # what a call reads, in two pieces of a table that is kept for all lengths
        table = torch.arange(float(buckets), dtype=torch.float64)[:, None]
        problem = lower(pyext.bias.t5(table, bidirectional, max_distance), heads=1, lq=301, lk=5001, batch=1)
        assert torch.equal(problem.diag[0, problem.diag_index.long()].long(), got[: 5001 + 300])


@pytest.mark.parametrize("bidirectional", [True, False], ids=["both ways", "one way"])
@pytest.mark.parametrize("buckets", BUCKETS)
def test_t5_bucket_equals_the_formula(buckets, bidirectional):
    """In fp64, written from the paper's rule; a border that rounding decides may fall on either side."""
    side = buckets // 2 if bidirectional else buckets
    exact, max_distance = side // 2, 128
    got = module.t5_bucket(REACH, buckets, bidirectional, max_distance).tolist()
    for d, bucket in zip(REACH.tolist(), got):
        n = abs(d) if bidirectional else max(-d, 0)
        base = side if bidirectional and d > 0 else 0
        if n < exact:
            assert bucket == base + n
        else:
            place = exact + (side - exact) * math.log(n / exact) / math.log(max_distance / exact)
            allowed = {min(int(place + e), side - 1) for e in (-1e-4, 0.0, 1e-4)}
            assert bucket - base in allowed, (d, place)


def test_t5_bucket_landmarks():
    """Of T5's own configuration, 32 buckets and 128: every bucket is used, and all beyond 128 share one."""
    bucket = module.t5_bucket(REACH, 32, True, 128)
    assert set(bucket.tolist()) == set(range(32)) - {16}  # no distance is positive and 0
    assert (bucket[REACH > 127] == 31).all() and (bucket[REACH < -127] == 15).all()
    bucket = module.t5_bucket(REACH, 32, False, 128)
    assert set(bucket.tolist()) == set(range(32))
    assert (bucket[REACH >= 0] == 0).all()


def test_t5_lowers_to_its_table():
    table = normal(32, 3, dtype=torch.bfloat16)
    problem = lower(pyext.bias.t5(table, True), lq=65, lk=129, dtype=torch.bfloat16)
    assert problem.diag.shape == (3, 32) and problem.diag.dtype == torch.float32
    assert problem.diag_index.shape == (193,) and problem.diag_index.dtype == torch.int32
    assert problem.dense is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_accumulation_dtype(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, (make, shape) in MAKE.items():
        problem = lower(make(normal(*shape(3, 5, 9), dtype=torch.float16)), dtype=dtype)
        assert problem.diag.dtype == wide, name


def test_memory_is_linear():
    """At 2^17 tokens no tensor of the lowering has more than a few values per head and distance."""
    length, heads = 2**17, 2
    for name, (make, shape) in MAKE.items():
        problem = lower(make(normal(*shape(heads, length, length))), heads=heads, lq=length, lk=length, batch=1)
        assert problem.dense is None and problem.mask is None
        assert problem.diag.numel() <= 2 * heads * length, name


def test_index_is_shared_between_lengths_and_bounded():
    table = normal(32, 3)
    row_table.cache_clear()
    kept = {
        lower(pyext.bias.t5(table, True), lq=1, lk=lk).diag_index.untyped_storage().data_ptr() for lk in range(130, 250)
    }
    assert len(kept) == 1
    for lk in (2**n for n in range(20)):
        lower(pyext.bias.t5(table, True), lq=1, lk=lk, batch=1)
    info = row_table.cache_info()
    assert info.currsize <= info.maxsize <= 32


def test_nothing_is_kept_from_a_trace():
    row_table.cache_clear()
    with FakeTensorMode():
        q = torch.randn(1, 3, 8, 4)
        pyext.attention(q, q, q, bias=pyext.bias.t5(torch.randn(32, 3), True))
    assert row_table.cache_info().currsize == 0
    torch.compile(lambda d: lower(pyext.bias.t5(torch.ones(32, 3), True)).diag_index + d, backend="eager")(1)
    assert row_table.cache_info().currsize == 0


def test_index_made_in_inference_mode_serves_training():
    row_table.cache_clear()
    table, q = torch.randn(32, 3, requires_grad=True), torch.randn(1, 3, 8, 4, requires_grad=True)
    with torch.inference_mode():
        pyext.attention(q, q, q, bias=pyext.bias.t5(table, True))
    pyext.attention(q, q, q, bias=pyext.bias.t5(table, True)).sum().backward()
    assert table.grad.abs().sum() > 0


def test_one_table_in_many_layers_accumulates():
    table, q = normal(32, 3), torch.randn(1, 3, 8, 4, dtype=torch.float64)
    bias = pyext.bias.t5(table, True)
    single = torch.autograd.grad(pyext.attention(q, q, q, bias=bias).square().sum(), table)[0]
    sum(pyext.attention(q, q, q, bias=bias).square().sum() for _ in range(3)).backward()
    torch.testing.assert_close(table.grad, 3 * single)


REFUSED = {
    "dense, not a tensor": (
        lambda: pyext.bias.dense(1.0),
        TypeError,
        r"bias\.dense values must be a torch\.Tensor, got float",
    ),
    "dense, bool": (
        lambda: pyext.bias.dense(torch.ones(3, 3).bool()),
        TypeError,
        r"bias\.dense values .*got torch\.bool",
    ),
    "dense, shape": (
        lambda: lower(pyext.bias.dense(torch.ones(4, 5, 9))),
        ValueError,
        r"bias\.dense values must be broadcastable to \(2, 3, 5, 9\), got \(4, 5, 9\)",
    ),
    "dense, dimensions": (lambda: lower(pyext.bias.dense(torch.ones(1, 1, 1, 1, 1))), ValueError, "broadcastable"),
    "diagonal, 1-D": (lambda: pyext.bias.diagonal(torch.ones(13)), ValueError, r"\(H, Lq \+ Lk - 1\).*got \(13,\)"),
    "diagonal, length": (
        lambda: lower(pyext.bias.diagonal(torch.ones(3, 12))),
        ValueError,
        r"bias\.diagonal values must have shape \(3, 13\), that is \(H, Lq \+ Lk - 1\), .*got \(3, 12\)",
    ),
    "diagonal, heads": (lambda: lower(pyext.bias.diagonal(torch.ones(2, 13))), ValueError, r"\(3, 13\).*got \(2, 13\)"),
    "alibi, integers": (lambda: pyext.bias.alibi(torch.ones(3).int()), TypeError, r"bias\.alibi slopes"),
    "alibi, 2-D": (
        lambda: pyext.bias.alibi(torch.ones(3, 1)),
        ValueError,
        r"bias\.alibi slopes must have shape \(H,\)",
    ),
    "alibi, heads": (
        lambda: lower(pyext.bias.alibi(torch.ones(2))),
        ValueError,
        r"shape \(3,\) to match query, got \(2,\)",
    ),
    "alibi, symmetric": (lambda: pyext.bias.alibi(torch.ones(3), "yes"), TypeError, r"bias\.alibi symmetric"),
    "t5, 1-D": (
        lambda: pyext.bias.t5(torch.ones(32), True),
        ValueError,
        r"bias\.t5 table must have shape \(num_buckets, H\)",
    ),
    "t5, heads": (
        lambda: lower(pyext.bias.t5(torch.ones(32, 2), True)),
        ValueError,
        r"\(num_buckets, 3\).*got \(32, 2\)",
    ),
    "t5, too few": (lambda: pyext.bias.t5(torch.ones(3, 3), True), ValueError, r"num_buckets >= 4.*got \(3, 3\)"),
    "t5, too near": (
        lambda: pyext.bias.t5(torch.ones(32, 3), False, 16),
        ValueError,
        r"max_distance must be greater than 16",
    ),
    "t5, max_distance": (lambda: pyext.bias.t5(torch.ones(32, 3), False, 9.5), TypeError, r"bias\.t5 max_distance"),
    "t5, bidirectional": (lambda: pyext.bias.t5(torch.ones(32, 3), None), TypeError, r"bias\.t5 bidirectional"),
    "device": (
        lambda: lower(pyext.bias.alibi(torch.ones(3, device="meta"))),
        ValueError,
        r"bias\.alibi slopes must be on cpu like query, got meta",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


def packed(bias, impl, dtype=torch.float64, **options):
    """A packed call of three sequences, one without queries, next to the same sequences one by one."""
    rows, cols = [0, 4, 4, 11], [0, 6, 9, 14]
    q, k = torch.randn(11, 3, 8, dtype=dtype), torch.randn(14, 3, 8, dtype=dtype)
    out, lse = pyext.varlen_attention(
        q, k, k, torch.tensor(rows), torch.tensor(cols), bias=bias, impl=impl, return_lse=True, **options
    )
    parts = []
    for n in range(3):
        query, key = (x[a[n] : a[n + 1]].transpose(0, 1)[None] for x, a in ((q, rows), (k, cols)))
        parts.append((query, key))
    return out, lse, parts


@pytest.mark.parametrize("name", ["alibi", "alibi symmetric", "t5"])
def test_packed(name, fp64_backend):
    make, shape = MAKE[name]
    leaf = normal(*shape(3, 11, 14))
    out, lse, parts = packed(make(leaf), fp64_backend.impl)
    each = [pyext.attention(q, k, k, bias=make(leaf), impl=fp64_backend.impl, return_lse=True) for q, k in parts]
    wanted = torch.cat([o[0].transpose(0, 1) for o, _ in each])
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lse, torch.cat([x[0] for _, x in each], dim=1), rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(out)
    got, expected = (torch.autograd.grad(x, leaf, weight)[0] for x in (out, wanted))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_packed_diagonal(fp64_backend):
    """The strip of a packed call has distance 0 at index total_k - 1."""
    values = normal(3, 24)
    out, _, parts = packed(pyext.bias.diagonal(values), fp64_backend.impl)
    each = []
    for q, k in parts:
        first = 14 - k.shape[2]
        strip = values[:, first : first + max(q.shape[2] + k.shape[2] - 1, 0)]
        each.append(
            pyext.attention(q, k, k, bias=pyext.bias.diagonal(strip), impl=fp64_backend.impl)[0].transpose(0, 1)
        )
    torch.testing.assert_close(out, torch.cat(each), rtol=1e-10, atol=1e-12)


def test_packed_refuses_dense():
    with pytest.raises(ValueError, match=r"dense bias has no meaning in varlen_attention.*bias\.alibi"):
        packed(pyext.bias.dense(torch.ones(1, 1)), "reference")
    with pytest.raises(ValueError, match=r"\(3, 24\), that is \(H, total_q \+ total_k - 1\)"):
        packed(pyext.bias.diagonal(torch.ones(3, 23)), "reference")


@pytest.mark.parametrize("lengths", [(0, 0), (0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("name", MAKE)
def test_empty_calls_train(name, lengths, backend):
    """A strip of no distances at all is legal, and the leaf gets a gradient of zeros."""
    make, shape = MAKE[name]
    leaf, q, k = (normal(*n, dtype=backend.widest) for n in (shape(3, *lengths), *((2, 3, n, 4) for n in lengths)))
    pyext.attention(q, k, k, bias=make(leaf), impl=backend.impl).sum().backward()
    assert (leaf.grad == 0).all()
    offsets = [torch.tensor([0, n]) for n in lengths]
    q, k = (x[0].transpose(0, 1) for x in (q, k))
    pyext.varlen_attention(q, k, k, *offsets, bias=make(leaf), impl=backend.impl).sum().backward()
    assert (leaf.grad == 0).all()


def test_no_heads(backend):
    q = torch.randn(2, 0, 5, 4)
    assert pyext.attention(q, q, q, bias=pyext.bias.alibi(torch.ones(0)), impl=backend.impl).shape == (2, 0, 5, 4)
