"""Random shapes, strides, dtypes, masks and biases, forward and backward, on every backend.

Examples differ in every run; a failure prints the case and the blob that repeats it.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pyext
from pyext.ops import _passes
from support import backends, layouts
from support.cases import DTYPES, Case, compare, expected, run
from support.examples import examples
from support.parts import (
    Shape,
    alibi,
    bool_attn_mask,
    causal,
    dense,
    dense_mask,
    diagonal,
    disentangled,
    documents,
    either,
    fixed,
    float_attn_mask,
    frozen_attn_mask,
    function,
    image,
    is_causal,
    padding,
    permutation,
    prefix,
    segment,
    shaw,
    strided,
    t5,
    torch_causal,
    transformer_xl,
    union,
    window,
)

BROADCASTS = ("bhqk", "b1qk", "1hqk", "11qk", "bh1k", "b11k", "1h1k", "111k", "bhq1", "b111", "1111", "hqk", "qk", "1k")
seeds = st.integers(0, 2**31 - 1)


def in_triton(test):
    """A few calls, which the interpreter takes a second each; many when asked for all."""
    here = pytest.mark.skipif(not backends.TRITON, reason="Triton is not installed")
    return here(examples(100 if backends.INTERPRET_ALL else 4)(test))


def length(longest):
    """Small lengths, tile borders and anything between."""
    return st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 17, 31, 32, 33, 63, 64, 65]), st.integers(1, longest))


@st.composite
def shapes(draw):
    hkv, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    d = draw(st.one_of(st.integers(1, 20), st.sampled_from([24, 31, 32, 40, 64, 72, 80])))
    dv = draw(st.one_of(st.just(d), st.integers(1, 70)))
    lq = draw(st.one_of(st.integers(1, 8), length(90)))
    lk = draw(length(160 if lq > 8 else 600))
    if draw(st.integers(0, 3)) == 0:
        lk = lq
    return Shape(draw(st.integers(0, 3)), hkv * group, hkv, lq, lk, d, dv)


def limits():
    return st.one_of(st.none(), st.integers(0, 40))


def masks(shape):
    return st.one_of(
        st.just(causal()),
        st.builds(window, limits(), limits()),
        st.builds(padding, queries=st.sampled_from([None, "random"])),
        st.builds(documents, batched=st.booleans(), cross=st.just(True), count=st.integers(1, 6), mixed=st.booleans()),
        st.just(prefix()),
        st.builds(either, st.integers(0, shape.lk)),
        st.builds(dense_mask, st.sampled_from(BROADCASTS), st.sampled_from([0.02, 0.3, 0.9])),
        blocks(shape),
        st.builds(union, blocks(shape), blocks(shape)),
    )


def blocks(shape):
    """Masks that lower to a block table, and some that are reordered instead."""
    several = [
        st.builds(strided, st.integers(1, 40)),
        st.builds(lambda stride, summary: fixed(stride, min(stride, summary)), st.integers(1, 40), st.integers(1, 9)),
        st.builds(image, st.sampled_from(["rows", "columns", "conv"]), st.integers(0, 50), st.integers(1, 20)),
        st.builds(function, st.sampled_from([which for which in BROADCASTS if len(which) == 4])),
    ]
    if shape.lq <= shape.lk:
        several.append(st.builds(permutation, st.booleans(), st.booleans()))
    return st.one_of(several)


def biases():
    dtypes = st.sampled_from([None, torch.float32])
    kinds = st.sampled_from(layouts.VARIED)
    return st.one_of(
        st.builds(dense, st.sampled_from(BROADCASTS), kinds, dtypes, holes=st.booleans()),
        st.builds(diagonal, st.sampled_from("h1"), dtypes),
        st.builds(alibi, symmetric=st.booleans(), learned=st.booleans(), dtype=dtypes),
        st.builds(t5, st.booleans(), st.sampled_from([4, 8, 32]), st.sampled_from([20, 64, 128]), dtypes),
        st.builds(
            transformer_xl,
            st.sampled_from(["all", "past", "xlnet", "few"]),
            u=st.booleans(),
            v=st.booleans(),
            heads=st.sampled_from("h1"),
            dtype=dtypes,
        ),
        st.builds(shaw, st.integers(0, 70), st.sampled_from(["", "h", "1"]), dtypes),
        st.builds(
            disentangled,
            st.sampled_from(["both", "c2p", "p2c"]),
            st.sampled_from([None, 2, 5, 16]),
            st.sampled_from([12, 50]),
            st.sampled_from("h1"),
            batched=st.booleans(),
            scale=st.sampled_from([None, 0.13]),
            dtype=dtypes,
        ),
        st.builds(segment, st.sampled_from(["bhq", "1hq", "b1q", "111"]), st.booleans(), st.integers(1, 4), dtypes),
    )


def sdpa_masks(shape):
    """At most one of SDPA's own arguments."""
    return st.one_of(
        st.just(()),
        st.just(()),
        st.tuples(st.just(is_causal())),
        st.tuples(st.builds(torch_causal, st.sampled_from(["upper_left", "lower_right"]))),
        st.tuples(st.builds(bool_attn_mask, st.sampled_from(BROADCASTS), st.sampled_from([0.1, 0.7]))),
        st.tuples(st.builds(float_attn_mask, st.sampled_from(BROADCASTS), st.sampled_from(layouts.VARIED))),
        st.tuples(st.builds(frozen_attn_mask, st.just(float("-inf")), st.sampled_from(BROADCASTS))),
    )


@st.composite
def cases(draw):
    shape = draw(shapes())
    parts = [*draw(st.lists(masks(shape), max_size=2)), *draw(st.lists(biases(), max_size=2)), *draw(sdpa_masks(shape))]
    return Case(
        shape,
        tuple(parts),
        scale=draw(st.sampled_from([None, None, 0.07, 0.5, -0.2])),
        softcap=draw(st.sampled_from([None, None, 0.5, 4.0])),
        sinks=draw(st.booleans()),
        lse=draw(st.booleans()),
        layout=tuple(draw(st.sampled_from(layouts.VARIED)) for _ in range(3)),
        grad_layout=draw(st.sampled_from(layouts.VARIED)),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.0, 0.2, 0.8])),
    )


def check(tried, which, dtype, seed, threads, least):
    """least: the number of queries from which on a mask may be reordered."""
    for backend in tried:
        with backend.selected(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(_passes, "LEAST_QUERIES", least)
            drawn, reference, eager = expected(which, dtype, seed)
            got = run(drawn, backend.impl, threads)
        compare(drawn, got, reference, eager)


ANY = dict(
    which=cases(), seed=seeds, threads=st.sampled_from([1, 2]), least=st.sampled_from([9, _passes.LEAST_QUERIES])
)


@examples(150)
@given(dtype=st.sampled_from(DTYPES), **ANY)
def test_any_call(**call):
    check(backends.ALL, **call)


@in_triton
@given(dtype=st.sampled_from(DTYPES[:3]), **ANY)
def test_any_call_of_triton(**call):
    check(backends.TRITON, **call)


@st.composite
def packed_calls(draw):
    sequences = draw(st.lists(st.tuples(length(60), length(90)), min_size=1, max_size=6))
    bias = draw(st.sampled_from(["none", "alibi", "symmetric", "t5", "t5 one way", "both", "xl", "deberta + shaw"]))
    mask = draw(st.sampled_from(["none", "is_causal", "causal", "window", "prefix"]))
    left, right = draw(limits()), draw(limits())
    return sequences, bias, mask, left, right


PACKED = dict(
    call=packed_calls(),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (3, 3)]),
    dims=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    softcap=st.sampled_from([None, 1.5]),
    dropout=st.sampled_from([0.0, 0.3]),
    seed=seeds,
)


@examples(60)
@given(**PACKED)
def test_any_packed_call(**call):
    """fp64 on the kernels against the reference, which runs each sequence by itself."""
    wanted = packed("reference", torch.float64, **call)
    for backend in backends.CPU:
        with backend.selected():
            results = packed(backend.impl, torch.float64, **call)
        for got, exact in zip(results, wanted):
            torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-10)


@in_triton
@given(**PACKED)
def test_any_packed_call_of_triton(**call):
    """fp32 against the reference in fp64."""
    with backends.TRITON[0].selected():
        results = [packed(*by, **call) for by in (("triton", torch.float32), ("reference", torch.float64))]
    for got, exact in zip(*results):
        near = 1e-5 * (1 + exact.masked_fill(exact == -torch.inf, 0).abs().sum().item() / max(exact.numel(), 1))
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=near)


def packed(impl, dtype, call, heads, dims, softcap, dropout, seed):
    """out, LSE and all gradients, zeros where there is none."""
    sequences, bias, mask, left, right = call
    lengths_q, lengths_k = zip(*sequences)
    g = torch.Generator().manual_seed(seed)

    def leaf(*size):
        values = torch.randn(*size, generator=g, device="cpu")  # in fp32, whatever the dtype
        return values.to(torch.get_default_device(), dtype).requires_grad_()

    q, k, v = leaf(sum(lengths_q), heads[0], dims[0]), leaf(sum(lengths_k), heads[1], dims[0]), None
    v = leaf(sum(lengths_k), heads[1], dims[1])
    slopes, table, sinks = leaf(heads[0]), leaf(8, heads[0]), leaf(heads[0])
    r, u, w, rows = leaf(90, heads[0], dims[0]), leaf(heads[0], dims[0]), leaf(1, dims[0]), leaf(heads[0], 8, dims[0])
    biases = {
        "none": None,
        "alibi": pyext.bias.alibi(slopes),
        "symmetric": pyext.bias.alibi(slopes, symmetric=True),
        "t5": pyext.bias.t5(table, bidirectional=True, max_distance=30),
        "t5 one way": pyext.bias.t5(table, bidirectional=False, max_distance=30),
        "xl": pyext.bias.transformer_xl(r, u, w, first_distance=-60),
        "deberta + shaw": pyext.bias.disentangled(rows, rows, buckets=4, max_position=30)
        + pyext.bias.shaw(rows[0, :7], 3),
        "both": pyext.bias.alibi(slopes) + pyext.bias.t5(table, bidirectional=True),
    }
    visible = {
        "causal": pyext.masks.causal(),
        "window": pyext.masks.window(left, right),
        "prefix": pyext.masks.prefix(torch.tensor(lengths_k) // 2),
    }
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    options = dict(
        bias=biases[bias], mask=visible.get(mask), is_causal=mask == "is_causal", softcap=softcap, sinks=sinks
    )
    out, lse = pyext.varlen_attention(
        *(q, k, v, cu_q, cu_k),
        enable_gqa=True,
        return_lse=True,
        dropout_p=dropout,
        generator=torch.Generator(torch.get_default_device()).manual_seed(seed),
        impl=impl,
        **options,
    )
    weight = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)
    leaves = [q, k, v, slopes, table, sinks, r, u, w, rows]
    grads = torch.autograd.grad((out * weight).sum() + lse.sum(), leaves, allow_unused=True)
    return [out, lse, *(torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, grads))]
