"""pyext.moe.dispatch, grouped_linear, experts, combine and forward against loops over tokens, with all gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyext
from pyext import _checks
from pyext._primitives import EXPERT_ACTIVATIONS
from support import moe
from support.cases import on_threads
from support.tolerance import assert_close_to_reference

NAMES = ("x", "weights", "w_gate_up", "w_down", "b_gate_up", "b_down")
K = {"switch": 1}


@pytest.fixture(params=["read", "masked"])
def path(request, monkeypatch):
    """The reference reads offsets where it may, and masks rows where it must not."""
    if request.param == "masked":
        monkeypatch.setattr(_checks, "is_readable", lambda value: False)
    return request.param


def layer(t, h, i, e, j=None, activation="swiglu", bias=True, dtype=torch.float64, seed=0):
    """x, experts' weights and biases as leaves, at the scale of a trained layer."""
    generator = torch.Generator().manual_seed(seed)
    j, rows = h if j is None else j, (2 * i if activation in moe.GATED else i)

    def normal(*size, scale=1.0):
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    leaves = {"x": normal(t, h), "w_gate_up": normal(e, rows, h, scale=max(h, 1) ** -0.5)}
    leaves["w_down"] = normal(e, j, i, scale=max(i, 1) ** -0.5)
    leaves["b_gate_up"] = normal(e, rows) if bias else None
    leaves["b_down"] = normal(e, j) if bias else None
    return leaves


def routed(t, e, k=2, seed=0, dtype=torch.float64, policy="softmax_topk", **options):
    """A routing whose weights are a leaf."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(t, e, generator=generator, dtype=torch.float64)
    routing = pyext.moe.route(logits, k, policy=policy, generator=generator, **options)
    return routing._replace(weights=routing.weights.to(dtype).requires_grad_())


def gradients(out, leaves, grad):
    named = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    found = torch.autograd.grad(out, list(named.values()), grad, allow_unused=True)
    zeros = {name: torch.zeros_like(leaf) for name, leaf in named.items()}
    return {"out": out.detach()} | {
        name: zeros[name] if got is None else got for name, got in zip(named, found, strict=True)
    }


def whole(leaves, routing, activation, **options):
    """out and all gradients by `forward`."""
    leaves = {**leaves, "weights": routing.weights}
    arguments = {name: leaf for name, leaf in leaves.items() if name not in ("x", "weights")}
    out = pyext.moe.forward(leaves["x"], routing, activation=activation, **arguments, **options)
    return out, {name: leaves[name] for name in NAMES}


def steps(leaves, routing, activation, **options):
    """The same in three steps."""
    xs = pyext.moe.dispatch(leaves["x"], routing, **options)
    arguments = {name: leaf for name, leaf in leaves.items() if name != "x"}
    ys = pyext.moe.experts(xs, routing, activation=activation, **arguments, **options)
    return pyext.moe.combine(ys, routing, **options), {**leaves, "weights": routing.weights}


def expected(leaves, routing, activation, grad, dtype=torch.float64):
    """out and all gradients by the loops, in a dtype (weights in fp32 at least)."""
    copies = {name: None if leaf is None else leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}
    weights = routing.weights.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    copies["weights"] = weights
    out = moe.forward(*(copies[name] for name in NAMES), routing, activation)
    return gradients(out + 0 * sum(leaf.sum() for leaf in copies.values() if leaf is not None), copies, grad.to(dtype))


def check64(leaves, routing, activation="swiglu", **options):
    j = leaves["w_down"].shape[1]
    grad = torch.randn(routing.position.shape[0], j, dtype=torch.float64)
    wanted = expected(leaves, routing, activation, grad)
    for compute in (whole, steps):
        out, named = compute(leaves, routing, activation, **options)
        for name, got in gradients(out, named, grad).items():
            torch.testing.assert_close(got, wanted[name], rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", moe.ACTIVATIONS)
def test_activations(activation, bias, path):
    check64(layer(11, 5, 7, 4, activation=activation, bias=bias), routed(11, 4), activation)


@pytest.mark.parametrize("options", [{}, dict(capacity_factor=0.6), dict(capacity_factor=3.0)], ids=str)
@pytest.mark.parametrize("policy", moe.POLICIES)
def test_policies(policy, options, path):
    mask = torch.rand(17) < 0.8
    routing = routed(17, 5, K.get(policy, 2), policy=policy, token_mask=mask, **options)
    check64(layer(17, 6, 3, 5, j=4), routing)


@pytest.mark.parametrize(
    ("t", "h", "i", "e", "k"),
    [(0, 4, 3, 5, 2), (1, 4, 3, 5, 2), (1, 1, 1, 1, 1), (9, 3, 2, 1, 1), (7, 4, 3, 4, 4), (5, 3, 2, 257, 3),
     (6, 0, 3, 2, 1), (6, 3, 0, 2, 1), (13, 31, 33, 3, 2)],
)  # fmt: skip
def test_sizes(t, h, i, e, k, path):
    check64(layer(t, h, i, e), routed(t, e, k))


def test_all_tokens_to_one_expert(path):
    logits = torch.zeros(12, 6, dtype=torch.float64)
    logits[:, 3] = 5.0
    check64(layer(12, 4, 3, 6), pyext.moe.route(logits.requires_grad_(), 1))


def test_all_tokens_dropped(path):
    logits = torch.zeros(8, 3, dtype=torch.float64, requires_grad=True)
    routing = pyext.moe.route(logits, 1, token_mask=torch.zeros(8, dtype=torch.bool))
    leaves = layer(8, 4, 3, 3)
    check64(leaves, routing)
    assert not whole(leaves, routing, "swiglu")[0].any()


def test_rows_that_nobody_needs_may_be_missing(path):
    """A share of an expert-parallel layer: tokens, and no row."""
    routing = routed(5, 3, token_mask=torch.zeros(5, dtype=torch.bool))
    routing = routing._replace(source=routing.source[:0])
    check64(layer(5, 4, 3, 3), routing)


def test_dropped_tokens():
    """Output 0, gradient 0."""
    leaves, routing = layer(20, 4, 3, 4), routed(20, 4, 1, policy="switch", capacity_factor=0.5)
    out, named = whole(leaves, routing, "swiglu")
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
def test_unused_rows_may_hold_anything(garbage, path):
    """They reach no output and no gradient, and get gradient 0."""
    leaves, routing = layer(12, 4, 3, 3), routed(12, 3, token_mask=torch.arange(12) % 3 > 0)
    used = int(routing.offsets[-1])
    xs = pyext.moe.dispatch(leaves["x"].detach(), routing)
    assert used < len(xs)
    results = []
    for fill in (0.0, garbage):
        rows = xs.clone()
        rows[used:] = fill
        rows.requires_grad_()
        ys = pyext.moe.experts(rows, routing, **{name: leaf for name, leaf in leaves.items() if name != "x"})
        assert not ys[used:].any()
        named = {**leaves, "x": rows}
        results.append(gradients(ys, named, torch.ones_like(ys)))
        assert not results[-1]["x"][used:].any()
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name
    ys = torch.randn(len(xs), 4, dtype=torch.float64)
    dirty = ys.clone()
    dirty[used:] = garbage
    assert torch.equal(pyext.moe.combine(ys, routing), pyext.moe.combine(dirty, routing))


@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 0, 7], [7, 0, 0], [0, 0, 0], [2, 2, 2]], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_grouped_linear(counts, bias, path):
    generator = torch.Generator().manual_seed(1)
    sizes = {"xs": (9, 5), "w": (3, 4, 5), "bias": (3, 4)}
    leaves = {
        name: torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True)
        for name, size in sizes.items()
        if bias or name != "bias"
    }
    offsets = torch.tensor([0, *counts]).cumsum(0)
    out = pyext.moe.grouped_linear(leaves["xs"], leaves["w"], offsets, leaves.get("bias"))
    parts, row = [], 0
    for expert, count in enumerate(counts):
        for _ in range(count):
            parts.append(leaves["w"][expert] @ leaves["xs"][row] + (leaves["bias"][expert] if bias else 0))
            row += 1
    zeros = torch.zeros(9 - row, 4, dtype=torch.float64) + 0 * sum(leaf.sum() for leaf in leaves.values())
    wanted = torch.cat([*(part[None] for part in parts), zeros])
    grad = torch.randn(9, 4, dtype=torch.float64)
    ours, theirs = gradients(out, leaves, grad), gradients(wanted, leaves, grad)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "relu"])
def test_tolerance(activation, dtype, session_seed, path):
    """The rule against fp64, beside the same loops in the dtype itself."""
    leaves = layer(40, 32, 24, 4, activation=activation, dtype=dtype, seed=session_seed)
    routing = routed(40, 4, 2, seed=session_seed, dtype=torch.float32, renormalize=True)
    grad = torch.randn(40, 32).to(dtype)
    exact = expected(leaves, routing, activation, grad)
    eager = expected(leaves, routing, activation, grad, dtype)
    for compute in (whole, steps) if dtype == torch.float32 else (whole,):
        out, named = compute(leaves, routing, activation)
        for name, got in gradients(out, named, grad).items():
            assert got.dtype == (torch.float32 if name == "weights" else dtype)
            assert_close_to_reference(got, exact[name], eager[name], name=f"{name} by {compute.__name__}")


@st.composite
def problems(draw):
    e = draw(st.integers(1, 6))
    sizes = dict(t=draw(st.integers(0, 9)), h=draw(st.integers(1, 5)), i=draw(st.integers(1, 5)), e=e)
    options = dict(activation=draw(st.sampled_from(moe.ACTIVATIONS)), bias=draw(st.booleans()))
    k = draw(st.integers(1, e))
    policy = draw(st.sampled_from(["softmax_topk", "sigmoid", "expert_choice"]))
    return sizes, options, k, policy, draw(st.sampled_from([None, 0.3, 1.0])), draw(st.integers(0, 2**31 - 1))


@settings(
    max_examples=60,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(problem=problems())
def test_fuzz(problem):
    sizes, options, k, policy, factor, seed = problem
    routing = routed(sizes["t"], sizes["e"], k, seed, policy=policy, capacity_factor=factor)
    check64(layer(**sizes, **options, seed=seed), routing, options["activation"])


def test_router_gradient_reaches_the_logits():
    leaves = layer(9, 4, 3, 5)
    logits = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    inputs = [logits, *leaves.values()]

    def call(logits, x, *experts):
        routing = pyext.moe.route(logits, 2, renormalize=True, capacity_factor=1.0)
        return pyext.moe.forward(x, routing, experts[0], experts[1], "swiglu", *experts[2:])

    torch.autograd.gradcheck(call, inputs)
    small = [torch.randn(3, 2), *(leaf.detach() for leaf in layer(3, 2, 2, 2).values())]
    torch.autograd.gradgradcheck(call, [x.double().requires_grad_() for x in small])


def test_strides():
    leaves, routing = layer(11, 6, 4, 3), routed(11, 3)
    wanted = whole(leaves, routing, "swiglu")[0]
    moved = {}
    for name, leaf in leaves.items():
        spread = torch.full((*leaf.shape, 2), torch.nan, dtype=leaf.dtype)
        spread[..., 1] = leaf.detach()
        moved[name] = spread[..., 1]
    moved["x"] = leaves["x"].detach().t().contiguous().t()
    torch.testing.assert_close(whole(moved, routing, "swiglu")[0], wanted)


def test_inputs_are_not_written():
    leaves, routing = layer(11, 6, 4, 3), routed(11, 3)
    before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    kept = [x.detach().clone() for x in routing]
    out, named = whole(leaves, routing, "swiglu")
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
def test_compile(dynamic):
    def call(logits, x, w_gate_up, w_down):
        routing = pyext.moe.route(logits, 2, renormalize=True, capacity_factor=1.25)
        out = pyext.moe.forward(x, routing, w_gate_up, w_down)
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
    for impl in ("cpu", "triton", "cuda"):
        with pytest.raises(NotImplementedError, match=f"pyext.moe.{name}: impl='{impl}' refuses this call"):
            call(name, impl=impl)


def test_every_activation_is_tested():
    assert moe.ACTIVATIONS == EXPERT_ACTIVATIONS
