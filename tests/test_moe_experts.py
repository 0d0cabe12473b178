"""pyext.moe.dispatch, grouped_linear, experts, combine and forward against loops over tokens, with all gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pyext
from pyext import _checks, _dispatch
from pyext._primitives import EXPERT_ACTIVATIONS
from support import backends, moe
from support.cases import DTYPES, dtype_name, on_threads
from support.examples import examples
from support.expert_layers import check, gradients, layer, routed, routed_by, whole

OP = "moe.forward"
K = {"switch": 1}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", moe.ACTIVATIONS)
def test_activations(activation, bias, backend):
    check(layer(11, 5, 7, 4, activation=activation, bias=bias), routed(11, 4), activation, backend)


@pytest.mark.parametrize("options", [{}, dict(capacity_factor=0.6), dict(capacity_factor=3.0)], ids=str)
@pytest.mark.parametrize("policy", moe.POLICIES)
def test_policies(policy, options, backend):
    mask = torch.rand(17) < 0.8
    routing = routed(17, 5, K.get(policy, 2), policy=policy, token_mask=mask, **options)
    check(layer(17, 6, 3, 5, j=4), routing, "swiglu", backend)


@pytest.mark.parametrize(
    ("t", "h", "i", "e", "k"),
    [(0, 4, 3, 5, 2), (1, 4, 3, 5, 2), (1, 1, 1, 1, 1), (9, 3, 2, 1, 1), (7, 4, 3, 4, 4), (5, 3, 2, 257, 3),
     (6, 0, 3, 2, 1), (6, 3, 0, 2, 1), (13, 31, 33, 3, 2)],
)  # fmt: skip
def test_sizes(t, h, i, e, k, backend):
    check(layer(t, h, i, e), routed(t, e, k), "swiglu", backend)


def test_all_tokens_to_one_expert(backend):
    logits = torch.zeros(12, 6, dtype=torch.float64)
    logits[:, 3] = 5.0
    check(layer(12, 4, 3, 6), pyext.moe.route(logits, 1), "geglu", backend)


def test_all_tokens_dropped(backend):
    logits = torch.zeros(8, 3, dtype=torch.float64, requires_grad=True)
    routing = pyext.moe.route(logits, 1, token_mask=torch.zeros(8, dtype=torch.bool))
    leaves = layer(8, 4, 3, 3)
    check(leaves, routing, "swiglu", backend)


def test_rows_that_nobody_needs_may_be_missing(backend):
    """A share of an expert-parallel layer: tokens, and no row."""
    routing = routed(5, 3, token_mask=torch.zeros(5, dtype=torch.bool))
    routing = routing._replace(source=routing.source[:0])
    check(layer(5, 4, 3, 3), routing, "swiglu", backend)


def test_dropped_tokens(backend):
    """Output 0, gradient 0."""
    leaves = layer(20, 4, 3, 4, dtype=backend.widest, device=backend.device)
    routing = routed(20, 4, 1, dtype=backend.widest, device=backend.device, policy="switch", capacity_factor=0.5)
    out, named = whole(leaves, routing, "swiglu", impl=backend.impl)
    got = gradients(out, named, torch.ones_like(out))
    gone = routing.expert_index[:, 0] < 0
    assert gone.any() and not gone.all()
    for name in ("out", "x", "weights"):
        assert not got[name][gone].any() and got[name][~gone].any(-1).all(), name


def test_dispatch_sorts_by_expert_then_token():
    routing = routed(30, 5, 2, capacity_factor=0.7, token_mask=torch.arange(30) % 2 == 0)
    x = torch.randn(30, 3)
    xs = pyext.moe.dispatch(x, routing)
    rows = sorted((e, t) for t, row in enumerate(routing.expert_index.tolist()) for e in row if e >= 0)
    used = int(routing.offsets[-1])
    assert used == len(rows) < len(xs)
    assert torch.equal(xs[:used], x[[t for _, t in rows]]) and not xs[used:].any()


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_unused_rows_may_hold_anything(garbage, backend):
    """They reach no output and no gradient, and get gradient 0."""
    leaves = layer(12, 4, 3, 3, dtype=backend.widest, device=backend.device)
    mask = (torch.arange(12) % 3 > 0).cpu()
    routing = routed(12, 3, dtype=backend.widest, device=backend.device, token_mask=mask)
    used = int(routing.offsets[-1])
    xs = pyext.moe.dispatch(leaves["x"].detach(), routing)
    assert used < len(xs)
    results = []
    for fill in (0.0, garbage):
        rows = xs.clone()
        rows[used:] = fill
        rows.requires_grad_()
        arguments = {name: leaf for name, leaf in leaves.items() if name != "x"}
        ys = pyext.moe.experts(rows, routing, **arguments, impl=backend.impl)
        assert not ys[used:].any()
        named = {**leaves, "x": rows}
        results.append(gradients(ys, named, torch.ones_like(ys)))
        assert not results[-1]["x"][used:].any()
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name
    ys = torch.randn(len(xs), 4, dtype=backend.widest)
    dirty = ys.clone()
    dirty[used:] = garbage
    assert torch.equal(pyext.moe.combine(ys, routing), pyext.moe.combine(dirty, routing))


@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 0, 7], [7, 0, 0], [0, 0, 0], [2, 2, 2]], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_grouped_linear(counts, bias, backend):
    sizes = {"xs": (9, 5), "w": (3, 4, 5), "bias": (3, 4)}
    leaves = {
        name: torch.randn(size, dtype=backend.widest, requires_grad=True)
        for name, size in sizes.items()
        if bias or name != "bias"
    }
    offsets = torch.tensor([0, *counts]).cumsum(0)
    out = pyext.moe.grouped_linear(leaves["xs"], leaves["w"], offsets, leaves.get("bias"), impl=backend.impl)
    parts, row = [], 0
    for expert, count in enumerate(counts):
        for _ in range(count):
            parts.append(leaves["w"][expert] @ leaves["xs"][row] + (leaves["bias"][expert] if bias else 0))
            row += 1
    zeros = torch.zeros(9 - row, 4, dtype=backend.widest) + 0 * sum(leaf.sum() for leaf in leaves.values())
    wanted = torch.cat([*(part[None] for part in parts), zeros])
    grad = torch.randn(9, 4, dtype=backend.widest)
    ours, theirs = gradients(out, leaves, grad), gradients(wanted, leaves, grad)
    for name in ours:
        tolerance = 1e-12 if backend.widest == torch.float64 else 1e-5
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("counts", [(3, 0, 4), (0, 9, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("activation", ["geglu", "silu"])
def test_reference_where_offsets_cannot_be_read(activation, counts, monkeypatch):
    """All rows go through every expert, behind masks."""
    routing = routed_by([e for e, count in enumerate(counts) for _ in range(count)], 3)
    monkeypatch.setattr(_checks, "is_readable", lambda value: False)
    check(layer(sum(counts), 4, 3, 3, activation=activation), routing, activation, backends.Backend("reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("activation", moe.ACTIVATIONS)
def test_tolerance(activation, dtype, session_seed, backend):
    """The rule against fp64, beside the same loops in the dtype itself."""
    leaves = layer(40, 33, 35, 4, activation=activation, dtype=dtype, seed=session_seed)
    check(leaves, routed(40, 4, 2, session_seed, renormalize=True), activation, backend, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("counts", [(1, 2, 3, 4, 5, 8, 9, 17), (520, 0, 70), (2100,), (1030, 1), (0, 0, 20)], ids=str)
def test_rows_per_expert(counts, dtype, cpu, session_seed):
    """Tiles and pieces of every size; several pieces and rounds for one expert."""
    rows = [e for e, count in enumerate(counts) for _ in range(count)]
    order = torch.randperm(len(rows)).tolist()
    routing = routed_by([rows[i] for i in order], len(counts), seed=session_seed)
    check(layer(len(rows), 20, 17, len(counts), 19, seed=session_seed), routing, "swiglu", cpu, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(("features", "hidden"), [(2102, 23), (22, 2101)], ids=str)
def test_long_sums(features, hidden, dtype, cpu, session_seed):
    """Sums of several stretches, of numbers of columns that divide no tile; few rows and many."""
    counts = (1, 6, 9, 70)
    routing = routed_by([e for e, count in enumerate(counts) for _ in range(count)], len(counts), seed=session_seed)
    check(layer(sum(counts), features, hidden, len(counts), seed=session_seed), routing, "swiglu", cpu, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("features", [1056, 1051], ids=str)
def test_large_gradients(features, dtype, cpu, session_seed):
    """Gradients of weights from 8 MiB on go past the caches where rows are aligned."""
    experts = 4
    assert experts * 1056 * features * dtype.itemsize >= 8 << 20
    leaves = layer(20, features, 1056, experts, activation="gelu", dtype=dtype, seed=session_seed)
    check(leaves, routed(20, experts, 2, session_seed), "gelu", cpu, dtype)


@st.composite
def problems(draw):
    e, width = draw(st.integers(1, 6)), st.one_of(st.integers(0, 5), st.integers(15, 40))
    sizes = dict(
        t=draw(st.one_of(st.integers(0, 9), st.integers(10, 60))), h=draw(width), i=draw(width), e=e, j=draw(width)
    )
    options = dict(activation=draw(st.sampled_from(moe.ACTIVATIONS)), bias=draw(st.booleans()))
    k = draw(st.integers(1, e))
    policy = draw(st.sampled_from(["softmax_topk", "sigmoid", "expert_choice"]))
    return sizes, options, k, policy, draw(st.sampled_from([None, 0.3, 1.0])), draw(st.integers(0, 2**31 - 1))


@examples(60)
@given(problem=problems(), threads=st.sampled_from([1, 2]))
def test_fuzz(problem, threads):
    sizes, options, k, policy, factor, seed = problem
    routing = routed(sizes["t"], sizes["e"], k, seed, policy=policy, capacity_factor=factor)
    for implementation in backends.ALL:
        with implementation.selected():
            check(layer(**sizes, **options, seed=seed), routing, options["activation"], implementation, threads=threads)


def test_router_gradient_reaches_the_logits():
    leaves = layer(9, 4, 3, 5)
    logits = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    inputs = [logits, *leaves.values()]

    def call(logits, x, *experts):
        routing = pyext.moe.route(logits, 2, renormalize=True, capacity_factor=1.0, impl=impl)
        return pyext.moe.forward(x, routing, experts[0], experts[1], "swiglu", *experts[2:], impl=impl)

    impl = "auto"
    torch.autograd.gradcheck(call, inputs)
    impl = "reference"
    small = [torch.randn(3, 2), *(leaf.detach() for leaf in layer(3, 2, 2, 2).values())]
    torch.autograd.gradgradcheck(call, [x.double().requires_grad_() for x in small])


def test_strides(backend):
    leaves = layer(11, 6, 4, 3, dtype=backend.widest, device=backend.device)
    routing = routed(11, 3, dtype=backend.widest, device=backend.device)
    grad = torch.randn(11, 6, dtype=backend.widest)
    wanted = gradients(*whole(leaves, routing, "swiglu", impl=backend.impl), grad)
    moved = {}
    for name, leaf in leaves.items():
        spread = torch.full((*leaf.shape, 2), torch.nan, dtype=leaf.dtype)
        spread[..., 1] = leaf.detach()
        moved[name] = spread[..., 1].requires_grad_()
    moved["x"] = leaves["x"].detach().t().contiguous().t().requires_grad_()
    rows = torch.full((4, 12, 12), torch.nan, dtype=backend.widest)[:3, 2:10, 3:9]  # gaps between rows and experts
    moved["w_gate_up"] = rows.copy_(leaves["w_gate_up"].detach()).requires_grad_()
    got = gradients(*whole(moved, routing, "swiglu", impl=backend.impl), grad.t().contiguous().t())
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name])


def test_inputs_are_not_written(backend):
    leaves = layer(11, 6, 4, 3, dtype=backend.widest, device=backend.device)
    routing = routed(11, 3, dtype=backend.widest, device=backend.device)
    before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    kept = [x.detach().clone() for x in routing]
    out, named = whole(leaves, routing, "swiglu", impl=backend.impl)
    gradients(out, named, torch.ones_like(out))
    assert all(torch.equal(before[name], leaf) for name, leaf in leaves.items())
    assert all(torch.equal(a, b) for a, b in zip(kept, routing))


def test_same_bits_at_any_number_of_threads():
    """Routing, dispatch and combine, forward and backward (the products in between are PyTorch's)."""
    torch.use_deterministic_algorithms(False)  # which would hide sums in the order of threads
    logits, x = torch.randn(2000, 16), torch.randn(2000, 64)
    grad = torch.randn(2000, 64)

    def call(threads):
        with on_threads(threads):
            leaves = [t.clone().requires_grad_() for t in (logits, x)]
            routing = pyext.moe.route(leaves[0], 4, capacity_factor=1.0, renormalize=True)
            xs = pyext.moe.dispatch(leaves[1], routing)
            out = pyext.moe.combine(xs * xs, routing)
            total = (out * grad).sum() + routing.balance_loss + routing.z_loss
            return (*routing, xs, out, *torch.autograd.grad(total, leaves))

    first = call(1)
    for threads in (2, 4, 2, 4):
        assert all(torch.equal(a, b) for a, b in zip(first, call(threads)))


# --- torch's ways of calling ---


def test_autocast():
    leaves = layer(11, 6, 4, 3, dtype=torch.float32)
    routing = routed(11, 3, dtype=torch.float32)
    half = {name: leaf.detach().bfloat16() for name, leaf in leaves.items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = whole(leaves, routing, "swiglu")[0]
        xs = pyext.moe.dispatch(leaves["x"], routing)
        assert xs.dtype == torch.float32
        assert pyext.moe.grouped_linear(xs, leaves["w_gate_up"], routing.offsets).dtype == torch.bfloat16
    assert torch.equal(out, whole(half, routing, "swiglu")[0])
    out.sum().backward()
    assert leaves["w_down"].grad.dtype == torch.float32


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, backend):
    def call(logits, x, w_gate_up, w_down):
        routing = pyext.moe.route(logits, 2, renormalize=True, capacity_factor=1.25)
        out = pyext.moe.forward(x, routing, w_gate_up, w_down, impl=backend.impl)
        return out, routing.balance_loss

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (12, 20) if dynamic else (12,):
        leaves = layer(tokens, 5, 3, 4, bias=False, dtype=torch.float32)
        inputs = [torch.randn(tokens, 4, requires_grad=True), *(leaf for leaf in leaves.values() if leaf is not None)]
        results = []
        for function in (compiled, call):
            out, loss = function(*inputs)
            results.append((out, *torch.autograd.grad(out.square().sum() + loss, inputs)))
        for ours, theirs in zip(*results):
            torch.testing.assert_close(ours, theirs)


def test_fake_tensors():
    from torch._subclasses import FakeTensorMode

    leaves = {name: x.detach() for name, x in layer(11, 6, 4, 3, j=5, dtype=torch.bfloat16).items()}
    routing = pyext.moe.Routing(*(x.detach() for x in routed(11, 3)))
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(leaf) for name, leaf in leaves.items()}
        fake_routing = pyext.moe.Routing(*(mode.from_tensor(x) for x in routing))
        out = whole(fake, fake_routing, "swiglu")[0]
    assert (out.shape, out.dtype) == ((11, 5), torch.bfloat16)


def test_checkpointing_and_functional_call():
    module = pyext.nn.MoE(6, 4, 3, 2).double()
    x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(module(x).square().sum(), x)[0]
    out = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x)[0], wanted)
    other = {name: torch.randn_like(p) for name, p in module.named_parameters()}
    assert not torch.equal(torch.func.functional_call(module, other, (x,)), module(x))


def test_func_transforms():
    leaves, routing = layer(6, 4, 3, 3, bias=False), routed(6, 3)

    def loss(w):
        return pyext.moe.forward(leaves["x"].detach(), routing, w, leaves["w_down"].detach()).square().sum()

    w = leaves["w_gate_up"]
    torch.testing.assert_close(torch.func.grad(loss)(w.detach()), torch.autograd.grad(loss(w), w)[0])


# --- Refusals ---


def call(name, **change):
    """The op on good arguments, but for `change`."""
    routing = routed(6, 3, capacity_factor=1.0, dtype=torch.float32)
    routing = routing._replace(**{k[8:]: change.pop(k) for k in list(change) if k.startswith("routing_")})
    rows = routing.source.shape[0]
    experts = dict(w_gate_up=torch.zeros(3, 8, 5), w_down=torch.zeros(3, 5, 4))
    arguments = {
        "dispatch": dict(x=torch.zeros(6, 5), routing=routing),
        "combine": dict(ys=torch.zeros(rows, 5), routing=routing),
        "experts": dict(xs=torch.zeros(rows, 5), routing=routing, **experts),
        "forward": dict(x=torch.zeros(6, 5), routing=routing, **experts),
        "grouped_linear": dict(xs=torch.zeros(6, 5), w=torch.zeros(3, 4, 5), offsets=torch.tensor([0, 2, 2, 6])),
    }[name]
    return getattr(pyext.moe, name)(**{**arguments, **change})


Z = torch.zeros


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("dispatch", dict(x=Z(5, 5)), ValueError, r"x must have shape \(6, H\) to match the tokens of routing"),
        ("dispatch", dict(x=Z(6)), ValueError, r"x must have shape \(6, H\)"),
        ("dispatch", dict(x=Z(6, 5).int()), TypeError, "x must be float32"),
        ("dispatch", dict(routing=(1, 2)), TypeError, r"routing must be a pyext\.moe\.Routing, got tuple"),
        ("dispatch", dict(routing_source=Z(6)), TypeError, r"routing\.source must be an integer tensor"),
        ("dispatch", dict(routing_source=Z(6, 1).int()), ValueError, r"routing\.source must have shape \(N,\)"),
        ("dispatch", dict(routing_position=Z(6, 1).int()), ValueError, r"routing\.position must have shape \(6, 2\)"),
        ("combine", dict(ys=Z(5, 5)), ValueError, r"ys must have shape \(12, J\) to match the rows of routing"),
        ("combine", dict(routing_weights=Z(6)), ValueError, r"routing\.weights must have shape \(T, K\)"),
        ("experts", dict(xs=Z(5, 5)), ValueError, r"xs must have shape \(12, H\) to match the rows of routing"),
        ("experts", dict(activation="tanh"), ValueError, "activation must be one of 'geglu', .*, got 'tanh'"),
        ("forward", dict(w_gate_up=Z(2, 8, 5)), ValueError, r"w_gate_up must have shape \(3, 2I, 5\) to match routing"),
        ("forward", dict(w_gate_up=Z(3, 8, 4)), ValueError, r"w_gate_up must have shape \(3, 2I, 5\)"),
        ("forward", dict(w_gate_up=Z(3, 7, 5)), ValueError, r"w_gate_up must have shape \(3, 2I, 5\) with activation="),
        (
            "forward",
            dict(w_down=Z(3, 5, 8)),
            ValueError,
            r"w_down must have shape \(3, J, 4\) to match routing and w_gate",
        ),
        ("forward", dict(activation="silu"), ValueError, r"w_down must have shape \(3, J, 8\)"),
        ("forward", dict(w_down=Z(3, 5, 4).half()), TypeError, "w_down must have dtype torch.float32 to match x"),
        ("forward", dict(w_down=None), TypeError, "w_down must be a torch.Tensor, got NoneType"),
        ("forward", dict(w_down=Z(3, 5, 4, device="meta")), ValueError, "w_down must be on cpu like x, got meta"),
        ("forward", dict(b_gate_up=Z(3, 4)), ValueError, r"b_gate_up must have shape \(3, 8\) to match w_gate_up"),
        ("forward", dict(b_down=Z(5)), ValueError, r"b_down must have shape \(3, 5\) to match w_down"),
        ("grouped_linear", dict(xs=Z(6)), ValueError, r"xs must have shape \(N, I\)"),
        ("grouped_linear", dict(w=Z(3, 4, 6)), ValueError, r"w must have shape \(E, O, 5\) to match xs"),
        ("grouped_linear", dict(bias=Z(4)), ValueError, r"bias must have shape \(3, 4\) to match w"),
        ("grouped_linear", dict(offsets=torch.arange(3)), ValueError, r"offsets must have shape \(4,\) to match w"),
        ("grouped_linear", dict(offsets=Z(4)), TypeError, "offsets must be an integer tensor"),
        ("grouped_linear", dict(offsets=torch.tensor([0, 3, 2, 6])), ValueError, "offsets must rise from 0 to 6"),
        ("grouped_linear", dict(offsets=torch.tensor([0, 3, 4, 7])), ValueError, "offsets must rise from 0 to 6"),
        ("grouped_linear", dict(offsets=torch.tensor([1, 3, 4, 6])), ValueError, "offsets must rise from 0 to 6"),
    ],
)
def test_refusals(name, change, error, message):
    with pytest.raises(error, match=message):
        call(name, **change)


@pytest.mark.parametrize("name", ["experts", "forward", "grouped_linear"])
def test_forced_backends_say_why(name):
    call(name), call(name, impl="reference")
    for impl in {"cpu", "triton", "cuda"} - set(_dispatch._OPS[f"moe.{name}"].kernels):
        with pytest.raises(NotImplementedError, match=f"pyext.moe.{name}: impl='{impl}' refuses this call"):
            call(name, impl=impl)


def test_every_activation_is_tested():
    assert moe.ACTIVATIONS == EXPERT_ACTIVATIONS
