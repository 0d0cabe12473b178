"""The tests' own tools: the oracle against SDPA, Philox against published vectors, the rule against seeded errors."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from support import layouts, oracle
from support.cases import case, expected
from support.parts import Shape, causal, t5
from support.tolerance import assert_close_to_reference


@pytest.mark.parametrize("masked", [False, True])
def test_oracle_equals_sdpa(masked):
    q = torch.randn(2, 4, 33, 16, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, 50, 16, dtype=torch.float64, requires_grad=True) for _ in range(2))
    allowed = torch.rand(2, 1, 33, 50) < 0.7 if masked else None
    bias = torch.randn(4, 33, 50, dtype=torch.float64)
    out, lse = oracle.attention(q, k, v, score=bias, allowed=allowed)
    mask = bias if allowed is None else bias.masked_fill(~allowed, -math.inf)
    peer = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(out, peer, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(out)
    for got, wanted in zip(torch.autograd.grad(out, (q, k, v), g), torch.autograd.grad(peer, (q, k, v), g)):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    scores = q @ k.repeat_interleave(2, 1).mT / 4.0 + mask
    torch.testing.assert_close(lse, scores.exp().sum(-1).log(), rtol=1e-12, atol=1e-12)


def test_philox_known_answers():
    """Random123's kat_vectors for philox4x32 with 10 rounds."""
    known = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, words in known:
        assert tuple(oracle.philox(np.array(counter, dtype=np.uint32), key)) == words


def test_t5_bucket_shape():
    """Small distances have a bucket each, far ones share the last, and the two directions do not mix."""
    d = torch.arange(-300, 301)
    two = oracle.t5_bucket(d, True, 32, 128)
    assert two[300] == 0 and two.min() == 0 and two.max() == 31
    assert (two[d > 0] >= 16).all() and (two[d <= 0] < 16).all()
    assert (two[(d <= 0) & (d > -8)] == -d[(d <= 0) & (d > -8)]).all()
    one = oracle.t5_bucket(d, False, 32, 128)
    assert (one[d >= 0] == 0).all() and (one[d <= -113] == 31).all()


@pytest.mark.parametrize("kind", layouts.KINDS)
def test_layouts_hold_the_values(kind):
    values = torch.randn(2, 3, 5, 7)
    view = layouts.place(values, kind)
    assert view.shape == values.shape
    assert not view.isnan().any()
    for dim, name in enumerate(("expanded_batch", "expanded_heads", "expanded_rows")):
        values = values.narrow(dim, 0, 1) if kind == name else values
    assert torch.equal(view, values.expand(2, 3, 5, 7))
    whole = torch.as_strided(view, (view.untyped_storage().nbytes() // 4,), (1,), 0)
    assert whole[: layouts.MARGIN].isnan().all() and whole[-layouts.MARGIN :].isnan().all()


SENSITIVE = case(Shape(2, 4, 4, 65, 90, 16, 16), causal(), t5())
DAMAGE = {
    "one wrong value": lambda x: x[0, 1, 2, 3].add_(0.3 * x.square().mean().sqrt()),
    "a lost row": lambda x: x[1, 2, 40].zero_(),
    "one NaN": lambda x: x[0, 1, 2, 3].fill_(math.nan),
    "a general loss of accuracy": lambda x: x.mul_(
        1.0 + max(40 * torch.finfo(x.dtype).eps, 1e-10) * torch.randn_like(x)
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rule_rejects(damage, dtype, session_seed):
    """The rule accepts eager and the rounded oracle, and rejects each kind of damage in out and in every gradient."""
    _, reference, eager = expected(SENSITIVE, dtype, session_seed)
    for name in ("out", "grad query", "grad key", "grad value"):
        fine = reference[name].detach().to(dtype)
        assert_close_to_reference(fine, reference[name], eager[name], name=name)
        assert_close_to_reference(eager[name], reference[name], eager[name], name=name)
        broken = fine.clone()
        DAMAGE[damage](broken)
        with pytest.raises(AssertionError, match=name):
            assert_close_to_reference(broken, reference[name], eager[name], name=name)


def test_workers_choose_the_same_cases():
    """Without a seed given, too: pytest-xdist refuses to run workers that collected different tests."""
    ours = ("PYEXT_TEST_SEED", "PYTEST_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "tests/test_bias.py", "-k", "refused or triton"]
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
