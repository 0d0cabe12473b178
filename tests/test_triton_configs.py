"""What only the Triton kernels have: configurations chosen by GPU, dtype and size. Each of them must compute right."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import pyext
from pyext._primitives import ACTIVATIONS, EXPERT_ACTIVATIONS
from support import backends, expert_layers, layouts
from support.tolerance import assert_close_to_reference

pytestmark = pytest.mark.skipif(not backends.TRITON, reason="Triton is not installed")
if backends.TRITON:
    from pyext.kernels import _gemm, _groups, _launch, gated_linear, glu, moe_experts

OP = "gated_mlp"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EAGER = {
    "geglu": F.gelu,
    "geglu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "swiglu": F.silu,
    "reglu": F.relu,
}


def test_triton_is_tested_where_it_can_be():
    """It is a requirement of the tests on Linux: missing is a failure, not a skip."""
    assert backends.TRITON or backends.os.environ.get("PYEXT_TEST_BACKENDS")


def results(function, tensors, grad):
    """out, and the gradients of all tensors that are there."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t is not None], grad.to(out.dtype))]


def compare(function, eager, tensors, grad, what):
    """The tolerance rule for the output and every gradient; the reference in fp64 is the oracle."""

    def by(function, change):
        return results(function, [t if t is None else change(t) for t in tensors], change(grad))

    got = by(lambda *t: function(*t, impl="triton"), torch.clone)
    exact = by(lambda *t: function(*t, impl="reference"), torch.Tensor.double)
    terms = by(lambda *t: function(*t, impl="reference"), lambda t: t.double().abs())
    plain = by(eager, torch.clone)
    for n, (one, wanted, near, size) in enumerate(zip(got, exact, plain, terms)):
        magnitude = size if size.numel() else None
        assert_close_to_reference(one, wanted, near, name=f"tensor {n} of {what}", magnitude=magnitude)


# --- Layers ---

SHAPES = {  # rows, K, N, J
    "few rows": (19, 70, 75, 37),
    "multiples of 16": (133, 144, 160, 80),
    "odd": (67, 75, 70, 37),
    "one row": (1, 40, 50, 60),
}


def layer(shape, dtype, packed, biased):
    """x, w_gate, w_up, w_down, b_gate, b_up, b_down and a gradient of the output."""
    rows, depth, columns, final = shape

    def normal(*size):
        return torch.randn(*size).to(dtype)

    def weight(*size):
        return (torch.randn(*size) / max(size[1], 1) ** 0.5).to(dtype)

    gates = [weight(columns * (2 if packed else 1), depth), weight(columns, depth)]
    biases = [normal(gates[0].shape[0]), normal(columns), normal(final)]
    if not biased:
        biases = [None] * 3
    if packed:
        gates[1] = biases[1] = None
    down = weight(final, columns)
    return [normal(rows, depth), *gates, down, *biases], normal(rows, final)


def eager_layer(activation, packed):
    def function(x, w_gate, w_up, w_down, b_gate, b_up, b_down):
        if packed:
            gate, up = F.linear(x, w_gate, b_gate).chunk(2, -1)
        else:
            gate, up = F.linear(x, w_gate, b_gate), F.linear(x, w_up, b_up)
        return F.linear(EAGER[activation](gate) * up, w_down, b_down)

    return function


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", _launch.ARCHITECTURES if backends.TRITON else [])
def test_every_configuration_of_layers(architecture, dtype, monkeypatch):
    used, options = set(), gated_linear.Config.options
    monkeypatch.setattr(gated_linear.Config, "options", lambda self: used.add(self) or options(self))
    if not backends.HAS_GPU:
        monkeypatch.setattr(_gemm, "architecture", lambda device: architecture)
    with backends.TRITON[0].selected():
        for n, (name, shape) in enumerate(SHAPES.items()):
            for packed, biased in ((False, True), (True, False)):
                activation = ACTIVATIONS[(n + packed + architecture // 10) % 4]

                def function(*tensors, impl, activation=activation):
                    return pyext.gated_mlp(*tensors, activation=activation, impl=impl)

                tensors, grad = layer(shape, dtype, packed, biased)
                what = f"{name}, {activation}, {'packed' if packed else 'separate'}"
                compare(function, eager_layer(activation, packed), tensors, grad, what)
    if not backends.HAS_GPU:
        size = torch.finfo(dtype).bits // 8
        assert used == {c for kind in ("forward", "backward") for c in gated_linear.CONFIGS[kind, size][architecture]}


# --- Experts ---

EXPERTS = {  # tokens, H, I, J, experts, choices
    "few rows": (15, 19, 37, 21, 3, 2),
    "multiples of 16": (75, 32, 48, 16, 2, 1),
    "odd": (40, 19, 37, 21, 2, 2),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", _launch.ARCHITECTURES if backends.TRITON else [])
def test_every_configuration_of_experts(architecture, dtype, monkeypatch, session_seed):
    used, options = set(), _gemm.Config.options
    monkeypatch.setattr(_gemm.Config, "options", lambda self: used.add(self) or options(self))
    if not backends.HAS_GPU:
        monkeypatch.setattr(_gemm, "architecture", lambda device: architecture)
    (backend,) = backends.TRITON
    with backend.selected():
        for n, (t, h, i, j, e, k) in enumerate(EXPERTS.values()):
            activation = EXPERT_ACTIVATIONS[(3 * n + architecture // 10) % 8]
            leaves = expert_layers.layer(t, h, i, e, j, activation, n != 1, seed=session_seed, device=backend.device)
            routing = expert_layers.routed(t, e, k, session_seed, device=backend.device)
            expert_layers.check(leaves, routing, activation, backend, dtype)
    if not backends.HAS_GPU:
        size = torch.finfo(dtype).bits // 8
        assert used == {c for (_, s), table in moe_experts.CONFIGS.items() if s == size for c in table[architecture]}


@pytest.mark.parametrize("counts", [[0, 0, 0], [5, 0, 200], [1] * 80, [129] + [0] * 130, [64, 64, 1]], ids=str)
def test_schedules(counts):
    """Every row once, in blocks of one expert each, within the bound that sizes alone give."""
    rows, height = sum(counts) + 7, 64
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    with backends.TRITON[0].selected():
        schedule, slots = _groups.Schedules(offsets.to(backends.TRITON[0].device), rows, unused=True).of(height)
    (count, *_), *blocks = schedule.tolist()
    assert count <= slots == len(blocks)
    found = [(e, row) for e, first, end in blocks[:count] for row in range(first, min(first + height, end))]
    owners = [e for e, size in enumerate([*counts, 7]) for _ in range(size)]
    assert found == list(zip(owners, range(rows)))
    assert all(end == 0 for _, _, end in blocks[count:])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "shape", [(0, 5, 6, 7), (5, 0, 6, 7), (5, 6, 0, 7), (5, 6, 7, 0), (0, 0, 0, 0), (1, 1, 1, 1)], ids=str
)
def test_empty_and_tiny_layers(shape, packed):
    with backends.TRITON[0].selected():
        tensors, grad = layer(shape, torch.float32, packed, True)
        got, wanted = (
            results(lambda *t, impl=impl: pyext.gated_mlp(*t, impl=impl), tensors, grad)
            for impl in ("triton", "reference")
        )
        for one, other in zip(got, wanted):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["padded_rows", "every_second", "columns", "expanded_rows"])
def test_strides_of_layers(kind):
    """A unit last stride is used as it is, others by a copy; the same bits either way."""
    with backends.TRITON[0].selected():
        tensors, grad = layer((37, 29, 45, 23), torch.float32, False, True)
        placed = [t if t.dim() == 1 else layouts.place(t[None, None], kind)[0, 0] for t in tensors]
        dense = [t.contiguous() for t in placed]

        def function(*tensors):
            return pyext.gated_mlp(*tensors, impl="triton")

        grad = layouts.place(grad[None, None], kind)[0, 0]
        for one, other in zip(results(function, placed, grad), results(function, dense, grad)):
            assert torch.equal(one, other)


# --- Elementwise ---

LAYOUTS = ("separate", "gate first", "up first", "gate first, interleaved", "up first, interleaved", "five dimensions")


def unit(layout, width, dtype):
    """The tensors of a call, its options, and a gradient of the output."""
    if layout == "five dimensions":
        gate, up = (torch.randn(2, 3, 2, 3, width).to(dtype).permute(2, 1, 0, 3, 4) for _ in range(2))
        return [gate, up], {}, torch.randn(gate.shape).to(dtype).transpose(0, 2).contiguous().transpose(0, 2)
    if layout == "separate":
        return [torch.randn(7, width).to(dtype) for _ in range(2)], {}, torch.randn(7, width).to(dtype)
    options = {"gate_first": "gate first" in layout, "interleaved": "interleaved" in layout}
    return [torch.randn(7, 2 * width).to(dtype)], options, torch.randn(7, width).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tile_of_units(layout, dtype):
    with backends.TRITON[0].selected():
        for n, ((least, columns), off) in enumerate(itertools.product(glu.COLUMNS, (0, 3))):
            name = ACTIVATIONS[(n + LAYOUTS.index(layout)) % 4]
            tensors, options, grad = unit(layout, least + off or columns, dtype)
            op = pyext.geglu if name.startswith("geglu") else getattr(pyext, name)
            if name.startswith("geglu"):
                options = {**options, "approximate": "tanh" if name == "geglu_tanh" else "none"}

            def function(*t, impl, op=op, options=options):
                return op(*t, **options, impl=impl)

            def eager(gate, up=None, name=name, options=options):
                if up is None:
                    parts = (gate[..., 0::2], gate[..., 1::2]) if options["interleaved"] else gate.chunk(2, -1)
                    gate, up = parts if options["gate_first"] else parts[::-1]
                return EAGER[name](gate) * up

            compare(function, eager, tensors, grad, f"{name}, {layout}, {tensors[0].shape}")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_large_values_give_no_nan(name):
    """Far from zero an activation is 0 or the identity, and its derivative 0 or 1."""
    with backends.TRITON[0].selected():
        gate = torch.tensor([-3e38, -1e20, -200.0, -90.0, 90.0, 200.0, 1e20, 3e38]).requires_grad_()
        op = pyext.geglu if name.startswith("geglu") else getattr(pyext, name)
        options = {"approximate": "tanh"} if name == "geglu_tanh" else {}
        out = op(gate, torch.ones_like(gate), impl="triton", **options)
        (grad,) = torch.autograd.grad(out.sum(), gate)
        torch.testing.assert_close(out, gate.detach().clamp(min=0), rtol=0, atol=1e-30)
        torch.testing.assert_close(grad, (gate > 0).float(), rtol=0, atol=1e-30)


def test_refusals():
    """What Triton does not take is said, and nothing else computes it instead."""
    x = torch.randn(4, 8, dtype=torch.float64)
    for call in (
        lambda: pyext.geglu(x, impl="triton"),
        lambda: pyext.gated_linear(x, x, None, impl="triton"),
        lambda: pyext.gated_mlp(x, x, None, torch.randn(3, 2, dtype=torch.float64), impl="triton"),
    ):
        with pytest.raises(NotImplementedError, match="triton: dtype torch.float64 is not supported"):
            call()
    if backends.HAS_GPU:
        with pytest.raises(NotImplementedError, match="triton: the tensors are on cpu"):
            pyext.geglu(x.float(), impl="triton")
