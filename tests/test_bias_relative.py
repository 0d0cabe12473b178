"""The relative biases: what each constructor adds to the score, what it lowers to, sums, packed calls, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import pyext
from pyext import _dispatch
from pyext import bias as module
from pyext.bias._base import row_table
from pyext.reference.attention import scores
from support import oracle

REACH = torch.arange(-5000, 5001)


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def inputs(heads=3, lq=5, lk=9, batch=2, dtype=torch.float64, width=4, kv_heads=None):
    return normal(batch, heads, lq, width, dtype=dtype), normal(batch, kv_heads or heads, lk, width, dtype=dtype)


def lower(bias, query=None, key=None, **options):
    """The flat problem of a call with this bias."""
    if query is None:
        query, key = inputs()
    return _dispatch.lower(pyext.attention, query, key, key, bias=bias, enable_gqa=True, **options)


def added(bias, query, key, **options):
    """What the bias adds to the score of a call."""
    plain = _dispatch.lower(pyext.attention, query, key, key, enable_gqa=True, **options)
    return scores(lower(bias, query, key, **options)) - scores(plain)


def pairs(vector, rows, row):
    """sum over d of vector[b,h,i,d] rows[h,row[i,j],d], pair by pair; row < 0 adds nothing."""
    value = torch.einsum("bhid,hijd->bhij", vector, rows[:, row.clamp(min=0)])
    return value * (row >= 0)


@pytest.mark.parametrize("first", [None, -9, -3, 0, 2, 50])
@pytest.mark.parametrize("lengths", [(5, 9), (9, 5), (1, 12), (7, 7)], ids=str)
def test_transformer_xl_is_the_contract(lengths, first):
    query, key = inputs(lq=lengths[0], lk=lengths[1])
    r, u, v = normal(11, 3, 4), normal(3, 4), normal(3, 4)
    got = added(pyext.bias.transformer_xl(r, u, v, first), query, key, scale=0.3)
    row = oracle.distance(*lengths) - (1 - lengths[1] if first is None else first)
    row = row.masked_fill((row < 0) | (row >= 11), -1)
    content = torch.einsum("hd,bhjd->bhj", u, key)[:, :, None]
    wanted = 0.3 * (content + pairs(query + v[:, None], r.transpose(0, 1), row))
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)
    leaves, weight = (query, key, r, u, v), torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, leaves, weight), torch.autograd.grad(wanted, leaves, weight)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_transformer_xl_as_published(softcap):
    """Section 3.3 of the paper in the order of its appendix B: rows from far to near, shifted by padding one column."""
    lq, lk = 6, 10
    query, key = inputs(heads=2, lq=lq, lk=lk)
    far_to_near, u, v = normal(lk, 2, 4), normal(2, 4), normal(2, 4)  # of positions Lk - 1 ... 0
    moved = torch.einsum("bhid,phd->bhip", query + v[:, None], far_to_near)
    padded = torch.cat([moved.new_zeros(2, 2, lq, 1), moved], -1).view(2, 2, lk + 1, lq)
    shifted = padded[:, :, 1:].reshape(2, 2, lq, lk)
    content = query @ key.mT
    bias = pyext.bias.transformer_xl(far_to_near, u, v)
    got = scores(lower(bias, query, key, softcap=softcap, scale=1.0))
    if softcap:
        wanted = softcap * torch.tanh(content / softcap) + torch.einsum("hd,bhjd->bhj", u, key)[:, :, None] + shifted
    else:
        wanted = (query + u[:, None]) @ key.mT + shifted
    seen = oracle.distance(lq, lk) <= 0  # the published shift leaves rubbish where the causal mask hides it
    torch.testing.assert_close(got[:, :, seen], wanted[:, :, seen], rtol=1e-11, atol=1e-12)


def test_transformer_xl_shares_tensors():
    """rel_query is the query itself without v, and the shifted query where u and v are one tensor."""
    query, key = inputs()
    r, u = normal(13, 3, 4), normal(3, 4)
    plain = lower(pyext.bias.transformer_xl(r), query, key)
    assert plain.rel_query is plain.query
    shared = lower(pyext.bias.transformer_xl(r, u, u), query, key)
    assert shared.rel_query is shared.query
    assert shared.rel_q.data_ptr() == r.data_ptr() and shared.rel_q.shape == (1, 3, 13, 4)  # a view: no copy of r
    assert torch.equal(shared.rel_index, torch.arange(13, dtype=torch.int32))
    longer = lower(pyext.bias.transformer_xl(normal(14, 3, 4), first_distance=-9), query, key)
    assert longer.rel_q.shape == (1, 3, 13, 4)  # XLNet's row of -Lk is not read


def test_transformer_xl_softcap_in_packed_calls():
    """There the u term enters as rows that keys meet: the same in one sequence as in an ordinary call."""
    q, k = torch.randn(5, 4, 8, dtype=torch.float64), torch.randn(9, 2, 8, dtype=torch.float64)
    bias = pyext.bias.transformer_xl(normal(13, 4, 8), normal(4, 8), normal(4, 8))
    cu = torch.tensor([0, 5]), torch.tensor([0, 9])
    options = dict(bias=bias, softcap=1.5, enable_gqa=True, impl="reference")
    got = pyext.varlen_attention(q, k, k, *cu, **options)
    query, key = (x.transpose(0, 1)[None] for x in (q, k))
    torch.testing.assert_close(got, pyext.attention(query, key, key, **options)[0].transpose(0, 1))


@pytest.mark.parametrize("heads", ["none", "each", "one"])
def test_shaw_is_the_contract(heads):
    query, key = inputs(lq=9, lk=6)
    rel_key = normal(*{"none": (), "each": (3,), "one": (1,)}[heads], 7, 4)
    got = added(pyext.bias.shaw(rel_key, 3), query, key)
    row = oracle.distance(9, 6).clamp(-3, 3) + 3
    wanted = pairs(query, rel_key.expand(3, 7, 4), row) / 2.0
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (query, rel_key)) for x in (got, wanted))):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("buckets,max_position", [(None, 4), (4, 12)])
@pytest.mark.parametrize("lengths", [(5, 9), (9, 5), (30, 30)], ids=str)
def test_disentangled_is_the_contract(lengths, buckets, max_position):
    query, key = inputs(lq=lengths[0], lk=lengths[1])
    pos_key, pos_query = normal(3, 8, 4), normal(3, 8, 4)
    bias = pyext.bias.disentangled(pos_key, pos_query, buckets=buckets, max_position=max_position, scale=0.2)
    got = added(bias, query, key, scale=0.7)
    position = -oracle.distance(*lengths)
    bucket = oracle.deberta_bucket if buckets else lambda x, *_: x
    c2p = (bucket(position, buckets, max_position) + 4).clamp(0, 7)
    p2c = (4 - bucket(-position, buckets, max_position)).clamp(0, 7)  # as published, from the key's side
    assert torch.equal(c2p, p2c)
    wanted = 0.2 * (pairs(query, pos_key, c2p) + pairs(key, pos_query, p2c.t()).mT)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)
    leaves = (query, key, pos_key, pos_query)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (got, wanted))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("buckets", [2, 3, 4, 7, 8, 16, 32, 64, 256])
def test_deberta_bucket_equals_transformers_rule(buckets):
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    for max_position in (buckets // 2 + 2, buckets, 128, 512, 1000):
        if max_position - 1 <= buckets // 2:
            continue
        got = module.deberta_bucket(REACH, buckets, max_position)
        assert torch.equal(got, make_log_bucket_position(REACH, buckets, max_position).long())
        assert torch.equal(got, -got.flip(0))  # odd
        # what a call reads, in two pieces of a table that is kept for all lengths
        rows = torch.arange(2.0 * buckets).view(1, -1, 1)
        bias = pyext.bias.disentangled(rows, buckets=buckets, max_position=max_position)
        query, key = torch.zeros(1, 1, 301, 1), torch.zeros(1, 1, 5001, 1)
        index = lower(bias, query, key).rel_index
        wanted = (module.deberta_bucket(-REACH, buckets, max_position) + buckets).clamp(0, 2 * buckets - 1)
        assert torch.equal(index.long(), wanted[: 5001 + 300])


def test_deberta_bucket_is_float32_whatever_the_default_is():
    wanted = module.deberta_bucket(REACH, 256, 512)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(module.deberta_bucket(REACH, 256, 512), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("batched", [True, False])
def test_segment_is_the_contract(batched, dtype):
    query, key = inputs(lq=6, lk=8)
    values = normal(2, 3, 6, 2)
    ids = (torch.randint(0, 3, (2, 6)), torch.randint(0, 3, (2, 8)))
    seg_q, seg_k = (x.to(dtype) if batched else x[0].to(dtype) for x in ids)
    got = added(pyext.bias.segment(values, seg_q, seg_k), query, key)
    same = (seg_q.unsqueeze(-1) == seg_k.unsqueeze(-2)).view(-1, 1, 6, 8)
    wanted = torch.where(same, values[..., 1:], values[..., :1])
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)


def test_segment_ids_beyond_int32():
    """Ids that differ by 2^32 are different, and the extremes of int64 are ids like others."""
    far = torch.tensor([7, 7 + 2**32, -(2**63), 2**63 - 1, 0])
    query, key = inputs(batch=1, lq=5, lk=5)
    values = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(1, 3, 5, 2)
    got = added(pyext.bias.segment(values, far, far.flip(0)), query, key)
    torch.testing.assert_close(got[0, 0], torch.eye(5, dtype=torch.float64).flip(0))
    mixed = added(pyext.bias.segment(values, far, far.to(torch.uint8)), query, key)  # of which only 7 and 0 are equal
    assert torch.equal(mixed[0, 0] > 0.5, far.view(-1, 1) == far.to(torch.uint8).view(1, -1))


def test_segment_broadcasts_and_counts_leading_dimensions():
    q = torch.randn(2, 3, 4, 5, 8, dtype=torch.float64)
    values = normal(3, 1, 5, 2)
    seg = torch.randint(0, 2, (6, 5))
    out = pyext.attention(q, q, q, bias=pyext.bias.segment(values, seg, seg), impl="reference")
    flat = q.flatten(0, 1)
    whole = values.expand(2, 3, 4, 5, 2).flatten(0, 1)
    wanted = pyext.attention(flat, flat, flat, bias=pyext.bias.segment(whole, seg, seg), impl="reference")
    torch.testing.assert_close(out.flatten(0, 1), wanted)


LEAVES = {
    "xl": lambda: (normal(13, 3, 4), normal(3, 4), normal(3, 4)),
    "xl few": lambda: (normal(5, 1, 4), normal(3, 4), normal(1, 4)),
    "xl batch": lambda: (normal(2, 13, 3, 4), normal(3, 4), normal(3, 4)),
    "shaw": lambda: (normal(7, 4),),
    "c2p + p2c": lambda: (normal(3, 8, 4), normal(1, 8, 4)),
    "p2c, batch": lambda: (normal(2, 3, 8, 4),),
    "segment": lambda: (normal(2, 3, 5, 2),),
    "diagonal": lambda: (normal(3, 13),),
    "dense": lambda: (normal(1, 5, 9),),
}
SEG = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([[0, 1, 2, 2, 1, 0, 0, 1, 2], [0] * 9])
MAKE = {
    "xl": lambda r, u, v: pyext.bias.transformer_xl(r, u, v),
    "xl few": lambda r, u, v: pyext.bias.transformer_xl(r, u, v, -3),
    "xl batch": lambda r, u, v: pyext.bias.transformer_xl(r, u, v),
    "shaw": lambda rel: pyext.bias.shaw(rel, 3),
    "c2p + p2c": lambda a, b: pyext.bias.disentangled(a, b, max_position=4),
    "p2c, batch": lambda b: pyext.bias.disentangled(None, b, buckets=4, max_position=12, scale=0.3),
    "segment": lambda scores: pyext.bias.segment(scores, *SEG),
    "diagonal": lambda values: pyext.bias.diagonal(values),
    "dense": lambda values: pyext.bias.dense(values),
}
PAIRS = [(a, b) for a in MAKE for b in MAKE if (a, b) != ("xl batch", "xl batch")]


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_sum_of_two(names, softcap):
    """The sum adds what its parts add, with all gradients, and stays without a dense term where both parts do."""
    query, key = inputs()
    leaves = [LEAVES[name]() for name in names]
    parts = [MAKE[name](*tensors) for name, tensors in zip(names, leaves)]
    got = added(sum(parts), query, key, softcap=softcap)
    wanted = sum(added(part, query, key, softcap=softcap) for part in parts).expand_as(got)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    weight, inside = torch.randn_like(got), [query, key, *leaves[0], *leaves[1]]
    gradients = (torch.autograd.grad(x, inside, weight, allow_unused=True) for x in (got, wanted))
    for a, b in zip(*gradients):
        if a is None or b is None:  # no part reads the keys: a difference of equal scores may, with gradient 0
            assert a is None or (a.abs() < 1e-12).all()
            assert b is None or (b.abs() < 1e-12).all()
        else:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    if "dense" not in names and names != ("segment", "segment") and not softcap:
        assert lower(sum(parts), query, key).dense is None


def test_sum_of_equal_rules_adds_rows():
    """Two tables read by the same rule stay tables."""
    query, key = inputs(lq=300, lk=300)
    problem = lower(pyext.bias.shaw(normal(7, 4), 3) + pyext.bias.shaw(normal(3, 7, 4), 3), query, key)
    assert problem.rel_q.shape == (1, 3, 7, 4)
    problem = lower(pyext.bias.shaw(normal(7, 4), 3) + pyext.bias.shaw(normal(9, 4), 4), query, key)
    assert problem.rel_q.shape == (1, 3, 599, 4) or problem.rel_q.shape == (1, 1, 599, 4)


def test_shared_shift_keeps_rows():
    """Two Transformer-XL terms with the same v need no strip."""
    r, v = normal(13, 3, 4), normal(3, 4)
    assert lower(pyext.bias.transformer_xl(r, v=v) + pyext.bias.transformer_xl(r, v=v)).diag is None
    assert lower(pyext.bias.transformer_xl(r, v=v) + pyext.bias.transformer_xl(r)).diag is not None


def test_memory_is_linear():
    """At 2^15 tokens no tensor of the lowering has more than a few rows of D values per head and distance."""
    length, heads, width = 2**15, 2, 4
    query = torch.zeros(1, heads, length, width)
    r, rows = torch.zeros(length, heads, width), torch.zeros(heads, 512, width)
    u = torch.zeros(heads, width)
    bias = (
        pyext.bias.transformer_xl(r, u, u)
        + pyext.bias.shaw(torch.zeros(33, width), 16)
        + pyext.bias.disentangled(rows, rows, buckets=256, max_position=512)
        + pyext.bias.segment(torch.zeros(1, heads, length, 2), torch.zeros(length).int(), torch.zeros(length).int())
    )
    problem = lower(bias, query, query)
    for name, value in problem._asdict().items():
        if isinstance(value, torch.Tensor):
            assert value.numel() <= 2 * heads * length * width, name


def test_index_is_shared_between_lengths_and_bounded():
    row_table.cache_clear()
    rows, r = normal(3, 8, 4), normal(200, 3, 4)
    for make in (
        lambda lk: pyext.bias.disentangled(rows, buckets=4, max_position=12),
        lambda lk: pyext.bias.shaw(rows[:, :7], 3),
        lambda lk: pyext.bias.transformer_xl(r[:lk]),
    ):
        kept = {
            lower(make(lk), *inputs(lq=1, lk=lk)).rel_index.untyped_storage().data_ptr() for lk in range(130, 190, 9)
        }
        assert len(kept) == 1
    far = lower(pyext.bias.transformer_xl(r, first_distance=-(2**40)))  # no table of 2^40 rows
    assert (far.rel_index == 200).all()
    assert row_table.cache_info().currsize <= 4


def test_nothing_is_kept_from_a_trace():
    row_table.cache_clear()
    with FakeTensorMode():
        q = torch.randn(1, 3, 8, 4)
        pyext.attention(q, q, q, bias=pyext.bias.shaw(torch.randn(7, 4), 3))
        pyext.attention(q, q, q, bias=pyext.bias.transformer_xl(torch.randn(7, 3, 4)))
        pyext.attention(q, q, q, bias=pyext.bias.disentangled(torch.randn(3, 8, 4), buckets=4, max_position=9))
        seg = torch.ones(8, dtype=torch.int64)
        pyext.attention(q, q, q, bias=pyext.bias.segment(torch.randn(1, 3, 8, 2), seg, seg))
    assert row_table.cache_info().currsize == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_of_the_problem(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    query, key = inputs(dtype=dtype)
    f32 = dict(dtype=torch.float32)
    bias = pyext.bias.transformer_xl(normal(13, 3, 4, **f32), normal(3, 4, **f32), normal(3, 4, **f32))
    bias = bias + pyext.bias.disentangled(None, normal(3, 8, 4, **f32), max_position=4, scale=0.1)
    problem = lower(bias + pyext.bias.segment(normal(2, 3, 5, 2, **f32), *SEG), query, key)
    for name in ("query", "rel_query", "rel_q", "rel_k"):
        assert getattr(problem, name).dtype == dtype, name
    assert problem.segment.dtype == wide
    assert problem.rel_index.dtype == problem.segment_q.dtype == problem.segment_k.dtype == torch.int32


XL, SHAW, DIS, SEGMENT = (
    pyext.bias.transformer_xl,
    pyext.bias.shaw,
    pyext.bias.disentangled,
    pyext.bias.segment,
)
ONES = torch.ones
REFUSED = {
    "xl, r": (lambda: XL(1.0), TypeError, r"bias\.transformer_xl r must be a torch\.Tensor, got float"),
    "xl, r integers": (lambda: XL(ONES(3, 3, 4).int()), TypeError, r"bias\.transformer_xl r must be float32"),
    "xl, r 2-D": (lambda: XL(ONES(3, 4)), ValueError, r"\(Lr, H, D\) or \(B, Lr, H, D\), got \(3, 4\)"),
    "xl, u 3-D": (lambda: XL(ONES(3, 3, 4), ONES(3, 1, 4)), ValueError, r"bias\.transformer_xl u .*\(H, D\), got"),
    "xl, v type": (lambda: XL(ONES(3, 3, 4), v=3), TypeError, r"bias\.transformer_xl v must be a torch\.Tensor"),
    "xl, first": (lambda: XL(ONES(3, 3, 4), None, None, 1.5), TypeError, r"first_distance must be an int, got float"),
    "xl, heads": (lambda: lower(XL(ONES(9, 2, 4))), ValueError, r"r must have shape \(Lr, 3, 4\) to match query, got"),
    "xl, width": (lambda: lower(XL(ONES(9, 3, 5))), ValueError, r"r must have shape \(Lr, 3, 4\) to match query, got"),
    "xl, batch": (lambda: lower(XL(ONES(3, 9, 3, 4))), ValueError, r"r must have shape \(2, Lr, 3, 4\) to match query"),
    "xl, u heads": (
        lambda: lower(XL(ONES(9, 3, 4), ONES(2, 4))),
        ValueError,
        r"bias\.transformer_xl u must have shape \(3, 4\) to match query, got \(2, 4\)",
    ),
    "xl, device": (
        lambda: lower(XL(ONES(9, 3, 4, device="meta"))),
        ValueError,
        r"bias\.transformer_xl r must be on cpu like query, got meta",
    ),
    "xl, two batches": (
        lambda: lower(XL(ONES(2, 9, 3, 4), v=ONES(3, 4)) + XL(ONES(2, 9, 3, 4))),
        ValueError,
        "at most one summand of different v may have relative rows with a batch",
    ),
    "shaw, rows": (
        lambda: SHAW(ONES(6, 4), 3),
        ValueError,
        r"rel_key must have shape \(7, D\) or \(H, 7, D\), that is 2 \* max_distance \+ 1 rows, got \(6, 4\)",
    ),
    "shaw, type": (lambda: SHAW(ONES(7, 4).long(), 3), TypeError, r"bias\.shaw rel_key must be float32"),
    "shaw, distance": (lambda: SHAW(ONES(7, 4), -3), ValueError, r"bias\.shaw max_distance must be a non-negative int"),
    "shaw, float": (lambda: SHAW(ONES(7, 4), 3.0), TypeError, r"bias\.shaw max_distance must be an int"),
    "shaw, heads": (
        lambda: lower(SHAW(ONES(2, 7, 4), 3)),
        ValueError,
        r"\(3, 7, 4\).* to match query, got \(2, 7, 4\)",
    ),
    "shaw, width": (lambda: lower(SHAW(ONES(7, 5), 3)), ValueError, r"\(3, 7, 4\).* to match query, got \(1, 7, 5\)"),
    "disentangled, none": (lambda: DIS(None, None, max_position=4), ValueError, r"pos_key must be a tensor where"),
    "disentangled, rows": (
        lambda: DIS(ONES(3, 7, 4), max_position=4),
        ValueError,
        r"pos_key must have shape \(H, 8, D\) or \(B, H, 8, D\) \(2 \* max_position rows\), got \(3, 7, 4\)",
    ),
    "disentangled, bucket rows": (
        lambda: DIS(None, ONES(3, 8, 4), buckets=6, max_position=12),
        ValueError,
        r"pos_query must have shape \(H, 12, D\) .*\(2 \* buckets rows\), got \(3, 8, 4\)",
    ),
    "disentangled, type": (lambda: DIS([1], max_position=4), TypeError, r"bias\.disentangled pos_key must be a torch"),
    "disentangled, buckets": (
        lambda: DIS(ONES(3, 2, 4), buckets=1, max_position=4),
        ValueError,
        r"buckets must be at least 2 \(or None\), got 1",
    ),
    "disentangled, near": (
        lambda: DIS(ONES(3, 16, 4), buckets=8, max_position=5),
        ValueError,
        r"max_position must be greater than 5 with 8 buckets, got 5",
    ),
    "disentangled, max_position": (
        lambda: DIS(ONES(3, 8, 4), max_position=0),
        ValueError,
        r"bias\.disentangled max_position must be positive, got 0",
    ),
    "disentangled, scale": (
        lambda: DIS(ONES(3, 8, 4), max_position=4, scale="x"),
        TypeError,
        r"bias\.disentangled scale must be a number",
    ),
    "disentangled, scale 0": (
        lambda: lower(DIS(ONES(3, 8, 4), max_position=4, scale=1.0), scale=0.0),
        ValueError,
        r"bias\.disentangled scale must be None or 0 where attention's is 0, got 1\.0",
    ),
    "disentangled, heads": (
        lambda: lower(DIS(ONES(2, 8, 4), max_position=4)),
        ValueError,
        r"pos_key must have shape \(3, 8, 4\) to match query, got \(2, 8, 4\)",
    ),
    "disentangled, batch": (
        lambda: lower(DIS(ONES(3, 3, 8, 4), max_position=4)),
        ValueError,
        r"pos_key must have shape \(2, 3, 8, 4\) to match query, got \(3, 3, 8, 4\)",
    ),
    "segment, scores": (lambda: SEGMENT(ONES(2, 3, 5, 3), *SEG), ValueError, r"scores must have shape \(B, H, Lq, 2\)"),
    "segment, type": (
        lambda: SEGMENT(ONES(2, 3, 5, 2).int(), *SEG),
        TypeError,
        r"bias\.segment scores must be float32",
    ),
    "segment, ids": (
        lambda: SEGMENT(ONES(2, 3, 5, 2), ONES(5), SEG[1]),
        TypeError,
        r"bias\.segment seg_q must be an integer tensor, got torch\.float32",
    ),
    "segment, 3-D": (
        lambda: SEGMENT(ONES(2, 3, 5, 2), SEG[0], SEG[1][None]),
        ValueError,
        r"bias\.segment seg_k must have shape \(L,\) or \(B, L\), got \(1, 2, 9\)",
    ),
    "segment, queries": (
        lambda: lower(SEGMENT(ONES(2, 3, 6, 2), *SEG)),
        ValueError,
        r"bias\.segment scores must be broadcastable to \(2, 3, 5, 2\), got \(2, 3, 6, 2\)",
    ),
    "segment, length": (
        lambda: lower(SEGMENT(ONES(2, 3, 5, 2), SEG[1], SEG[1])),
        ValueError,
        r"bias\.segment seg_q must have shape \(5,\) or \(2, 5\) to match query, got \(2, 9\)",
    ),
    "segment, batch": (
        lambda: lower(SEGMENT(ONES(2, 3, 5, 2), SEG[0], SEG[1].repeat(2, 1)[:3])),
        ValueError,
        r"bias\.segment seg_k must have shape \(9,\) or \(2, 9\) to match key, got \(3, 9\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


PACKED = {
    "xl": (lambda r, u, v: XL(r, u, v, -13), lambda: (normal(24, 3, 8), normal(3, 8), normal(3, 8))),
    "xl few": (lambda r, u: XL(r, u, u, -3), lambda: (normal(5, 3, 8), normal(3, 8))),
    "shaw": (lambda rel: SHAW(rel, 3), lambda: (normal(7, 8),)),
    "v1": (lambda a, b: DIS(a, b, max_position=4), lambda: (normal(3, 8, 8), normal(3, 8, 8))),
    "v2": (lambda a, b: DIS(a, b, buckets=4, max_position=9, scale=0.2), lambda: (normal(3, 8, 8), normal(1, 8, 8))),
    "sum": (lambda r, v, rel: XL(r, None, v, -5) + SHAW(rel, 3), lambda: (normal(9, 3, 8), normal(3, 8), normal(7, 8))),
}


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("name", PACKED)
def test_packed(name, softcap, fp64_backend):
    """Three sequences, one without queries, next to the same sequences one by one: distances are local."""
    make, draw = PACKED[name]
    leaves, rows, cols = draw(), [0, 4, 4, 11], [0, 6, 9, 14]
    q, k = normal(11, 3, 8), normal(14, 3, 8)
    options = dict(bias=make(*leaves), return_lse=True, softcap=softcap)
    offsets = torch.tensor(rows), torch.tensor(cols)
    out, lse = pyext.varlen_attention(q, k, k, *offsets, **options, impl=fp64_backend.impl)
    each = []
    for n in range(3):
        query, key = (x[a[n] : a[n + 1]].transpose(0, 1)[None] for x, a in ((q, rows), (k, cols)))
        each.append(pyext.attention(query, key, key, **options, impl=fp64_backend.impl))
    wanted = torch.cat([o[0].transpose(0, 1) for o, _ in each])
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lse, torch.cat([x[0] for _, x in each], dim=1), rtol=1e-10, atol=1e-12)
    weight, inside = torch.randn_like(out), (q, k, *leaves)
    for a, b in zip(*(torch.autograd.grad(x, inside, weight) for x in (out, wanted))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_packed_refuses():
    q, cu = torch.randn(9, 3, 4), torch.tensor([0, 4, 9])
    for bias, message in (
        (SEGMENT(ONES(9, 2), ONES(9).int(), ONES(9).int()), r"bias\.segment: a segment bias has no meaning in varlen"),
        (DIS(ONES(1, 3, 8, 4), max_position=4), r"bias\.disentangled pos_key: a tensor with a batch has no meaning"),
        (XL(ONES(1, 9, 3, 4)), r"bias\.transformer_xl r: a tensor with a batch has no meaning in varlen_attention"),
    ):
        with pytest.raises(ValueError, match=message):
            pyext.varlen_attention(q, q, q, cu, cu, bias=bias)


@pytest.mark.parametrize("lengths", [(0, 0), (0, 1), (1, 0), (0, 3), (3, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_empty_calls_train(name, lengths, backend):
    """No distances at all are legal, and the leaves get gradients of zeros."""
    make, draw = PACKED[name]
    q, k = (normal(2, 3, n, 8, dtype=backend.widest) for n in lengths)
    leaves = [leaf.detach().to(q.dtype).requires_grad_() for leaf in draw()]
    out = pyext.attention(q, k, k, bias=make(*leaves), impl=backend.impl)
    assert out.shape == q.shape
    out.sum().backward()
    for leaf in leaves if 0 in lengths else ():
        assert (leaf.grad == 0).all()
    if 0 in lengths:
        assert (q.grad == 0).all()
    offsets = [torch.tensor([0, n]) for n in lengths]
    q, k = (x.detach()[0].transpose(0, 1) for x in (q, k))
    pyext.varlen_attention(q, k, k, *offsets, bias=make(*leaves), impl=backend.impl).sum().backward()


def test_u_outside_of_the_softcap_is_full_precision_under_autocast():
    query, key = inputs(dtype=torch.float32, heads=4, kv_heads=2)
    u = normal(4, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        problem = lower(XL(ONES(13, 4, 4), u), query, key, softcap=2.0)
    wanted = torch.einsum("hd,bhjd->bhj", u.double(), key.bfloat16().double().repeat_interleave(2, 1)) / 2.0
    assert problem.dense.dtype == torch.float32
    torch.testing.assert_close(problem.dense[:, :, 0].double(), wanted, rtol=1e-6, atol=1e-6)


def test_the_scheme_of_the_docs(fp64_backend):
    """The ten lines of docs/positions.md run and mean what they say."""
    text = (Path(__file__).parents[1] / "docs" / "positions.md").read_text()
    names = {"__name__": "docs"}
    exec(text.split("```python\n")[1].split("```")[0], names)
    p, a = normal(3), normal(3)
    query, key = inputs(lq=7, lk=11)
    bias = names["Kerple"](p.exp(), a.exp())
    distance = oracle.distance(7, 11).abs()
    wanted = -p.exp().view(3, 1, 1) * torch.log(1 + a.exp().view(3, 1, 1) * distance)
    torch.testing.assert_close(
        added(bias + pyext.bias.t5(torch.zeros(32, 3), True), query, key), wanted.expand(2, 3, 7, 11)
    )
    out = pyext.attention(query, key, key, bias=bias, mask=pyext.masks.causal(), impl=fp64_backend.impl)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(out.square().sum(), (p, a)))


def test_no_heads(backend):
    q = torch.randn(2, 0, 5, 4)
    u = torch.zeros(0, 4)
    for bias in (
        XL(ONES(9, 0, 4), u, u),
        XL(ONES(9, 1, 4)),
        SHAW(ONES(7, 4), 3),
        DIS(None, ONES(1, 8, 4), max_position=4),
    ):
        for softcap in (None, 1.0):
            out = pyext.attention(q, q, q, bias=bias, softcap=softcap, impl=backend.impl)
            assert out.shape == (2, 0, 5, 4)


def test_autocast_casts_rows(backend):
    q = torch.randn(2, 4, 9, 8, requires_grad=True)
    r, u = torch.randn(17, 4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = pyext.attention(q, q, q, bias=XL(r, u, u), impl=backend.impl)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert r.grad.dtype == u.grad.dtype == torch.float32 and r.grad.abs().sum() > 0
    plain = pyext.attention(q, q, q, bias=XL(r, u, u), impl=backend.impl)
    torch.testing.assert_close(out.float(), plain, rtol=0.05, atol=0.1)
