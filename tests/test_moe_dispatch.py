"""pyext.moe.dispatch and combine against indexing in fp64: values, all gradients, layouts, edges, wrong maps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pyext
from pyext._primitives import acc_dtype
from support import backends, layouts
from support.cases import DTYPES, dtype_name, on_threads
from support.examples import examples
from support.tolerance import assert_close_to_reference

OP = "moe.dispatch"
K = {"switch": 1}
SIZES = [  # tokens, features, experts, choices
    (13, 5, 4, 2), (0, 4, 5, 2), (1, 4, 5, 2), (1, 1, 1, 1), (9, 3, 1, 1), (7, 4, 4, 4), (5, 3, 257, 3), (6, 0, 3, 2),
    (3, 33, 257, 257), *((11, width, 5, 3) for width in (7, 8, 15, 16, 17, 32, 63, 64, 65, 127, 1030)),
]  # fmt: skip


def routed(t, e, k=2, seed=0, dtype=torch.float32, device="cpu", policy="softmax_topk", **options):
    """A routing whose weights are of that dtype."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(t, e, generator=generator, dtype=torch.float64, device="cpu")
    routing = pyext.moe.route(logits, k, policy=policy, generator=generator, impl="reference", **options)
    routing = pyext.moe.Routing(*(x.to(device) for x in routing))
    return routing._replace(weights=routing.weights.to(acc_dtype(dtype)))


def placed(values, kind):
    """The matrix in a layout of support.layouts."""
    return layouts.place(values[None, None], kind)[0, 0]


def formulas(x, ys, weights, routing, grad_xs, grad_out):
    """xs, out and the gradients of x, ys and weights, in the dtype of x."""
    x, ys, weights = (leaf.detach().requires_grad_() for leaf in (x, ys, weights))
    used = (routing.source >= 0).nonzero()[:, 0]
    xs = torch.zeros_like(grad_xs).index_put((used,), x[routing.source[used].long()]) + 0 * x.sum()
    out = torch.zeros_like(grad_out) + 0 * (ys.sum() + weights.sum())
    for k in range(routing.position.shape[1]):
        has = routing.position[:, k] >= 0
        row = routing.position[has, k].long()
        out = out.index_put((has.nonzero()[:, 0],), weights[has, k, None] * ys[row], accumulate=True)
    return results(x, ys, weights, xs, out, grad_xs, grad_out)


def results(x, ys, weights, xs, out, grad_xs, grad_out):
    found = {"xs": xs.detach(), "out": out.detach()}
    for leaf, result, grad, name in ((x, xs, grad_xs, "x"), (ys, out, grad_out, "ys"), (weights, out, grad_out, "w")):
        gradient = torch.autograd.grad(result, leaf, grad, retain_graph=True, allow_unused=True)[0]
        found[f"grad {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return found


def ours(x, ys, routing, grad_xs, grad_out, impl, kind="contiguous"):
    x, ys = (placed(leaf.detach(), kind).requires_grad_() for leaf in (x, ys))
    weights = routing.weights.detach().requires_grad_()
    xs = pyext.moe.dispatch(x, routing, impl=impl)
    out = pyext.moe.combine(ys, routing._replace(weights=weights), impl=impl)
    return results(x, ys, weights, xs, out, *(placed(grad, kind) for grad in (grad_xs, grad_out)))


def draw(sizes, dtype, seed, device, policy="softmax_topk", **options):
    t, width, e, k = sizes
    if options.pop("masked", False):
        options["token_mask"] = torch.rand(t, generator=torch.Generator().manual_seed(seed)) < 0.7
    routing = routed(t, e, k, seed, dtype, device, policy, **options)
    generator = torch.Generator().manual_seed(seed + 1)
    rows = (t, len(routing.source), len(routing.source), t)
    tensors = [torch.randn(n, width, generator=generator, dtype=torch.float64, device="cpu") for n in rows]
    return [x.to(device, dtype) for x in tensors], routing


def check(sizes, dtype, backend, seed, kind="contiguous", threads=1, **options):
    if backend.refuses(dtype):
        dtype = backend.widest
    (x, ys, grad_xs, grad_out), routing = draw(sizes, dtype, seed, backend.device, **options)
    with on_threads(threads):
        got = ours(x, ys, routing, grad_xs, grad_out, backend.impl, kind)
    tensors = [placed(t, kind) for t in (x, ys)], [placed(t, kind) for t in (grad_xs, grad_out)]
    exact, eager = (
        formulas(*(t.to(to) for t in tensors[0]), routing.weights.to(to), routing, *(t.to(to) for t in tensors[1]))
        for to in (torch.float64, dtype)
    )
    sizes = [[t.double().abs() for t in part] for part in tensors]
    terms = formulas(*sizes[0], routing.weights.double(), routing, *sizes[1])["grad w"]  # of the inner products
    for name, value in got.items():
        assert value.dtype == (acc_dtype(dtype) if name == "grad w" else dtype), name
        magnitude = terms if name == "grad w" else None
        assert_close_to_reference(value, exact[name], eager[name], name=name, magnitude=magnitude)
    assert torch.equal(got["xs"].double(), exact["xs"])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(sizes, dtype, backend, session_seed):
    check(sizes, dtype, backend, session_seed)


@pytest.mark.parametrize(
    "kind", [kind for kind in layouts.KINDS if not kind.startswith("expanded_")] + ["expanded_rows"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_layouts(kind, dtype, backend, session_seed):
    check((12, 37, 4, 3), dtype, backend, session_seed, kind)


@pytest.mark.parametrize("options", [{}, dict(capacity_factor=0.6), dict(capacity_factor=3.0)], ids=str)
@pytest.mark.parametrize("policy", ["softmax_topk", "switch", "gshard", "sigmoid", "expert_choice"])
def test_policies(policy, options, backend, session_seed):
    check((17, 6, 5, K.get(policy, 2)), torch.float32, backend, session_seed, policy=policy, masked=True, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize(("tokens", "width", "choices"), [(3000, 1024, 2), (3000, 1000, 2), (4200, 1024, 3)])
def test_results_beyond_the_caches(tokens, width, choices, dtype, cpu, session_seed):
    """Results of more than 8 MiB are stored by instructions of their own, where rows are whole vectors."""
    check((tokens, width, 8, choices), dtype, cpu, session_seed, capacity_factor=0.9, threads=2)


@examples(60)
@given(
    sizes=st.tuples(st.integers(0, 20), st.integers(0, 70), st.integers(2, 9), st.integers(1, 2)),
    policy=st.sampled_from(["softmax_topk", "sigmoid", "expert_choice"]),
    factor=st.sampled_from([None, 0.3, 1.0]),
    masked=st.booleans(),
    kind=st.sampled_from([kind for kind in layouts.KINDS if not kind.startswith("expanded_")]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31 - 1),
    threads=st.sampled_from([1, 2]),
)
def test_any_call(sizes, policy, factor, masked, kind, dtype, seed, threads):
    for backend in backends.of(OP):
        with backend.selected():
            check(sizes, dtype, backend, seed, kind, threads, policy=policy, capacity_factor=factor, masked=masked)


def test_all_tokens_to_one_expert_and_all_masked(backend):
    logits = torch.zeros(12, 6)
    logits[:, 3] = 5.0
    x = torch.randn(12, 4)
    routing = pyext.moe.route(logits, 1, impl="reference")
    assert torch.equal(pyext.moe.dispatch(x, routing, impl=backend.impl), x)
    routing = pyext.moe.route(logits, 1, token_mask=torch.zeros(12, dtype=torch.bool), impl="reference")
    for out in (pyext.moe.dispatch(x, routing, impl=backend.impl), pyext.moe.combine(x, routing, impl=backend.impl)):
        assert out.shape == (12, 4) and not out.any()


def test_unused_rows_may_hold_anything(backend):
    """They reach no output and no gradient, and get gradient 0."""
    routing = routed(12, 3, token_mask=torch.arange(12, device="cpu") % 3 > 0, device=backend.device)
    used = int(routing.offsets[-1])
    ys = torch.randn(len(routing.source), 4)
    for garbage in (torch.nan, torch.inf):
        found = []
        for fill in (0.0, garbage):
            leaf = ys.clone()
            leaf[used:] = fill
            leaf.requires_grad_()
            weights = routing.weights.detach().requires_grad_()
            out = pyext.moe.combine(leaf, routing._replace(weights=weights), impl=backend.impl)
            found.append((out, *torch.autograd.grad(out.sum(), (leaf, weights))))
        assert all(torch.equal(a, b) for a, b in zip(*found)) and not found[0][1][used:].any()


def test_derivatives_of_dispatch_of_any_order(backend):
    """dispatch is linear, and so is its derivative, which has one again."""
    routing = routed(9, 4, 2, device=backend.device, capacity_factor=0.8)
    x, grad = torch.randn(9, 5, requires_grad=True), torch.randn(len(routing.source), 5, requires_grad=True)
    (first,) = torch.autograd.grad(pyext.moe.dispatch(x, routing, impl=backend.impl), x, grad, create_graph=True)
    weight = torch.randn(9, 5)
    (second,) = torch.autograd.grad(first, grad, weight)
    torch.testing.assert_close(second, pyext.moe.dispatch(weight, routing, impl="reference"))


def test_derivatives_of_combine_of_higher_order(fp64_backend):
    routing = routed(5, 3, 2, dtype=torch.float64, capacity_factor=0.8)
    ys = torch.randn(len(routing.source), 3, dtype=torch.float64, requires_grad=True)

    def call(ys, weights):
        return pyext.moe.combine(ys, routing._replace(weights=weights), impl=fp64_backend.impl)

    weights = routing.weights.detach().requires_grad_()
    torch.autograd.gradcheck(call, (ys, weights))
    torch.autograd.gradgradcheck(call, (ys, weights))

    def first(ys, weights):
        return torch.autograd.grad(call(ys, weights).square().sum(), (ys, weights), create_graph=True)

    torch.autograd.gradgradcheck(first, (ys, weights))


def test_only_what_needs_a_gradient_is_computed(kernel):
    routing = routed(9, 4, 2, device=kernel.device)
    ys, out = torch.randn(len(routing.source), 5), []
    for need_ys, need_weights in ((True, False), (False, True)):
        leaf, weights = ys.clone().requires_grad_(need_ys), routing.weights.clone().requires_grad_(need_weights)
        result = pyext.moe.combine(leaf, routing._replace(weights=weights), impl=kernel.impl)
        out.append(torch.autograd.grad(result.sum(), leaf if need_ys else weights)[0])
    both = [x.clone().requires_grad_() for x in (ys, routing.weights)]
    result = pyext.moe.combine(both[0], routing._replace(weights=both[1]), impl=kernel.impl)
    assert all(torch.equal(a, b) for a, b in zip(out, torch.autograd.grad(result.sum(), both)))


def test_dispatch_saves_the_positions_only(kernel):
    routing, saved = routed(64, 4, 2, device=kernel.device), []
    x = torch.randn(64, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pyext.moe.dispatch(x, routing, impl=kernel.impl)
    assert [t.data_ptr() for t in saved] == [routing.position.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_same_bits_at_any_number_of_threads(dtype, cpu):
    (x, ys, grad_xs, grad_out), routing = draw((2500, 64, 8, 3), dtype, 5, "cpu", capacity_factor=1.0)
    found = []
    for threads in (1, 2, 7):
        with on_threads(threads):
            found.append(ours(x, ys, routing, grad_xs, grad_out, "cpu"))
    assert all(torch.equal(value, other[name]) for other in found[1:] for name, value in found[0].items())


def test_inputs_are_not_written(backend):
    (x, ys, grad_xs, grad_out), routing = draw((30, 9, 4, 2), torch.float32, 6, backend.device)
    tensors = [x, ys, grad_xs, grad_out, *routing]
    before = [t.clone() for t in tensors]
    ours(x, ys, routing, grad_xs, grad_out, backend.impl)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors))


def test_autocast_changes_nothing(backend):
    (x, ys, grad_xs, grad_out), routing = draw((30, 9, 4, 2), torch.float32, 6, backend.device)
    plain = ours(x, ys, routing, grad_xs, grad_out, backend.impl)
    with torch.autocast(backend.device, torch.bfloat16):
        cast = ours(x, ys, routing, grad_xs, grad_out, backend.impl)
    assert all(torch.equal(value, cast[name]) for name, value in plain.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(source=[0, 1, 0, 7]), r"source must lie in \[-1, 2\), got 7"),
        (dict(source=[0, 1, 0, -2]), r"source must lie in \[-1, 2\), got -2"),
        (dict(position=[[0, 2], [1, 4]]), r"position must lie in \[-1, 4\), got 4"),
        (dict(position=[[0, 2], [1, -9]]), r"position must lie in \[-1, 4\), got -9"),
        (dict(position=[[0, 2], [1, 2]]), "position must name no row twice, got row 2 again"),
        (dict(position=[[0, 2], [1, -1]]), "source must name a token where position names the row, .* not in row 3"),
        (dict(source=[0, 1, 0, -1]), "source must name a token where position names the row, .* not in row 3"),
        (dict(source=[0, 0, 1, 1]), "source must name token 0 in row 2, where position puts it, got 1"),
    ],
)
def test_maps_that_a_kernel_must_not_follow(change, message, cpu):
    maps = dict(source=[0, 1, 0, 1], position=[[0, 2], [1, 3]])
    maps = {name: torch.tensor(value, dtype=torch.int32) for name, value in {**maps, **change}.items()}
    routing = routed(2, 3, 2)._replace(**maps)
    with pytest.raises(RuntimeError, match=message):
        pyext.moe.dispatch(torch.randn(2, 5), routing, impl="cpu")
    if "lie" in message and "position" in change:
        with pytest.raises(RuntimeError, match=message):
            pyext.moe.combine(torch.randn(4, 5), routing, impl="cpu")
    if "twice" in message:
        ys = torch.randn(4, 5, requires_grad=True)
        with pytest.raises(RuntimeError, match=message):
            pyext.moe.combine(ys, routing, impl="cpu").sum().backward()
