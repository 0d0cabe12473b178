"""pyext.nn's position modules against Transformers' own."""

from __future__ import annotations

import copy

import pytest
import torch

import pyext
from pyext.bias._distance import Alibi
from pyext.nn.positions import alibi_slopes, sinusoids


@pytest.mark.parametrize("bidirectional", [True, False], ids=["encoder", "decoder"])
def test_t5_bias_is_the_one_of_t5(bidirectional, fp64_backend):
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(d_model=24, d_kv=8, num_heads=3, is_decoder=not bidirectional, dropout_rate=0.0)
    theirs = T5Attention(config, has_relative_attention_bias=True).double()
    ours = pyext.nn.T5Bias(3, bidirectional=bidirectional).double()
    state = {"relative_attention_bias.weight": theirs.relative_attention_bias.weight.detach()}
    ours.load_state_dict(state)
    assert ours.state_dict().keys() == state.keys()
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (150, 200, 200))
    bias = theirs.compute_bias(150, 200, past_seen_tokens=50)
    wanted = torch.softmax(q @ k.mT + bias, -1) @ v
    got = pyext.attention(q, k, v, scale=1.0, bias=ours(), impl=fp64_backend.impl)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)
    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    (wanted * weight).sum().backward()
    expected = theirs.relative_attention_bias.weight.grad
    torch.testing.assert_close(ours.relative_attention_bias.weight.grad, expected, rtol=1e-10, atol=1e-11)


def test_t5_bias_refuses():
    with pytest.raises(TypeError, match="bidirectional must be a bool"):
        pyext.nn.T5Bias(4, bidirectional="yes")
    with pytest.raises(ValueError, match="max_distance must be greater than 8"):
        pyext.nn.T5Bias(4, max_distance=8)
    with pytest.raises(TypeError, match="num_heads must be an int"):
        pyext.nn.T5Bias(4.0)


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 14, 16, 20, 32, 40, 71, 112])
def test_alibi_slopes_are_those_of_bloom(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(heads), theirs, rtol=1e-6, atol=0)


def test_alibi_is_the_score_of_bloom(fp64_backend):
    """Their bias counts from the first key, ours from the query: a constant per row, which the softmax takes out."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    heads, length = 6, 40
    theirs = build_alibi_tensor(torch.ones(2, length), heads, torch.float64).view(2, heads, 1, length)
    module = pyext.nn.ALiBi(heads)
    q, k, v = (torch.randn(2, heads, length, 8, dtype=torch.float64) for _ in range(3))
    got = pyext.attention(q, k, v, bias=module(), mask=pyext.masks.causal(), impl=fp64_backend.impl)
    score = (q @ k.mT / 8**0.5 + theirs).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(got, torch.softmax(score, -1) @ v, rtol=1e-6, atol=1e-7)


def test_alibi_module():
    fixed, learned = pyext.nn.ALiBi(6), pyext.nn.ALiBi(6, learned=True, symmetric=True)
    assert fixed.state_dict() == {} and not list(fixed.parameters())
    assert list(learned.state_dict()) == ["slopes"] and learned.slopes.requires_grad
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(copy.deepcopy(fixed).to(dtype).slopes, alibi_slopes(6))
        assert learned.to(dtype).slopes.dtype == dtype
    assert isinstance(learned(), Alibi) and learned().symmetric and not fixed().symmetric
    q = torch.randn(1, 6, 9, 8)
    pyext.attention(q, q, q, bias=pyext.nn.ALiBi(6, learned=True)(), impl="reference")
    module = pyext.nn.ALiBi(6, learned=True)
    pyext.attention(q, q, q, bias=module(), impl="reference").square().sum().backward()
    assert module.slopes.grad.abs().sum() > 0
    with pytest.raises(TypeError, match="learned must be a bool"):
        pyext.nn.ALiBi(6, learned=None)


def test_sinusoids_are_those_of_xlnet():
    from transformers.models.xlnet.modeling_xlnet import XLNetModel

    positions = torch.arange(50.0, -30.0, -1.0)
    inverse = 1 / torch.pow(10000, torch.arange(0, 24, 2.0) / 24)
    theirs = XLNetModel.positional_embedding(positions, inverse)[:, 0]
    torch.testing.assert_close(sinusoids(positions, 24, torch.float32), theirs, rtol=1e-5, atol=1e-5)
    assert sinusoids(positions, 24, torch.bfloat16).dtype == torch.bfloat16
