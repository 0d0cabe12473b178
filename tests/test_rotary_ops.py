"""The rotary ops as PyTorch sees them: opcheck, fakes, torch.compile with dynamic shapes, autocast, torch.func."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

import pyext
from support import layouts
from support.rotary import Case, draw

OP = "rotary"
CASES = [
    Case(),
    Case(layout="lbhd", interleaved=True, inverse=True, r=20),
    Case(layout="every_second", tables="batch", positions="batch"),
    Case(layout="expanded_heads", tables="one", positions="row", r=6),
    Case(tables="batch", table_layout="columns"),
    Case(n=0),
    Case(b=0),
    Case(r=0),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def op_arguments(which, dtype, requires_grad, device):
    drawn = draw(which, dtype, 1, device)
    positions = drawn.positions
    if positions is not None and positions.dim() == 1:
        positions = positions[None]
    leaves = [x.detach().requires_grad_(requires_grad) for x in drawn.leaves]
    return drawn, leaves, positions


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", CASES, ids=str)
def test_opcheck(which, dtype, requires_grad, kernel):
    drawn, leaves, positions = op_arguments(which, dtype, requires_grad, kernel.device)
    operators, arguments = kernel.operators, (*leaves, positions, which.interleaved, which.inverse)
    if kernel.refuses(dtype):
        with pytest.raises(RuntimeError, match="x must be float32, bfloat16 or float16"):
            operators.rotary_forward.default(*arguments)
        return
    torch.library.opcheck(operators.rotary_forward.default, arguments)
    sizes = (1, *drawn.cos.shape)[-3:]
    grad = drawn.grad.detach().requires_grad_(requires_grad)
    arguments = (grad, leaves[0], positions, *sizes, which.interleaved, which.inverse)
    torch.library.opcheck(operators.rotary_backward.default, arguments)


@pytest.mark.parametrize("kind", layouts.KINDS)
def test_fake_strides(kind, kernel):
    drawn = draw(Case(layout=kind), torch.float32, 1, kernel.device)
    leaves = [x.detach() for x in drawn.leaves]
    real = pyext.rotary(*leaves, impl=kernel.impl)
    with FakeTensorMode() as mode:
        fake = pyext.rotary(*map(mode.from_tensor, leaves), impl=kernel.impl)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.randn(2, 5, 8)), "x must have 4 dimensions"),
        (dict(cos=torch.randn(5, 5), sin=torch.randn(5, 5)), "at most half as many columns"),
        (dict(sin=torch.randn(5, 3)), "same shape"),
        (dict(sin=torch.randn(5, 4).half()), "same dtype"),
        (dict(cos=torch.randn(4, 4), sin=torch.randn(4, 4)), "a row for every row of x"),
        (dict(cos=torch.randn(3, 5, 4), sin=torch.randn(3, 5, 4)), "x's batch size"),
        (dict(positions=torch.arange(5)), r"int64 \(batch or 1, length\)"),
        (dict(positions=torch.arange(5)[None].int()), r"int64 \(batch or 1, length\)"),
    ],
)
def test_the_op_protects_memory(change, message, kernel):
    """What Python checks first, the op itself refuses too: it is public to torch."""
    if kernel.emulated:
        pytest.skip("the checks are the operator's, which the emulator is called without")
    call = dict(x=torch.randn(2, 3, 5, 8), cos=torch.randn(5, 4), sin=torch.randn(5, 4), positions=None)
    call.update(change)
    call = {name: None if value is None else value.to(kernel.device) for name, value in call.items()}
    with pytest.raises(RuntimeError, match=message):
        kernel.operators.rotary_forward(*call.values(), False, False)


@pytest.mark.parametrize("outside", [5, -1, 2**40])
def test_positions_outside_the_tables(outside, kernel):
    """The op refuses them on a CPU. Where that would need a device sync, they give NaN, and no gradient to a table."""
    positions = torch.tensor([[0, 1, 2, outside, 3]])
    x, cos, sin = torch.randn(2, 3, 5, 8), torch.randn(5, 4), torch.randn(5, 4)
    if kernel.impl == "cpu":
        with pytest.raises(RuntimeError, match="must lie in"):
            kernel.operators.rotary_forward(x, cos, sin, positions, False, False)
        return
    out = kernel.operators.rotary_forward(x, cos, sin, positions, False, False)
    assert torch.equal(out.isnan().any(-1).any(1), (positions == outside).expand(2, 5))
    got = kernel.operators.rotary_backward(x, x, positions, 1, 5, 4, False, False)
    known = torch.tensor([0, 1, 2, 4])
    wanted = kernel.operators.rotary_backward(
        x[:, :, known], x[:, :, known], positions[:, known], 1, 5, 4, False, False
    )
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))


# --- torch.compile ---


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def inputs(n, keys=None, blhd=False):
    keys = n if keys is None else keys
    shapes = ((2, 4, n, 16), (2, 2, keys, 16), (2, 2, keys, 16))
    q, k, v = (torch.randn(s) for s in shapes)
    if blhd:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    tables = [torch.randn(200, 6), torch.randn(200, 6)]
    return [x.requires_grad_() for x in (q, k, v, *tables)]


def with_positions(q, k, v, cos, sin):
    return pyext.rotary(q, cos, sin, positions=torch.arange(q.shape[2]) + 3, interleaved=True)


CALLS = {
    "rotary": lambda q, k, v, cos, sin: pyext.rotary(q, cos, sin, inverse=True),
    "positions": with_positions,
    "attention": lambda q, k, v, cos, sin: pyext.attention(
        q, k, v, rotary=pyext.Rotary(cos, sin), mask=pyext.masks.causal(), enable_gqa=True
    ),
}


def outputs(function, leaves):
    out = function(*leaves)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out, *torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)]


@pytest.mark.parametrize("blhd", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_compiles_whole_with_dynamic_shapes(name, blhd, cpu_best):
    compiled = torch.compile(CALLS[name], fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in ((33, 33), (20, 47), (65, 65), (2, 90)):
        leaves = inputs(*sizes, blhd)
        got, wanted = outputs(compiled, leaves), outputs(CALLS[name], leaves)
        assert got[0].stride() == wanted[0].stride()
        for a, b in zip(got, wanted):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


def test_compiles_whole_for_each_backend(kernel):
    def function(q, k, v, cos, sin):
        return pyext.rotary(q, cos, sin, positions=torch.arange(q.shape[2]) + 3, impl=kernel.impl)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (33, 20):
        leaves = inputs(n)
        for a, b in zip(outputs(compiled, leaves), outputs(function, leaves)):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


def test_compiles_without_recompiling_for_each_length(cpu_best):
    compiled = torch.compile(CALLS["attention"], fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (20, 31, 42, 53):
        compiled(*inputs(n))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_inductor(cpu_best):
    compiled = torch.compile(CALLS["attention"], fullgraph=True, dynamic=True)
    for sizes in ((33, 33), (20, 47)):
        leaves = inputs(*sizes)
        for a, b in zip(outputs(compiled, leaves), outputs(CALLS["attention"], leaves)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compiled_module_with_tables(cpu_best):
    """RotaryEmbedding inside the graph, beyond its cached length too."""
    embedding = pyext.nn.RotaryEmbedding(16, 40)

    def function(q):
        cos, sin = embedding(q.shape[2])
        return pyext.rotary(q, cos, sin)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (20, 33, 70):
        q = torch.randn(1, 2, n, 16)
        torch.testing.assert_close(compiled(q), function(q), rtol=0, atol=0)


def test_compiled_varlen(cpu_best):
    def function(q, k, v, cu_q, cu_k, cos, sin):
        return pyext.varlen_attention(q, k, v, cu_q, cu_k, rotary=pyext.Rotary(cos, sin))

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    cos, sin = torch.randn(50, 4), torch.randn(50, 4)
    for lengths in ((3, 5, 0), (10, 1, 30)):
        cu = torch.tensor([0, *lengths]).cumsum(0)
        q, k, v = (torch.randn(int(cu[-1]), 2, 8) for _ in range(3))
        assert torch.equal(compiled(q, k, v, cu, cu, cos, sin), function(q, k, v, cu, cu, cos, sin))


# --- Autocast, torch.func ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, backend):
    """rotary keeps x's dtype."""
    cos, sin, x = torch.randn(9, 4), torch.randn(9, 4), torch.randn(1, 2, 9, 8)
    with torch.autocast(backend.device, dtype=dtype):
        assert pyext.rotary(x, cos, sin, impl=backend.impl).dtype == torch.float32
        assert pyext.rotary(x.to(dtype), cos, sin, impl=backend.impl).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_attention(dtype, cpu):
    """Query and key are rotated after they were cast."""
    cos, sin = torch.randn(9, 4), torch.randn(9, 4)
    q = torch.randn(1, 2, 9, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out = pyext.attention(q, q, q, rotary=pyext.Rotary(cos, sin), impl=cpu.impl)
    assert out.dtype == dtype
    out.sum().backward()
    assert q.grad.dtype == torch.float32


def test_func_transforms_run_on_the_reference(cpu):
    x, cos, sin = torch.randn(1, 2, 5, 8, dtype=torch.float64), torch.randn(5, 4).double(), torch.randn(5, 4).double()

    def loss(x, cos):
        return pyext.rotary(x, cos, sin).pow(3).sum()

    leaves = x.clone().requires_grad_(), cos.clone().requires_grad_()
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, (0, 1))(x, cos), wanted)
    with pytest.raises(NotImplementedError, match=r"do not support torch\.func"):
        torch.func.grad(lambda x: pyext.rotary(x, cos, sin, impl="cpu").sum())(x)


def test_checkpointing(backend):
    from torch.utils.checkpoint import checkpoint

    def function(q, k, v, cos, sin):
        return pyext.rotary(q, cos, sin, inverse=True, impl=backend.impl)

    leaves = inputs(11)
    wanted = torch.autograd.grad(function(*leaves).square().sum(), (leaves[0], *leaves[3:]))
    out = checkpoint(function, *leaves, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(out.square().sum(), (leaves[0], *leaves[3:])), wanted):
        assert torch.equal(a, b)
