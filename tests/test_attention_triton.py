"""Attention in Triton: every primitive, combinations of them, every tile, always; the other tests of attention run a
few cases at a time of it when it is interpreted (conftest.py). Both directions against the oracle."""

from __future__ import annotations

import pytest
import torch

import pyext
from support import backends
from support.cases import Case, arguments, case, check, compare, expected
from support.parts import (
    Shape,
    alibi,
    causal,
    dense,
    dense_mask,
    diagonal,
    disentangled,
    documents,
    float_attn_mask,
    image,
    padding,
    permutation,
    segment,
    shaw,
    strided,
    t5,
    transformer_xl,
    window,
)

pytestmark = pytest.mark.skipif(not backends.TRITON, reason="Triton is not installed")
if backends.TRITON:
    from pyext.kernels import _attention_configs, attention

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SELF, CROSS = Shape(1, 2, 2, 150, 150, 40, 24), Shape(1, 2, 1, 75, 139, 24, 40)
FEW, ONE = Shape(1, 4, 2, 5, 300, 40, 40), Shape(1, 4, 1, 1, 800, 64, 64)

CASES = [
    (case(SELF), FP32),
    (case(SELF, causal()), BF16),
    (case(CROSS, window(40, 9), softcap=2.0, sinks=True), FP16),
    (case(CROSS, padding(), alibi()), FP32),
    (case(SELF, documents(), t5(), causal()), BF16),
    (case(CROSS, diagonal(), dense("1hqk")), FP32),
    (case(CROSS, dense("b11k"), dense_mask("bhqk", density=0.3)), BF16),
    (case(SELF, float_attn_mask("bhq1"), dropout=0.3), FP32),
    (case(Shape(3, 2, 2, 40, 75, 24, 24), dense("11qk")), FP32),
    (case(SELF, transformer_xl("xlnet"), segment(), causal()), FP32),
    (case(CROSS, transformer_xl("past"), softcap=3.0), BF16),
    (case(CROSS, shaw(30), padding(), sinks=True), FP32),
    (case(SELF, disentangled(buckets=32, max_position=128)), BF16),
    (case(SELF, disentangled(buckets=32, max_position=128), dense("1hqk"), window(60, 60), dropout=0.2), FP32),
    (case(Shape(1, 2, 2, 200, 300, 24, 24), strided(24), causal()), FP32),
    (case(Shape(1, 2, 2, 200, 300, 24, 24), image("columns", 44, 16), t5()), BF16),
    (case(SELF, permutation(exclude_self=True), sinks=True), FP32),
    (case(FEW, causal(), t5()), FP32),
    (case(FEW, shaw(9), dropout=0.3), BF16),
    (case(ONE, alibi(), sinks=True), BF16),
    (case(ONE, padding()), FP32),
    (case(Shape(1, 1, 1, 290, 350, 16, 16), alibi()), FP32),
    (case(Shape(1, 2, 2, 290, 350, 16, 16), t5(max_distance=40), causal()), FP32),
    (case(Shape(1, 1, 1, 70, 70, 256, 130), causal()), BF16),
    (case(Shape(1, 1, 1, 33, 70, 3, 1), t5(), layout="blhd", grad_layout="expanded_rows"), FP32),
]


def name(value) -> str:
    return str(value)[6:] if isinstance(value, torch.dtype) else str(value)


@pytest.mark.parametrize(("which", "dtype"), CASES, ids=name)
def test_against_oracle(which: Case, dtype, session_seed):
    with backends.TRITON[0].selected():
        check(which, dtype, backends.TRITON[0], session_seed)


def tiles() -> list:
    """Every tile of the tables, once for each kind of call it is for."""
    if not backends.TRITON:
        return []
    found = {
        (kind, config.rows, config.columns): (kind, config)
        for (kind, _), table in _attention_configs.CONFIGS.items()
        for configs in table.values()
        for config in configs
    }
    return list(found.values())


PARTS = {
    "plain": (causal(),),
    "pairs": (causal(), diagonal()),
    "relative": (shaw(9), disentangled(max_position=12), window(70, None)),
}


@pytest.mark.parametrize(
    ("kind", "config"), tiles(), ids=lambda c: c if isinstance(c, str) else f"{c.rows}x{c.columns}"
)
def test_every_tile(kind, config, monkeypatch, session_seed):
    monkeypatch.setattr(attention, "forward_config", lambda problem: config)
    size = Shape(1, 1, 1, config.rows + 9, 2 * config.columns + config.rows + 5, 40, 24)
    which = case(size, *PARTS[kind], dropout=0.2 if kind == "pairs" else 0.0)
    with backends.TRITON[0].selected():
        drawn, reference, eager = expected(which, FP32, session_seed)
        query, key, value = (drawn.leaves[name] for name in ("query", "key", "value"))
        with torch.no_grad():  # the backward's tiles are others
            out, lse = pyext.attention(query, key, value, return_lse=True, impl="triton", **arguments(drawn))
    compare(drawn, {"out": out, "lse": lse}, reference, eager)


def test_wide_heads_are_refused():
    q = torch.randn(1, 1, 3, 257)
    with pytest.raises(NotImplementedError, match="triton: the head dimension is 257, more than 256"):
        pyext.attention(q, q, q, impl="triton")


@pytest.mark.parametrize("splits", [1, 3, 7])
def test_parts_of_the_keys(splits, monkeypatch):
    """However many programs share the keys of few queries, also where some see none: the same to rounding."""
    q, k, v = torch.randn(2, 4, 3, 40), torch.randn(2, 2, 1900, 40), torch.randn(2, 2, 1900, 24)
    options = {"enable_gqa": True, "mask": pyext.masks.window(900, 0), "return_lse": True, "sinks": torch.randn(4)}
    wanted = pyext.attention(q, k, v, impl="reference", **options)
    monkeypatch.setattr(attention, "processors", lambda device: 2 * splits)
    with backends.TRITON[0].selected():
        got = pyext.attention(*(x.to(backends.TRITON[0].device) for x in (q, k, v)), impl="triton", **options)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)


def test_dropout_of_packed_sequences(seed):
    """The gradient of a strip, whose tiles of packed sequences begin anywhere, drops what the output dropped."""
    found = []
    with backends.TRITON[0].selected():
        q, k, v, grad = (torch.randn(109, 2, 24) for _ in range(4))
        leaves, starts = [x.requires_grad_() for x in (q, k, v, torch.randn(32, 2))], torch.tensor([0, 37, 37, 109])
        for impl in ("reference", "triton"):
            generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
            options = {"bias": pyext.bias.t5(leaves[3], bidirectional=True), "dropout_p": 0.3, "generator": generator}
            out = pyext.varlen_attention(q, k, v, *[starts.to(torch.int32)] * 2, **options, impl=impl)
            found.append((out, *torch.autograd.grad(out, leaves, grad)))
    for wanted, got in zip(*found):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
