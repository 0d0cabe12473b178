"""The two torch ops as PyTorch sees them: opcheck, fakes, output layout, and dropout's mask word by word."""

from __future__ import annotations

import math

import pytest
import torch

import pyext  # noqa: F401  (registers the ops)
from pyext._primitives import UNBOUNDED, AttentionProblem
from support import oracle
from support.cases import case, expected
from support.parts import Shape

GRADIENTS = ("query", "key", "value", "dense", "diag", "rel_query", "rel_q", "rel_k", "segment", "sinks")


def op_arguments(b=2, hq=4, hkv=2, lq=9, lk=13, d=8, dv=8, dtype=torch.float32, requires_grad=False, **given):
    """The arguments of attention_forward after query, key, value, by name, with `given` over the defaults."""
    q, k, v = torch.randn(b, hq, lq, d), torch.randn(b, hkv, lk, d), torch.randn(b, hkv, lk, dv)
    tensors = [x.to(dtype).requires_grad_(requires_grad) for x in (q, k, v)]
    names = dict.fromkeys(AttentionProblem._fields[3:])
    names.update(left=UNBOUNDED, right=UNBOUNDED, scale=0.3, softcap=0.0, dropout_p=0.0)
    assert given.keys() <= names.keys()
    names.update(given)
    return tensors, names


def lengths_to_offsets(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


ARGUMENTS = {
    "plain": lambda g: op_arguments(requires_grad=g),
    "bf16, window": lambda g: op_arguments(dtype=torch.bfloat16, left=3, right=0, requires_grad=g),
    "fp16, softcap": lambda g: op_arguments(dtype=torch.float16, softcap=2.0, requires_grad=g),
    "fp64, Dv": lambda g: op_arguments(dtype=torch.float64, dv=5, requires_grad=g),
    "dense (B,1,Lq,Lk)": lambda g: op_arguments(dense=torch.randn(2, 1, 9, 13, requires_grad=g), requires_grad=g),
    "dense (1,H,1,Lk), mask": lambda g: op_arguments(
        dense=torch.randn(1, 4, 1, 13, requires_grad=g), mask=torch.rand(2, 1, 9, 13) < 0.6, requires_grad=g
    ),
    "diag": lambda g: op_arguments(diag=torch.randn(4, 21, requires_grad=g), requires_grad=g),
    "diag, index": lambda g: op_arguments(
        diag=torch.randn(4, 6, requires_grad=g), diag_index=torch.randint(0, 6, (21,)).int(), requires_grad=g
    ),
    "diag of one head": lambda g: op_arguments(diag=torch.randn(1, 21, requires_grad=g), requires_grad=g),
    "intervals, sinks": lambda g: op_arguments(
        intervals=torch.randint(0, 13, (2, 9, 2)).sort(-1).values.int(),
        sinks=torch.randn(4, requires_grad=g),
        requires_grad=g,
    ),
    "dropout": lambda g: op_arguments(seed=torch.tensor([1 << 40]), dropout_p=0.4, requires_grad=g),
    "varlen": lambda g: op_arguments(
        b=1,
        lq=12,
        lk=15,
        cu_seqlens_q=lengths_to_offsets(5, 0, 7),
        cu_seqlens_k=lengths_to_offsets(3, 4, 8),
        right=0,
        requires_grad=g,
    ),
    "everything": lambda g: op_arguments(
        dense=torch.randn(1, 4, 9, 13, requires_grad=g),
        diag=torch.randn(4, 6, requires_grad=g),
        diag_index=torch.randint(0, 6, (21,)).int(),
        mask=torch.rand(2, 4, 1, 13) < 0.8,
        intervals=torch.tensor([0, 11]).int().expand(1, 9, 2).contiguous(),
        sinks=torch.randn(4, requires_grad=g),
        seed=torch.tensor([7]),
        left=9,
        right=2,
        softcap=3.0,
        dropout_p=0.1,
        requires_grad=g,
    ),
    "one query, many keys": lambda g: op_arguments(b=1, lq=1, lk=300, requires_grad=g),
    "no keys": lambda g: op_arguments(lk=0, requires_grad=g),
    "no queries": lambda g: op_arguments(lq=0, requires_grad=g),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck_forward(name, cpu):
    for requires_grad in (False, True):
        tensors, named = ARGUMENTS[name](requires_grad)
        torch.library.opcheck(torch.ops.pyext.attention_forward.default, (*tensors, *named.values()))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck_rotated(name, cpu):
    for requires_grad in (False, True):
        tensors, named = ARGUMENTS[name](requires_grad)
        query, key = tensors[:2]
        tables = torch.randn(2, max(query.shape[2], key.shape[2]), 3, requires_grad=requires_grad).unbind()
        positions = torch.zeros(1, key.shape[2], dtype=torch.int64)
        arguments = *tensors, *named.values(), *tables, None, *tables, positions, False
        torch.library.opcheck(torch.ops.pyext.attention_rotated_forward.default, arguments)


def test_rotated_takes_no_relative_rows(cpu):
    tensors, named = op_arguments(rel_k=torch.randn(1, 4, 21, 8), rel_index=torch.arange(21).int())
    tables = torch.randn(2, 13, 3).unbind()
    with pytest.raises(RuntimeError, match="relative rows"):
        torch.ops.pyext.attention_rotated_forward(*tensors, *named.values(), *tables, None, *tables, None, False)


def backward_arguments(tensors, named):
    out, lse = torch.ops.pyext.attention_forward(*tensors, *named.values())
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    needed = (named[name] is not None for name in ("dense", "diag", "rel_q", "rel_k", "segment"))
    return (grad_out, grad_lse, *tensors, out, lse, *named.values(), *needed)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck_backward(name, cpu):
    arguments = backward_arguments(*ARGUMENTS[name](False))
    torch.library.opcheck(torch.ops.pyext.attention_backward.default, arguments)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_output_layout(name, cpu):
    """Results lie in memory as (B, L, H, D), so that the merge of heads that follows needs no copy."""
    tensors, named = ARGUMENTS[name](False)
    out, lse = torch.ops.pyext.attention_forward(*tensors, *named.values())
    assert out.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()
    gradients = torch.ops.pyext.attention_backward(*backward_arguments(tensors, named))
    for gradient, tensor in zip(gradients, tensors):
        assert gradient.shape == tensor.shape and gradient.dtype == tensor.dtype
        assert gradient.transpose(1, 2).is_contiguous()
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    assert len(gradients) == len(GRADIENTS)
    for gradient, key in zip(gradients[3:], GRADIENTS[3:]):
        if key == "rel_query" and named[key] is not None:
            assert gradient.shape == named[key].shape and gradient.transpose(1, 2).is_contiguous()
            continue
        shape = (0,) if named[key] is None else named[key].shape
        assert gradient.shape == shape and gradient.dtype == wide and gradient.is_contiguous()


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1 - 2**-20, 1.0])
@pytest.mark.parametrize("raw_seed", [0, 1, -1, 2**63 - 1, 0x0123456789ABCDEF])
def test_dropout_is_philox(p, raw_seed, cpu):
    """The op keeps exactly the keys that Philox4x32-10, computed here independently, says; kept weights are scaled."""
    lq, lk = 21, 37
    q, k, v = torch.zeros(2, 3, lq, 4), torch.zeros(2, 3, lk, 4), torch.eye(lk).expand(2, 3, lk, lk).contiguous()
    _, named = op_arguments(seed=torch.tensor([raw_seed]), dropout_p=p)
    out, lse = torch.ops.pyext.attention_forward(q, k, v, *named.values())
    keep = oracle.dropout_keep(raw_seed, p, 2, 3, lq, lk)
    wanted = keep / lk / (1.0 - p) if p < 1 else torch.zeros(2, 3, lq, lk)
    torch.testing.assert_close(out, wanted.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(lk)))


def test_intervals_outside_are_clipped(cpu, session_seed):
    """Bounds below 0 or beyond Lk mean 0 and Lk; an empty or reversed interval sees nothing."""
    drawn, _, _ = expected(case(Shape(1, 2, 2, 6, 10, 8, 8), lse=False), torch.float64, session_seed)
    q, k, v = (drawn.leaves[name].detach() for name in ("query", "key", "value"))
    low_high = [(-5, 3), (0, 99), (7, 7), (8, 2), (-(2**31), 2**31 - 1), (10, 12)]
    _, named = op_arguments(intervals=torch.tensor([low_high]).int(), scale=1 / math.sqrt(8))
    out, lse = torch.ops.pyext.attention_forward(q, k, v, *named.values())
    j = torch.arange(10)
    allowed = torch.stack([(j >= low) & (j < high) for low, high in low_high])
    wanted, wanted_lse = oracle.attention(q, k, v, allowed=allowed)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-12, atol=1e-12)
