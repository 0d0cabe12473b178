"""torch.compile(fullgraph=True) with dynamic shapes, autocast, checkpointing, functional_call, torch.func, pickling."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import pyext

LENGTHS = ((33, 33), (20, 47), (65, 65), (2, 90))


def inputs(lq, lk, dtype=torch.float32, heads=(4, 2), d=16):
    """Fresh leaves: q, k, v and the parameters that the calls below may use."""
    sizes = {"q": (2, heads[0], lq, d), "k": (2, heads[1], lk, d), "v": (2, heads[1], lk, d)}
    leaves = {name: torch.randn(*size, dtype=dtype) for name, size in sizes.items()}
    leaves.update(table=torch.randn(32, heads[0]), slopes=torch.rand(heads[0]), sinks=torch.randn(heads[0]))
    leaves.update(r=torch.randn(lk, heads[0], d), u=torch.randn(heads[0], d), v_=torch.randn(heads[0], d))
    leaves.update(rows=torch.randn(heads[0], 16, d), segment=torch.randn(2, heads[0], lq, 2))
    leaves.update(dense=torch.randn(heads[0], 1, lk), strip=torch.randn(heads[0], lq + lk - 1))
    return {name: x.requires_grad_() for name, x in leaves.items()}


def call(t, **options):
    return pyext.attention(t["q"], t["k"], t["v"], enable_gqa=True, **options)


def lengths_of(t):
    return torch.tensor([t["k"].shape[2], t["k"].shape[2] // 2])


CALLS = {
    "plain": lambda t, impl: call(t, impl=impl),
    "is_causal": lambda t, impl: call(t, is_causal=True, impl=impl),
    "causal": lambda t, impl: call(t, mask=pyext.masks.causal(), impl=impl),
    "window": lambda t, impl: call(t, mask=pyext.masks.window(7, 0), softcap=3.0, impl=impl),
    "t5": lambda t, impl: call(t, bias=pyext.bias.t5(t["table"], bidirectional=True), impl=impl),
    "t5 causal": lambda t, impl: call(
        t, bias=pyext.bias.t5(t["table"], bidirectional=False), mask=pyext.masks.causal(), impl=impl
    ),
    "alibi": lambda t, impl: call(t, bias=pyext.bias.alibi(t["slopes"]), mask=pyext.masks.causal(), impl=impl),
    "diagonal": lambda t, impl: call(t, bias=pyext.bias.diagonal(t["strip"]), impl=impl),
    "dense": lambda t, impl: call(t, bias=pyext.bias.dense(t["dense"]), impl=impl),
    "float mask": lambda t, impl: call(t, attn_mask=t["dense"], impl=impl),
    "padding": lambda t, impl: call(t, mask=pyext.masks.padding(lengths_of(t)), impl=impl),
    "padding, prefix": lambda t, impl: call(
        t, mask=pyext.masks.padding(lengths_of(t)) & pyext.masks.prefix(lengths_of(t) // 2), impl=impl
    ),
    "documents": lambda t, impl: call(
        t,
        mask=pyext.masks.documents(
            torch.arange(t["q"].shape[2]) // 11,
            torch.arange(t["k"].shape[2]) // 11,
        ),
        impl=impl,
    ),
    "dense mask": lambda t, impl: call(t, mask=pyext.masks.dense(t["dense"] > 0), impl=impl),
    "lse, sinks": lambda t, impl: call(t, sinks=t["sinks"], return_lse=True, impl=impl),
    "sum": lambda t, impl: call(
        t,
        bias=pyext.bias.t5(t["table"], bidirectional=True) + pyext.bias.alibi(t["slopes"], symmetric=True),
        scale=0.5,
        impl=impl,
    ),
    "transformer_xl": lambda t, impl: call(
        t, bias=pyext.bias.transformer_xl(t["r"], t["u"], t["v_"]), mask=pyext.masks.causal(), impl=impl
    ),
    "deberta": lambda t, impl: call(
        t, bias=pyext.bias.disentangled(t["rows"], t["rows"], buckets=8, max_position=40), impl=impl
    ),
    "shaw + xl, softcap": lambda t, impl: call(
        t,
        bias=pyext.bias.shaw(t["rows"][:, 1:], 7) + pyext.bias.transformer_xl(t["r"], t["u"], t["v_"]),
        softcap=2.0,
        impl=impl,
    ),
    "segment": lambda t, impl: call(
        t,
        bias=pyext.bias.segment(t["segment"], torch.arange(t["q"].shape[2]) // 11, torch.arange(t["k"].shape[2]) // 11),
        impl=impl,
    ),
}


def outputs_and_gradients(function, leaves, impl):
    out = function(leaves, impl)
    outs = [out] if isinstance(out, torch.Tensor) else list(out)
    total = sum((x.float() * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in outs)
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return [x.detach() for x in outs], dict(zip(leaves, gradients))


def assert_same(got, wanted, exact=True):
    for a, b in zip(got[0], wanted[0]):
        assert a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)
    for name, b in wanted[1].items():
        a = got[1][name]
        assert (a is None) == (b is None), name
        if b is not None:
            # Compiled code may sum a gradient over heads or distances in another order.
            torch.testing.assert_close(
                a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()), msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CALLS)
def test_compiles_whole_with_dynamic_shapes(name, cpu_best):
    """One graph, no break, for changing lengths; the kernel's own results are the same bits as without compile."""
    compiled = torch.compile(CALLS[name], fullgraph=True, dynamic=True, backend="aot_eager")
    for lq, lk in LENGTHS:
        leaves = inputs(lq, lk)
        got = outputs_and_gradients(compiled, leaves, cpu_best.impl)
        assert_same(got, outputs_and_gradients(CALLS[name], leaves, cpu_best.impl))


@pytest.mark.parametrize("name", ["t5", "padding"])
def test_compiles_without_recompiling_for_each_length(name, cpu_best):
    compiled = torch.compile(CALLS[name], fullgraph=True, dynamic=True, backend="aot_eager")
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for n in (20, 31, 42, 53, 64):
        compiled(inputs(n, n), cpu_best.impl)
    assert graphs["unique_graphs"] - before == 1


@pytest.mark.parametrize("name", ["t5 causal", "padding"])
def test_inductor(name, cpu_best):
    compiled = torch.compile(CALLS[name], fullgraph=True, dynamic=True)
    for lq, lk in LENGTHS[:2]:
        leaves = inputs(lq, lk)
        got = outputs_and_gradients(compiled, leaves, cpu_best.impl)
        assert_same(got, outputs_and_gradients(CALLS[name], leaves, cpu_best.impl), exact=False)


def test_compiles_static_and_auto(cpu_best):
    """dynamic=None (static first, dynamic on change) and impl="auto" work too, and without grad."""
    compiled = torch.compile(CALLS["alibi"], fullgraph=True, backend="aot_eager")
    for lq, lk in LENGTHS:
        leaves = inputs(lq, lk)
        with torch.no_grad():
            torch.testing.assert_close(compiled(leaves, "auto"), CALLS["alibi"](leaves, "auto"), rtol=0, atol=0)


def test_compiled_dropout_draws_from_the_global_state(cpu_best):
    """Compiled dropout is random, repeats with the seed, and its backward uses the same mask."""

    def function(q, v):
        return pyext.attention(q, q, v, dropout_p=0.5, impl=cpu_best.impl)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    q = torch.zeros(1, 2, 24, 8)
    v = torch.eye(24).expand(1, 2, 24, 24).clone().requires_grad_()
    torch.manual_seed(1)
    first = compiled(q, v)
    second = compiled(q, v)
    torch.manual_seed(1)
    assert torch.equal(first, compiled(q, v))
    assert not torch.equal(first, second)
    (gradient,) = torch.autograd.grad(first.sum(), v)
    torch.testing.assert_close(gradient, first.detach().mT.sum(-1, keepdim=True).expand_as(v), rtol=1e-5, atol=1e-6)


def test_compiled_varlen(cpu_best):
    def function(q, k, v, cu):
        return pyext.varlen_attention(q, k, v, cu, cu, is_causal=True, impl=cpu_best.impl)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((3, 5, 0), (10, 1, 30), (7, 7, 7)):
        cu = torch.tensor([0, *lengths]).cumsum(0).int()
        leaves = [torch.randn(int(cu[-1]), 2, 16, requires_grad=True) for _ in range(3)]
        got, wanted = compiled(*leaves, cu), function(*leaves, cu)
        assert torch.equal(got, wanted)
        for a, b in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves)):
            assert torch.equal(a, b)


class Block(torch.nn.Module):
    """Self-attention as models write it: projections, a T5 table, dropout in training mode."""

    def __init__(self, impl, dropout=0.0):
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)
        self.table = torch.nn.Parameter(torch.randn(32, 4))
        self.impl, self.dropout = impl, dropout

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = pyext.bias.t5(self.table, bidirectional=False)
        p = self.dropout if self.training else 0.0
        y = pyext.attention(q, k, v, bias=bias, mask=pyext.masks.causal(), dropout_p=p, impl=self.impl)
        return self.out(y.transpose(1, 2).flatten(2))


def test_compiled_module_trains_as_eager(cpu_best):
    eager = Block(cpu_best.impl)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, dynamic=True, backend="aot_eager")
    steps = [torch.optim.SGD(m.parameters(), 0.1) for m in (eager, other)]
    for n in (12, 25, 40):
        x = torch.randn(2, n, 32)
        for module, optimizer in zip((eager, compiled), steps):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(eager.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, backend):
    """Inside autocast fp32 inputs run in half precision, as SDPA's do; tables keep their dtype; gradients are fp32."""
    block = Block(backend.impl)
    x = torch.randn(2, 20, 32)
    with torch.autocast("cpu", dtype=dtype):
        out = block(x)
        q = torch.randn(1, 2, 5, 8)
        ours, theirs = (f(q, q, q) for f in (pyext.attention, torch.nn.functional.scaled_dot_product_attention))
        if not backend.refuses(torch.float64):
            wide = torch.randn(1, 2, 5, 8, dtype=torch.float64)
            assert pyext.attention(wide, wide, wide, impl=backend.impl).dtype == torch.float64
        mixed = pyext.attention(q.to(dtype), q, q.to(dtype), impl=backend.impl)
    assert out.dtype == ours.dtype == theirs.dtype == mixed.dtype == dtype
    out.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in block.parameters())
    plain = block(x)
    torch.testing.assert_close(out.float(), plain, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointing(dropout, use_reentrant, backend):
    """Recomputation in backward meets the same dropout mask: the same gradients as without checkpointing."""
    block = Block(backend.impl, dropout)
    gradients = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant)):
        torch.manual_seed(4)
        block.zero_grad()
        x = torch.randn(2, 20, 32, requires_grad=True)
        run(x).square().mean().backward()
        gradients.append([x.grad] + [p.grad.clone() for p in block.parameters()])
    for a, b in zip(*gradients):
        assert torch.equal(a, b)


def test_functional_call(backend):
    block = Block(backend.impl)
    x = torch.randn(2, 20, 32)
    other = {name: torch.randn_like(p).requires_grad_() for name, p in block.named_parameters()}
    got = torch.func.functional_call(block, other, (x,))
    gradients = torch.autograd.grad(got.square().sum(), list(other.values()))
    block.load_state_dict(other)
    wanted = block(x)
    assert torch.equal(got, wanted)
    for a, b in zip(gradients, torch.autograd.grad(wanted.square().sum(), list(block.parameters()))):
        assert torch.equal(a, b)


def test_meta_and_fake_tensors(cpu_best):
    """Shapes without data, as export and memory planners ask for them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(2, 4, 33, 16, requires_grad=True)
        k = torch.empty(2, 2, 50, 16)
        out, lse = pyext.attention(q, k, k, enable_gqa=True, is_causal=True, return_lse=True, impl=cpu_best.impl)
        assert out.shape == (2, 4, 33, 16) and lse.shape == (2, 4, 33) and lse.dtype == torch.float32
        (gradient,) = torch.autograd.grad(out.sum(), q)
        assert gradient.shape == q.shape


def test_export(cpu_best):
    class Plain(torch.nn.Module):
        def forward(self, q, k):
            return pyext.attention(q, k, k, mask=pyext.masks.causal(), impl=cpu_best.impl)

    q, k = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 12, 8)
    n, m = torch.export.Dim("n", min=2, max=512), torch.export.Dim("m", min=2, max=512)
    program = torch.export.export(Plain(), (q, k), dynamic_shapes={"q": {2: n}, "k": {2: m}})
    for lq, lk in ((9, 12), (30, 77)):
        q, k = torch.randn(1, 2, lq, 8), torch.randn(1, 2, lk, 8)
        assert torch.equal(program.module()(q, k), Plain()(q, k))
