"""Few queries against many keys: the kernel of its own, split over keys, with every feature, both directions."""

from __future__ import annotations

import pytest
import torch

import pyext
from support import layouts
from support.cases import case, check, draw, run
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
    float_attn_mask,
    is_causal,
    padding,
    prefix,
    segment,
    shaw,
    t5,
    transformer_xl,
    window,
)


def one(hq=8, hkv=2, lq=1, lk=1500, d=64, dv=None, b=2):
    return Shape(b, hq, hkv, lq, lk, d, d if dv is None else dv)


CASES = [
    *(case(one(lq=lq, lk=701), causal()) for lq in range(1, 9)),
    *(case(one(8, hkv, lq, 530, 72)) for hkv in (1, 2, 8) for lq in (1, 3)),
    *(case(one(lk=lk, d=16)) for lk in (1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 511, 513, 1023, 1025)),
    case(one(lk=3001, d=128, b=1), causal()),
    case(one(16, 4, 1, 1300, 128, b=1)),
    case(one(d=80, dv=40), alibi()),
    case(one(d=1)),
    case(one(d=256, lk=300)),
    case(one(d=320, lk=200)),
    case(one(lq=4), alibi(), causal()),
    case(one(lq=5), alibi(symmetric=True)),
    case(one(), t5()),
    case(one(lq=6), t5(bidirectional=False), causal()),
    case(one(lq=2), t5(dtype=torch.float32), softcap=3.0),
    case(one(lq=3), diagonal()),
    case(one(), dense("bhqk")),
    case(one(lq=3), dense("1hqk"), causal()),
    case(one(lq=2), float_attn_mask("b11k")),
    case(one(lq=2), float_attn_mask("bhq1")),
    case(one(), bool_attn_mask("b11k")),
    case(one(lq=4), dense_mask("bhqk", density=0.3)),
    case(one(lq=4), dense_mask("bhqk", density=0.001)),
    case(one(), padding()),
    case(one(lq=4), padding([3, 1499], [4, 2])),
    case(one(lq=4), padding(), causal(), t5()),
    case(one(), window(100, 0)),
    case(one(lq=7), window(5, 5)),
    case(one(lq=3), documents(cross=True)),
    case(one(lq=4), prefix()),
    case(one(lq=3), is_causal()),
    case(one(), sinks=True),
    case(one(lq=4), causal(), sinks=True, softcap=2.0, scale=0.3),
    case(one(), dropout=0.3),
    case(one(lq=5), t5(), padding(), dropout=0.2),
    case(one(), lse=False),
    case(one(b=1, hq=1, hkv=1, lk=3000)),
    case(one(b=1, hq=1, hkv=1, lq=8, lk=2999), t5()),
    case(one(b=5, hq=3, hkv=3, lk=40)),
    case(one(), transformer_xl("past")),
    case(one(lq=5, lk=700), transformer_xl("xlnet"), segment(), causal()),
    case(one(lq=3, lk=400, d=40), shaw(30), softcap=3.0),
    case(one(lk=513, d=24), disentangled(buckets=32, max_position=128)),
    *(case(one(lk=300, lq=2, d=40), causal(), layout=kind) for kind in layouts.VARIED),
    *(case(one(lk=300, d=40), t5(), layout=("contiguous", kind, kind), grad_layout="blhd") for kind in layouts.VARIED),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("which", CASES, ids=str)
def test_against_oracle(which, dtype, backend, session_seed):
    check(which, dtype, backend, session_seed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("which", CASES[::3], ids=str)
def test_other_dtypes_against_oracle(which, dtype, backend, session_seed):
    check(which, dtype, backend, session_seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_steps_equal_the_whole(dtype, cpu, seed):
    """Decoding a sequence token by token with a growing cache gives the rows of one causal call."""
    torch.manual_seed(seed)
    q, k, v = (
        torch.randn(1, 8, 40, 64).to(dtype),
        torch.randn(1, 2, 40, 64).to(dtype),
        torch.randn(1, 2, 40, 64).to(dtype),
    )
    table = torch.randn(32, 8)
    bias = pyext.bias.t5(table, bidirectional=False)
    options = dict(enable_gqa=True, mask=pyext.masks.causal(), bias=bias, impl=cpu.impl, return_lse=True)
    whole, lse = pyext.attention(q, k, v, **options)
    for n in (1, 2, 17, 33, 40):
        step, step_lse = pyext.attention(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], **options)
        torch.testing.assert_close(step, whole[:, :, n - 1 : n], rtol=2e-5, atol=8 * torch.finfo(dtype).eps)
        torch.testing.assert_close(
            step_lse, lse[:, :, n - 1 : n], rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-4
        )


def test_preallocated_cache(cpu, seed):
    """A cache longer than what is filled, NaN beyond: slices of it, or padding over finite leftovers, give the same."""
    drawn = draw(case(Shape(2, 8, 2, 1, 333, 64, 64)), torch.bfloat16, seed)
    wanted = run(drawn, cpu.impl)
    for name in ("key", "value"):
        cache = torch.full((2, 2, 1024, 64), float("nan"), dtype=torch.bfloat16)
        cache[:, :, :333] = drawn.leaves[name].detach()
        drawn.leaves[name] = cache[:, :, :333].requires_grad_()
    for name, value in run(drawn, cpu.impl).items():
        assert torch.equal(value, wanted[name]), name
