"""pyext.moe.route against loops over tokens: every decision, weight, loss and gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import pyext
from pyext._primitives import POLICIES
from support import backends, moe
from support.cases import on_threads
from support.examples import examples
from support.moe import Case, check

OP = "moe.route"
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


def draw(case: Case, dtype, seed: int, device="cpu"):
    """logits and options."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*case.shape, case.e, generator=generator, dtype=torch.float64, device="cpu") * 2
    options = case.options(generator)
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return logits.to(device, dtype).requires_grad_(), options


def run(case: Case, logits, options, seed: int, impl: str):
    """The routing, and the uniform numbers that it drew."""
    first, again = (torch.Generator(logits.device).manual_seed(seed) for _ in range(2))
    routing = pyext.moe.route(logits, case.k, generator=first, impl=impl, **options)
    return routing, torch.rand((1, *case.shape)[-2:], generator=again, device=logits.device)


def check_case(case: Case, dtype, backend, seed: int, tolerance: float = 1e-11):
    dtype = backend.widest if backend.refuses(dtype) else dtype
    logits, options = draw(case, dtype, seed, backend.device)
    routing, uniform = run(case, logits, options, seed, backend.impl)
    check(case, logits, options, routing, uniform, tolerance if dtype == torch.float64 else 2e-5)
    return routing


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_against_loops(case, dtype, backend, session_seed):
    if backend.refuses(dtype):
        pytest.skip("computes in fp32")
    routing = check_case(case, dtype, backend, session_seed)
    assert routing.weights.dtype == routing.z_loss.dtype == routing.balance_loss.dtype == dtype


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


@examples(150)
@given(case=routings(), seed=st.integers(0, 2**31 - 1))
def test_fuzz(case, seed):
    for backend in backends.of(OP):
        with backend.selected():
            check_case(case, torch.float64, backend, seed, 1e-10)


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
def test_few_tokens(policy, factor, shape, backend):
    g, s, e = (None, *shape) if len(shape) == 2 else shape
    case = Case(policy, g=g, s=s, e=e, k=K.get(policy, 2), capacity_factor=factor)
    logits, options = draw(case, backend.widest, 3, backend.device)
    routing, _ = run(case, logits, options, 3, backend.impl)
    total = routing.weights.sum() + routing.balance_loss + routing.z_loss
    assert torch.autograd.grad(total, logits)[0].shape == logits.shape
    check_case(case, torch.float64, backend, 3)


@pytest.mark.parametrize("policy", [p for p in moe.POLICIES if p != "gshard"])
def test_one_expert(policy, backend):
    logits = torch.randn(7, 1)
    routing = pyext.moe.route(logits, 1, policy=policy, capacity_factor=None, impl=backend.impl)
    assert routing.expert_index.flatten().tolist() == [0] * 7 and routing.source.tolist() == list(range(7))
    weight = logits.sigmoid() if policy == "sigmoid" else torch.ones(7, 1)
    torch.testing.assert_close(routing.weights, weight)


@pytest.mark.parametrize("policy", moe.POLICIES)
@pytest.mark.parametrize("k", [2, 9, 40, 257])
def test_many_experts(policy, k, backend, session_seed):
    """More choices than a vector has lanes, up to all; fp32 has twice as many lanes."""
    if K.get(policy, 2) != k and policy in ("switch", "gshard"):
        k = K.get(policy, 2)
    case = Case(policy, g=1, s=20, e=257, k=k, capacity_factor=1.0)
    for dtype in DTYPES:
        check_case(case, dtype, backend, session_seed)


@pytest.mark.parametrize("e", [1, 2, 8, 15, 16, 17, 31, 32, 33, 40, 64, 100, 300])
def test_any_number_of_experts(e, backend, session_seed):
    for k in {1, min(e, 3), min(e, 16), e}:
        for dtype in DTYPES:
            check_case(Case("softmax_topk", g=1, s=7, e=e, k=k), dtype, backend, session_seed)


@pytest.mark.parametrize("e", [5, 16, 40, 128, 1000, 4096])
@pytest.mark.parametrize("order", ["equal", "rising", "falling", "by lane", "few values"])
def test_orders_that_are_hard_to_filter(order, e, backend, seed):
    """Whatever the order of the logits, the best are found, the first of equal ones first."""
    place = torch.arange(e)
    logits = {
        "equal": torch.zeros(e), "rising": place * 0.01, "falling": place * -0.01,
        "by lane": -(place % 16) - place * 1e-4,
        "few values": torch.randint(5, (e,), generator=torch.Generator().manual_seed(seed)),
    }[order].float()  # fmt: skip
    for k in (k for k in (1, 5, 16, 33, 200) if k <= e):
        routing = pyext.moe.route(logits[None], k, impl=backend.impl)
        wanted = torch.sort(logits, descending=True, stable=True).indices[:k]
        assert torch.equal(routing.expert_index[0].long(), wanted)


@pytest.mark.parametrize("policy", ["softmax_topk", "switch", "sigmoid"])
def test_all_tokens_want_one_expert(policy, backend):
    logits = torch.randn(30, 8)
    logits[:, 5] = 9.0
    routing = pyext.moe.route(logits, 1, policy=policy, impl=backend.impl)
    assert routing.offsets.tolist() == [0] * 6 + [30] * 3
    routing = pyext.moe.route(logits, 1, policy=policy, capacity_factor=2.0, impl=backend.impl)
    assert routing.expert_index[:, 0].tolist() == [5] * 8 + [-1] * 22
    assert int(routing.dropped) == 22 and routing.source.tolist() == list(range(8)) + [-1] * 22


@pytest.mark.parametrize("policy", moe.POLICIES)
def test_ties_go_to_the_lower_index(policy, backend):
    for e in (4, 40):
        case = Case(policy, g=1, s=6, e=e, k=K.get(policy, 2), capacity_factor=1.0)
        logits = torch.zeros(1, 6, e, requires_grad=True)
        routing, uniform = run(case, logits, dict(policy=policy, capacity_factor=1.0), 6, backend.impl)
        check(case, logits, {}, routing, uniform, 1e-6)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("policy", moe.POLICIES)
def test_padding_may_hold_anything(policy, garbage, backend):
    case = Case(policy, g=2, s=9, e=5, k=K.get(policy, 2), capacity_factor=1.0, masked=True)
    logits, options = draw(case, backend.widest, 7, backend.device)
    filled = logits.detach().masked_fill(~options["token_mask"][..., None], garbage).requires_grad_()
    results = []
    for leaf in (logits, filled):
        routing, _ = run(case, leaf, options, 7, backend.impl)
        total = routing.weights.square().sum() + routing.balance_loss + routing.z_loss
        results.append((*routing, *torch.autograd.grad(total, leaf)))
    for clean, dirty in zip(*results):
        assert torch.equal(clean, dirty)


def test_groups_of_padding_do_not_dilute_the_losses(backend):
    logits, mask = torch.randn(3, 8, 4), torch.ones(3, 8, dtype=torch.bool)
    mask[1] = False
    whole = pyext.moe.route(logits, 2, token_mask=mask, impl=backend.impl)
    part = pyext.moe.route(logits[[0, 2]], 2, impl=backend.impl)
    torch.testing.assert_close(whole.balance_loss, part.balance_loss)
    torch.testing.assert_close(whole.z_loss, part.z_loss)


def test_experts_may_be_switched_off(backend):
    logits = torch.randn(12, 6)
    logits[:, [1, 4]] = -torch.inf
    logits.requires_grad_()
    routing = pyext.moe.route(logits, 2, impl=backend.impl)
    assert not torch.isin(routing.expert_index, torch.tensor([1, 4])).any()
    grad = torch.autograd.grad(routing.weights.square().sum() + routing.balance_loss + routing.z_loss, logits)[0]
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("policy", moe.POLICIES)
def test_half_precision_is_computed_in_single(policy, dtype, backend):
    logits = (2 * torch.randn(2, 20, 8)).to(dtype).requires_grad_()
    single = logits.detach().float().requires_grad_()
    results = []
    for leaf in (logits, single):
        options = dict(capacity_factor=1.0, generator=torch.Generator(leaf.device).manual_seed(8), impl=backend.impl)
        routing = pyext.moe.route(leaf, K.get(policy, 2), policy=policy, **options)
        total = routing.weights.square().sum() + routing.balance_loss + routing.z_loss
        results.append((*routing, torch.autograd.grad(total, leaf)[0]))
    *ours, grad = results[0]
    *wanted, exact = results[1]
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, wanted))
    assert grad.dtype == dtype and torch.equal(grad, exact.to(dtype))


def test_strides_do_not_matter(backend):
    spread = torch.full((3, 7, 2, 6, 2), torch.nan)
    spread[:, :, 0, :, 1] = torch.randn(3, 7, 6)
    wanted = pyext.moe.route(spread[:, :, 0, :, 1].contiguous(), 2, impl=backend.impl)
    rows = torch.randn(3, 7, 9)
    rows[..., :6] = spread[:, :, 0, :, 1]
    for logits in (spread[:, :, 0, :, 1], rows[..., :6], wanted_order(spread[:, :, 0, :, 1])):
        got = pyext.moe.route(logits, 2, impl=backend.impl)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted))


def wanted_order(x):
    """The same numbers with tokens inside groups in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def test_inputs_are_not_written(backend):
    case = Case("sigmoid", masked=True, biased=True, capacity_factor=0.7)
    logits, options = draw(case, backend.widest, 9, backend.device)
    before = logits.detach().clone(), {n: x.clone() for n, x in options.items() if isinstance(x, torch.Tensor)}
    routing, _ = run(case, logits, options, 9, backend.impl)
    torch.autograd.grad(routing.weights.sum() + routing.z_loss, logits)
    assert torch.equal(before[0], logits) and all(torch.equal(x, options[n]) for n, x in before[1].items())


@pytest.mark.parametrize("policy", moe.POLICIES)
def test_same_bits_at_any_number_of_threads(policy, cpu):
    results = []
    for threads in (1, 2, 7):
        with on_threads(threads):
            leaf = torch.randn(2, 1500, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
            options = dict(capacity_factor=0.9, renormalize=True, impl="cpu", generator=torch.Generator())
            options["batch_priority"] = policy == "topk_softmax"
            routing = pyext.moe.route(leaf, K.get(policy, 2), policy=policy, **options)
            total = routing.weights.square().sum() + routing.balance_loss + routing.z_loss
            results.append((*routing, *torch.autograd.grad(total, leaf)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("policy", moe.POLICIES)
def test_many_tokens_against_the_reference(policy, cpu):
    """Several blocks of tokens in a group, and of rows; in fp64, where no two scores are nearly equal."""
    logits = 2 * torch.randn(2, 1300, 24, dtype=torch.float64)
    options = dict(policy=policy, capacity_factor=0.9, token_mask=torch.rand(2, 1300) < 0.9)
    options["batch_priority"] = policy in ("softmax_topk", "sigmoid")
    results = []
    for impl in ("reference", "cpu"):
        leaf = logits.clone().requires_grad_()
        generator = torch.Generator().manual_seed(2)
        routing = pyext.moe.route(leaf, K.get(policy, 2), impl=impl, generator=generator, **options)
        total = routing.weights.square().sum() + routing.balance_loss + routing.z_loss
        results.append((*routing, *torch.autograd.grad(total, leaf)))
    for name, wanted, got in zip((*pyext.moe.Routing._fields, "grad"), *results):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("policy", moe.POLICIES)
def test_logits_that_are_no_numbers_spoil_their_token_only(policy, value, backend):
    logits = torch.randn(9, 20)
    routed = []
    for spoiled in (False, True):
        logits = logits.clone()
        if spoiled:
            logits[4, 7:9] = value
            logits[5] = value
        options = dict(generator=torch.Generator(logits.device), impl=backend.impl)
        routed.append(pyext.moe.route(logits, K.get(policy, 2), policy=policy, **options))
    clean, dirty = routed
    index = dirty.expert_index[dirty.expert_index >= 0]
    assert ((index >= 0) & (index < 20)).all() and int(dirty.offsets[-1]) == len(index)
    if policy != "expert_choice":
        others = torch.arange(9)[[0, 1, 2, 3, 6, 7, 8]]
        assert torch.equal(clean.expert_index[others], dirty.expert_index[others])
        assert torch.equal(clean.weights[others], dirty.weights[others])


def test_kernels_have_no_second_derivative(kernel):
    logits = torch.randn(5, 4, requires_grad=True)
    weights = pyext.moe.route(logits, 2, impl=kernel.impl).weights
    (grad,) = torch.autograd.grad(weights.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="pyext.moe.route: the kernels have no second derivative"):
        grad.sum().backward()


def test_double_backward():
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def call(logits):
        routing = pyext.moe.route(logits, 2, capacity_factor=0.9, impl="reference")
        return routing.weights, routing.balance_loss, routing.z_loss

    torch.autograd.gradgradcheck(call, logits)


def test_gradients_that_nobody_asks_for(backend):
    logits = torch.randn(5, 4, requires_grad=True)
    routing = pyext.moe.route(logits, 2, impl=backend.impl)
    parts = [routing.weights.sum(), routing.balance_loss, routing.z_loss]
    alone = [torch.autograd.grad(part, logits, retain_graph=True)[0] for part in parts]
    together = torch.autograd.grad(sum(parts), logits)[0]
    torch.testing.assert_close(sum(alone), together)
    assert not any(x.requires_grad for x in (routing.expert_index, routing.offsets, routing.dropped))
    assert not pyext.moe.route(logits.detach(), 2, impl=backend.impl).weights.requires_grad


def test_autocast_changes_nothing(backend):
    logits = torch.randn(9, 4)
    plain = pyext.moe.route(logits, 2, impl=backend.impl)
    with torch.autocast(backend.device, torch.bfloat16):
        cast = pyext.moe.route(logits, 2, impl=backend.impl)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast))


# --- torch.compile ---


@pytest.mark.parametrize("policy", moe.POLICIES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(policy, dynamic, backend):
    if backend not in (*backends.ALL[:1], *backends.CPU[-1:]):
        pytest.skip("does not depend on the instruction set; the compiler is shown no emulator")
    torch._dynamo.reset()

    def call(logits, mask):
        options = dict(policy=policy, capacity_factor=1.25, token_mask=mask, impl=backend.impl)
        return pyext.moe.route(logits, K.get(policy, 2), **options)

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (10, 7, 12) if dynamic else (10,):
        logits, mask = torch.randn(3, tokens, 4, requires_grad=True), torch.rand(3, tokens) < 0.8
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


def test_forced_backends_say_why(cpu):
    with pytest.raises(NotImplementedError, match="pyext.moe.route: impl='cpu' refuses .*\n(.*\n)*.*are on meta"):
        pyext.moe.route(L.to("meta"), 2, impl="cpu")
    table = pyext.explain(pyext.moe.route, L, 2)
    assert table.auto == "cpu" and table.op == "moe.route"
    assert dict(table) == dict(pyext.explain("moe.route", L, 2))


def test_every_policy_is_tested():
    assert moe.POLICIES == POLICIES
