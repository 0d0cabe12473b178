"""Attention under block masks and reordered parts, forward and backward, in every dtype, against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch

from pyext.ops import _passes
from support.cases import DTYPES, case, check, draw, run
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
def test_both_ways_agree(which, backend, seed, monkeypatch):
    """fp64 through the reordered parts, where there are any, and through the block table of the reference."""
    drawn = draw(which, torch.float64, seed)
    monkeypatch.setattr(_passes, "LEAST_QUERIES", 9)
    parts = run(drawn, backend.impl)
    monkeypatch.setattr(_passes, "LEAST_QUERIES", 10**9)
    table = run(drawn, "reference")
    for name, value in parts.items():
        torch.testing.assert_close(value, table[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
