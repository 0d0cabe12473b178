"""flash-attn's functions against the dense oracle: every argument, forward and all gradients."""

from __future__ import annotations

import inspect

import pytest
import torch

import pyext
from pyext import flash_attn_interface as flash
from support import oracle

TOLERANCE = {torch.float64: dict(rtol=1e-10, atol=1e-11), torch.float32: dict(rtol=2e-4, atol=2e-4)}
HEADS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (4, 1)}
COMMON = {
    "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0,
    "alibi_slopes": None, "deterministic": False, "return_attn_probs": False,
}  # fmt: skip
OPTIONS = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(window_size=(5, 2)),
    "window, list": dict(window_size=[0, 0]),
    "left window": dict(window_size=(7, -1)),
    "right window": dict(window_size=(-1, 3)),
    "causal window": dict(causal=True, window_size=(4, 9)),
    "softcap, scale": dict(softcap=1.5, softmax_scale=0.7),
    "alibi": dict(alibi="shared"),
    "alibi, causal": dict(alibi="shared", causal=True),
    "alibi per row, window": dict(alibi="per row", window_size=(6, 6), softcap=2.0),
    "deterministic": dict(deterministic=True),
}


def leaf(*size, dtype):
    return torch.randn(*size, dtype=dtype, requires_grad=True)


def options_for(name, batch, heads, dtype):
    options = dict(OPTIONS[name])
    kind = options.pop("alibi", None)
    if kind is not None:
        size = (heads,) if kind == "shared" else (batch, heads)
        options["alibi_slopes"] = torch.rand(*size, dtype=dtype, requires_grad=True)
    return options


def dense(q, k, v, row, options):
    """(out (Lq, Hq, D), lse (Hq, Lq)) of one sequence (L, H, D) by flash-attn's definition."""
    d = oracle.distance(q.shape[0], k.shape[0])
    left, right = options.get("window_size", (-1, -1))
    right = 0 if options.get("causal") else right
    allowed = torch.ones_like(d, dtype=torch.bool)
    if left >= 0:
        allowed &= d >= -left
    if right >= 0:
        allowed &= d <= right
    slopes, score = options.get("alibi_slopes"), None
    if slopes is not None:
        slopes = slopes if slopes.dim() == 1 else slopes[row]
        score = -slopes.view(-1, 1, 1) * d.abs()
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    scale, softcap = options.get("softmax_scale"), options.get("softcap")
    out, lse = oracle.attention(*heads_first, scale=scale, softcap=softcap, score=score, allowed=allowed)
    return out[0].transpose(0, 1), lse[0]


def compare(got, wanted, leaves, dtype):
    """(out, lse) and their gradients; a query without keys has lse -inf, which has none."""
    weight = torch.randn_like(got[0])
    totals = []
    for out, lse in (got, wanted):
        seen = lse.masked_fill(lse == -torch.inf, 0.0)
        totals.append((out * weight).sum() + (seen * weight.mean()).sum())
    for name, a, b in zip(("out", "lse"), got, wanted):
        torch.testing.assert_close(a, b, **TOLERANCE[dtype], msg=lambda m, n=name: f"{n}: {m}")
    gradients = [torch.autograd.grad(total, list(leaves.values()), retain_graph=True) for total in totals]
    for name, a, b in zip(leaves, *gradients):
        torch.testing.assert_close(a, b, **TOLERANCE[dtype], msg=lambda m, n=name: f"grad {n}: {m}")


def with_slopes(leaves, options):
    slopes = options.get("alibi_slopes")
    return leaves if slopes is None else {**leaves, "slopes": slopes}


@pytest.mark.parametrize("sizes", [(2, 13, 13), (3, 5, 19), (2, 17, 6), (1, 1, 40), (2, 3, 0), (0, 4, 4)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_padded(name, sizes, fp64_backend):
    batch, queries, keys = sizes
    dtype = torch.float64
    for heads, groups in HEADS.values():
        options = options_for(name, batch, heads, dtype)
        q, k, v = (leaf(batch, n, h, 16, dtype=dtype) for n, h in ((queries, heads), (keys, groups), (keys, groups)))
        out, lse, nothing = flash.flash_attn_func(q, k, v, **options, return_attn_probs=True, impl=fp64_backend.impl)
        assert nothing is None and out.shape == q.shape and lse.shape == (batch, heads, queries)
        if batch == 0:
            continue
        rows = [dense(q[b], k[b], v[b], b, options) for b in range(batch)]
        wanted = tuple(map(torch.stack, zip(*rows)))
        compare((out, lse), wanted, with_slopes(dict(q=q, k=k, v=v), options), dtype)


LENGTHS = {
    "mixed": ((5, 0, 13, 1, 20), (5, 7, 20, 0, 9)),
    "decode": ((1, 1, 2), (30, 17, 1)),
    "one": ((9,), (12,)),
    "empty": ((0, 0), (0, 3)),
    "none": ((), ()),
}


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def dense_packed(q, k, v, lengths, options):
    sequences = enumerate(zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1])))
    outs, lses = zip(*(dense(*sequence, row, options) for row, sequence in sequences))
    return torch.cat(outs), torch.cat(lses, 1)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("name", OPTIONS)
def test_varlen(name, lengths, fp64_backend):
    dtype, totals = torch.float64, tuple(map(sum, lengths))
    cu_q, cu_k = map(offsets, lengths)
    for heads, groups in HEADS.values():
        options = options_for(name, len(lengths[0]), heads, dtype)
        q, k, v = (leaf(n, h, 16, dtype=dtype) for n, h in zip((totals[0], *totals[1:] * 2), (heads, groups, groups)))
        given = (q, k, v, cu_q, cu_k, max(lengths[0], default=0), max(lengths[1], default=0))
        out, lse, nothing = flash.flash_attn_varlen_func(
            *given, **options, return_attn_probs=True, impl=fp64_backend.impl
        )
        assert nothing is None and out.shape == q.shape and lse.shape == (heads, totals[0])
        if lengths[0]:
            wanted = dense_packed(q, k, v, lengths, options)
            compare((out, lse), wanted, with_slopes(dict(q=q, k=k, v=v), options), dtype)


def paged(k, v, lengths, page, spare=3):
    """Packed k and v as pages in random order, and their table; what is not in use is NaN, or no page at all."""
    counts = [-(-length // page) for length in lengths]
    order = torch.randperm(sum(counts) + spare)
    table = torch.full((len(lengths), max(counts, default=0) + 1), -7, dtype=torch.int32)
    pages = [x.new_full((len(order), page, *x.shape[1:]), torch.nan) for x in (k, v)]
    taken = 0
    for row, (count, *parts) in enumerate(zip(counts, k.split(lengths), v.split(lengths))):
        table[row, :count] = order[taken : taken + count]
        for j in range(lengths[row]):
            for into, part in zip(pages, parts):
                into[table[row, j // page], j % page] = part[j]
        taken += count
    return *pages, table


@pytest.mark.parametrize("name", ["plain", "causal window", "alibi per row, window"])
@pytest.mark.parametrize("page", [1, 4, 16])
def test_varlen_with_pages(page, name, fp64_backend):
    lengths, dtype = LENGTHS["mixed"], torch.float64
    q, k, v = (leaf(sum(n), h, 16, dtype=dtype) for n, h in zip((*lengths, lengths[1]), (4, 2, 2)))
    options = options_for(name, len(lengths[0]), 4, dtype)
    k_pages, v_pages, table = paged(k, v, lengths[1], page)
    given = (q, k_pages, v_pages, *map(offsets, lengths), 20, 20)
    out, lse, _ = flash.flash_attn_varlen_func(
        *given, **options, return_attn_probs=True, block_table=table, impl=fp64_backend.impl
    )
    wanted = dense_packed(q, k, v, lengths, options)
    compare((out, lse), wanted, with_slopes(dict(q=q, k=k, v=v), options), dtype)


@pytest.mark.parametrize("packing", ["qkv", "kv"])
def test_packed_tensors(packing, family):
    """The same numbers as from separate tensors, and one gradient for all."""
    options = dict(causal=True, window_size=(9, 0), alibi_slopes=torch.rand(4), softcap=3.0, softmax_scale=0.3)
    qkv, lengths = leaf(2, 11, 3, 4, 16, dtype=torch.float32), offsets((11, 11))
    q, k, v = qkv.unbind(2)
    wanted = flash.flash_attn_func(q, k, v, **options, impl=family.impl)
    gradient = torch.autograd.grad(wanted.square().sum(), qkv)[0]
    options["impl"] = family.impl
    if packing == "qkv":
        out = flash.flash_attn_qkvpacked_func(qkv, **options)
        packed = flash.flash_attn_varlen_qkvpacked_func(qkv.flatten(0, 1), lengths, 11, **options)
    else:
        out = flash.flash_attn_kvpacked_func(q, qkv[:, :, 1:], **options)
        flat = qkv.flatten(0, 1)
        packed = flash.flash_attn_varlen_kvpacked_func(flat[:, 0], flat[:, 1:], lengths, lengths, 11, 11, **options)
    for got in (out, packed.unflatten(0, (2, 11))):
        torch.testing.assert_close(got, wanted, **TOLERANCE[torch.float32])
        torch.testing.assert_close(
            torch.autograd.grad(got.square().sum(), qkv, retain_graph=True)[0], gradient, **TOLERANCE[torch.float32]
        )


def test_signatures():
    """flash-attn 2's names, order and defaults; `impl` comes by keyword only."""
    cu = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    required = {
        "flash_attn_func": ["q", "k", "v"],
        "flash_attn_qkvpacked_func": ["qkv"],
        "flash_attn_kvpacked_func": ["q", "kv"],
        "flash_attn_varlen_func": ["q", "k", "v", *cu],
        "flash_attn_varlen_qkvpacked_func": ["qkv", "cu_seqlens", "max_seqlen"],
        "flash_attn_varlen_kvpacked_func": ["q", "kv", *cu],
    }
    for name, tensors in required.items():
        expected = {**dict.fromkeys(tensors, inspect.Parameter.empty), **COMMON}
        if name == "flash_attn_varlen_func":
            expected["block_table"] = None
        assert signature(name) == expected and list(signature(name)) == list(expected)
    cached = signature("flash_attn_with_kvcache")
    names = (
        "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad block_table "
        "softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits return_softmax_lse"
    )
    assert list(cached) == names.split()
    defaults = dict(causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, num_splits=0)
    for name, default in list(cached.items())[3:]:
        assert default == {**defaults, "return_softmax_lse": False}.get(name)
    assert pyext.flash_attn_interface is flash


def signature(name):
    parameters = dict(inspect.signature(getattr(flash, name)).parameters)
    assert parameters.pop("impl").kind is inspect.Parameter.KEYWORD_ONLY
    return {name: parameter.default for name, parameter in parameters.items()}


def test_dropout():
    q = torch.randn(2, 40, 4, 16)
    torch.manual_seed(1)
    first = flash.flash_attn_func(q, q, q, 0.5)
    assert not torch.equal(first, flash.flash_attn_func(q, q, q, 0.5))
    torch.manual_seed(1)
    assert torch.equal(first, flash.flash_attn_func(q, q, q, 0.5))
    assert (flash.flash_attn_func(q, q, q, 1.0) == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_half_precision_and_layout(dtype, family):
    """The output has the query's dtype and is contiguous, as flash-attn's callers, which reshape it, expect."""
    q, k, v = (torch.randn(2, n, h, 16).to(dtype) for n, h in ((9, 4), (14, 2), (14, 2)))
    out, lse, _ = flash.flash_attn_func(q, k, v, causal=True, return_attn_probs=True, impl=family.impl)
    assert out.dtype == dtype and lse.dtype == torch.float32 and out.is_contiguous()
    wanted = flash.flash_attn_func(q.float(), k.float(), v.float(), causal=True)
    torch.testing.assert_close(out.float(), wanted, rtol=3e-2, atol=3e-2)


def test_compiles():
    torch._dynamo.reset()
    q, k, v = (leaf(2, n, h, 16, dtype=torch.float32) for n, h in ((9, 4), (14, 2), (14, 2)))
    slopes, cu = torch.rand(4), offsets((4, 5))

    def padded(q, k, v):
        return flash.flash_attn_func(q, k, v, causal=True, window_size=(8, 0), alibi_slopes=slopes)

    def packed(q, k, v):
        return flash.flash_attn_varlen_func(q[0], k[0, :9], v[0, :9], cu, cu, 5, 5, causal=True)

    for function in (padded, packed):
        got = torch.compile(function, fullgraph=True, backend="aot_eager")(q, k, v)
        torch.testing.assert_close(got, function(q, k, v))
        gradients = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (got, function(q, k, v))]
        torch.testing.assert_close(*gradients)


Q, K = torch.zeros(2, 5, 4, 16), torch.zeros(2, 7, 2, 16)
CU = offsets((2, 3))
BAD = {
    "q must have shape (B, L, H, D)": lambda: flash.flash_attn_func(Q[0], K, K),
    "q must be a torch.Tensor": lambda: flash.flash_attn_func(None, K, K),
    "k must have shape (2, Lk, Hkv, 16) to match q, with Hkv dividing its 4": lambda: flash.flash_attn_func(
        Q, K[:1], K[:1]
    ),
    "k must have shape (2, Lk, Hkv, 16)": lambda: flash.flash_attn_func(Q, torch.zeros(2, 7, 3, 16), K),
    "v must have shape (2, 7, 2, D) to match k": lambda: flash.flash_attn_func(Q, K, K[:, :3]),
    "k must have dtype torch.float32 to match q": lambda: flash.flash_attn_func(Q, K.double(), K),
    "alibi_slopes must have shape (4,) or (2, 4)": lambda: flash.flash_attn_func(Q, K, K, alibi_slopes=torch.zeros(3)),
    "window_size must be a pair of ints": lambda: flash.flash_attn_func(Q, K, K, window_size=3),
    "window_size[1] must be an int": lambda: flash.flash_attn_func(Q, K, K, window_size=(3, 1.5)),
    "softcap must be positive": lambda: flash.flash_attn_func(Q, K, K, softcap=-1.0),
    "softmax_scale must be a number": lambda: flash.flash_attn_func(Q, K, K, softmax_scale="1"),
    "dropout_p must be between 0 and 1": lambda: flash.flash_attn_func(Q, K, K, 1.5),
    "causal must be a bool": lambda: flash.flash_attn_func(Q, K, K, causal="yes"),
    "return_attn_probs must be a bool": lambda: flash.flash_attn_func(Q, K, K, return_attn_probs="yes"),
    "qkv must have shape (B, L, 3, H, D)": lambda: flash.flash_attn_qkvpacked_func(Q),
    "kv must have shape (B, Lk, 2, Hkv, D)": lambda: flash.flash_attn_kvpacked_func(Q, torch.zeros(2, 7, 3, 2, 16)),
    "kv must be float32": lambda: flash.flash_attn_kvpacked_func(Q, torch.zeros(2, 7, 2, 2, 16).int()),
    "q must have shape (total, H, D)": lambda: flash.flash_attn_varlen_func(Q, K[0], K[0], CU, CU, 3, 3),
    "cu_seqlens_q must rise from 0 to 5": lambda: flash.flash_attn_varlen_func(
        Q[0], K[0], K[0], offsets((2, 2)), offsets((3, 4)), 3, 3
    ),
    "cu_seqlens_k must have shape (3,)": lambda: flash.flash_attn_varlen_func(
        Q[0], K[0], K[0], CU, offsets((7,)), 3, 7
    ),
    "cu_seqlens must be an integer": lambda: flash.flash_attn_varlen_qkvpacked_func(
        torch.zeros(5, 3, 4, 16), CU.float(), 3
    ),
    "max_seqlen_k must be an int": lambda: flash.flash_attn_varlen_func(Q[0], K[0], K[0], CU, offsets((3, 4)), 3, None),
    "block_table must have shape (2, pages)": lambda: flash.flash_attn_varlen_func(
        Q[0], K, K, CU, offsets((3, 4)), 3, 4, block_table=torch.zeros(1, 1).int()
    ),
    "block_table must have shape (2, 2 or more) for pages of 7": lambda: flash.flash_attn_varlen_func(
        Q[0], K, K, CU, offsets((3, 8)), 3, 8, block_table=torch.zeros(2, 1).int()
    ),
    "block_table must lie in [0, 2), got 2": lambda: flash.flash_attn_varlen_func(
        Q[0], K, K, CU, offsets((3, 4)), 3, 4, block_table=torch.tensor([[0], [2]])
    ),
    "k must have shape (num_pages, page_size, Hkv, D) with block_table": lambda: flash.flash_attn_varlen_func(
        Q[0], K[0], K[0], CU, CU, 3, 4, block_table=torch.zeros(2, 1).int()
    ),
    "impl must be one of": lambda: flash.flash_attn_func(Q, K, K, impl="fast"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises((TypeError, ValueError)) as caught:
        BAD[message]()
    assert str(caught.value).startswith(message), caught.value
