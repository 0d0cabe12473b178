"""pyext.moe.route against loops over tokens: every decision, weight, loss and gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import pyext
from pyext._primitives import POLICIES
from support import moe
from support.moe import Case, check

DTYPES = (torch.float64, torch.float32)
K = {"switch": 1}


def cases():
    for policy in moe.POLICIES:
        k = K.get(policy, 2)
        plain = Case(policy, k=k)
        yield plain
        yield Case(policy, g=None, k=k, masked=True)
        for factor in (0.5, 1.0, 1.3):
            yield Case(policy, k=k, capacity_factor=factor)
            yield Case(policy, k=k, capacity_factor=factor, masked=True, renormalize=True)
        if policy != "expert_choice":
            yield Case(policy, k=k, capacity_factor=0.8, batch_priority=True)
            yield Case(policy, k=k, capacity_factor=0.8, batch_priority=True, masked=True)
        if policy not in K and policy != "gshard":
            yield Case(policy, g=1, s=7, e=5, k=5, capacity_factor=0.6)
            yield Case(policy, s=9, e=7, k=3, renormalize=True)
    for groups, k in (((2, 1), 2), ((3, 2), 3), ((6, 3), 2), ((1, 1), 6), ((4, 3), 5)):
        yield Case("sigmoid", e=12, k=k, groups=groups, biased=True, capacity_factor=1.0)
        yield Case("sigmoid", e=12, k=k, groups=groups, renormalize=True, masked=True)


def draw(case: Case, dtype, seed: int):
    """logits and options."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*case.shape, case.e, generator=generator, dtype=torch.float64) * 2
    return logits.to(dtype).requires_grad_(), case.options(generator)


def run(case: Case, logits, options, seed: int):
    """The routing, and the uniform numbers that it drew."""
    routing = pyext.moe.route(
        logits, case.k, generator=torch.Generator().manual_seed(seed), impl="reference", **options
    )
    shape = (1, *case.shape)[-2:]
    return routing, torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_against_loops(case, dtype, seed):
    logits, options = draw(case, dtype, seed)
    routing, uniform = run(case, logits, options, seed)
    assert routing.weights.dtype == routing.z_loss.dtype == routing.balance_loss.dtype == dtype
    check(case, logits, options, routing, uniform, 1e-11 if dtype == torch.float64 else 2e-5)


@st.composite
def routings(draw):
    policy = draw(st.sampled_from(moe.POLICIES))
    e = draw(st.integers(2 if policy == "gshard" else 1, 9))
    k = {"switch": 1, "gshard": 2}.get(policy) or draw(st.integers(1, e))
    groups = None
    if policy == "sigmoid" and draw(st.booleans()):
        n = draw(st.sampled_from([n for n in range(1, e + 1) if e % n == 0]))
        m = draw(st.integers(1, n))
        assume(m * (e // n) >= k)
        groups = n, m
    return Case(
        policy,
        g=draw(st.sampled_from([None, 1, 2, 3])),
        s=draw(st.integers(0, 12)),
        e=e,
        k=k,
        capacity_factor=draw(st.sampled_from([None, 0.1, 0.5, 1.0, 1.25, 3.0])),
        renormalize=draw(st.booleans()),
        masked=draw(st.booleans()),
        biased=policy == "sigmoid" and draw(st.booleans()),
        groups=groups,
        batch_priority=policy != "expert_choice" and draw(st.booleans()),
    )


@settings(
    max_examples=150,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(case=routings(), seed=st.integers(0, 2**31 - 1))
def test_fuzz(case, seed):
    logits, options = draw(case, torch.float64, seed)
    routing, uniform = run(case, logits, options, seed)
    check(case, logits, options, routing, uniform, 1e-10)


# --- Transformers' routers, on random weights ---


def hidden(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def same_choices(routing, index, weights):
    """The same experts for each token with the same weights, in any order of columns."""
    for ours, theirs in ((routing.expert_index.long(), index), (routing.weights, weights)):
        assert ours.shape == theirs.shape
    experts = int(max(index.max(), routing.expert_index.max())) + 1
    dense = [torch.zeros(len(w), experts, dtype=w.dtype).scatter(1, i, w) for i, w in ((index, weights),)]
    ours = torch.zeros(len(weights), experts, dtype=weights.dtype)
    ours = ours.scatter(1, routing.expert_index.long(), routing.weights.to(weights.dtype))
    torch.testing.assert_close(ours, dense[0], rtol=1e-6, atol=1e-9)
    assert torch.equal(ours > 0, dense[0] > 0)


def test_mixtral():
    from transformers import MixtralConfig
    from transformers.models.mixtral import modeling_mixtral as theirs

    config = MixtralConfig(hidden_size=16, num_local_experts=8, num_experts_per_tok=3)
    router = theirs.MixtralTopKRouter(config).double()
    torch.nn.init.normal_(router.weight)
    logits, weights, index = router(hidden(2, 21, 16))
    for policy in ("softmax_topk", "topk_softmax"):
        routing = pyext.moe.route(logits, 3, policy=policy, renormalize=True)
        assert torch.equal(routing.expert_index.long(), index)
        same_choices(routing, index, weights.double())
    wanted = theirs.load_balancing_loss_func((logits,), 8, 3)
    torch.testing.assert_close(pyext.moe.route(logits, 3).balance_loss, wanted.double(), rtol=1e-6, atol=0)
    mask = torch.rand(2, 21) < 0.6
    wanted = theirs.load_balancing_loss_func((logits,), 8, 3, mask.long())
    got = pyext.moe.route(logits, 3, token_mask=mask.flatten()).balance_loss
    torch.testing.assert_close(got, wanted.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("capacity", [1, 3, 64])
def test_switch(capacity):
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers import modeling_switch_transformers as theirs

    config = SwitchTransformersConfig(hidden_size=16, d_model=16, num_experts=5, expert_capacity=capacity)
    router = theirs.SwitchTransformersTop1Router(config).eval()
    torch.nn.init.normal_(router.classifier.weight)
    index, probability, logits = router(torch.randn(3, 17, 16))
    routing = pyext.moe.route(logits, 1, policy="switch", capacity_factor=capacity * 5 / 17)
    got = torch.nn.functional.one_hot(routing.expert_index.long() + 1, 6)[:, 0, 1:].view(3, 17, 5)
    assert torch.equal(got, index)
    kept = index.sum(-1, keepdim=True) > 0
    torch.testing.assert_close(routing.weights.view(3, 17, 1), probability.masked_fill(~kept, 0.0))
    assert int(routing.dropped) == int((~kept).sum())
    whole = torch.softmax(logits, -1)
    torch.testing.assert_close(routing.z_loss, theirs.router_z_loss_func(logits))
    torch.testing.assert_close(routing.balance_loss, theirs.load_balancing_loss_func(whole, whole.argmax(-1)))


def nllb(**options):
    from transformers import NllbMoeConfig
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router

    options = dict(hidden_size=16, d_model=16, router_dtype="float32", **options)
    config = NllbMoeConfig(normalize_router_prob_before_dropping=True, router_ignore_padding_tokens=False, **options)
    router = NllbMoeTop2Router(config)
    torch.nn.init.normal_(router.classifier.weight)
    return router.train()


def dense(routing, experts):
    """(T, E) of weights, as NLLB's router returns them."""
    index = routing.expert_index.long() + 1
    return torch.zeros(len(index), experts + 1).scatter(1, index, routing.weights)[:, 1:]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("priority", [False, True], ids=["in order", "by priority"])
@pytest.mark.parametrize("capacity", [2, 5, 40])
def test_nllb(capacity, priority, padded):
    """Top 2 with a capacity, every second choice kept."""
    router = nllb(
        num_experts=6, expert_capacity=capacity, second_expert_policy="all", batch_prioritized_routing=priority
    )
    padding = (torch.rand(1, 33) < 0.3) if padded else None
    first, gates, logits = router(torch.randn(33, 16), None if padding is None else padding[0])
    routing = pyext.moe.route(
        logits, 2, renormalize=True, capacity_factor=capacity * 6 / 66, batch_priority=priority,
        token_mask=None if padding is None else ~padding[0],
    )  # fmt: skip
    assert torch.equal(dense(routing, 6) > 0, gates > 0)
    torch.testing.assert_close(dense(routing, 6), gates)
    assert torch.equal(torch.nn.functional.one_hot(routing.expert_index[:, 0].long() + 1, 7)[:, 1:], first)


@pytest.mark.parametrize("capacity", [3, 9, 40])
def test_nllb_random_second_expert(capacity, monkeypatch):
    """Their chance is 2 p2 with p2 not normalised, which for two experts is the same."""
    router = nllb(num_experts=2, expert_capacity=capacity, second_expert_policy="random")
    uniform = torch.rand(40, generator=torch.Generator().manual_seed(capacity))
    x = torch.randn(40, 16)
    with torch.no_grad():
        logits = router.classifier(x)
    monkeypatch.setattr(torch, "rand_like", lambda *_, **__: uniform)
    _, gates = router.route_tokens(logits.clone())
    monkeypatch.undo()
    generator = torch.Generator().manual_seed(capacity)
    routing = pyext.moe.route(logits, 2, policy="gshard", capacity_factor=capacity / 40, generator=generator)
    assert int(routing.dropped) > 0
    torch.testing.assert_close(dense(routing, 2), gates)
    assert torch.equal(dense(routing, 2) > 0, gates > 0)


@pytest.mark.parametrize("normalised", [True, False], ids=["normalised", "plain"])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (8, 3)], ids=str)
def test_deepseek(groups, normalised):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=16, n_routed_experts=32, num_experts_per_tok=5, n_group=groups[0], topk_group=groups[1],
        norm_topk_prob=normalised, routed_scaling_factor=1.0,
    )  # fmt: skip
    router = DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(router.weight, std=0.3)
    router.e_score_correction_bias.normal_(std=0.3)
    logits, weights, index = router(torch.randn(29, 16))
    bias = router.e_score_correction_bias
    routing = pyext.moe.route(
        logits, 5, policy="sigmoid", groups=groups, expert_bias=bias, renormalize=normalised
    )  # fmt: skip
    same_choices(routing, index, weights)


# --- Chance ---


def test_second_experts_are_kept_in_proportion():
    gate = torch.tensor([0.05, 0.2, 0.4])
    logits = torch.stack([torch.log1p(-gate), torch.log(gate)], -1).repeat(20000, 1)
    routing = pyext.moe.route(logits, 2, policy="gshard", generator=torch.Generator().manual_seed(1))
    kept = (routing.expert_index[:, 1] >= 0).view(-1, 3).double().mean(0)
    torch.testing.assert_close(kept, 2 * gate.double(), rtol=0, atol=0.02)
    torch.testing.assert_close(routing.weights[:, 0], (1 - gate).repeat(20000))


@pytest.mark.parametrize(
    "options", [dict(policy="gshard"), dict(jitter=0.3), dict(policy="gshard", jitter=0.3)], ids=str
)
def test_random_numbers_come_from_the_generator(options):
    logits, state = torch.randn(64, 4), torch.get_rng_state()
    first, again, other = (
        pyext.moe.route(logits, 2, generator=torch.Generator().manual_seed(n), **options) for n in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first.weights, other.weights) or not torch.equal(first.expert_index, other.expert_index)
    pyext.moe.route(logits, 2, **options)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("policy", [p for p in moe.POLICIES if p != "gshard"])
def test_nothing_is_drawn_without_need(policy):
    state = torch.get_rng_state()
    pyext.moe.route(torch.randn(9, 4, generator=torch.Generator()), K.get(policy, 2), policy=policy)
    pyext.explain(pyext.moe.route, torch.zeros(9, 4), 2, policy="gshard", jitter=0.5)
    assert torch.equal(torch.get_rng_state(), state)


def test_jitter_is_a_factor_on_the_logits():
    logits = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    noise = torch.rand(1, 11, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))[0]
    got = pyext.moe.route(logits, 2, jitter=0.25, generator=torch.Generator().manual_seed(5))
    wanted = pyext.moe.route(logits * (0.75 + 0.5 * noise), 2)
    assert torch.equal(got.expert_index, wanted.expert_index)
    torch.testing.assert_close(got.weights, wanted.weights)
    torch.testing.assert_close(got.z_loss, wanted.z_loss)
    first, second = (torch.autograd.grad(r.weights.square().sum(), logits)[0] for r in (got, wanted))
    torch.testing.assert_close(first, second)


# --- Edges ---


@pytest.mark.parametrize("policy", moe.POLICIES)
@pytest.mark.parametrize("factor", [None, 1.0])
@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (0, 3, 4), (3, 0, 4), (3, 1, 4)], ids=str)
def test_few_tokens(policy, factor, shape):
    g, s, e = (None, *shape) if len(shape) == 2 else shape
    case = Case(policy, g=g, s=s, e=e, k=K.get(policy, 2), capacity_factor=factor)
    logits, options = draw(case, torch.float64, 3)
    routing, uniform = run(case, logits, options, 3)
    total = routing.weights.sum() + routing.balance_loss + routing.z_loss
    assert torch.autograd.grad(total, logits, retain_graph=True)[0].shape == logits.shape
    check(case, logits, options, routing, uniform)


@pytest.mark.parametrize("policy", [p for p in moe.POLICIES if p != "gshard"])
def test_one_expert(policy):
    logits = torch.randn(7, 1)
    routing = pyext.moe.route(logits, 1, policy=policy, capacity_factor=None)
    assert routing.expert_index.flatten().tolist() == [0] * 7 and routing.source.tolist() == list(range(7))
    weight = logits.sigmoid() if policy == "sigmoid" else torch.ones(7, 1)
    torch.testing.assert_close(routing.weights, weight)


@pytest.mark.parametrize("policy", moe.POLICIES)
def test_many_experts(policy):
    case = Case(policy, g=1, s=40, e=257, k=K.get(policy, 2), capacity_factor=1.0)
    logits, options = draw(case, torch.float64, 4)
    routing, uniform = run(case, logits, options, 4)
    check(case, logits, options, routing, uniform)


@pytest.mark.parametrize("policy", ["softmax_topk", "switch", "sigmoid"])
def test_all_tokens_want_one_expert(policy):
    logits = torch.randn(30, 8)
    logits[:, 5] = 9.0
    routing = pyext.moe.route(logits, 1, policy=policy)
    assert routing.offsets.tolist() == [0] * 6 + [30] * 3
    routing = pyext.moe.route(logits, 1, policy=policy, capacity_factor=2.0)
    assert routing.expert_index[:, 0].tolist() == [5] * 8 + [-1] * 22
    assert int(routing.dropped) == 22 and routing.source.tolist() == list(range(8)) + [-1] * 22


@pytest.mark.parametrize("policy", moe.POLICIES)
def test_ties_go_to_the_lower_index(policy):
    case = Case(policy, g=1, s=6, e=4, k=K.get(policy, 2), capacity_factor=1.0)
    logits = torch.zeros(1, 6, 4, requires_grad=True)
    routing, uniform = run(case, logits, dict(policy=policy, capacity_factor=1.0), 6)
    check(case, logits, {}, routing, uniform, 1e-6)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("policy", moe.POLICIES)
def test_padding_may_hold_anything(policy, garbage):
    case = Case(policy, g=2, s=9, e=5, k=K.get(policy, 2), capacity_factor=1.0, masked=True)
    logits, options = draw(case, torch.float64, 7)
    filled = logits.detach().masked_fill(~options["token_mask"][..., None], garbage).requires_grad_()
    results = []
    for leaf in (logits, filled):
        routing, _ = run(case, leaf, options, 7)
        total = routing.weights.square().sum() + routing.balance_loss + routing.z_loss
        results.append((*routing, *torch.autograd.grad(total, leaf)))
    for clean, dirty in zip(*results):
        assert torch.equal(clean, dirty)


def test_groups_of_padding_do_not_dilute_the_losses():
    logits, mask = torch.randn(3, 8, 4), torch.ones(3, 8, dtype=torch.bool)
    mask[1] = False
    whole = pyext.moe.route(logits, 2, token_mask=mask)
    part = pyext.moe.route(logits[[0, 2]], 2)
    torch.testing.assert_close(whole.balance_loss, part.balance_loss)
    torch.testing.assert_close(whole.z_loss, part.z_loss)


def test_experts_may_be_switched_off():
    logits = torch.randn(12, 6)
    logits[:, [1, 4]] = -torch.inf
    logits.requires_grad_()
    routing = pyext.moe.route(logits, 2)
    assert not torch.isin(routing.expert_index, torch.tensor([1, 4])).any()
    grad = torch.autograd.grad(routing.weights.square().sum() + routing.balance_loss + routing.z_loss, logits)[0]
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("policy", moe.POLICIES)
def test_half_precision_is_computed_in_single(policy, dtype):
    logits = (2 * torch.randn(2, 20, 8)).to(dtype).requires_grad_()
    single = logits.detach().float().requires_grad_()
    results = []
    for leaf in (logits, single):
        generator = torch.Generator().manual_seed(8)
        routing = pyext.moe.route(leaf, K.get(policy, 2), policy=policy, capacity_factor=1.0, generator=generator)
        total = routing.weights.square().sum() + routing.balance_loss + routing.z_loss
        results.append((*routing, torch.autograd.grad(total, leaf)[0]))
    *ours, grad = results[0]
    *wanted, exact = results[1]
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, wanted))
    assert grad.dtype == dtype and torch.equal(grad, exact.to(dtype))


def test_strides_do_not_matter():
    logits = torch.randn(6, 20, 2)[..., 0].t()
    assert all(torch.equal(a, b) for a, b in zip(pyext.moe.route(logits, 2), pyext.moe.route(logits.contiguous(), 2)))


def test_double_backward():
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def call(logits):
        routing = pyext.moe.route(logits, 2, capacity_factor=0.9)
        return routing.weights, routing.balance_loss, routing.z_loss

    torch.autograd.gradgradcheck(call, logits)


# --- torch.compile ---


@pytest.mark.parametrize("policy", moe.POLICIES)
def test_compile(policy):
    def call(logits, mask):
        return pyext.moe.route(logits, K.get(policy, 2), policy=policy, capacity_factor=1.25, token_mask=mask)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    logits, mask = torch.randn(3, 10, 4, requires_grad=True), torch.rand(3, 10) < 0.8
    results = []
    for function in (compiled, call):
        torch.manual_seed(1)
        routing = function(logits, mask)
        assert isinstance(routing, pyext.moe.Routing)
        total = routing.weights.square().sum() + routing.balance_loss + routing.z_loss
        results.append((*routing, torch.autograd.grad(total, logits)[0]))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)


def test_fake_tensors():
    from torch._subclasses import FakeTensorMode

    for policy, factor in itertools.product(moe.POLICIES, (None, 1.0)):
        real = pyext.moe.route(torch.randn(2, 9, 4), K.get(policy, 2), policy=policy, capacity_factor=factor)
        with FakeTensorMode():
            fake = pyext.moe.route(torch.randn(2, 9, 4), K.get(policy, 2), policy=policy, capacity_factor=factor)
        assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]


# --- Refusals ---

L = torch.zeros(6, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (dict(logits=L[0]), ValueError, r"logits must have shape \(T, E\) or \(G, S, E\) with E > 0, got \(4,\)"),
        (dict(logits=L[:, :0]), ValueError, "logits must have shape"),
        (dict(logits=L.int()), TypeError, "logits must be float32"),
        (dict(top_k=0), ValueError, "top_k must be between 1 and 4, the number of experts, got 0"),
        (dict(top_k=5), ValueError, "top_k must be between 1 and 4"),
        (dict(top_k=2.0), TypeError, "top_k must be an int"),
        (dict(policy="switch"), ValueError, "top_k must be 1 with policy='switch', got 2"),
        (dict(policy="gshard", top_k=1), ValueError, "top_k must be 2 with policy='gshard', got 1"),
        (dict(policy="best"), ValueError, "policy must be one of 'softmax_topk', .*, got 'best'"),
        (dict(capacity_factor=0.0), ValueError, "capacity_factor must be positive"),
        (dict(capacity_factor="1"), TypeError, "capacity_factor must be a number"),
        (dict(capacity_factor=torch.tensor(1.0)), TypeError, "capacity_factor must be a number"),
        (dict(renormalize="yes"), TypeError, "renormalize must be a bool"),
        (dict(token_mask=torch.ones(6)), TypeError, r"token_mask must be a bool tensor \(True = a token"),
        (dict(token_mask=torch.ones(4).bool()), ValueError, r"token_mask must have shape \(6,\) to match logits"),
        (dict(expert_bias=torch.zeros(4)), ValueError, "expert_bias must be None with policy='softmax_topk'"),
        (dict(groups=(2, 1)), ValueError, "groups must be None with policy='softmax_topk'"),
        (dict(policy="sigmoid", expert_bias=torch.zeros(3)), ValueError, r"expert_bias must have shape \(4,\)"),
        (dict(policy="sigmoid", groups=3), TypeError, "groups must be"),
        (dict(policy="sigmoid", groups=(3, 1)), ValueError, "groups must divide the 4 experts, got 3 groups"),
        (dict(policy="sigmoid", groups=(4, 1)), ValueError, "groups must leave top_k = 2 or more of the 4 experts"),
        (dict(jitter=2.0), ValueError, "jitter must be between 0 and 1, got 2.0"),
        (dict(generator=3), TypeError, "generator must be a torch.Generator"),
        (dict(policy="expert_choice", batch_priority=True), ValueError, "batch_priority must be False"),
        (dict(impl="fast"), ValueError, "impl must be one of"),
        (dict(logits=torch.zeros(2**30, 4, device="meta")), ValueError, "fewer than 2\\^31 choices"),
    ],
)
def test_refusals(call, error, message):
    call = {"logits": L, "top_k": 2, **call}
    with pytest.raises(error, match=message):
        pyext.moe.route(**call)


@pytest.mark.parametrize("impl", ["cpu", "triton", "cuda"])
def test_forced_backends_say_why(impl):
    name = {"cpu": "CPU", "triton": "Triton", "cuda": "CUDA"}[impl]
    with pytest.raises(NotImplementedError, match=f"pyext.moe.route: .*\n(.*\n)*.*no {name} kernel in this build"):
        pyext.moe.route(L, 2, impl=impl)
    table = pyext.explain(pyext.moe.route, L, 2)
    assert table.auto == "reference" and table.op == "moe.route"
    assert dict(table) == dict(pyext.explain("moe.route", L, 2))


def test_every_policy_is_tested():
    assert moe.POLICIES == POLICIES
