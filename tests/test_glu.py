"""pyext.geglu, swiglu, reglu against PyTorch in fp64: forward, gradients, forms, layouts, special values."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pyext
from support import backends, layouts
from support.cases import DTYPES, dtype_name
from support.examples import examples
from support.gated import ACTIVATIONS, FORMS, Unit, check, draw, run

OP = "geglu"
WIDTHS = [1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100]
CASES = [
    *(Unit(a, form) for a, form in itertools.product(ACTIVATIONS, FORMS)),
    *(Unit("swiglu", form, (2, 5, 24, width)) for form in FORMS for width in WIDTHS),
    *(Unit("geglu", form, layout=kind, grad_layout=kind) for form in FORMS[:4] for kind in layouts.KINDS),
    *(Unit(a, scale=10.0) for a in ACTIVATIONS),  # where Phi and the logistic function saturate
    Unit("geglu", shape=(1, 1, 1, 70000)),  # a row of several tasks
    Unit("reglu", "interleaved", (1, 1, 2, 40000)),
    Unit("swiglu", shape=(30, 40, 50, 3)),
]
EMPTY = [Unit("geglu", form, shape) for form in FORMS for shape in ((0, 2, 3, 4), (1, 2, 0, 4), (2, 3, 4, 0))]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("which", CASES, ids=str)
def test_against_pytorch(which, dtype, backend, session_seed):
    check(which, dtype, backend, session_seed)


@pytest.mark.parametrize("which", EMPTY, ids=str)
def test_empty(which, backend, session_seed):
    drawn = draw(which, torch.float32, session_seed, backend.device)
    got = run(which, drawn, backend.impl)
    assert got["out"].shape == which.shape and got["grad gate"].shape == drawn.leaves[0].shape


@examples(100)
@given(
    which=st.builds(
        Unit,
        st.sampled_from(list(ACTIVATIONS)),
        st.sampled_from(FORMS),
        st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 9), st.integers(0, 70)),
        st.sampled_from(layouts.KINDS),
        st.sampled_from(layouts.KINDS),
        st.sampled_from([0.1, 1.0, 5.0]),
    ),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31 - 1),
    threads=st.sampled_from([1, 2]),
)
def test_any_call(which, dtype, seed, threads):
    for backend in backends.of(OP):
        with backend.selected():
            check(which, dtype, backend, seed, threads)


@pytest.mark.parametrize("dims", [1, 2, 3, 5, 6])
def test_any_number_of_dimensions(dims, backend):
    """Leading dimensions that merge into three, and such that do not."""
    shape = (2, 3, 2, 3, 2, 10)[-dims:]
    for order in (range(dims - 1), reversed(range(dims - 1))):
        order = [*order]
        spread = torch.randn(*(shape[d] for d in order), 2 * shape[-1])[..., : shape[-1]]
        gate = spread.permute(*(order.index(d) for d in range(dims - 1)), dims - 1)
        gate = gate[::1].requires_grad_() if dims == 1 else gate.requires_grad_()
        up = torch.randn(shape)
        out = pyext.swiglu(gate, up, impl=backend.impl)
        torch.testing.assert_close(out, torch.nn.functional.silu(gate) * up)
        weight = torch.randn(shape)
        wanted = torch.autograd.grad(torch.nn.functional.silu(gate) * up, gate, weight)
        torch.testing.assert_close(torch.autograd.grad(out, gate, weight), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_special_values(activation, dtype, kernel):
    """Infinities, NaN, zeros, saturation: what PyTorch's function and its derivative give."""
    values = [0.0, -0.0, 1e-5, -1e-5, 20.0, -20.0, 100.0, -100.0, 6e4, -6e4, torch.inf, -torch.inf, torch.nan]
    dtype = kernel.widest if kernel.refuses(dtype) else dtype
    gate = torch.tensor(values * 5, dtype=dtype, requires_grad=True)
    which, ones = Unit(activation), torch.ones_like(gate)
    exact = gate.detach().double().requires_grad_()  # in fp32 PyTorch's GELU of infinity is NaN
    results = which.call(kernel.impl, gate, ones), which.formula(exact, ones.double()).to(dtype)
    slopes = [torch.autograd.grad(x, leaf, ones)[0] for x, leaf in zip(results, (gate, exact))]
    # some tails are flushed to zero here
    torch.testing.assert_close(*results, equal_nan=True, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(slopes[0], slopes[1].to(dtype), equal_nan=True, rtol=1e-2, atol=1e-6)


def test_derivative_of_relu_at_zero(backend):
    gate = torch.zeros(40, requires_grad=True)
    pyext.reglu(gate, torch.full((40,), torch.inf), impl=backend.impl).nan_to_num().sum().backward()
    assert not gate.grad.nan_to_num().any()


@pytest.mark.parametrize("which", [Unit("geglu", form, (3, 4, 70, 129)) for form in FORMS], ids=str)
def test_deterministic_at_any_thread_count(which, cpu, seed):
    drawn = draw(which, torch.float32, seed)
    alone, many = run(which, drawn, cpu.impl, 1), run(which, drawn, cpu.impl, 5)
    assert all(torch.equal(alone[name], many[name]) for name in alone)


def test_saves_the_inputs_only(kernel):
    saved = []
    gate, up = (torch.randn(64, 32, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pyext.swiglu(gate, up, impl=kernel.impl)
    assert {t.data_ptr() for t in saved} == {gate.data_ptr(), up.data_ptr()}


def test_inputs_are_not_written(backend, seed):
    drawn = draw(Unit("geglu", "halves"), torch.float32, seed, backend.device)
    before = drawn.leaves[0].detach().clone()
    run(Unit("geglu", "halves"), drawn, backend.impl)
    assert torch.equal(drawn.leaves[0], before)


X = torch.randn(2, 6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pyext.geglu([1.0]), TypeError, "gate must be a torch.Tensor, got list"),
        (lambda: pyext.geglu(X.long()), TypeError, "gate must be float32"),
        (lambda: pyext.geglu(torch.tensor(1.0)), ValueError, r"gate must have shape \(\.\.\., N\), or packed"),
        (lambda: pyext.swiglu(X[:, :5]), ValueError, r"gate must have shape \(\.\.\., 2N\) without up, got \(2, 5\)"),
        (lambda: pyext.swiglu(X, X[:, :5]), ValueError, r"up must have shape \(2, 6\) to match gate, got \(2, 5\)"),
        (lambda: pyext.reglu(X, X.double()), TypeError, "up must have dtype torch.float32 to match gate"),
        (lambda: pyext.reglu(X, X.to("meta")), ValueError, "up must be on cpu like gate, got meta"),
        (lambda: pyext.geglu(X, approximate="erf"), ValueError, "approximate must be 'none' or 'tanh', got 'erf'"),
        (lambda: pyext.geglu(X, X, interleaved=True), ValueError, "interleaved must be False with up"),
        (lambda: pyext.geglu(X, X, gate_first=False), ValueError, "gate_first must be True with up"),
        (lambda: pyext.geglu(X, interleaved="no"), TypeError, "interleaved must be a bool, got str"),
        (lambda: pyext.geglu(X, impl="tpu"), ValueError, "impl must be one of"),
        (lambda: pyext.geglu(X, impl="cuda"), NotImplementedError, "no CUDA kernel|tensors are on cpu"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
