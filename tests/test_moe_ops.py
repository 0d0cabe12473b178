"""The ops of routing, dispatch and combine as PyTorch sees them: opcheck, fakes, torch.compile, checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

import pyext
from pyext._primitives import POLICIES, RouteProblem, acc_dtype
from support import backends, moe

OP = "moe.route"
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
K = {"switch": 1}


def problem(policy, dtype, device, requires_grad=False, capacity=3, groups=2, tokens=5, experts=6) -> RouteProblem:
    logits = torch.randn(groups, tokens, experts, device=device).to(dtype).requires_grad_(requires_grad)
    is_sigmoid = policy == "sigmoid"
    return RouteProblem(
        logits,
        torch.rand(groups, tokens, device=device) < 0.8,
        torch.randn(experts, device=device).to(acc_dtype(dtype)) if is_sigmoid else None,
        torch.rand(groups, tokens, device=device) if policy == "gshard" else None,
        POLICIES.index(policy),
        K.get(policy, 2),
        capacity,
        groups=3 if is_sigmoid else 1,
        top_groups=2 if is_sigmoid else 1,
    )


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_opcheck_of_routing(policy, dtype, requires_grad, family):
    if family.refuses(dtype):
        pytest.skip("computes in fp32")
    for capacity in (3, 0 if policy == "expert_choice" else -1):
        arguments = problem(policy, dtype, family.device, requires_grad, capacity)
        # With a gradient its last test adds up all results in place, first of all integers: see test_compile for that.
        tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        operator = family.operators.moe_route_forward.default
        torch.library.opcheck(operator, tuple(arguments), test_utils=tests[: 3 if requires_grad else 4])
    found = family.operators.moe_route_forward(*arguments._replace(logits=arguments.logits.detach()))
    grads = torch.randn_like(found[1]), torch.randn_like(found[5]), torch.randn_like(found[6])
    rest = arguments.logits.detach(), arguments.token_mask, found[0], found[8], found[9], arguments.policy, False
    for given in (grads, (None, grads[1], None)):
        torch.library.opcheck(family.operators.moe_route_backward.default, (*given, *rest))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_of_dispatch_and_combine(dtype, requires_grad, family):
    if family.refuses(dtype):
        pytest.skip("computes in fp32")
    ops = family.operators
    routing = pyext.moe.route(torch.randn(9, 4), 2, capacity_factor=0.8, impl="reference")
    weights = routing.weights.to(acc_dtype(dtype)).requires_grad_(requires_grad)
    x, ys, grad = (
        torch.randn(n, 7).to(dtype).requires_grad_(requires_grad) for n in (9, len(routing.source), 9)
    )  # fmt: skip
    torch.library.opcheck(ops.moe_dispatch_forward.default, (x, routing.source, routing.position))
    for w in (weights, None):
        torch.library.opcheck(ops.moe_combine_forward.default, (ys, w, routing.position))
        for needs in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(ops.moe_combine_backward.default, (grad, ys, w, routing.position, *needs))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("factor", [None, 1.25])
def test_compile(factor, dynamic, family):
    if family.impl != "cpu":
        pytest.skip("the compiler is shown no interpreter")
    torch._dynamo.reset()

    def call(logits, x):
        routing = pyext.moe.route(logits, 2, renormalize=True, capacity_factor=factor, impl=family.impl)
        xs = pyext.moe.dispatch(x, routing, impl=family.impl)
        return pyext.moe.combine(xs * xs, routing, impl=family.impl), routing.balance_loss

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (12, 20, 7) if dynamic else (12,):
        inputs = [torch.randn(tokens, n, requires_grad=True) for n in (4, 6)]
        results = []
        for function in (compiled, call):
            out, loss = function(*inputs)
            results.append((out, *torch.autograd.grad(out.square().sum() + loss, inputs)))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results))


def test_meta_tensors_find_the_shapes():
    """Without a device there is the reference, and what it makes has the shapes of the kernels."""
    for policy in POLICIES:
        real = pyext.moe.route(torch.randn(2, 9, 4), K.get(policy, 2), policy=policy, capacity_factor=1.0)
        meta = pyext.moe.route(
            torch.randn(2, 9, 4, device="meta"), K.get(policy, 2), policy=policy, capacity_factor=1.0
        )
        assert [(x.shape, x.dtype) for x in meta] == [(x.shape, x.dtype) for x in real]


@pytest.mark.parametrize("policy", POLICIES)
def test_fakes_are_like_the_results(policy, family):
    for capacity in (-1 if policy != "expert_choice" else 0, 2, 100):
        arguments = problem(policy, torch.float32, family.device, capacity=capacity)
        real = family.operators.moe_route_forward(*arguments)
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
            fake = family.operators.moe_route_forward(*fake)
        assert [(x.shape, x.dtype, x.stride()) for x in fake] == [(x.shape, x.dtype, x.stride()) for x in real]


def test_checkpointing(family):
    def block(logits, x):
        routing = pyext.moe.route(logits, 2, impl=family.impl)
        return pyext.moe.combine(pyext.moe.dispatch(x, routing, impl=family.impl), routing, impl=family.impl)

    inputs = torch.randn(9, 4, requires_grad=True), torch.randn(9, 5, requires_grad=True)
    wanted = torch.autograd.grad(block(*inputs).square().sum(), inputs)
    out = torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out.square().sum(), inputs), wanted))


def test_transforms_are_left_to_the_reference():
    logits = torch.randn(5, 4)
    gradient = torch.func.grad(lambda x: pyext.moe.route(x, 2).weights.square().sum())(logits)
    leaf = logits.requires_grad_()
    wanted = torch.autograd.grad(pyext.moe.route(leaf, 2).weights.square().sum(), leaf)[0]
    torch.testing.assert_close(gradient, wanted)
    with pytest.raises(NotImplementedError, match="the CPU kernels do not support torch.func transforms"):
        torch.func.grad(lambda x: pyext.moe.route(x, 2, impl="cpu").weights.sum())(logits)


L, B, U = torch.randn(2, 3, 4), torch.randn(4), torch.rand(2, 3)
M = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(logits=L[0]), r"logits must have shape \(G, S, E\)"),
        (dict(logits=L[..., :0]), r"logits must have shape \(G, S, E\) with E > 0"),
        (dict(token_mask=M[:1]), r"token_mask must be a bool tensor \(G, S\)"),
        (dict(token_mask=M.int()), "token_mask must be a bool tensor"),
        (dict(policy=6), "policy must be an index into POLICIES"),
        (dict(top_k=0), r"top_k must be in \[1, E\]"),
        (dict(top_k=5), r"top_k must be in \[1, E\]"),
        (dict(policy=3, uniform=U, top_k=1), "top_k must be in"),
        (dict(policy=3), "uniform must be given for gshard"),
        (dict(uniform=U), "uniform must be given for gshard, and only there"),
        (dict(policy=3, uniform=U[:1]), r"uniform must have shape \(G, S\)"),
        (dict(policy=3, uniform=U.double()), "uniform must have shape .* in fp32"),
        (dict(policy=4, expert_bias=B[:3]), r"expert_bias must have shape \(E,\)"),
        (dict(policy=4, expert_bias=B.double()), "expert_bias must have shape .* in the accumulation dtype"),
        (dict(policy=4, groups=3), "groups must divide E"),
        (dict(policy=4, groups=2, top_groups=3), "groups must divide E"),
        (dict(capacity=-2), "capacity must be positive, or -1"),
        (dict(policy=5), "capacity must be positive"),
    ],
)
def test_routing_protects_memory(change, message, cpu_best):
    arguments = RouteProblem(L, policy=0, top_k=2)._replace(**change)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pyext.moe_route_forward(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(choice=torch.full((6, 2), 4, dtype=torch.int32)), r"choice must lie in \[-1, 4\), got 4"),
        (dict(choice=torch.zeros(6, 3, dtype=torch.int32)), r"expert_index and choice must have shape \(T, K\)"),
        (dict(expert_index=torch.zeros(5, 2, dtype=torch.int32)), "expert_index and choice must have shape"),
        (dict(expert_index=torch.zeros(6, 2)), "expert_index must be int32"),
        (dict(load=torch.zeros(2, 3, dtype=torch.int32)), r"load must have shape \(G, E\)"),
        (dict(grad_weights=torch.zeros(6, 3)), "grad_weights must match expert_index"),
        (dict(grad_balance=torch.zeros(2)), "the gradient of a loss must be one number"),
        (dict(grad_z=torch.zeros((), dtype=torch.float64)), "the gradient of a loss must be one number"),
        (dict(policy=5), "expert_index must have E columns"),
    ],
)
def test_the_derivative_of_routing_protects_memory(change, message, cpu_best):
    _, _, _, _, _, _, _, _, choice, load = torch.ops.pyext.moe_route_forward(*RouteProblem(L, top_k=2))
    arguments = dict(
        grad_weights=torch.zeros(6, 2), grad_balance=torch.zeros(()), grad_z=None, logits=L, token_mask=None,
        expert_index=choice, choice=choice, load=load, policy=0, renormalize=False,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pyext.moe_route_backward(*{**arguments, **change}.values())


X, S, P = torch.randn(3, 5), torch.arange(3, dtype=torch.int32), torch.arange(3, dtype=torch.int32)[:, None]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op.moe_dispatch_forward(X[0], S, P), "x must be a matrix of 3 rows"),
        (lambda op: op.moe_dispatch_forward(X[:2], S, P), "x must be a matrix of 3 rows"),
        (lambda op: op.moe_dispatch_forward(X, S.long(), P), "source must be int32"),
        (lambda op: op.moe_dispatch_forward(X, P, P), "source must have one dimension"),
        (lambda op: op.moe_combine_forward(X[0], None, P), "must have two dimensions"),
        (lambda op: op.moe_combine_forward(X, None, P.long()), "position must be int32"),
        (lambda op: op.moe_combine_forward(X[:2], None, P), r"position must lie in \[-1, 2\), got 2"),
        (lambda op: op.moe_combine_forward(X, torch.ones(3, 2), P), "weights must match position"),
        (lambda op: op.moe_combine_forward(X, torch.ones(3, 1).double(), P), "in the accumulation dtype"),
        (lambda op: op.moe_combine_backward(X[:2], X, None, P, True, True), "grad must be a matrix of 3 rows"),
        (lambda op: op.moe_combine_backward(X[:, :4], X, None, P, True, True), "grad must match ys"),
        (lambda op: op.moe_combine_backward(X.half(), X, None, P, True, True), "grad must match ys"),
    ],
)
def test_dispatch_and_combine_protect_memory(call, message, cpu_best):
    with pytest.raises(RuntimeError, match=message):
        call(torch.ops.pyext)


def test_every_policy_is_tested():
    assert moe.POLICIES == POLICIES and backends.of(OP)
