"""Gradients as autograd sees them: gradcheck, double backward, partial results merged through lse, needs_input_grad."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import pyext
from support.cases import arguments, case, draw, expected, function_of_leaves, run
from support.parts import (
    Shape,
    alibi,
    causal,
    dense,
    diagonal,
    disentangled,
    documents,
    float_attn_mask,
    function,
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
from support.tolerance import assert_close_to_reference

TINY = Shape(2, 2, 2, 4, 6, 3, 2)
GROUPED = Shape(1, 4, 2, 5, 3, 2, 3)
GRADCHECK = [
    case(TINY),
    case(TINY, causal(), alibi()),
    case(GROUPED, t5(buckets=8, max_distance=6), padding(), softcap=1.5),
    case(GROUPED, causal(), diagonal(), sinks=True),
    case(TINY, dense("1hqk"), dense("b11k"), sinks=True, softcap=0.8),
    case(TINY, float_attn_mask("11q1"), window(1, 2), scale=0.9),
    case(Shape(2, 2, 1, 4, 4, 3, 3), documents(batched=True), alibi(symmetric=True), dropout=0.3),
    case(TINY, transformer_xl("past"), segment(), causal()),
    case(GROUPED, transformer_xl("few"), softcap=1.2),
    case(GROUPED, disentangled(buckets=4, max_position=9), shaw(2)),
    case(TINY, strided(2), causal(), sinks=True),
    case(TINY, function("bhqk", 0.4), alibi(), softcap=1.5),
    case(TINY, permutation(batched=True), image("columns", 1, 2)),
]


@pytest.mark.parametrize("which", GRADCHECK, ids=str)
def test_gradcheck(which, fp64_backend, seed):
    call, inputs = function_of_leaves(draw(which, torch.float64, seed), fp64_backend.impl)
    assert gradcheck(call, inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("which", GRADCHECK, ids=str)
def test_gradgradcheck_on_reference(which, seed):
    call, inputs = function_of_leaves(draw(which, torch.float64, seed), "reference")
    assert gradgradcheck(call, inputs, eps=1e-6, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("which", [case(TINY), case(TINY, t5(), causal(), sinks=True)], ids=str)
def test_double_backward_raises_on_kernels(which, cpu, seed):
    """Kernels have no second derivative; asking for one raises, it never returns a wrong or a zero gradient."""
    call, inputs = function_of_leaves(draw(which, torch.float64, seed), cpu.impl, lse=False)
    out = call(*inputs)
    with pytest.raises(RuntimeError):
        gradients = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)


def test_double_backward_message_is_clear(cpu):
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    out = pyext.attention(q, q, q, impl="cpu")
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="(?i)twice|double backward|second|reference|not require grad|no.*autograd"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("parts", [(), (alibi(),), (padding([100, 55]),)], ids=["plain", "alibi", "padding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_two_key_ranges_merge_through_lse(dtype, parts, backend, session_seed):
    """Attention over keys [0, 41) and [41, 100), merged with their lse, is attention over all: values and gradients.

    The gradient of the merged output flows through both lse, so this fails if the backward ignores grad_lse.
    """
    which = case(Shape(2, 4, 2, 30, 100, 24, 24), *parts, lse=False)
    drawn, reference, eager = expected(which, dtype, session_seed)
    leaves = drawn.leaves
    q, k, v = leaves["query"], leaves["key"], leaves["value"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    outs, lses = [], []
    i, j = torch.arange(30).view(-1, 1), torch.arange(100).view(1, -1)
    for low, high in ((0, 41), (41, 100)):
        options = {"enable_gqa": True, "return_lse": True, "impl": backend.impl}
        if parts and drawn.terms[0].keyword == "bias":
            score = leaves["slopes0"].view(-1, 1, 1) * (j - (i + 70))[:, low:high]
            options["bias"] = pyext.bias.dense(score)
        elif parts:
            options["mask"] = pyext.masks.padding((torch.tensor([100, 55]) - low).clamp(0, high - low))
        out, lse = pyext.attention(q, k[:, :, low:high], v[:, :, low:high], **options)
        outs.append(out.to(wide))
        lses.append(lse)
    total = torch.logaddexp(*lses)
    merged = sum(out * (lse - total).exp().unsqueeze(-1) for out, lse in zip(outs, lses)).to(dtype)
    gradients = torch.autograd.grad(merged, list(leaves.values()), drawn.grad_out)
    tolerant = {"out": merged, "lse": total, **{f"grad {n}": g for n, g in zip(leaves, gradients)}}
    for name, value in tolerant.items():
        # The merge rounds out and every partial gradient once more: twice eager's error.
        twice = 2 * eager[name].double() - reference[name]
        magnitude = reference["magnitude"].get(name)
        assert_close_to_reference(value, reference[name], twice, name=name, magnitude=magnitude)


def test_gradients_only_where_asked(backend, seed):
    """Each subset of leaves that require grad gets the same bits as when all do; the others get none."""
    which = case(Shape(2, 4, 2, 20, 33, 16, 16), t5(), dense("1hqk"), sinks=True)
    drawn = draw(which, torch.float32, seed)
    everything = run(drawn, backend.impl)
    names = list(drawn.leaves)
    for chosen in itertools.chain(*(itertools.combinations(names, n) for n in (1, 2, len(names) - 1))):
        for name in names:
            drawn.leaves[name] = drawn.leaves[name].detach().requires_grad_(name in chosen)
        got = run_subset(drawn, chosen, backend.impl)
        for name in chosen:
            assert torch.equal(got[name], everything[f"grad {name}"]), (name, chosen)


def run_subset(drawn, chosen, impl):
    q, k, v = (drawn.leaves[name] for name in ("query", "key", "value"))
    out, lse = pyext.attention(q, k, v, return_lse=True, impl=impl, **arguments(drawn))
    pairs = [(x, g) for x, g in ((out, drawn.grad_out), (lse, drawn.grad_lse)) if x.requires_grad]
    leaves = [drawn.leaves[name] for name in chosen]
    outputs, cotangents = zip(*pairs)
    return dict(zip(chosen, torch.autograd.grad(outputs, leaves, cotangents)))


def close(backend) -> dict[str, float]:
    """To the last places of the widest dtype."""
    eps = torch.finfo(backend.widest).eps
    return {"rtol": 1e5 * eps, "atol": 1e3 * eps} if eps < 1e-9 else {"rtol": 1e-4, "atol": 1e-5}


def test_lse_alone_carries_gradient(backend, session_seed):
    """grad of lse only (out unused): dq = scale * P k, dv = 0."""
    drawn = draw(case(Shape(1, 2, 2, 17, 40, 16, 16)), backend.widest, session_seed)
    q, k, v = (drawn.leaves[name] for name in ("query", "key", "value"))
    _, lse = pyext.attention(q, k, v, return_lse=True, impl=backend.impl)
    dq, dv = torch.autograd.grad(lse, (q, v), drawn.grad_lse, allow_unused=True)
    p = torch.softmax(q @ k.mT / 4.0, -1)
    torch.testing.assert_close(dq, (drawn.grad_lse.unsqueeze(-1) * p) @ k / 4.0, **close(backend))
    assert dv is None or (dv == 0).all()


def test_same_result_with_and_without_lse_and_grad(backend, seed):
    """return_lse, no_grad and inference_mode change no bit of the output."""
    drawn = draw(case(Shape(2, 4, 2, 37, 53, 24, 24), causal(), t5(), sinks=True), torch.bfloat16, seed)
    q, k, v = (drawn.leaves[name] for name in ("query", "key", "value"))
    out, lse = pyext.attention(q, k, v, return_lse=True, impl=backend.impl, **arguments(drawn))
    assert out.requires_grad and lse.requires_grad
    assert torch.equal(out, pyext.attention(q, k, v, impl=backend.impl, **arguments(drawn)))
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            again = pyext.attention(q, k, v, impl=backend.impl, **arguments(drawn))
        assert not again.requires_grad
        assert torch.equal(out, again)


def test_backward_accumulates_and_repeats(backend):
    """retain_graph: a second backward adds the same bits again."""
    q, k, v = (torch.randn(1, 2, 20, 16, requires_grad=True) for _ in range(3))
    out = pyext.attention(q, k, v, impl=backend.impl)
    out.sum().backward(retain_graph=True)
    once = [x.grad.clone() for x in (q, k, v)]
    out.sum().backward()
    assert all(torch.equal(x.grad, 2 * g) for x, g in zip((q, k, v), once))


def test_one_tensor_in_three_roles(backend):
    """query = key = value is one leaf: its gradient is the sum of the three."""
    x = torch.randn(2, 2, 25, 16, dtype=backend.widest, requires_grad=True)
    (got,) = torch.autograd.grad(pyext.attention(x, x, x, impl=backend.impl).square().sum(), x)
    parts = [x.detach().clone().requires_grad_() for _ in range(3)]
    separate = torch.autograd.grad(pyext.attention(*parts, impl=backend.impl).square().sum(), parts)
    torch.testing.assert_close(got, sum(separate), **close(backend))
