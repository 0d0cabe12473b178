"""`torch.nn.functional.scaled_dot_product_attention = pyext.attention` is safe: same calls, results and refusals."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import bias as torch_bias

import pyext

SDPA = F.scaled_dot_product_attention


def T(*size, dtype=torch.float64):
    return torch.randn(*size, dtype=dtype)


def mask(*size, density=0.7):
    """A bool mask in which every row sees its first key (PyTorch's own answer for empty rows has changed over time)."""
    values = torch.rand(*size) < density
    values[..., 0] = True
    return values


# Every call form: positional arguments as SDPA takes them, keyword arguments, 2 to 6 dimensions, broadcast batches.
CALLS = {
    "plain": lambda: ((T(2, 4, 9, 8), T(2, 4, 13, 8), T(2, 4, 13, 8)), {}),
    "Dv differs": lambda: ((T(2, 4, 9, 8), T(2, 4, 13, 8), T(2, 4, 13, 5)), {}),
    "keywords": lambda: ((), {"query": T(2, 4, 9, 8), "key": T(2, 4, 13, 8), "value": T(2, 4, 13, 8)}),
    "float mask, positional": lambda: ((T(2, 4, 9, 8), T(2, 4, 13, 8), T(2, 4, 13, 8), T(2, 4, 9, 13)), {}),
    "None, 0.0, causal, positional": lambda: (
        (T(2, 4, 9, 8), T(2, 4, 9, 8), T(2, 4, 9, 8), None, 0.0, True),
        {},
    ),
    "scale and gqa keywords": lambda: (
        (T(2, 4, 9, 8), T(2, 2, 9, 8), T(2, 2, 9, 8)),
        {"scale": 0.3, "enable_gqa": True},
    ),
    "causal, more keys": lambda: ((T(2, 4, 5, 8), T(2, 4, 13, 8), T(2, 4, 13, 8)), {"is_causal": True}),
    "causal, fewer keys": lambda: ((T(2, 4, 13, 8), T(2, 4, 5, 8), T(2, 4, 5, 8)), {"is_causal": True}),
    "bool mask": lambda: ((T(2, 4, 9, 8), T(2, 4, 13, 8), T(2, 4, 13, 8)), {"attn_mask": mask(2, 4, 9, 13)}),
    "bool mask (L, S)": lambda: ((T(2, 4, 9, 8), T(2, 4, 13, 8), T(2, 4, 13, 8)), {"attn_mask": mask(9, 13)}),
    "bool mask (B, 1, 1, S)": lambda: (
        (T(2, 4, 9, 8), T(2, 4, 13, 8), T(2, 4, 13, 8)),
        {"attn_mask": mask(2, 1, 1, 13)},
    ),
    "float mask (L, S)": lambda: ((T(2, 4, 9, 8), T(2, 4, 13, 8), T(2, 4, 13, 8)), {"attn_mask": T(9, 13)}),
    "float mask (H, L, S)": lambda: ((T(2, 4, 9, 8), T(2, 4, 13, 8), T(2, 4, 13, 8)), {"attn_mask": T(4, 9, 13)}),
    "float mask (1, 1)": lambda: ((T(2, 4, 9, 8), T(2, 4, 13, 8), T(2, 4, 13, 8)), {"attn_mask": T(1, 1)}),
    "2-D": lambda: ((T(9, 8), T(13, 8), T(13, 8)), {}),
    "2-D causal": lambda: ((T(9, 8), T(13, 8), T(13, 8)), {"is_causal": True}),
    "2-D mask": lambda: ((T(9, 8), T(13, 8), T(13, 8)), {"attn_mask": T(9, 13)}),
    "3-D": lambda: ((T(4, 9, 8), T(4, 13, 8), T(4, 13, 8)), {}),
    "3-D mask": lambda: ((T(4, 9, 8), T(4, 13, 8), T(4, 13, 8)), {"attn_mask": mask(4, 9, 13)}),
    "3-D mask (1, L, S)": lambda: ((T(4, 9, 8), T(4, 13, 8), T(4, 13, 8)), {"attn_mask": T(1, 9, 13)}),
    "5-D": lambda: ((T(2, 3, 4, 9, 8), T(2, 3, 4, 13, 8), T(2, 3, 4, 13, 8)), {}),
    "5-D mask": lambda: ((T(2, 3, 4, 9, 8), T(2, 3, 4, 13, 8), T(2, 3, 4, 13, 8)), {"attn_mask": T(2, 3, 4, 9, 13)}),
    "5-D mask (L, S)": lambda: ((T(2, 3, 4, 9, 8), T(2, 3, 4, 13, 8), T(2, 3, 4, 13, 8)), {"attn_mask": mask(9, 13)}),
    "5-D mask (3, 1, L, S)": lambda: (
        (T(2, 3, 4, 9, 8), T(2, 3, 4, 13, 8), T(2, 3, 4, 13, 8)),
        {"attn_mask": T(3, 1, 9, 13)},
    ),
    "5-D mask (2, 1, 4, L, S)": lambda: (
        (T(2, 3, 4, 9, 8), T(2, 3, 4, 13, 8), T(2, 3, 4, 13, 8)),
        {"attn_mask": T(2, 1, 4, 9, 13)},
    ),
    "6-D": lambda: ((T(1, 2, 3, 4, 9, 8), T(1, 2, 3, 4, 13, 8), T(1, 2, 3, 4, 13, 8)), {"is_causal": True}),
    "5-D gqa": lambda: ((T(2, 3, 4, 9, 8), T(2, 3, 2, 13, 8), T(2, 3, 2, 13, 8)), {"enable_gqa": True}),
    "batch broadcast": lambda: ((T(2, 4, 9, 8), T(1, 4, 13, 8), T(1, 4, 13, 8)), {}),
    "head broadcast": lambda: ((T(2, 4, 9, 8), T(2, 1, 13, 8), T(2, 1, 13, 8)), {}),
    "query broadcast": lambda: ((T(1, 4, 9, 8), T(2, 4, 13, 8), T(2, 4, 13, 8)), {}),
    "fewer dimensions broadcast": lambda: ((T(2, 4, 9, 8), T(4, 13, 8), T(4, 13, 8)), {}),
    "value broadcast": lambda: ((T(2, 4, 9, 8), T(2, 4, 13, 8), T(1, 4, 13, 8)), {}),
    "lower right bias": lambda: (
        (T(2, 4, 5, 8), T(2, 4, 13, 8), T(2, 4, 13, 8)),
        {"attn_mask": torch_bias.causal_lower_right(5, 13)},
    ),
    "upper left bias": lambda: (
        (T(2, 4, 5, 8), T(2, 4, 13, 8), T(2, 4, 13, 8)),
        {"attn_mask": torch_bias.causal_upper_left(5, 13)},
    ),
    "no keys": lambda: ((T(2, 4, 5, 8), T(2, 4, 0, 8), T(2, 4, 0, 8)), {}),
    "no queries": lambda: ((T(2, 4, 0, 8), T(2, 4, 3, 8), T(2, 4, 3, 8)), {}),
    "no batch": lambda: ((T(0, 4, 5, 8), T(0, 4, 3, 8), T(0, 4, 3, 8)), {}),
    "scale 0": lambda: ((T(2, 4, 5, 8), T(2, 4, 6, 8), T(2, 4, 6, 8)), {"scale": 0.0}),
    "scale 1, as T5": lambda: ((T(2, 4, 5, 8), T(2, 4, 6, 8), T(2, 4, 6, 8)), {"scale": 1.0}),
    "int scale": lambda: ((T(2, 4, 5, 8), T(2, 4, 6, 8), T(2, 4, 6, 8)), {"scale": 1}),
    "is_causal=0": lambda: ((T(2, 4, 5, 8), T(2, 4, 6, 8), T(2, 4, 6, 8)), {"is_causal": False, "dropout_p": 0}),
    "fp32 mask on fp32": lambda: (
        (T(2, 4, 5, 8).float(), T(2, 4, 6, 8).float(), T(2, 4, 6, 8).float()),
        {"attn_mask": T(5, 6).float()},
    ),
    "gqa enabled, equal heads": lambda: ((T(2, 4, 5, 8), T(2, 4, 6, 8), T(2, 4, 6, 8)), {"enable_gqa": True}),
}
# Calls that PyTorch refuses: so must a drop-in.
REFUSED = {
    "D differs": lambda: ((T(2, 4, 9, 8), T(2, 4, 13, 7), T(2, 4, 13, 8)), {}),
    "dtypes differ": lambda: ((T(2, 4, 9, 8), T(2, 4, 13, 8).float(), T(2, 4, 13, 8)), {}),
    "mask shape": lambda: ((T(2, 4, 9, 8), T(2, 4, 13, 8), T(2, 4, 13, 8)), {"attn_mask": T(9, 12)}),
    "integer mask": lambda: ((T(2, 4, 9, 8), T(2, 4, 13, 8), T(2, 4, 13, 8)), {"attn_mask": torch.ones(9, 13).long()}),
    "gqa not enabled": lambda: ((T(2, 4, 9, 8), T(2, 2, 13, 8), T(2, 2, 13, 8)), {}),
    "gqa not divisible": lambda: ((T(2, 4, 9, 8), T(2, 3, 13, 8), T(2, 3, 13, 8)), {"enable_gqa": True}),
    "1-D": lambda: ((T(8), T(8), T(8)), {}),
    "integer input": lambda: ((torch.ones(2, 2, 3, 4).long(),) * 3, {}),
    "dropout_p of 2": lambda: ((T(2, 4, 9, 8), T(2, 4, 13, 8), T(2, 4, 13, 8)), {"dropout_p": 2.0}),
    "unknown keyword": lambda: ((T(2, 4, 9, 8), T(2, 4, 13, 8), T(2, 4, 13, 8)), {"causal": True}),
    "scale positional": lambda: ((T(2, 4, 9, 8), T(2, 4, 9, 8), T(2, 4, 9, 8), None, 0.0, False, 0.5, False, 3), {}),
}


def leaves_of(args, kwargs, widest):
    """Make every float tensor of a call a leaf, in place of the original, and none wider than `widest`."""
    made = []

    def leaf(x):
        if isinstance(x, torch.Tensor) and type(x) is torch.Tensor and x.is_floating_point():
            x = x.to(widest) if x.dtype == torch.float64 else x
            made.append(x.requires_grad_())
        return x

    args = tuple(leaf(x) for x in args)
    return args, {name: leaf(x) for name, x in kwargs.items()}, made


@pytest.mark.parametrize("name", CALLS)
def test_same_call_same_result(name, backend):
    args, kwargs, leaves = leaves_of(*CALLS[name](), backend.widest)
    wanted = SDPA(*args, **kwargs)
    got = pyext.attention(*args, **kwargs, impl=backend.impl)
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    tight = dict(rtol=1e-9, atol=1e-11) if got.dtype == torch.float64 else dict(rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(got, wanted, **tight)
    g = torch.randn_like(wanted)
    ours, theirs = (torch.autograd.grad(out, leaves, g) for out in (got, wanted))
    # What cancels is as exact as the gradients around it are large.
    tight["atol"] *= max([1.0, *(float(b.abs().max()) for b in theirs if b.numel())])
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, **tight)


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_sdpa_refuses(name, backend):
    args, kwargs = REFUSED[name]()
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        SDPA(*args, **kwargs)
    with pytest.raises((ValueError, TypeError)):
        pyext.attention(*args, **kwargs, impl=backend.impl)


def test_stricter_than_sdpa(backend):
    """Key and value of different lengths: PyTorch's CPU kernel reads past the shorter one."""
    with pytest.raises(ValueError, match="value"):
        pyext.attention(T(2, 4, 9, 8), T(2, 4, 13, 8), T(2, 4, 12, 8), impl=backend.impl)


def test_mask_together_with_is_causal(backend):
    """PyTorch documents an error, and its fused CPU kernel applies both. Never one of the two alone."""
    q, k, v, bias = T(2, 4, 9, 8), T(2, 4, 9, 8), T(2, 4, 9, 8), T(9, 9)
    try:
        got = pyext.attention(q, k, v, bias, 0.0, True, impl=backend.impl)
    except ValueError as error:
        assert "attn_mask" in str(error) and "is_causal" in str(error)
        return
    both = bias.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -math.inf)
    torch.testing.assert_close(got, SDPA(q, k, v, both), rtol=1e-9, atol=1e-11)


def test_rows_without_keys_as_sdpa(backend):
    """Where PyTorch gives zeros for a fully masked row, so do we; where it gives NaN, we still give zeros."""
    q, k, v = (T(1, 2, n, 8, dtype=backend.widest) for n in (4, 6, 6))
    allowed = mask(4, 6)
    allowed[1] = False
    got = pyext.attention(q, k, v, attn_mask=allowed, impl=backend.impl)
    wanted = SDPA(q, k, v, attn_mask=allowed)
    assert (got[:, :, 1] == 0).all()
    torch.testing.assert_close(got[:, :, [0, 2, 3]], wanted[:, :, [0, 2, 3]], **close(backend))


def close(backend) -> dict[str, float]:
    """To the last places of the widest dtype."""
    return {"rtol": 1e-8, "atol": 1e-10} if backend.widest == torch.float64 else {"rtol": 1e-4, "atol": 2e-5}


class Replaced:
    """Put pyext.attention where PyTorch's modules look for SDPA, and count the calls."""

    def __init__(self, monkeypatch, impl):
        self.calls = 0

        def counted(*args, **kwargs):
            self.calls += 1
            return pyext.attention(*args, **kwargs, impl=impl)

        monkeypatch.setattr(F, "scaled_dot_product_attention", counted)


def both_ways(module, run, monkeypatch, impl):
    """(out, gradients) of run(module) with PyTorch's SDPA, then with ours."""
    results = []
    for ours in (False, True):
        copied = copy.deepcopy(module)
        with monkeypatch.context() as patch:
            counter = Replaced(patch, impl) if ours else None
            out = run(copied)
            out.square().mean().backward()
        results.append([out] + [p.grad for p in copied.parameters() if p.grad is not None])
        assert counter is None or counter.calls > 0, "the module never called SDPA"
    return results


FORMS = {
    "self": {},
    "key padding": {"key_padding_mask": torch.arange(11).view(1, -1) >= torch.tensor([[11], [6], [1]])},
    "causal": {"attn_mask": torch.triu(torch.ones(11, 11, dtype=torch.bool), 1), "is_causal": True},
    "float mask": {"attn_mask": torch.triu(torch.full((11, 11), -math.inf, dtype=torch.float64), 1)},
}


@pytest.mark.parametrize("form", FORMS)
def test_multihead_attention(form, backend, monkeypatch):
    module = torch.nn.MultiheadAttention(24, 4, batch_first=True, dtype=backend.widest)
    x = T(3, 11, 24, dtype=backend.widest)
    options = {n: v.to(x.dtype) if getattr(v, "dtype", None) == torch.float64 else v for n, v in FORMS[form].items()}
    wanted, got = both_ways(module, lambda m: m(x, x, x, need_weights=False, **options)[0], monkeypatch, backend.impl)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, **close(backend))


def test_transformer_layers(backend, monkeypatch):
    """Encoder and decoder, pre- and post-norm, unbatched too, trained one step the same way."""
    for layer, inputs in (
        (
            torch.nn.TransformerEncoderLayer(24, 4, 32, 0.0, batch_first=True, dtype=backend.widest),
            (T(3, 11, 24, dtype=backend.widest),),
        ),
        (
            torch.nn.TransformerEncoderLayer(24, 4, 32, 0.0, norm_first=True, dtype=backend.widest),
            (T(11, 24, dtype=backend.widest),),
        ),
        (
            torch.nn.TransformerDecoderLayer(24, 4, 32, 0.0, dtype=backend.widest),
            (T(11, 3, 24, dtype=backend.widest), T(7, 3, 24, dtype=backend.widest)),
        ),
    ):
        wanted, got = both_ways(layer, lambda m, x=inputs: m(*x), monkeypatch, backend.impl)
        for a, b in zip(got, wanted):
            torch.testing.assert_close(a, b, **close(backend))


def test_full_transformer(backend, monkeypatch):
    model = torch.nn.Transformer(24, 4, 2, 2, 32, 0.0, batch_first=True, dtype=backend.widest)
    source, target = T(2, 9, 24, dtype=backend.widest), T(2, 6, 24, dtype=backend.widest)
    causal = model.generate_square_subsequent_mask(6, dtype=backend.widest)
    padding = torch.tensor([[False] * 9, [False] * 5 + [True] * 4])
    options = dict(tgt_mask=causal, tgt_is_causal=True, src_key_padding_mask=padding, memory_key_padding_mask=padding)
    wanted, got = both_ways(model, lambda m: m(source, target, **options), monkeypatch, backend.impl)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, **close(backend))


def test_dropout_in_modules(backend, monkeypatch):
    """MultiheadAttention passes dropout_p in training mode: the module runs, is random, and is not in eval mode."""
    module = torch.nn.MultiheadAttention(24, 4, 0.5, batch_first=True)
    x = torch.randn(3, 11, 24)
    Replaced(monkeypatch, backend.impl)
    first, second = (module(x, x, x, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(first, second)
    module.eval()
    first, second = (module.train(False)(x, x, x, need_weights=False)[0] for _ in range(2))
    assert torch.equal(first, second)
