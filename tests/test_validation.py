"""Bad input: each argument of each op, wrong in type, shape, dtype, device or value, is named, and no kernel runs."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import bias as torch_bias

import pyext


def T(*size, **options):
    return torch.randn(size, **options)


def attention(changes, query=None, key=None, value=None, **options):
    call = {"query": T(2, 8, 64, 32), "key": T(2, 8, 128, 32), "value": T(2, 8, 128, 16), **changes}
    return pyext.attention(**call, **options)


def packed(**changes):
    call = {
        "q": T(10, 4, 8),
        "k": T(12, 4, 8),
        "v": T(12, 4, 6),
        "cu_seqlens_q": torch.tensor([0, 3, 10]),
        "cu_seqlens_k": torch.tensor([0, 5, 12]),
    }
    return pyext.varlen_attention(**{**call, **changes})


GOOD = T(2, 8, 128, 32)
NESTED = torch.nested.nested_tensor([T(3, 4), T(2, 4)], layout=torch.jagged)
SPARSE = torch.eye(4).to_sparse()

# name: (changed arguments, error, message)
REFUSED = {
    "query, list": ({"query": [1.0]}, TypeError, r"query must be a torch\.Tensor, got list"),
    "key, None": ({"key": None}, TypeError, r"key must be a torch\.Tensor, got NoneType"),
    "value, numpy": ({"value": GOOD.numpy()}, TypeError, r"value must be a torch\.Tensor, got ndarray"),
    "query, nested": ({"query": NESTED}, TypeError, r"query must be a dense \(strided\) tensor, got a nested tensor"),
    "value, sparse": (
        {"value": SPARSE},
        TypeError,
        r"value must be a dense \(strided\) tensor, got layout torch\.sparse",
    ),
    "query, integer": (
        {"query": torch.ones(2, 8, 64, 32).long()},
        TypeError,
        r"query must be float32, bfloat16.*int64",
    ),
    "query, complex": ({"query": T(2, 8, 64, 32, dtype=torch.complex64)}, TypeError, r"query must be float32"),
    "key, dtype": (
        {"key": GOOD.double()},
        TypeError,
        r"key must have dtype torch\.float32 to match query, got .*float64",
    ),
    "value, dtype": ({"value": GOOD.half()}, TypeError, r"value must have dtype torch\.float32 to match query"),
    "key, device": ({"key": GOOD.to("meta")}, ValueError, r"key must be on cpu like query, got meta"),
    "value, device": ({"value": GOOD.to("meta")}, ValueError, r"value must be on cpu like query, got meta"),
    "key, D": (
        {"query": T(2, 8, 128, 64), "key": T(2, 8, 128, 32)},
        ValueError,
        r"key must have shape \(B, Hkv, Lk, 64\) to match query, got \(2, 8, 128, 32\)",
    ),
    "value, Lk": (
        {"value": T(2, 8, 127, 16)},
        ValueError,
        r"value must have shape \(B, Hkv, 128, Dv\) to match key, got \(2, 8, 127, 16\)",
    ),
    "key, batch": (
        {"key": T(3, 8, 128, 32)},
        ValueError,
        r"key must have shape \(2, Hkv, Lk, D\) .*to match query, got \(3, 8, 128, 32\)",
    ),
    "value, batch": ({"value": T(3, 8, 128, 16)}, ValueError, r"value must have shape \(2, Hkv, Lk, Dv\).*got \(3, 8"),
    "key, heads": (
        {"key": T(2, 2, 128, 32), "value": T(2, 2, 128, 16)},
        ValueError,
        r"key must have shape \(B, 8, Lk, D\) to match the 8 heads of query \(enable_gqa=True groups query heads\)",
    ),
    "key, no heads": (
        {"key": T(2, 0, 128, 32), "value": T(2, 0, 128, 16)},
        ValueError,
        r"key must have shape \(B, 8, Lk, D\)",
    ),
    "value, heads": (
        {"value": T(2, 4, 128, 16)},
        ValueError,
        r"value must have shape \(B, 8, Lk, Dv\) to match the 8 heads",
    ),
    "key, grouping": (
        {"key": T(2, 3, 128, 32), "value": T(2, 3, 128, 16), "enable_gqa": True},
        ValueError,
        r"key must have shape \(B, Hkv, Lk, D\) with Hkv dividing the 8 heads of query, got \(2, 3, 128, 32\)",
    ),
    "query, 1-D": (
        {"query": T(32)},
        ValueError,
        r"query must have shape \(\.\.\., Lq, D\) with at least two dim.*got \(32,\)",
    ),
    "key, 0-D": ({"key": T()}, ValueError, r"key must have shape \(\.\.\., Lk, D\).*got \(\)"),
    "3-D, D": ({"query": T(8, 5, 32), "key": T(8, 5, 31)}, ValueError, r"key must have shape \(Hkv, Lk, 32\)"),
    "5-D, D": ({"query": T(1, 2, 8, 5, 32), "key": T(1, 2, 8, 5, 31)}, ValueError, r"\(\.\.\., Hkv, Lk, 32\)"),
    "2-D, gqa": (
        {"query": T(5, 32), "key": T(5, 32), "value": T(5, 32), "enable_gqa": True},
        ValueError,
        r"query must have shape \(\.\.\., H, L, D\) with enable_gqa=True",
    ),
    "attn_mask, list": ({"attn_mask": [[True]]}, TypeError, r"attn_mask must be a torch\.Tensor, got list"),
    "attn_mask, object": ({"attn_mask": pyext.masks.causal()}, TypeError, r"attn_mask must be a torch\.Tensor"),
    "attn_mask, integer": (
        {"attn_mask": torch.ones(64, 128).int()},
        TypeError,
        r"attn_mask must be a bool or float tensor, got torch\.int32",
    ),
    "attn_mask, shape": (
        {"attn_mask": T(64, 127)},
        ValueError,
        r"attn_mask must be broadcastable to \(2, 8, 64, 128\), got \(64, 127\)",
    ),
    "attn_mask, bool shape": (
        {"attn_mask": torch.ones(3, 8, 64, 128).bool()},
        ValueError,
        r"attn_mask must be broadcast",
    ),
    "attn_mask, dimensions": ({"attn_mask": T(1, 1, 1, 64, 128)}, ValueError, r"attn_mask must be broadcastable"),
    "attn_mask, device": ({"attn_mask": T(64, 128, device="meta")}, ValueError, r"attn_mask must be on cpu"),
    "attn_mask, causal object": (
        {"attn_mask": torch_bias.causal_lower_right(63, 128)},
        ValueError,
        r"attn_mask must be made for \(Lq, Lk\) = \(64, 128\), got \(63, 128\)",
    ),
    "attn_mask and is_causal": (
        {"attn_mask": T(64, 128), "is_causal": True},
        ValueError,
        r"attn_mask must be None with is_causal=True",
    ),
    "dropout_p, high": ({"dropout_p": 1.5}, ValueError, r"dropout_p must be between 0 and 1, got 1\.5"),
    "dropout_p, low": ({"dropout_p": -0.1}, ValueError, r"dropout_p must be between 0 and 1, got -0\.1"),
    "dropout_p, NaN": ({"dropout_p": math.nan}, ValueError, r"dropout_p must be finite, got nan"),
    "dropout_p, text": ({"dropout_p": "0.1"}, TypeError, r"dropout_p must be a number, got str"),
    "dropout_p, None": ({"dropout_p": None}, TypeError, r"dropout_p must be a number, got NoneType"),
    "dropout_p, tensor": ({"dropout_p": torch.tensor(0.5)}, TypeError, r"dropout_p must be a number, got Tensor"),
    "is_causal": ({"is_causal": "yes"}, TypeError, r"is_causal must be a bool, got str"),
    "scale, text": ({"scale": "1"}, TypeError, r"scale must be a number, got str"),
    "scale, tensor": ({"scale": torch.tensor(0.5)}, TypeError, r"scale must be a number, got Tensor"),
    "scale, bool": ({"scale": True}, TypeError, r"scale must be a number, got bool"),
    "scale, inf": ({"scale": math.inf}, ValueError, r"scale must be finite, got inf"),
    "enable_gqa": ({"enable_gqa": None}, TypeError, r"enable_gqa must be a bool, got NoneType"),
    "bias, tensor": ({"bias": T(64, 128)}, TypeError, r"bias must be a pyext\.bias object \(wrap a tensor.*got Tensor"),
    "bias, mask": ({"bias": pyext.masks.causal()}, TypeError, r"bias must be a pyext\.bias object, got Window"),
    "bias, number": (
        {"bias": 1.0, "attn_mask": T(64, 128)},
        TypeError,
        r"bias must be a pyext\.bias object, got float",
    ),
    "mask, tensor": (
        {"mask": torch.ones(64, 128).bool()},
        TypeError,
        r"mask must be a pyext\.masks object \(wrap a ten",
    ),
    "mask, bias": ({"mask": pyext.bias.alibi(T(8))}, TypeError, r"mask must be a pyext\.masks object, got Alibi"),
    "mask, text": (
        {"mask": "causal", "attn_mask": T(64, 128) > 0},
        TypeError,
        r"mask must be a pyext\.masks object, got str",
    ),
    "softcap, zero": ({"softcap": 0.0}, ValueError, r"softcap must be positive \(or None\), got 0\.0"),
    "softcap, negative": ({"softcap": -5}, ValueError, r"softcap must be positive"),
    "softcap, NaN": ({"softcap": math.nan}, ValueError, r"softcap must be finite"),
    "softcap, tensor": ({"softcap": T(1)}, TypeError, r"softcap must be a number, got Tensor"),
    "sinks, list": ({"sinks": [0.0] * 8}, TypeError, r"sinks must be a torch\.Tensor, got list"),
    "sinks, integer": ({"sinks": torch.ones(8).int()}, TypeError, r"sinks must be float32"),
    "sinks, heads": ({"sinks": T(4)}, ValueError, r"sinks must have shape \(8,\) to match query, got \(4,\)"),
    "sinks, 2-D": ({"sinks": T(8, 1)}, ValueError, r"sinks must have shape \(8,\) to match query, got \(8, 1\)"),
    "sinks, device": ({"sinks": T(8, device="meta")}, ValueError, r"sinks must be on cpu like query"),
    "rotary": ({"rotary": T(9, 4)}, TypeError, r"rotary must be a pyext\.Rotary, got Tensor"),
    "return_lse": ({"return_lse": "yes"}, TypeError, r"return_lse must be a bool, got str"),
    "generator, seed": ({"generator": 3}, TypeError, r"generator must be a torch\.Generator, got int"),
    "deterministic": ({"deterministic": None}, TypeError, r"deterministic must be a bool, got NoneType"),
    "impl": ({"impl": "fast"}, ValueError, r"impl must be one of 'auto'"),
}

REFUSED_PACKED = {
    "q, None": ({"q": None}, TypeError, r"q must be a torch\.Tensor"),
    "q, 4-D": ({"q": T(1, 10, 4, 8)}, ValueError, r"q must have shape \(total_q, Hq, D\), got \(1, 10, 4, 8\)"),
    "k, D": ({"k": T(12, 4, 7)}, ValueError, r"k must have shape \(total_k, Hkv, 8\) to match q, got \(12, 4, 7\)"),
    "k, dtype": ({"k": T(12, 4, 8).double()}, TypeError, r"k must have dtype torch\.float32 to match q"),
    "v, rows": ({"v": T(11, 4, 6)}, ValueError, r"v must have shape \(12, 4, Dv\) to match k, got \(11, 4, 6\)"),
    "v, heads": ({"v": T(12, 2, 6)}, ValueError, r"v must have shape \(12, 4, Dv\) to match k"),
    "k, heads": (
        {"k": T(12, 2, 8), "v": T(12, 2, 6)},
        ValueError,
        r"k must have shape \(total_k, 4, D\) to match q \(enable_gqa=True groups query heads\)",
    ),
    "k, grouping": (
        {"k": T(12, 3, 8), "v": T(12, 3, 6), "enable_gqa": True},
        ValueError,
        r"k must have shape \(total_k, Hkv, D\) with Hkv dividing the 4 heads of q",
    ),
    "cu_seqlens_q, list": ({"cu_seqlens_q": [0, 3, 10]}, TypeError, r"cu_seqlens_q must be a torch\.Tensor, got list"),
    "cu_seqlens_q, float": ({"cu_seqlens_q": T(3)}, TypeError, r"cu_seqlens_q must be an integer tensor"),
    "cu_seqlens_k, 2-D": (
        {"cu_seqlens_k": torch.zeros(1, 3).int()},
        ValueError,
        r"cu_seqlens_k must have shape \(N \+ 1,\)",
    ),
    "cu_seqlens_k, empty": (
        {"cu_seqlens_k": torch.zeros(0).int()},
        ValueError,
        r"cu_seqlens_k must have shape \(N \+ 1,\)",
    ),
    "cu_seqlens_k, count": (
        {"cu_seqlens_k": torch.tensor([0, 12])},
        ValueError,
        r"cu_seqlens_k must have shape \(3,\) to match cu_seqlens_q, got \(2,\)",
    ),
    "cu_seqlens_q, end": (
        {"cu_seqlens_q": torch.tensor([0, 3, 11])},
        ValueError,
        r"cu_seqlens_q must rise from 0 to 10, the number of packed rows, got \[0, 3, 11\]",
    ),
    "cu_seqlens_q, start": (
        {"cu_seqlens_q": torch.tensor([1, 3, 10])},
        ValueError,
        r"cu_seqlens_q must rise from 0 to 10",
    ),
    "cu_seqlens_k, order": (
        {"cu_seqlens_q": torch.tensor([0, 3, 4, 10]), "cu_seqlens_k": torch.tensor([0, 9, 5, 12])},
        ValueError,
        r"cu_seqlens_k must rise from 0 to 12.*got \[0, 9, 5, 12\]",
    ),
    "cu_seqlens_k, device": (
        {"cu_seqlens_k": torch.zeros(3).int().to("meta")},
        ValueError,
        r"cu_seqlens_k must be on cpu",
    ),
    "max_seqlen_q": ({"max_seqlen_q": 2.5}, TypeError, r"max_seqlen_q must be an int, got float"),
    "max_seqlen_k": ({"max_seqlen_k": -1}, ValueError, r"max_seqlen_k must be a non-negative int, got -1"),
    "sinks": ({"sinks": T(3)}, ValueError, r"sinks must have shape \(4,\) to match"),
    "scale": ({"scale": math.nan}, ValueError, r"scale must be finite"),
    "softcap": ({"softcap": 0}, ValueError, r"softcap must be positive"),
    "dropout_p": ({"dropout_p": 2}, ValueError, r"dropout_p must be between 0 and 1"),
    "bias": ({"bias": T(4)}, TypeError, r"bias must be a pyext\.bias object"),
    "mask": ({"mask": torch.ones(10, 12).bool()}, TypeError, r"mask must be a pyext\.masks object"),
    "prefix, count": (
        {"mask": pyext.masks.prefix(torch.ones(3).long())},
        ValueError,
        r"masks\.prefix lengths must have shape \(2,\) to match cu_seqlens_q, got \(3,\)",
    ),
    "rotary": ({"rotary": 1}, TypeError, r"rotary must be a pyext\.Rotary, got int"),
    "generator": ({"generator": "cpu"}, TypeError, r"generator must be a torch\.Generator"),
}


@pytest.fixture
def no_kernel(monkeypatch):
    """A test that reaches a backend fails."""

    def reached(*args):
        raise AssertionError("a backend was called")

    monkeypatch.setattr("pyext._dispatch.BACKENDS", tuple((name, reached) for name in pyext._dispatch.NAMES))


@pytest.mark.parametrize("name", REFUSED)
def test_attention(name, no_kernel):
    changes, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        attention(changes)


@pytest.mark.parametrize("name", REFUSED_PACKED)
def test_varlen_attention(name, no_kernel):
    changes, error, message = REFUSED_PACKED[name]
    with pytest.raises(error, match=message):
        packed(**changes)


def test_unknown_and_positional_arguments():
    with pytest.raises(TypeError, match="unexpected keyword argument 'causal'"):
        attention({"causal": True})
    with pytest.raises(TypeError):
        pyext.attention(GOOD, GOOD, GOOD, None, 0.0, False, None, False, pyext.bias.alibi(T(8)))


def test_all_arguments_are_tested():
    import inspect

    for op, table in ((pyext.attention, REFUSED), (pyext.varlen_attention, REFUSED_PACKED)):
        seen = {name for changes, _, _ in table.values() for name in changes}
        missing = set(inspect.signature(op).parameters) - seen
        if op is pyext.varlen_attention:  # shared code, tested above
            missing -= {"is_causal", "return_lse", "deterministic", "impl"}
        assert not missing


@pytest.mark.parametrize("scale", [0, 1, -0.5, 0.125, math.pi])
def test_good_numbers_pass(scale):
    import numpy as np

    q = T(1, 2, 5, 4)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, q, q, scale=float(scale))
    for value in (scale, np.float32(scale), np.float64(scale)):
        torch.testing.assert_close(pyext.attention(q, q, q, scale=value, impl="reference"), wanted)
    pyext.attention(q, q, q, softcap=30, dropout_p=0, is_causal=1, return_lse=0, deterministic=False, impl="reference")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_sdpa_does(dtype):
    """fp32, half and mixed inputs become autocast's dtype, fp64 stays; without autocast a mixture is refused."""
    q, k, v = T(1, 2, 5, 4), T(1, 2, 5, 4).bfloat16(), T(1, 2, 5, 4).half()
    with torch.autocast("cpu", dtype=dtype):
        assert pyext.attention(q, k, v).dtype == dtype
        q.requires_grad_()
        pyext.attention(q, k, v, bias=pyext.bias.alibi(T(2))).sum().backward()
        assert q.grad.dtype == torch.float32
        assert pyext.attention(*(T(1, 2, 5, 4, dtype=torch.float64),) * 3).dtype == torch.float64
        offsets = torch.tensor([0, 5])
        assert pyext.varlen_attention(*(T(5, 2, 4),) * 3, offsets, offsets).dtype == dtype
    with pytest.raises(TypeError, match="key must have dtype"):
        pyext.attention(q, k, v)


def test_autocast_does_not_lower_the_reference():
    q = T(1, 2, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = pyext.attention(q, q, q, impl="reference")
    torch.testing.assert_close(got, pyext.attention(*(q.bfloat16(),) * 3, impl="reference"), rtol=0, atol=0)


@pytest.mark.parametrize("shift", [0, 2**31, -1])
def test_offsets_beyond_int32_are_named(shift):
    """int64 offsets are accepted, and a value that int32 cannot hold is caught before it wraps around."""
    offsets = torch.tensor([0, 5 + 2 * shift if shift > 0 else 5 + shift])
    q = T(5, 2, 4)
    if shift == 0:
        assert pyext.varlen_attention(q, q, q, offsets, offsets).shape == (5, 2, 4)
    else:
        with pytest.raises(ValueError, match="cu_seqlens_q must rise from 0 to 5"):
            pyext.varlen_attention(q, q, q, offsets, offsets)
