"""Attention under block masks and reordered parts, forward and backward, in every dtype, against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch

import pyext
from pyext.ops import _passes
from support.cases import DTYPES, case, check, draw, function_of_leaves, run
from support.parts import (
    Shape,
    alibi,
    block_mask,
    bool_attn_mask,
    causal,
    dense,
    dense_mask,
    documents,
    either,
    fixed,
    float_attn_mask,
    function,
    image,
    is_causal,
    padding,
    permutation,
    prefix,
    strided,
    t5,
    union,
    window,
)

SELF = Shape(2, 2, 2, 150, 150, 16, 16)  # no multiple of a block, and more than one
LONGER = Shape(2, 2, 1, 130, 300, 16, 24)
SHORTER = Shape(1, 2, 2, 300, 140, 16, 16)
BLOCKS = Shape(1, 2, 2, 256, 384, 16, 16)
TINY = Shape(2, 2, 2, 5, 9, 8, 8)
HEADS = Shape(2, 4, 2, 150, 200, 16, 16)
LONG_PERMUTED = Shape(1, 2, 2, 260, 300, 16, 16)

ALONE = [
    case(SELF, strided(16)),
    case(LONGER, strided(7)),
    case(SHORTER, strided(13)),
    case(BLOCKS, strided(128)),
    case(TINY, strided(3)),
    case(SELF, fixed(16, 3)),
    case(LONGER, fixed(50)),
    case(SHORTER, fixed(9, 9)),
    case(BLOCKS, fixed(128, 8)),
    case(SELF, image("rows", 20, 12)),
    case(SHORTER, image("rows", 130, 3)),
    case(SELF, image("columns", 20, 12)),
    case(LONGER, image("columns", 0, 17)),
    case(SELF, image("conv", 20, 12, 5)),
    case(BLOCKS, image("conv", 128, 16, 3)),
    case(SELF, permutation()),
    case(LONGER, permutation(batched=True)),
    case(BLOCKS, permutation(exclude_self=True)),
    case(SELF, function()),
    case(HEADS, function("bh11")),
    case(HEADS, function("1h1k", 0.1)),
    case(BLOCKS, function("b1qk", 0.002)),
    case(SELF, documents(mixed=True)),
    case(LONGER, documents(batched=True, cross=True, mixed=True, count=9)),
    case(SELF, block_mask()),
    case(HEADS, block_mask(64, batch=True)),
    case(LONGER, block_mask((32, 48), heads=True)),
    case(SHORTER, block_mask(256, batch=True, heads=True)),
]
TOGETHER = [
    case(SELF, strided(16), causal()),
    case(LONGER, fixed(16, 2), causal(), padding()),
    case(HEADS, image("columns", 20, 12), causal(), padding(queries="random")),
    case(SELF, image("rows", 20, 12), image("columns", 20, 12)),
    case(SELF, strided(16), fixed(9, 2), function("b1qk")),
    case(BLOCKS, strided(5), window(100, 0)),
    case(LONGER, permutation(), causal()),
    case(LONG_PERMUTED, permutation(), is_causal()),
    case(LONGER, permutation(batched=True), documents(cross=True), padding()),
    case(SELF, documents(mixed=True), prefix()),
    case(SELF, strided(16), dense_mask("bhqk")),
    case(SELF, fixed(16, 3), bool_attn_mask("b11k")),
    case(SELF, strided(16), is_causal()),
    case(SHORTER, fixed(16, 3), is_causal()),
    case(BLOCKS, block_mask(64), strided(9), causal()),
    case(SELF, union(strided(16), window(2, 2))),
    case(LONGER, union(permutation(), documents(cross=True)), causal()),
    case(SELF, union(padding(), function("1h1k", 0.1), image("rows", 20, 12))),
    case(SHORTER, union(block_mask((40, 64), batch=True), window(3, 0)), padding()),
    case(SELF, either(13), strided(16)),
]
FEATURES = [
    case(SELF, strided(16), causal(), t5(), sinks=True),
    case(LONGER, fixed(16, 2), alibi(), softcap=2.0),
    case(HEADS, image("conv", 20, 12), dense("1hqk")),
    case(HEADS, image("columns", 20, 12), causal(), float_attn_mask("b11k")),
    case(HEADS, permutation(batched=True), sinks=True, dropout=0.3),
    case(LONGER, function("bhqk", 0.02), causal(), sinks=True),
    case(SELF, block_mask(64), t5(), dropout=0.2, scale=0.3),
    case(SELF, strided(16), causal(), lse=False, layout="blhd"),
]
# Above `LEAST_QUERIES`: two parts, or one in another order.
LONG, LONG_GROUPED, LONG_CROSS = Shape(2, 2, 2, 300, 300, 16, 16), Shape(1, 4, 2, 257, 400, 16, 24), SHORTER
REORDERED = [
    case(LONG, strided(16), causal()),
    case(LONG, strided(300), causal()),
    case(LONG, strided(1)),
    case(LONG_GROUPED, strided(24)),
    case(LONG_CROSS, strided(7), causal()),
    case(LONG_CROSS, strided(7), is_causal()),
    case(LONG_GROUPED, image("columns", 44, 16), is_causal(), window(90, None)),
    case(LONG_GROUPED, strided(24), causal(), window(100, None), padding(), sinks=True),
    case(LONG, strided(9), documents(batched=True), softcap=2.0, scale=0.4),
    case(LONG, prefix(), strided(9), lse=False),
    case(LONG, fixed(32, 3), causal()),
    case(LONG_GROUPED, fixed(50), padding(queries="random"), sinks=True),
    case(LONG_CROSS, fixed(7, 7), is_causal(), softcap=2.0),
    case(LONG, image("columns", 44, 16), causal()),
    case(LONG, image("columns", 0, 16)),
    case(LONG, image("columns", 300, 16), causal(), sinks=True),
    case(LONG_GROUPED, image("columns", 44, 16), padding(queries="random"), layout="blhd"),
    case(LONG, permutation()),
    case(LONG_GROUPED, permutation(exclude_self=True), sinks=True),
    case(LONG, permutation(batched=True, exclude_self=True), softcap=3.0),
]
ALL = ALONE + TOGETHER + FEATURES


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("which", ALL, ids=str)
def test_by_blocks(which, dtype, backend, session_seed, monkeypatch):
    monkeypatch.setattr(_passes, "LEAST_QUERIES", 10**9)
    check(which, dtype, backend, session_seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("which", REORDERED, ids=str)
def test_by_parts(which, dtype, backend, session_seed, monkeypatch):
    called = []
    attend = _passes.attend
    monkeypatch.setattr(_passes, "attend", lambda *args: called.append(1) or attend(*args))
    check(which, dtype, backend, session_seed)
    assert bool(called) == (backend.impl != "reference")


@pytest.mark.parametrize("which", REORDERED[:5] + FEATURES[3:5], ids=str)
def test_both_ways_agree(which, fp64_backend, seed, monkeypatch):
    """fp64 through the reordered parts, where there are any, and through the block table of the reference."""
    drawn = draw(which, torch.float64, seed)
    monkeypatch.setattr(_passes, "LEAST_QUERIES", 9)
    parts = run(drawn, fp64_backend.impl)
    monkeypatch.setattr(_passes, "LEAST_QUERIES", 10**9)
    table = run(drawn, "reference")
    for name, value in parts.items():
        torch.testing.assert_close(value, table[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def always(monkeypatch):
    """Reorder short calls too."""
    monkeypatch.setattr(_passes, "LEAST_QUERIES", 9)


SHORT = Shape(2, 2, 1, 12, 15, 3, 2)
GRADIENTS = [
    case(SHORT, strided(3), causal(), sinks=True),
    case(SHORT, image("columns", 4, 3), padding([15, 2], [9, 12]), softcap=1.5),
    case(SHORT, image("columns", 4, 3), causal()),
    case(SHORT, fixed(4, 1), causal(), sinks=True),
    case(SHORT, permutation(batched=True, exclude_self=True), sinks=True, scale=0.7),
]


@pytest.mark.parametrize("which", GRADIENTS, ids=str)
def test_gradcheck_of_parts(which, cpu_best, seed, always):
    call, inputs = function_of_leaves(draw(which, torch.float64, seed), cpu_best.impl)
    assert torch.autograd.gradcheck(call, inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


def test_gradients_of_parts_only_where_asked(cpu_best, seed, always):
    """Each subset of leaves gets the bits it gets when all ask; out or lse alone carry a gradient too."""
    drawn = draw(GRADIENTS[0], torch.float32, seed)
    everything = run(drawn, cpu_best.impl)
    for chosen in ({"query"}, {"key", "sinks"}, {"value"}, {"sinks"}):
        for name, leaf in drawn.leaves.items():
            drawn.leaves[name] = leaf.detach().requires_grad_(name in chosen)
        call, inputs = function_of_leaves(drawn, cpu_best.impl)
        leaves = [leaf for leaf in inputs if leaf.requires_grad]
        lse = drawn.grad_lse.masked_fill(everything["lse"] == -torch.inf, 0.0)
        found = torch.autograd.grad(call(*inputs), leaves, (drawn.grad_out, lse))
        for name, gradient in zip([n for n in drawn.leaves if n in chosen], found):
            assert torch.equal(gradient, everything[f"grad {name}"]), name


def test_lse_of_parts_alone_carries_gradient(cpu_best, seed, always):
    drawn = draw(GRADIENTS[0], torch.float64, seed)
    call, inputs = function_of_leaves(drawn, cpu_best.impl)
    wanted, reference = function_of_leaves(drawn, "reference")
    for which in (0, 1):
        upstream = (drawn.grad_out, drawn.grad_lse)[which]
        got, right = (
            torch.autograd.grad(f(*x)[which], x, upstream, allow_unused=True, materialize_grads=True)
            for f, x in ((call, inputs), (wanted, reference))
        )
        for a, b in zip(got, right):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_double_backward_of_parts_raises(cpu_best, seed, always):
    call, inputs = function_of_leaves(draw(GRADIENTS[0], torch.float64, seed), cpu_best.impl)
    with pytest.raises(RuntimeError):
        first = torch.autograd.grad(call(*inputs)[0].square().sum(), inputs, create_graph=True)
        torch.autograd.grad(sum(x.square().sum() for x in first), inputs)


def test_rotary_sinks_and_leading_dimensions_in_parts(cpu_best, always):
    """Query and key are turned by their positions before these are reordered."""
    angles = torch.outer(torch.arange(40.0), torch.tensor([1.0, 0.1]))
    rotary = pyext.Rotary(angles.cos().double(), angles.sin().double())
    q, k, v = (torch.randn(2, 1, 3, 30, 4, dtype=torch.float64) for _ in range(3))
    options = dict(mask=pyext.masks.strided(7) & pyext.masks.causal(), rotary=rotary, sinks=torch.randn(3).double())
    got, wanted = (pyext.attention(q, k, v, impl=impl, return_lse=True, **options) for impl in ("cpu", "reference"))
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_func_transforms_and_tangents_take_the_reference(always):
    q = torch.randn(1, 2, 20, 4, dtype=torch.float64)
    mask = pyext.masks.strided(3) & pyext.masks.causal()

    def loss(x):
        return pyext.attention(x, x, x, mask=mask).square().sum()

    (wanted,) = torch.autograd.grad(loss(q.requires_grad_()), q)
    torch.testing.assert_close(torch.func.grad(loss)(q.detach()), wanted)
    step = torch.randn_like(q)
    _, tangent = torch.func.jvp(loss, (q.detach(),), (step,))
    torch.testing.assert_close(tangent, (wanted * step).sum())
