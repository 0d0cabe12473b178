"""pyext.gated_linear and gated_mlp against PyTorch's linear layers in fp64: forward, all gradients, sizes, layouts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pyext
from support import backends
from support.cases import DTYPES, dtype_name
from support.examples import examples
from support.gated import ACTIVATIONS, Layer, check, draw, run, with_gradients

OP = "gated_mlp"
SIZES = [  # around the widths of vectors, tiles and panels; up to 8 rows take a kernel of their own
    (1, 16, 16, 16), (2, 33, 17, 5), (3, 1, 40, 1), (4, 100, 70, 33), (5, 7, 50, 40), (8, 64, 64, 64), (9, 33, 31, 7),
    (13, 40, 1, 30), (20, 40, 48, 33), (66, 65, 129, 50), (100, 150, 70, 140), (17, 300, 16, 8), (17, 8, 300, 16),
]  # fmt: skip
LAYOUTS = ("padded_rows", "unaligned", "every_second", "columns", "expanded_rows")
CASES = [
    *(Layer(*size) for size in SIZES),
    *(Layer(*size[:3], activation="geglu") for size in SIZES),
    *(Layer(m, 20, 40, j, a) for a in ACTIVATIONS for m in (3, 30) for j in (None, 12)),
    *(Layer(m, 20, 37, j, packed=True, bias=bias) for m in (3, 30) for j in (None, 12) for bias in (False, True)),
    *(Layer(m, 20, 37, 12, bias=False) for m in (3, 30)),
    *(Layer(m, 21, 19, 12, layout=kind) for m in (1, 6, 19) for kind in LAYOUTS),
    *(Layer(19, 21, 18, 12, packed=True, layout=kind) for kind in LAYOUTS[:2]),
    Layer(2100, 20, 33, 19),  # several rounds of the backward
    Layer(1030, 17, 20, activation="geglu_tanh", packed=True),
]
EMPTY = [
    Layer(m, k, n, j, packed=packed)
    for m, k, n, j in [
        (0, 8, 8, 8), (5, 0, 8, 8), (5, 8, 0, 8), (5, 8, 8, 0), (20, 0, 8, 8), (20, 8, 0, 8), (20, 8, 8, 0),
        (0, 8, 8, None), (20, 0, 8, None), (20, 8, 0, None), (0, 0, 0, 0),
    ]
    for packed in (False, True)
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("which", CASES, ids=str)
def test_against_pytorch(which, dtype, backend, session_seed):
    check(which, dtype, backend, session_seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("which", EMPTY, ids=str)
def test_empty(which, dtype, backend, session_seed):
    """No rows, no features, no hidden features: biases alone, zeros where a sum is empty."""
    check(which, dtype, backend, session_seed)


@examples(60)
@given(
    which=st.builds(
        Layer,
        st.one_of(st.integers(0, 20), st.integers(40, 150)),
        st.integers(0, 70),
        st.integers(0, 70),
        st.one_of(st.none(), st.integers(0, 70)),
        st.sampled_from(list(ACTIVATIONS)),
        st.booleans(),
        st.booleans(),
        st.sampled_from(["contiguous", "padded_rows", "every_second", "columns"]),
    ),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31 - 1),
    threads=st.sampled_from([1, 2]),
)
def test_any_call(which, dtype, seed, threads):
    for backend in backends.of(OP):
        with backend.selected():
            check(which, dtype, backend, seed, threads)


@pytest.mark.parametrize("j", [None, 12])
@pytest.mark.parametrize("which_gradient", range(7))
def test_each_gradient_alone(which_gradient, j, kernel, seed):
    """What is not wanted is not computed; what is, is the same as among others."""
    case = Layer(19, 20, 37, j)
    drawn = draw(case, torch.float32, seed, kernel.device)
    if which_gradient >= len(drawn.leaves):
        pytest.skip("gated_linear has fewer tensors")
    everything = run(case, drawn, kernel.impl)
    leaves = [x.detach().requires_grad_(i == which_gradient) for i, x in enumerate(drawn.leaves)]
    name = drawn.names[which_gradient]
    grads = with_gradients(
        lambda leaf: case.call(kernel.impl, *(leaf if x.requires_grad else x for x in leaves)),
        [leaves[which_gradient]],
        [name],
        drawn.grad,
    )
    assert torch.equal(grads[f"grad {name}"], everything[f"grad {name}"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("which", [Layer(7, 40, 70, 30), Layer(200, 40, 70, 30), Layer(1100, 33, 40)], ids=str)
def test_deterministic_at_any_thread_count(which, dtype, cpu, seed):
    drawn = draw(which, dtype, seed)
    alone = run(which, drawn, cpu.impl, 1)
    for threads in (2, 5):
        many = run(which, drawn, cpu.impl, threads)
        assert all(torch.equal(alone[name], many[name]) for name in alone)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 3, 6), (2, 0, 6), (2, 1, 3, 6)])
@pytest.mark.parametrize("mlp", [False, True])
def test_leading_dimensions(shape, mlp, backend):
    case = Layer(1, 6, 5, 4 if mlp else None)
    x, *weights = draw(case, backend.widest, 1, backend.device).leaves
    x = torch.randn(shape, dtype=backend.widest)
    out = case.call(backend.impl, x, *weights)
    assert out.shape == (*shape[:-1], 4 if mlp else 5)
    torch.testing.assert_close(out, case.formula(x, *weights))


@pytest.mark.parametrize("mlp", [False, True])
def test_saved_bytes(mlp, kernel):
    """x and the pre-activations, besides the weights, which are there anyway."""
    case = Layer(64, 32, 48, 16 if mlp else None)
    drawn, saved = draw(case, torch.float32, 1, kernel.device), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        case.call(kernel.impl, *drawn.leaves)
    weights = {leaf.data_ptr() for leaf in drawn.leaves[1:]}
    bytes_saved = sum(t.nbytes for t in saved.values() if t.data_ptr() not in weights)
    assert bytes_saved <= drawn.leaves[0].nbytes + case.m * 2 * case.n * 4


def test_rows_do_not_depend_on_each_other(kernel):
    """A row with NaN or infinities touches no other row of out."""
    case = replace(Layer(20, 33, 40, 17), bias=False)
    drawn = draw(case, torch.float32, 3, kernel.device)
    x, *weights = (leaf.detach() for leaf in drawn.leaves)
    clean = case.call(kernel.impl, x, *weights)
    x = x.clone()
    x[7], x[11] = torch.nan, torch.inf
    out = case.call(kernel.impl, x, *weights)
    others = [i for i in range(20) if i not in (7, 11)]
    assert torch.equal(out[others], clean[others]) and out[7].isnan().all()


X, W, D = torch.randn(2, 6), torch.randn(4, 6), torch.randn(3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pyext.gated_linear([1.0], W, W), TypeError, "x must be a torch.Tensor, got list"),
        (lambda: pyext.gated_linear(X.int(), W, W), TypeError, "x must be float32"),
        (lambda: pyext.gated_linear(torch.tensor(1.0), W, W), ValueError, r"x must have shape \(\.\.\., K\)"),
        (lambda: pyext.gated_linear(X, W[:, :5], W), ValueError, r"w_gate must have shape \(N, 6\), or \(2N, 6\)"),
        (lambda: pyext.gated_linear(X, W[:3], None), ValueError, r"w_gate must have shape \(2N, 6\) without w_up"),
        (lambda: pyext.gated_linear(X, W, W[:3]), ValueError, r"w_up must have shape \(4, 6\) to match w_gate"),
        (lambda: pyext.gated_linear(X, W, W.double()), TypeError, "w_up must have dtype torch.float32 to match x"),
        (lambda: pyext.gated_linear(X, W, W.to("meta")), ValueError, "w_up must be on cpu like x, got meta"),
        (lambda: pyext.gated_linear(X, W, W, W[0]), ValueError, r"b_gate must have shape \(4,\) to match w_gate"),
        (lambda: pyext.gated_linear(X, W, None, None, W[0, :2]), ValueError, "b_up must be None without w_up"),
        (lambda: pyext.gated_linear(X, W, W, activation="gelu"), ValueError, "activation must be one of 'geglu'"),
        (lambda: pyext.gated_linear(X, W, W, impl="tpu"), ValueError, "impl must be one of"),
        (lambda: pyext.gated_mlp(X, W, W, None), TypeError, "w_down must be a torch.Tensor, got NoneType"),
        (lambda: pyext.gated_mlp(X, W, W, W), ValueError, r"w_down must have shape \(J, 4\) to match w_gate"),
        (lambda: pyext.gated_mlp(X, W, W, D, b_down=D[0]), ValueError, r"b_down must have shape \(3,\) to match w_d"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
