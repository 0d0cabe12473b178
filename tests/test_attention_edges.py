"""Rows that see nothing, masks made of finfo.min, enormous scores, garbage behind the tails."""

from __future__ import annotations

import math

import pytest
import torch

import pyext
from support.cases import DTYPES, case, check, compare, draw, dtype_name, expected, run
from support.parts import (
    Shape,
    alibi,
    causal,
    dense,
    dense_mask,
    documents,
    float_attn_mask,
    frozen_attn_mask,
    padding,
    t5,
    window,
)

FINITE_MASKED = (torch.float32, torch.bfloat16, torch.float16)
SHAPE = Shape(2, 4, 4, 50, 67, 24, 24)
MORE_QUERIES = Shape(2, 4, 2, 67, 21, 24, 24)


DEAD = [
    case(SHAPE, padding([0, 0])),
    case(SHAPE, padding([0, 67], [50, 0])),
    case(MORE_QUERIES, causal()),
    case(MORE_QUERIES, causal(), t5()),
    case(MORE_QUERIES, window(3, 0)),
    case(MORE_QUERIES, window(0, 1), alibi()),
    case(SHAPE, dense_mask("1hq1", 0.5)),
    case(SHAPE, dense_mask("bhqk", 0.0)),
    case(SHAPE, dense_mask("bhqk", 0.02), alibi()),
    case(SHAPE, frozen_attn_mask(-math.inf, "b1qk", 0.01)),
    case(SHAPE, frozen_attn_mask(-math.inf, "bhq1", 0.5)),
    case(SHAPE, documents(cross=True, count=30)),
    case(SHAPE, documents(cross=True, count=30), padding(), dense("bhqk")),
    case(MORE_QUERIES, causal(), dropout=0.4),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("which", DEAD, ids=str)
def test_rows_that_see_nothing(which, dtype, backend, session_seed):
    """Output 0, lse -inf, gradient 0 exactly; the other rows as always."""
    drawn, reference, eager = expected(which, dtype, session_seed)
    got = run(drawn, backend.impl)
    dead = reference["lse"] == -torch.inf
    assert dead.any()
    assert (got["out"][dead] == 0).all()
    assert (got["lse"][dead] == -torch.inf).all()
    assert (got["grad query"][dead] == 0).all()
    compare(drawn, got, reference, eager)


@pytest.mark.parametrize("dtype", FINITE_MASKED, ids=dtype_name)
@pytest.mark.parametrize("density", [0.0, 0.3])
def test_finfo_min_masks_stay_finite(density, dtype, backend, session_seed):
    """Masks of finfo.min, as libraries build them: everything finite, rows with a visible key as with -inf."""
    which = case(SHAPE, frozen_attn_mask("min", "b1qk", density))
    drawn, reference, eager = expected(which, dtype, session_seed)
    got = run(drawn, backend.impl)
    for name, value in got.items():
        assert value.isfinite().all(), name
    visible = (drawn.terms[0].score({}) == 0).any(-1).expand(2, 4, 50)
    assert bool(visible.any()) == (density > 0)
    if density > 0.1:
        compare(drawn, got, reference, eager)


def test_finfo_min_twice_stays_finite(backend):
    """Two such masks added overflow to -inf: a fully masked row then gives 0, not NaN."""
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    mask = torch.full((5, 5), torch.finfo(torch.float32).min)
    out = pyext.attention(q, q, q, attn_mask=mask, bias=pyext.bias.dense(mask), impl=backend.impl)
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert out.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("bias", [(), (causal(),), (t5(), causal())], ids=["plain", "causal", "t5"])
def test_large_scores(bias, dtype, backend, session_seed):
    """Scores near +-1e4: a one-hot softmax, no overflow, no NaN."""
    which = case(
        SHAPE, *bias, q_scale=1e4 if dtype != torch.float16 else 1e3, scale=0.2 if dtype != torch.float16 else 2.0
    )
    drawn, reference, eager = expected(which, dtype, session_seed)
    got = run(drawn, backend.impl)
    if dtype == torch.float64:
        for name in ("out", "lse"):
            torch.testing.assert_close(got[name], reference[name], rtol=1e-9, atol=1e-9)
        return
    for value in got.values():
        assert not value.isnan().any()
    compare(drawn, got, reference, eager)


@pytest.mark.parametrize("value", [3e4, -3e4])
def test_large_common_shift(value, backend, session_seed):
    """A constant added to every score changes lse by that constant and nothing else beyond its rounding."""
    drawn = draw(case(SHAPE), torch.float32, session_seed)
    shift = torch.full((1, 1), value)
    q, k, v = (drawn.leaves[name] for name in ("query", "key", "value"))
    out, lse = pyext.attention(q, k, v, attn_mask=shift, return_lse=True, impl=backend.impl)
    plain, plain_lse = pyext.attention(q, k, v, return_lse=True, impl=backend.impl)
    step = abs(value) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(out, plain, rtol=0, atol=16 * step)
    torch.testing.assert_close(lse, plain_lse + value, rtol=0, atol=4 * step)


@pytest.mark.parametrize("dtype", FINITE_MASKED, ids=dtype_name)
@pytest.mark.parametrize("parts", [(), (t5(),), (causal(),)], ids=["plain", "t5", "causal"])
def test_garbage_in_padding(parts, dtype, backend, session_seed):
    """What stands in keys and values beyond key_lengths changes no bit, and receives no gradient."""
    drawn = draw(case(Shape(2, 4, 2, 33, 300, 24, 24), padding([33, 257]), *parts), dtype, session_seed)

    def with_padding(content):
        with torch.no_grad():
            for name in ("key", "value"):
                drawn.leaves[name][0, :, 33:] = content
                drawn.leaves[name][1, :, 257:] = content
        return run(drawn, backend.impl)

    clean, dirty = with_padding(0.0), with_padding(1e4)
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name
    for name in ("grad key", "grad value"):
        assert (dirty[name][0, :, 33:] == 0).all()
        assert (dirty[name][1, :, 257:] == 0).all()


def test_single_visible_key(backend, session_seed):
    """With one visible key the output is that value and the score gradients vanish by cancellation."""
    for which in (
        case(Shape(2, 4, 4, 9, 1, 24, 24), t5()),
        case(Shape(2, 4, 4, 40, 40, 24, 24), window(0, 0), alibi()),
    ):
        for dtype in (torch.float32, backend.widest, torch.bfloat16):
            check(which, dtype, backend, session_seed)


@pytest.mark.parametrize("dtype", FINITE_MASKED, ids=dtype_name)
def test_constant_values_pass_through(dtype, backend):
    """Weights sum to one: constant values come out as they went in, to the rounding of the sum."""
    q, k = torch.randn(2, 4, 100, 24).to(dtype), torch.randn(2, 4, 333, 24).to(dtype)
    v = torch.full((2, 4, 333, 24), 1.0, dtype=dtype)
    out = pyext.attention(q, k, v, impl=backend.impl)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=max(2e-6, 2 * torch.finfo(dtype).eps))


def test_learned_mask_with_infinities(backend, session_seed):
    """A trainable additive mask that holds -inf: its gradient is 0 there, finite elsewhere."""
    for parts in ((dense("bhqk", holes=True),), (float_attn_mask("11qk"), dense("1hqk", holes=True))):
        drawn, reference, eager = expected(case(SHAPE, *parts), torch.float32, session_seed)
        got = run(drawn, backend.impl)
        compare(drawn, got, reference, eager)
        name = [n for n in drawn.leaves if n.startswith("dense")][0]
        assert (got[f"grad {name}"][drawn.leaves[name] == -torch.inf] == 0).all()
