"""The ops of layers of experts: opcheck, fakes, saved memory, single gradients, what they refuse, and their bits."""

from __future__ import annotations

import pytest
import torch

import pyext
from pyext._primitives import EXPERT_ACTIVATIONS
from support.cases import dtype_name, on_threads
from support.expert_layers import NAMES, gradients, layer, routed, routed_by, whole

OP = "moe.forward"
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def drawn(activation="swiglu", dtype=torch.float32, requires_grad=False, bias=True, t=11, device="cpu"):
    """Arguments of moe_forward but for `save`, and the routing."""
    leaves = layer(t, 6, 5, 3, 7, activation=activation, dtype=dtype, bias=bias, device=device)
    weights = torch.promote_types(dtype, torch.float32)
    mask = torch.arange(t, device="cpu") != 4
    routing = routed(t, 3, dtype=weights, token_mask=mask, device=device)
    tensors = [x if x is None else x.detach().requires_grad_(requires_grad) for x in leaves.values()]
    weights = routing.weights.detach().requires_grad_(requires_grad)
    maps = (routing.offsets, routing.source, routing.position)
    return (*tensors, weights, *maps, EXPERT_ACTIVATIONS.index(activation)), routing


def arguments_of(name, call, save):
    """Those of another op of the family, made of moe_forward's; save None: there is no such argument."""
    x, w_gate_up, w_down, b_gate_up, b_down, weights, offsets, source, position, activation = call
    if name == "moe_forward":
        return *call, save
    xs = x.detach()[source.long().clamp(min=0)].requires_grad_(x.requires_grad)
    if name == "moe_experts_forward":
        return xs, w_gate_up, w_down, b_gate_up, b_down, offsets, activation, save
    return xs, w_gate_up, b_gate_up, offsets


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("activation", ["geglu", "silu"])
@pytest.mark.parametrize("name", ["moe_forward", "moe_experts_forward", "moe_grouped_linear_forward"])
def test_opcheck(name, activation, dtype, requires_grad, family):
    if family.refuses(dtype):
        pytest.skip("it refuses this dtype")
    for t, bias in ((11, True), (0, False)):
        call, _ = drawn(activation, dtype, requires_grad, bias, t, family.device)
        for save in (False, True):
            torch.library.opcheck(getattr(family.operators, name).default, arguments_of(name, call, save))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("needs", [(True,) * 6, (False, True, False, True, False, True)], ids=str)
def test_opcheck_of_backwards(needs, dtype, family):
    if family.refuses(dtype):
        pytest.skip("it refuses this dtype")
    ops, (call, _) = family.operators, drawn("gelu", dtype, device=family.device)
    x, w_gate_up, w_down, _, b_down, weights, *maps, activation = call
    out, pre = ops.moe_forward(*call, True)
    grad = torch.randn_like(out)
    torch.library.opcheck(
        ops.moe_backward.default, (grad, x, pre, w_gate_up, w_down, b_down, weights, *maps, activation, *needs)
    )
    xs, *rest = arguments_of("moe_experts_forward", call, True)
    ys, pre = ops.moe_experts_forward(xs, *rest)
    arguments = (torch.randn_like(ys), xs, pre, w_gate_up, w_down, maps[0], activation, *needs[:5])
    torch.library.opcheck(ops.moe_experts_backward.default, arguments)
    arguments = (torch.randn_like(pre), xs, w_gate_up, maps[0], *needs[:3])
    torch.library.opcheck(ops.moe_grouped_linear_backward.default, arguments)


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_saved_bytes(activation, kernel):
    """x, the pre-activations and the routing, besides the weights and biases, which are there anyway."""
    leaves = layer(64, 32, 24, 4, activation=activation, dtype=torch.float32, device=kernel.device)
    routing, saved = routed(64, 4, dtype=torch.float32, device=kernel.device), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        whole(leaves, routing, activation, impl=kernel.impl)
    given = {leaf.data_ptr() for name, leaf in leaves.items() if name != "x"}
    bytes_saved = sum(t.nbytes for t in saved.values() if t.data_ptr() not in given)
    pre = len(routing.source) * leaves["w_gate_up"].shape[1] * 4
    maps = sum(getattr(routing, name).nbytes for name in ("weights", "offsets", "source", "position"))
    assert bytes_saved <= leaves["x"].nbytes + pre + maps


@pytest.mark.parametrize("activation", ["geglu", "silu"])
@pytest.mark.parametrize("name", NAMES)
def test_each_gradient_alone(name, activation, kernel, seed):
    """What is not wanted is not computed; what is, is the same as among others."""
    leaves = layer(19, 20, 17, 3, 12, activation=activation, dtype=torch.float32, seed=seed, device=kernel.device)
    routing = routed(19, 3, dtype=torch.float32, seed=seed, device=kernel.device)
    out, named = whole(leaves, routing, activation, impl=kernel.impl)
    grad = torch.randn(out.shape)
    everything = gradients(out, named, grad)
    fixed = {key: leaf.detach().requires_grad_(key == name) for key, leaf in leaves.items()}
    weights = routing.weights.detach().requires_grad_(name == "weights")
    out, named = whole(fixed, routing._replace(weights=weights), activation, impl=kernel.impl)
    assert torch.equal(gradients(out, {name: named[name]}, grad)[name], everything[name])


# --- Bits ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("t", [3, 200, 1500])
def test_deterministic_at_any_thread_count(t, dtype, cpu, seed):
    torch.use_deterministic_algorithms(False)
    leaves, routing = layer(t, 40, 50, 5, dtype=dtype, seed=seed), routed(t, 5, dtype=torch.float32, seed=seed)
    grad, first = torch.randn(t, 40).to(dtype), None
    for threads in (1, 2, 5):
        with on_threads(threads):
            results = gradients(*whole(leaves, routing, "swiglu", impl="cpu"), grad)
        first = first or results
        assert all(torch.equal(first[name], results[name]) for name in first), threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("counts", [(7, 7), (9, 40), (70, 600)], ids=str)
def test_rows_do_not_depend_on_their_neighbours(counts, dtype, cpu, seed):
    """A row of an expert has the same bits whatever rows are beside it, and wherever among them it is. (Up to 64 are
    summed in another order than more.)"""
    few, many = counts
    leaves = layer(many, 33, 20, 2, dtype=dtype, seed=seed)
    grad = torch.randn(many, 33).to(dtype)

    def call(tokens, experts):
        part = {**leaves, "x": leaves["x"].detach()[tokens].requires_grad_()}
        routing = routed_by(experts, 2, torch.float32)
        weights = torch.ones_like(routing.weights).requires_grad_()
        found = gradients(*whole(part, routing._replace(weights=weights), "geglu", impl="cpu"), grad[tokens])
        return [found[name] for name in ("out", "x", "weights")]

    everything = call(torch.arange(many), [1] * many)
    chosen = torch.randperm(many)[:few]
    among = call(chosen, [1] * few)
    for one, other in zip(everything, among):
        assert torch.equal(one[chosen], other)


@pytest.mark.parametrize("counts", [(700, 30), (40, 1500)], ids=str)
def test_experts_do_not_depend_on_each_other(counts, cpu, seed):
    """The bits of an expert's gradients are those of the layer in which all others have no rows."""
    leaves = layer(sum(counts), 20, 17, 2, dtype=torch.float32, seed=seed)
    experts = torch.tensor([0] * counts[0] + [1] * counts[1])
    grad = torch.randn(sum(counts), 20)

    def call(tokens):
        part = {**leaves, "x": leaves["x"].detach()[tokens].requires_grad_()}
        routing = routed_by(experts[tokens].tolist(), 2, torch.float32)
        weights = torch.ones_like(routing.weights).requires_grad_()
        return gradients(*whole(part, routing._replace(weights=weights), "swiglu", impl="cpu"), grad[tokens])

    both = call(torch.arange(sum(counts)))
    for expert in range(2):
        alone = call((experts == expert).nonzero()[:, 0])
        for name in ("w_gate_up", "w_down", "b_gate_up", "b_down"):
            assert torch.equal(both[name][expert], alone[name][expert]), name
            assert not alone[name][1 - expert].any(), name


# --- Refusals: what Python cannot check without a sync, or checks first, the ops themselves refuse too ---


def change(position, value):
    def apply(call):
        new = call[position].clone()
        new.view(-1)[0 if call[position].dim() > 1 else 1] = value
        return *call[:position], new, *call[position + 1 :]

    return apply


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (change(6, -1), "offsets must rise"),
        (change(6, 99), "offsets must rise"),
        (change(7, 11), "source must hold indices of tokens"),
        (change(7, -2), "source must hold indices of tokens"),
        (change(8, 22), "position must hold indices of rows"),
        (change(8, -2), "position must hold indices of rows"),
        (lambda call: change(8, int(call[8][3, 0]))(call), "position must hold each row of an expert once"),
        (lambda call: (*call[:6], call[6].long(), *call[7:]), r"offsets must be \(E \+ 1,\) int32"),
        (lambda call: (*call[:8], call[8][:5], *call[9:]), r"position must be \(T, K\) int32"),
        (lambda call: (*call[:5], call[5].double(), *call[6:]), r"weights must be \(T, K\)"),
        (lambda call: (*call[:9], 8), "index into EXPERT_ACTIVATIONS"),
        (lambda call: (call[0][:, :5], *call[1:]), "to match xs"),
        (lambda call: (*call[:2], call[2][:, :, :4], *call[3:]), "w_down must be"),
        (lambda call: (*call[:3], call[3][:, :4], *call[4:]), "a bias must have an element"),
        (lambda call: (call[0].double(), *call[1:]), "to match xs"),
    ],
)
def test_the_ops_protect_memory(changed, message, cpu_best):
    call, _ = drawn()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pyext.moe_forward(*changed(call), True)


def test_routing_made_by_hand(cpu_best):
    """Indices out of range raise at the public function too."""
    leaves, routing = layer(6, 4, 3, 3), routed(6, 3)
    for field, value in (("source", 6), ("position", 12), ("offsets", 13)):
        wrong = getattr(routing, field).clone()
        wrong.view(-1)[-1] = value
        with pytest.raises(RuntimeError, match=f"{field} must"):
            whole(leaves, routing._replace(**{field: wrong}), "swiglu", impl="cpu")


def test_double_backward_says_that_there_is_none(cpu_best):
    leaves, routing = layer(6, 4, 3, 3), routed(6, 3)
    out = pyext.moe.forward(leaves["x"], routing, leaves["w_gate_up"], leaves["w_down"], impl="cpu")
    (grad,) = torch.autograd.grad(out.square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
