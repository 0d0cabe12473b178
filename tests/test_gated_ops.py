"""The ops of gated units and layers as PyTorch sees them: opcheck, fakes, torch.compile, autocast, checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

import pyext
from pyext._primitives import ACTIVATIONS
from support.gated import FORMS, Layer, Unit, draw

OP = "gated_mlp"
UNITS = [
    *(Unit("geglu", form, (2, 1, 3, 9)) for form in FORMS),
    Unit("swiglu", shape=(0, 2, 3, 4)),
    Unit("reglu", layout="every_second"),
    Unit("geglu_tanh", layout="expanded_heads"),
]
LAYERS = [
    Layer(),
    Layer(j=7, activation="geglu"),
    Layer(3, packed=True, bias=False),
    Layer(j=5, packed=True, layout="columns"),
    Layer(0, j=4),
    Layer(12, 0, 8, 4),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def unit_arguments(which: Unit, leaves):
    gate, up = (*leaves, None)[:2]
    first, mixed = not which.form.endswith("up_first"), "interleaved" in which.form
    return gate, up, ACTIVATIONS.index(which.activation), first, mixed


def layer_arguments(which: Layer, leaves, *numbers):
    names = ["x", "w_gate", "w_up"] + (["w_down"] if which.j is not None else []) + ["b_gate", "b_up"]
    names += ["b_down"] if which.j is not None else []
    named = dict(zip(which.names, leaves, strict=True))
    return *(named.get(name) for name in names), ACTIVATIONS.index(which.activation), *numbers


def drawn_leaves(which, dtype, requires_grad, device):
    drawn = draw(which, dtype, 1, device)
    return drawn, [x.detach().requires_grad_(requires_grad) for x in drawn.leaves]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", UNITS, ids=str)
def test_opcheck_of_units(which, dtype, requires_grad, family):
    drawn, leaves = drawn_leaves(which, dtype, requires_grad, family.device)
    arguments = unit_arguments(which, leaves)
    if family.refuses(dtype):
        with pytest.raises(RuntimeError, match="gate must be float32, bfloat16 or float16"):
            family.operators.glu_forward.default(*arguments)
        return
    torch.library.opcheck(family.operators.glu_forward.default, arguments)
    arguments = unit_arguments(which, [x.detach() for x in leaves])  # it has no derivative
    torch.library.opcheck(family.operators.glu_backward.default, (drawn.grad, *arguments))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", LAYERS, ids=str)
def test_opcheck_of_layers(which, dtype, requires_grad, family):
    drawn, leaves = drawn_leaves(which, dtype, requires_grad, family.device)
    name = "gated_linear" if which.j is None else "gated_mlp"
    ops = family.operators
    forward, backward = (getattr(ops, f"{name}_{direction}").default for direction in ("forward", "backward"))
    if family.refuses(dtype):
        with pytest.raises(RuntimeError, match="x must be float32, bfloat16 or float16"):
            forward(*layer_arguments(which, leaves, True))
        return
    for save in (False, True):
        torch.library.opcheck(forward, layer_arguments(which, leaves, save))
    leaves = [x.detach() for x in leaves]  # the backward has no derivative
    _, pre = forward(*layer_arguments(which, leaves, True))
    weights = layer_arguments(which, leaves)
    weights = weights[1:3] if which.j is None else weights[1:4]
    for needs in ((True,) * 5, (False, True, False, True, False)):
        needs = needs[:3] if which.j is None else needs
        index = ACTIVATIONS.index(which.activation)
        torch.library.opcheck(backward, (drawn.grad, leaves[0], pre, *weights, index, *needs))


@pytest.mark.parametrize("which", UNITS + LAYERS, ids=str)
def test_fake_strides(which, family):
    leaves = [x.detach() for x in draw(which, torch.float32, 1, family.device).leaves]
    real = which.call(family.impl, *leaves)
    with FakeTensorMode() as mode:
        fake = which.call(family.impl, *map(mode.from_tensor, leaves))
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


M, W, D = torch.randn(2, 6), torch.randn(4, 6), torch.randn(3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op.glu_forward(torch.tensor(1.0), None, 0, True, False), "at least 1 dimension"),
        (lambda op: op.glu_forward(torch.randn(3, 5), None, 0, True, False), "even last dimension"),
        (lambda op: op.glu_forward(M, M, 4, True, False), "index into ACTIVATIONS"),
        (lambda op: op.glu_forward(M, M[:1], 0, True, False), "up must match gate"),
        (lambda op: op.glu_forward(M, M.half(), 0, True, False), "up must match gate"),
        (lambda op: op.glu_backward(M[:, :4], M, None, 0, True, False), "grad must match the output"),
        (lambda op: op.gated_linear_forward(M[0], W, W, None, None, 0, False), "must have 2 dimensions"),
        (lambda op: op.gated_linear_forward(M, W, W, None, None, -1, False), "index into ACTIVATIONS"),
        (lambda op: op.gated_linear_forward(M, W[:3], None, None, None, 0, False), "w_gate must be"),
        (lambda op: op.gated_linear_forward(M, W, W[:3], None, None, 0, False), "w_up must match w_gate"),
        (lambda op: op.gated_linear_forward(M, W, W, W[0], None, 0, False), "a bias must have an element"),
        (lambda op: op.gated_linear_forward(M, W, None, None, W[0], 0, False), "b_up must be None"),
        (lambda op: op.gated_mlp_forward(M, W, W, W, None, None, None, 0, False), "w_down must be"),
        (lambda op: op.gated_linear_backward(M, M, M, W, W, 0, True, True, True), "grad must match the output"),
        (lambda op: op.gated_linear_backward(M[:, :4], M, M, W, W, 0, True, True, True), "pre must be"),
    ],
)
def test_the_ops_protect_memory(call, message, family):
    """What Python checks first, the ops themselves refuse too: they are public to torch."""
    with pytest.raises(RuntimeError, match=message):
        call(family.operators)


# --- torch.compile ---


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def weights(k=10, n=12, j=7):
    shapes = ((n, k), (n, k), (j, n), (n,), (n,), (j,))
    return [torch.randn(s).div_(s[-1] ** 0.5).requires_grad_() for s in shapes]


CALLS = {
    "geglu": lambda x, *w: pyext.geglu(x, approximate="tanh", interleaved=True),
    "swiglu": lambda x, *w: pyext.swiglu(x, x.flip(0)),
    "gated_linear": lambda x, *w: pyext.gated_linear(x, w[0], w[1], w[3], w[4]),
    "gated_mlp": lambda x, *w: pyext.gated_mlp(x, *w),
    "packed": lambda x, *w: pyext.gated_mlp(x, torch.cat([w[0], w[1]]), None, w[2], activation="reglu"),
}


def outputs(function, leaves):
    out = function(*leaves)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out, *torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)]


@pytest.mark.parametrize("name", CALLS)
def test_compiles_whole_with_dynamic_shapes(name, cpu_best):
    compiled = torch.compile(CALLS[name], fullgraph=True, dynamic=True, backend="aot_eager")
    parameters = weights()
    for sizes in ((2, 5, 10), (3, 4, 10), (7, 2, 10), (2, 30, 10)):
        leaves = [torch.randn(sizes, requires_grad=True), *parameters]
        got, wanted = outputs(compiled, leaves), outputs(CALLS[name], leaves)
        assert got[0].stride() == wanted[0].stride()
        for a, b in zip(got, wanted):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiles_whole_for_each_family(family):
    def function(x, *w):
        return pyext.gated_mlp(pyext.geglu(x, x.flip(0), impl=family.impl), *w, impl=family.impl)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    parameters = weights()
    for sizes in ((2, 5, 10), (3, 4, 10)):
        leaves = [torch.randn(sizes, requires_grad=True), *parameters]
        for a, b in zip(outputs(compiled, leaves), outputs(function, leaves)):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


@pytest.mark.parametrize("name", ["geglu", "gated_mlp"])
def test_inductor(name, cpu_best):
    compiled = torch.compile(CALLS[name], fullgraph=True, dynamic=True)
    parameters = weights()
    for sizes in ((2, 5, 10), (3, 4, 10)):
        leaves = [torch.randn(sizes, requires_grad=True), *parameters]
        for a, b in zip(outputs(compiled, leaves), outputs(CALLS[name], leaves)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- Autocast, torch.func, checkpointing, second derivatives ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, backend):
    """Layers are cast as linear layers are; units keep the dtype they get."""
    x, parameters = torch.randn(5, 10, requires_grad=True), weights()
    with torch.autocast(backend.device, dtype=dtype):
        assert pyext.swiglu(x, impl=backend.impl).dtype == torch.float32
        out = pyext.gated_mlp(x, *parameters, impl=backend.impl)
        if backend.widest == torch.float64:
            out64 = pyext.gated_mlp(x.double(), *(w.double() for w in parameters), impl=backend.impl)
            assert out64.dtype == torch.float64
    assert out.dtype == dtype
    out.float().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in (x, *parameters))


@pytest.mark.parametrize("name", CALLS)
def test_checkpointing(name, cpu_best):
    from torch.utils.checkpoint import checkpoint

    leaves = [torch.randn(6, 10, requires_grad=True), *weights()]
    wanted = outputs(CALLS[name], leaves)
    got = outputs(lambda *leaves: checkpoint(CALLS[name], *leaves, use_reentrant=False), leaves)
    for a, b in zip(got, wanted):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


@pytest.mark.parametrize("name", CALLS)
def test_double_backward(name, cpu_best):
    """Not implemented by the kernels: an error that says so; right on the reference."""
    x = torch.randn(6, 10, requires_grad=True)
    (grad,) = torch.autograd.grad(CALLS[name](x, *weights()).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
    x, up = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(3, 4, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: pyext.geglu(x, up, impl="reference"), x)


def test_func_transforms_run_on_the_reference(cpu_best):
    x = torch.randn(5, 10, dtype=torch.float64)
    parameters = [w.detach().double() for w in weights()]

    def loss(x):
        return pyext.gated_mlp(x, *parameters).pow(3).sum()

    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(x), *torch.autograd.grad(loss(leaf), leaf))
    with pytest.raises(NotImplementedError, match=r"do not support torch\.func"):
        torch.func.grad(lambda x: pyext.gated_mlp(x, *parameters, impl="cpu").sum())(x)


def test_explain(cpu_best):
    x = torch.randn(5, 10)
    for function, call in ((pyext.geglu, (x,)), (pyext.gated_mlp, (x, *weights()))):
        assert pyext.explain(function, *call).auto == "cpu"
