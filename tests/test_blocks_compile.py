"""Block masks under torch.compile(fullgraph=True): made in the graph, built beforehand, and in reordered parts."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import pyext
from pyext import masks
from pyext.ops import _passes

SQUARE = ((150, 150), (170, 170), (300, 300))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(lq, lk, batch=2):
    sizes = (batch, 4, lq, 16), (batch, 2, lk, 16), (batch, 2, lk, 16)
    return [torch.randn(size, requires_grad=True) for size in sizes]


def outputs_and_gradients(function, leaves, *more):
    out, lse = function(*leaves, *more)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out, lse, *torch.autograd.grad((out * weight).sum() + (lse * lse).mean(), leaves)]


def attend(q, k, v, mask, **options):
    return pyext.attention(q, k, v, enable_gqa=True, mask=mask, return_lse=True, **options)


def assert_same(function, leaves, *more, dynamic=None):
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    got, wanted = (outputs_and_gradients(f, leaves, *more) for f in (compiled, function))
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


MASKS = {
    "strided": lambda q: masks.strided(16),
    "strided, causal": lambda q: masks.strided(16) & masks.causal(),
    "fixed": lambda q: masks.fixed(16, 2) & masks.padding(torch.tensor([q.shape[2], 20])),
    "rows": lambda q: masks.image_rows(10, 12) & masks.causal(),
    "columns": lambda q: masks.image_columns(10, 12) & masks.causal(),
    "conv": lambda q: masks.image_conv(10, 12, 3),
    "permutation": lambda q: masks.permutation(torch.arange(q.shape[2]).flip(0), exclude_self=True),
    "function": lambda q: masks.from_function(lambda b, h, i, j: (i + j + h) % 3 == 0, q.shape[2], q.shape[2]),
    "union": lambda q: masks.strided(16) | masks.padding(torch.tensor([q.shape[2], 20])),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", MASKS)
def test_made_in_the_graph(name, dynamic, cpu_best):
    """In one graph, of a given length (where some masks are reordered) or any."""

    def function(q, k, v):
        return attend(q, k, v, MASKS[name](q))

    for lengths in SQUARE[: 2 if dynamic else 3]:
        assert_same(function, inputs(*lengths), dynamic=dynamic)


@pytest.mark.parametrize("name", [*MASKS, "flex"])
def test_built_before(name, cpu_best):
    """A finished table, or finished passes, from outside: closed over and as an argument."""
    for n, m in SQUARE[1:]:
        leaves = inputs(n, m)
        if name == "flex":
            mask = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < 50 * (h + 1)), None, 4, n, m, "cpu", 64)
            mask = masks.window(1, 1) | mask
        else:
            mask = MASKS[name](leaves[0])
        made = mask.build(n, m, batch=2, heads=4)
        wanted = outputs_and_gradients(attend, leaves, mask)
        for function, more in ((attend, (made,)), (lambda q, k, v, made=made: attend(q, k, v, made), ())):
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            for a, b in zip(outputs_and_gradients(compiled, leaves, *more), wanted):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert_same(lambda q, k, v, made=made: attend(q, k, v, made & masks.causal(), softcap=3.0), leaves)


def test_flex_block_mask_in_the_graph(cpu_best):
    mask = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < 50 * (h + 1)), None, 4, 150, 170, "cpu", 64)
    assert_same(lambda q, k, v: attend(q, k, v, mask), inputs(150, 170))


def test_parts_are_traced(cpu_best, monkeypatch):
    """Reordering needs no table, so that it takes part in graphs of any length."""
    called = []
    traced = _passes.attend
    monkeypatch.setattr(_passes, "attend", lambda *args: called.append(1) or traced(*args))

    def function(q, k, v, lengths):
        return attend(q, k, v, masks.strided(16) & masks.causal() & masks.padding(lengths))

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (300, 333):
        leaves, lengths = inputs(n, n), torch.tensor([n, 40])
        got, wanted = (outputs_and_gradients(f, leaves, lengths) for f in (compiled, function))
        for a, b in zip(got, wanted):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert called


def test_inductor(cpu_best):
    def function(q, k, v):
        return attend(q, k, v, masks.strided(16) & masks.causal())

    compiled = torch.compile(function, fullgraph=True)
    leaves = inputs(300, 300)
    for a, b in zip(outputs_and_gradients(compiled, leaves), outputs_and_gradients(function, leaves)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
