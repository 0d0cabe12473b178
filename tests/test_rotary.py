"""pyext.rotary against complex numbers in fp64: forward and all gradients, shapes, strides, positions, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import pyext
from support import backends, layouts, rotary
from support.cases import DTYPES, dtype_name
from support.examples import examples
from support.rotary import POSITIONS, TABLES, Case, check, draw, run

OP = "rotary"


SIZES = [  # D, R around the widths of all vectors
    (2, 2), (7, 6), (8, 8), (16, 16), (24, 16), (32, 32), (33, 2), (40, 24), (48, 46), (64, 16), (64, 64), (72, 70),
    (80, 32), (96, 24), (128, 128), (130, 128), (256, 64),
]  # fmt: skip
CASES = [
    *(Case(d=d, r=r, interleaved=i) for d, r in SIZES for i in (False, True)),
    *(Case(tables=t, positions=p, inverse=p == "row", r=20) for t, p in itertools.product(TABLES, POSITIONS)),
    *(
        Case(tables=t, positions=p, interleaved=True, inverse=p is None)
        for t, p in itertools.product(TABLES, POSITIONS)
    ),
    *(Case(layout=kind, grad_layout=kind, h=4, b=3) for kind in layouts.KINDS),
    *(Case(layout=kind, interleaved=True, r=10) for kind in layouts.KINDS),
    *(Case(table_layout=kind, tables="batch") for kind in ("padded_rows", "unaligned", "every_second", "columns")),
    Case(table_layout="every_second", interleaved=True, positions="batch"),
    Case(table_dtype=None),
    Case(table_dtype=None, tables="batch", interleaved=True, d=40, r=34),
    Case(table_dtype=torch.float16, r=14),
    Case(table_dtype=torch.float64, r=14, interleaved=True),
    Case(b=1, h=1, n=1, d=64, r=64),
    Case(b=1, h=5, n=1, d=64, r=32, layout="blhd"),
    Case(b=3, h=1, n=200, d=16, r=8, positions="row"),
]
EMPTY = [
    *(Case(**{size: 0}, tables=t, positions=p) for size in "bhn" for t in TABLES for p in POSITIONS),
    *(Case(r=0, interleaved=i, layout=kind) for i in (False, True) for kind in ("contiguous", "blhd")),
    Case(d=0, r=0),
    Case(b=0, h=0, n=0),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("which", CASES, ids=str)
def test_against_complex_numbers(which, dtype, backend, session_seed):
    check(which, dtype, backend, session_seed)


@pytest.mark.parametrize("which", EMPTY, ids=str)
def test_empty(which, backend, session_seed):
    """No batch, no heads, no tokens, nothing rotated: the right shapes, zeros where a sum is empty."""
    drawn = draw(which, torch.float32, session_seed, backend.device)
    got = run(drawn, backend.impl)
    for name, like in (("out", drawn.x), ("grad x", drawn.x), ("grad cos", drawn.cos), ("grad sin", drawn.sin)):
        assert got[name].shape == like.shape
    assert torch.equal(got["out"], drawn.x) and torch.equal(got["grad x"], drawn.grad)
    assert not got["grad cos"].any() and not got["grad sin"].any()


length = st.one_of(st.integers(0, 9), st.sampled_from([31, 32, 33, 63, 64, 65, 129]))


@st.composite
def cases(draw):
    d = draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 72, 80, 96, 128])))
    return Case(
        *(draw(st.integers(0, 3)), draw(st.integers(0, 5)), draw(length), d, 2 * draw(st.integers(0, d // 2))),
        interleaved=draw(st.booleans()),
        inverse=draw(st.booleans()),
        tables=draw(st.sampled_from(TABLES)),
        positions=draw(st.sampled_from(POSITIONS)),
        layout=draw(st.sampled_from(layouts.KINDS)),
        grad_layout=draw(st.sampled_from(layouts.KINDS)),
        table_layout=draw(st.sampled_from(["contiguous", "padded_rows", "every_second", "columns"])),
        table_dtype=draw(st.sampled_from([None, torch.float32, torch.float16, torch.bfloat16])),
    )


@examples(150)
@given(which=cases(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31 - 1), threads=st.sampled_from([1, 2]))
def test_any_call(which, dtype, seed, threads):
    for backend in backends.of(OP):
        with backend.selected():
            check(which, dtype, backend, seed, threads)


# --- Properties ---


@pytest.mark.parametrize("interleaved", [False, True])
def test_inverse_undoes(interleaved, backend):
    dtype = backend.widest
    angle = torch.randn(37, 12, dtype=dtype)
    x = torch.randn(2, 3, 37, 30, dtype=dtype)
    options = dict(interleaved=interleaved, impl=backend.impl)
    there = pyext.rotary(x, angle.cos(), angle.sin(), **options)
    assert (there - x).abs().max() > 0.1
    back = pyext.rotary(there, angle.cos(), angle.sin(), inverse=True, **options)
    limit = 500 * torch.finfo(dtype).eps
    torch.testing.assert_close(back, x, rtol=limit, atol=limit)


def test_scores_depend_on_the_distance_only(backend):
    """The point of it all: q_i . k_j is the same wherever the pair stands."""
    cos, sin = pyext.nn.RotaryEmbedding(64, 4096)(4096)
    q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)
    scores = []
    for shift in (0, 100, 3000):
        turned = [
            pyext.rotary(x.to(backend.widest), cos, sin, positions=torch.tensor([at + shift]), impl=backend.impl)
            for x, at in ((q, 17), (k, 5))
        ]
        scores.append((turned[0] * turned[1]).sum())
    torch.testing.assert_close(scores[1:], [scores[0]] * 2, rtol=1e-3, atol=1e-3)  # fp32 angles near 3000
    assert (scores[0] - (q * k).sum()).abs() > 1e-2


@pytest.mark.parametrize("kind", ["contiguous", "blhd", "lbhd", "packed_qkv", "padded_rows", "columns"])
def test_layout_is_kept(kind, kernel):
    """Dense results in the order of x's dimensions in memory: what reads (B, L, H, D) next needs no copy."""
    drawn = draw(Case(b=2, h=3, n=5, layout=kind), torch.float32, 1, kernel.device)
    out = pyext.rotary(drawn.x, drawn.cos, drawn.sin, impl=kernel.impl)
    order = {"blhd": (0, 2, 1, 3), "lbhd": (2, 0, 1, 3), "packed_qkv": (0, 2, 1, 3)}.get(kind, (0, 1, 2, 3))
    assert out.permute(order).is_contiguous()


def test_models_agree():
    """Transformers' LLaMA, GPT-NeoX (first quarter) and GPT-J (interleaved, first part) on random weights."""
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    neox = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = torch.randn(2, 4, 37, 64), torch.randn(2, 2, 37, 64)
    for module, rotated in ((llama, 64), (neox, 16)):
        cos, sin = pyext.nn.RotaryEmbedding(rotated)(37)
        doubled = (torch.cat([table, table], -1)[None] for table in (cos, sin))
        theirs = module.apply_rotary_pos_emb(q, k, *doubled)
        for x, wanted in zip((q, k), theirs):
            torch.testing.assert_close(pyext.rotary(x, cos, sin), wanted, rtol=1e-6, atol=1e-6)
    sincos = gptj.create_sinusoidal_positions(37, 32)
    sin, cos = sincos.chunk(2, -1)
    part = gptj.apply_rotary_pos_emb(q.transpose(1, 2)[..., :32], sin[None], cos[None]).transpose(1, 2)
    wanted = torch.cat([part, q[..., 32:]], -1)
    torch.testing.assert_close(pyext.rotary(q, cos, sin, interleaved=True), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "which",
    [Case(h=5, n=200, positions="batch"), Case(h=5, n=300, interleaved=True), Case(b=70, h=2, n=3, positions="row")],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_thread_count_changes_no_bit(which, dtype, cpu, seed):
    drawn = draw(which, dtype, seed)
    once = run(drawn, cpu.impl, threads=1)
    for threads in (2, 3, 8):
        for name, value in run(drawn, cpu.impl, threads).items():
            assert torch.equal(value, once[name]), (name, threads)


def test_many_tokens_at_one_position(kernel):
    """A gradient summed over 50,000 tokens keeps fp32 accuracy."""
    x, grad = (torch.rand(5, 2, 5000, 4) for _ in range(2))
    cos, sin = (torch.ones(3, 2, requires_grad=True) for _ in range(2))
    out = pyext.rotary(x, cos, sin, positions=torch.ones(5000, dtype=torch.int32), impl=kernel.impl)
    got = torch.autograd.grad(out, (cos, sin), grad)
    g, y = grad.double().view(-1, 2, 2), x.double().view(-1, 2, 2)
    wanted = (g * y).sum((0, 1)), (g[:, 1] * y[:, 0] - g[:, 0] * y[:, 1]).sum(0)
    for gradient, row in zip(got, wanted):
        torch.testing.assert_close(gradient[1].double(), row, rtol=3e-7, atol=1e-3)
        assert not gradient[[0, 2]].any()


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "row"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_name)
def test_offsets_beyond_two_billion(dtype, dim, kernel):
    drawn = draw(Case(b=2, h=2), dtype, 1, kernel.device)
    wanted = run(drawn, kernel.impl)
    drawn.x = layouts.far_apart(drawn.x.detach(), dim).requires_grad_()
    drawn.grad = layouts.far_apart(drawn.grad, dim)
    for name, value in run(drawn, kernel.impl).items():
        assert torch.equal(value, wanted[name]), name


def test_nan_stays_in_its_row(kernel):
    """Vectors that reach past a row's rotated features bring nothing into another row, or out of the copied ones."""
    for d, r in SIZES:
        for interleaved in (False, True):
            drawn = draw(Case(b=1, h=2, n=4, d=d, r=r, interleaved=interleaved), torch.float32, 1, kernel.device)
            clean = run(drawn, kernel.impl)["out"]
            with torch.no_grad():
                drawn.x[0, 1, 2] = float("nan")
            dirty = run(drawn, kernel.impl)["out"]
            others = torch.ones(1, 2, 4, dtype=torch.bool)
            others[0, 1, 2] = False
            assert dirty[0, 1, 2].isnan().all() and torch.equal(dirty[others], clean[others])


def test_inputs_are_not_written_and_not_aliased(backend):
    for which in (Case(positions="batch", r=20), Case(r=0)):
        drawn = draw(which, torch.float32, 1, backend.device)
        before = [x.detach().clone() for x in drawn.leaves]
        out = pyext.rotary(*drawn.leaves, positions=drawn.positions, impl=backend.impl)
        out.sum().backward()
        assert all(torch.equal(a, b) for a, b in zip(before, drawn.leaves))
        storages = {x.untyped_storage().data_ptr() for x in drawn.leaves}
        assert out.untyped_storage().data_ptr() not in storages


# --- Derivatives ---


TINY = [
    Case(2, 2, 3, 5, 4),
    Case(2, 2, 3, 6, 4, interleaved=True, inverse=True, tables="batch"),
    Case(2, 1, 3, 4, 4, positions="batch", inverse=True),
    Case(2, 2, 3, 4, 2, tables="batch", positions="row"),
    Case(2, 2, 3, 4, 4, tables="one", interleaved=True),
]


@pytest.mark.parametrize("check_derivative", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("which", TINY, ids=str)
def test_derivatives(which, check_derivative, fp64_backend, seed):
    """First and second ones: the kernels' are right, too."""
    drawn = draw(which, torch.float64, seed)
    options = dict(interleaved=which.interleaved, positions=drawn.positions, inverse=which.inverse)
    options["impl"] = fp64_backend.impl
    assert check_derivative(lambda *leaves: pyext.rotary(*leaves, **options), drawn.leaves)


def test_third_derivative(kernel):
    """Kernels against the reference, three times differentiated in all three inputs."""
    results = []
    for impl in ("reference", kernel.impl):
        drawn = draw(Case(2, 2, 5, 10, 8, tables="shared", positions="row"), kernel.widest, 3, kernel.device)
        value = pyext.rotary(*drawn.leaves, positions=drawn.positions, impl=impl).pow(4).sum()
        for _ in range(3):
            gradients = torch.autograd.grad(value, drawn.leaves, create_graph=True)
            value = sum((g * torch.linspace(-1, 1, g.numel(), dtype=g.dtype).view(g.shape)).sum() for g in gradients)
        results.append(torch.stack([value, *(g.sum() for g in gradients)]))
    limit = 1e5 * torch.finfo(kernel.widest).eps
    torch.testing.assert_close(results[1], results[0], rtol=limit, atol=limit * float(results[0].detach().abs().max()))


def test_gradients_only_where_asked(backend, seed):
    drawn = draw(Case(positions="row"), torch.float32, seed, backend.device)
    everything = run(drawn, backend.impl)
    for wanted in itertools.product((False, True), repeat=3):
        leaves = [x.detach().requires_grad_(flag) for x, flag in zip(drawn.leaves, wanted)]
        out = pyext.rotary(*leaves, positions=drawn.positions, impl=backend.impl)
        assert out.requires_grad == any(wanted)
        assert torch.equal(out, everything["out"])
        if any(wanted):
            out.backward(drawn.grad)
        for x, flag, name in zip(leaves, wanted, ("grad x", "grad cos", "grad sin")):
            assert (x.grad is not None) == flag and (not flag or torch.equal(x.grad, everything[name]))


def test_x_is_not_kept_without_need(kernel):
    """Where the tables are constants, the graph holds them and not x."""
    import gc
    import weakref

    drawn = draw(Case(), torch.float32, 1, kernel.device)
    hidden = drawn.x * 1.0
    watch = weakref.ref(hidden)
    out = pyext.rotary(hidden, drawn.cos.detach(), drawn.sin.detach(), impl=kernel.impl)
    del hidden
    gc.collect()
    assert watch() is None
    out.sum().backward()
    assert drawn.x.grad is not None


# --- Bad input ---


def T(*size, **options):
    return torch.randn(size, **options)


REFUSED = {
    "x, list": ({"x": [1.0]}, TypeError, r"x must be a torch\.Tensor, got list"),
    "x, integer": ({"x": torch.ones(2, 3, 5, 8).int()}, TypeError, r"x must be float32, bfloat16.*int32"),
    "x, 3-D": ({"x": T(3, 5, 8)}, ValueError, r"x must have shape \(B, H, L, D\), got \(3, 5, 8\)"),
    "cos, list": ({"cos": [1.0]}, TypeError, r"cos must be a torch\.Tensor"),
    "cos, integer": ({"cos": torch.ones(5, 4).long()}, TypeError, r"cos must be float32"),
    "cos, 1-D": ({"cos": T(4)}, ValueError, r"cos must have shape \(L_max, R/2\) or \(B, L, R/2\), got \(4,\)"),
    "cos, 4-D": ({"cos": T(1, 1, 5, 4)}, ValueError, r"cos must have shape \(L_max, R/2\) or"),
    "cos, device": ({"cos": T(9, 4, device="meta")}, ValueError, r"sin must be on meta like cos, got cpu"),
    "cos and sin, device": (
        {"cos": T(5, 4, device="meta"), "sin": T(5, 4, device="meta")},
        ValueError,
        r"cos must be on cpu like x, got meta",
    ),
    "cos, wide": (
        {"cos": T(5, 8), "sin": T(5, 8)},
        ValueError,
        r"cos must have shape .* with R/2 <= 4 to match the 8 features of x, got \(5, 8\)",
    ),
    "cos, short": (
        {"cos": T(4, 4), "sin": T(4, 4)},
        ValueError,
        r"cos must have shape \(L_max, R/2\) with L_max >= 5, or \(2, 5, R/2\), to match x without positions, got",
    ),
    "cos, long": ({"cos": T(2, 6, 4), "sin": T(2, 6, 4)}, ValueError, r"cos must have .* got \(2, 6, 4\)"),
    "cos, batch": (
        {"cos": T(3, 5, 4), "sin": T(3, 5, 4)},
        ValueError,
        r"cos must have shape \(2, L, R/2\) \(or 1 in batch\) to match x, got \(3, 5, 4\)",
    ),
    "sin, None": ({"sin": None}, TypeError, r"sin must be a torch\.Tensor, got NoneType"),
    "sin, shape": ({"sin": T(5, 3)}, ValueError, r"sin must have shape \(9, 4\) to match cos, got \(5, 3\)"),
    "sin, dtype": ({"sin": T(9, 4).half()}, TypeError, r"sin must have dtype torch\.float32 to match cos, got .*16"),
    "interleaved": ({"interleaved": "yes"}, TypeError, r"interleaved must be a bool, got str"),
    "inverse": ({"inverse": None}, TypeError, r"inverse must be a bool, got NoneType"),
    "positions, list": ({"positions": [0]}, TypeError, r"positions must be a torch\.Tensor, got list"),
    "positions, float": ({"positions": T(5)}, TypeError, r"positions must be an integer tensor"),
    "positions, length": (
        {"positions": torch.arange(4)},
        ValueError,
        r"positions must have shape \(5,\) or \(2, 5\) to match x, got \(4,\)",
    ),
    "positions, batch": ({"positions": torch.ones(3, 5).long()}, ValueError, r"positions must have shape"),
    "positions, 3-D": ({"positions": torch.ones(1, 2, 5).long()}, ValueError, r"positions must have shape"),
    "positions, device": ({"positions": torch.ones(5, device="meta").long()}, ValueError, r"positions must be on cpu"),
    "positions, high": (
        {"positions": torch.arange(5) + 5},
        ValueError,
        r"positions must lie in \[0, 9\), the rows of cos and sin, got 9",
    ),
    "positions, low": ({"positions": torch.arange(5) - 1}, ValueError, r"positions must lie in .* got -1"),
    "impl": ({"impl": "fast"}, ValueError, r"impl must be one of 'auto'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input(name, monkeypatch):
    changes, error, message = REFUSED[name]

    def reached(*args):
        raise AssertionError("a backend was called")

    monkeypatch.setattr("pyext._dispatch.BACKENDS", tuple((n, reached) for n in pyext._dispatch.NAMES))
    with pytest.raises(error, match=message):
        pyext.rotary(**{"x": T(2, 3, 5, 8), "cos": T(9, 4), "sin": T(9, 4), **changes})


def test_all_arguments_are_tested():
    import inspect

    seen = {name for changes, _, _ in REFUSED.values() for name in changes}
    assert seen == set(inspect.signature(pyext.rotary).parameters)


@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_forced_backend_never_falls_back(impl):
    drawn = rotary.draw(Case(), torch.float64, 1)
    with pytest.raises(NotImplementedError, match=f"pyext.rotary: impl='{impl}' refuses this call\n"):
        pyext.rotary(*drawn.leaves, impl=impl)


def test_explain(cpu):
    drawn = draw(Case(), torch.float32, 1)
    table = pyext.explain("rotary", *drawn.leaves, inverse=True)
    assert table.auto == "cpu" and table["reference"] == "accepts" and table["cuda"] != "accepts"
    assert dict(table) == dict(pyext.explain(pyext.rotary, *drawn.leaves))
