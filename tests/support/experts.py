"""What each process of the tests of `ExpertParallel` runs: every case against one process that has everything."""

from __future__ import annotations

import copy
import traceback
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

LEAVES = ("w_gate_up", "w_down", "b_gate_up", "b_down")


@dataclass(frozen=True)
class Case:
    """One layer, of whose `tokens` each process has a range; `groups` of as many each, if there are any."""

    policy: str = "softmax_topk"
    experts: int = 5
    top_k: int = 2
    tokens: int = 22
    split: str = "even"
    groups: int = 0
    width: int = 16
    hidden: int = 32
    activation: str = "swiglu"
    bias: bool = False
    masked: bool = False
    skewed: bool = False  # every token likes the last expert best
    together: bool = True
    options: dict = field(default_factory=dict)

    def bounds(self, ranks: int) -> list[int]:
        """Where the tokens (or groups) of each process begin, and those of the last one end."""
        total = self.groups or self.tokens
        return {
            "even": [total * rank // ranks for rank in range(ranks + 1)],
            "first has none": [0, *(total * rank // max(ranks - 1, 1) for rank in range(ranks - 1)), total],
            "last has all": [0] * ranks + [total],
        }[self.split]


# The widths make whole vectors of rows: MKL, which the reference calls, rounds by the alignment of its operands.
CASES = {
    "dropless": Case(options=dict(renormalize=True), together=False),
    "dropless, biases": Case(bias=True, activation="gelu", experts=7, top_k=3, together=False),
    "groups of their own": Case("switch", top_k=1, tokens=6, groups=4, options=dict(capacity_factor=1.0), masked=True),
    "groups, each for itself": Case(
        "topk_softmax", tokens=6, groups=4, options=dict(capacity_factor=1.0), together=False
    ),
    "softmax_topk": Case(options=dict(capacity_factor=1.0, batch_priority=True), split="first has none"),
    "topk_softmax": Case("topk_softmax", experts=8, masked=True, activation="geglu_tanh", bias=True),
    "switch": Case("switch", experts=4, top_k=1, activation="relu", options=dict(capacity_factor=1.25)),
    "gshard": Case("gshard", experts=6, options=dict(capacity_factor=1.0, jitter=0.1), masked=True),
    "sigmoid": Case("sigmoid", experts=8, top_k=3, options=dict(groups=(4, 2), renormalize=True), activation="reglu"),
    "expert_choice": Case("expert_choice", options=dict(capacity_factor=1.5), bias=True, activation="silu"),
    "all to one": Case(top_k=1, skewed=True, experts=6, together=False),
    "all to one, dropped": Case("switch", top_k=1, skewed=True, options=dict(capacity_factor=0.5), bias=True),
    "first has no token": Case(split="first has none", experts=9, top_k=4, bias=True, together=False),
    "last has all tokens": Case(split="last has all", activation="geglu", together=False),
    "no token at all": Case(tokens=0, bias=True, together=False),
    "one token": Case(tokens=1, split="last has all", experts=3, top_k=3),
    "fewer experts than processes": Case(experts=3, bias=True, together=False),
    "one expert": Case(experts=1, top_k=1, bias=True, split="last has all"),
    "odd widths": Case(width=13, hidden=7, experts=9, bias=True, masked=True),
}


def drawn(case: Case, seed: int, dtype) -> tuple[dict, torch.Tensor, dict]:
    """(leaves of all experts and tokens, the gradient of the output, the options of `route`) of one process."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    tokens = (case.groups, case.tokens) if case.groups else (case.tokens,)
    rows = case.hidden * (2 if case.activation.endswith("glu") or case.activation == "geglu_tanh" else 1)
    leaves = {"x": randn(*tokens, case.width), "logits": randn(*tokens, case.experts)}
    if case.skewed:
        leaves["logits"][..., -1] += 20
    leaves["w_gate_up"] = randn(case.experts, rows, case.width) * case.width**-0.5
    leaves["w_down"] = randn(case.experts, case.width, case.hidden) * case.hidden**-0.5
    if case.bias:
        leaves.update(b_gate_up=randn(case.experts, rows), b_down=randn(case.experts, case.width))
    options = dict(case.options, policy=case.policy)
    if case.masked:
        options["token_mask"] = torch.rand(tokens, generator=generator) < 0.7
    if case.policy == "sigmoid":
        options["expert_bias"] = torch.randn(case.experts, generator=generator)
    if case.policy == "gshard":
        options["generator"] = torch.Generator().manual_seed(seed)
    return leaves, randn(*tokens, case.width), options


def computed(case: Case, leaves, grad, options, route, forward, factor: float, impl: str):
    """(name -> result, the routing): the output and the gradients of the leaves."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in leaves.items()}
    routing = route(leaves["logits"], case.top_k, impl=impl, **options)
    layer = [leaves.get(name) for name in LEAVES]
    x = leaves["x"].flatten(0, -2)
    out = forward(x, routing, *layer[:2], case.activation, *layer[2:], impl=impl)
    loss = (out * grad.flatten(0, -2)).sum()
    if case.together:
        loss = loss + factor * (routing.balance_loss + routing.z_loss).to(loss.dtype)
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {"out": out.detach(), **dict(zip(leaves, grads))}, routing


def by_steps(dispatch, combine):
    """A forward that keeps the rows of the experts."""
    import pyext

    def forward(x, routing, w_gate_up, w_down, activation, b_gate_up, b_down, impl):
        xs, exchange = dispatch(x, routing, impl=impl)
        layer = w_gate_up, w_down, activation, b_gate_up, b_down
        ys = pyext.moe.experts(xs, exchange.routing, *layer, impl=impl)
        return combine(ys, routing, exchange, impl=impl)

    return forward


def compare(case: Case, dtype, impl: str, seed: int, exact: bool):
    """Outputs, all gradients and the routing against one process; the same bits, or what rounding allows."""
    import pyext
    from pyext import moe

    ep = pyext.distributed.ExpertParallel(together=case.together)
    leaves, grad, options = drawn(case, seed, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    whole = {name: value if name == "logits" else value.to(wide) for name, value in leaves.items()}
    bounds = case.bounds(ep.size)
    own = slice(bounds[ep.rank], bounds[ep.rank + 1])
    rows = slice(*(bound * (case.tokens if case.groups else 1) for bound in (own.start, own.stop)))

    def part(name, value):
        if name in LEAVES:
            return ep.shard(value)
        return value[rows] if name == "out" else value[own]

    here = dict(options)
    if case.masked:
        here["token_mask"] = options["token_mask"][own]
    shards = {name: part(name, value) for name, value in leaves.items()}
    alone = by_steps(
        lambda x, routing, impl: (moe.dispatch(x, routing, impl=impl), SimpleNamespace(routing=routing)),
        lambda ys, routing, _, impl: moe.combine(ys, routing, impl=impl),
    )
    results = []
    for one, many in ((moe.forward, ep.forward), (alone, by_steps(ep.dispatch, ep.combine))):
        for given in (
            (whole, grad.to(wide), options, moe.route, one, 0.5),
            (shards, grad[own], here, ep.route, many, 0.5 / ep.size),
        ):
            if "generator" in options:
                options["generator"].manual_seed(seed)
            results.append(computed(case, *given, impl))
    # Only now, so that processes of which one fails do not part.
    for (wanted, routing), (got, own_routing) in (results[:2], results[2:]):
        assert torch.equal(own_routing.expert_index, routing.expert_index[rows])
        assert not case.together or torch.equal(own_routing.dropped, routing.dropped)
        for name, mine in got.items():
            yours = part(name, wanted[name])
            assert mine.dtype == dtype, name
            if exact and dtype == wide:
                assert torch.equal(mine, yours), f"{name}: {(mine - yours).abs().max()} apart"
            else:
                apart, most = (mine.to(wide) - yours).abs(), yours.abs()
                tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 4e-2)
                assert apart.numel() == 0 or apart.max() <= tolerance * max(1, most.max()), f"{name}: {apart.max()}"


class Model(torch.nn.Module):
    """A mixture of experts between two layers that all processes have."""

    def __init__(self, seed: int, expert_parallel=None, **options):
        import pyext

        super().__init__()
        torch.manual_seed(seed)
        self.first = torch.nn.Linear(6, 16)
        self.moe = pyext.nn.MoE(16, 32, 5, 2, bias=True, expert_parallel=expert_parallel, **options)
        self.last = torch.nn.Linear(16, 3)

    def forward(self, x):
        hidden, routing = self.moe(self.first(x), return_routing=True)
        return self.last(hidden).square().mean() + 0.1 * routing.balance_loss + 0.01 * routing.z_loss


def parts(x):
    return x.unflatten(0, (dist.get_world_size(), -1))[dist.get_rank()]


def trained(model, batches, clip):
    """The losses of some steps of descent."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.3), []
    for x in batches:
        losses.append(model(x))
        losses[-1].backward()
        clip(model)
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses).detach()


def check_training(seed: int, wrap, **options):
    """Three steps of data and expert parallelism, clipped, against those of one process."""
    import pyext

    ep = pyext.distributed.ExpertParallel(dist.new_group(), average=True, together=True)
    one, many = Model(seed, **options), Model(seed, ep, **options)
    batches = torch.randn(3, 4 * ep.size, 7, 6, generator=torch.Generator().manual_seed(seed))
    wrapped = wrap(many)
    wanted = trained(one, batches, lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
    losses = trained(wrapped, [parts(x) for x in batches], lambda _: pyext.distributed.clip_grad_norm_(many, 0.5))
    dist.all_reduce(losses)
    torch.testing.assert_close(losses / ep.size, wanted, rtol=1e-4, atol=1e-5)
    state = pyext.distributed.full_state_dict(many)
    for name, value in one.state_dict().items():
        mine = state[name]
        mine = mine.full_tensor() if hasattr(mine, "full_tensor") else mine
        torch.testing.assert_close(mine, value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def check_ddp(seed: int):
    import pyext

    def wrap(model):
        parallel = torch.nn.parallel.DistributedDataParallel
        names = list(pyext.distributed.expert_parameters(model))
        parallel._set_params_and_buffers_to_ignore_for_model(model, names)
        return parallel(model)

    check_training(seed, wrap, capacity_factor=1.25)


def check_fsdp(seed: int):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    import pyext

    def wrap(model):
        experts = set(pyext.distributed.expert_parameters(model).values())
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        return fully_shard(model, mesh=mesh, ignored_params=experts)

    check_training(seed, wrap, policy="expert_choice", capacity_factor=1.0)


def check_module(seed: int):
    """One seed makes the same experts; outputs, gradients, state dicts and the moving bias agree."""
    import pyext

    ep = pyext.distributed.ExpertParallel()
    options = dict(policy="sigmoid", expert_bias=True, per_sequence=True, capacity_factor=1.0, scale=1.5)
    torch.manual_seed(seed)
    one = pyext.nn.MoE(16, 32, 5, 2, "geglu", **options)
    torch.manual_seed(seed)
    many = pyext.nn.MoE(16, 32, 5, 2, "geglu", expert_parallel=ep, **options)
    generator = torch.Generator().manual_seed(seed)
    x, mask = torch.randn(4, 9, 16, generator=generator), torch.rand(4, 9, generator=generator) < 0.8
    copied = copy.deepcopy(many)
    calls = {
        many: many,
        copied: lambda *args, **how: checkpoint(copied, *args, use_reentrant=False, **how),
    }
    for rate in (0.1, 0.03):  # the second time with the biases that the first has moved
        leaf = x.clone().requires_grad_()
        out, routing = one(leaf, mask, return_routing=True)
        one.zero_grad()
        out.square().sum().backward()
        for module, call in calls.items():
            own = parts(x).clone().requires_grad_()
            got, own_routing = call(own, parts(mask), return_routing=True)
            assert torch.equal(got, parts(out))
            module.zero_grad()
            got.square().sum().backward()
            assert torch.equal(own.grad, parts(leaf.grad))
            for name, parameter in module.expert_parameters().items():
                assert torch.equal(parameter.grad, ep.shard(one.get_parameter(name).grad)), name
            dist.all_reduce(module.router.weight.grad)
            torch.testing.assert_close(module.router.weight.grad, one.router.weight.grad)
            module.update_expert_bias(own_routing, rate)
        one.update_expert_bias(routing, rate)
        assert torch.equal(many.expert_bias, one.expert_bias) and one.expert_bias.any()


def check_state_dicts(seed: int):
    """From one process to many and back."""
    import pyext

    ep = pyext.distributed.ExpertParallel()
    one, many, again = Model(seed), Model(seed + 1, ep), Model(seed + 2, ep)
    assert not torch.equal(one.moe.router.weight, many.moe.router.weight)
    many.load_state_dict(one.state_dict())
    state = pyext.distributed.full_state_dict(many)
    assert state.keys() == one.state_dict().keys() == many.state_dict().keys()
    for name, value in one.state_dict().items():
        assert torch.equal(state[name], value), name
    again.load_state_dict(many.state_dict())  # what this process holds
    for name, value in many.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert many.moe.w_down.shape[0] == len(ep.local_experts(5)) == len(many.moe.local_experts)


def check_second_derivative(seed: int):
    import pyext

    ep = pyext.distributed.ExpertParallel()
    case = Case(experts=4, tokens=8, activation="gelu")
    leaves, grad, options = drawn(case, seed, torch.float64)
    results = []
    for cut, route, forward in ((lambda x: x, pyext.moe.route, pyext.moe.forward), (parts, ep.route, ep.forward)):
        x, logits = (cut(leaves[name]).clone().requires_grad_() for name in ("x", "logits"))
        layer = [leaves[name] if cut is not parts else ep.shard(leaves[name]) for name in LEAVES[:2]]
        routing = route(logits, 2, impl="reference")
        out = forward(x, routing, *layer, "gelu", impl="reference")
        first = torch.autograd.grad((out * cut(grad)).sum(), (x, logits), create_graph=True)
        results.append(torch.autograd.grad(sum(value.square().sum() for value in first), (x, logits)))
    for whole, own in zip(*results):
        torch.testing.assert_close(own, parts(whole), rtol=1e-10, atol=1e-10)


def check_nothing_recorded(seed: int):
    """Without gradients, and with a part of what could have them."""
    import pyext

    ep = pyext.distributed.ExpertParallel()
    leaves, _, _ = drawn(Case(experts=3), seed, torch.float32)
    x, logits = leaves["x"], leaves["logits"]
    w_gate_up, w_down = (ep.shard(leaves[name]).clone() for name in LEAVES[:2])
    out = ep.forward(x, ep.route(logits, 2), w_gate_up, w_down)
    assert not out.requires_grad
    if ep.rank == 0:  # one process asks, all take part
        w_down.requires_grad_()
    out = ep.forward(x, ep.route(logits, 2), w_gate_up, w_down)
    out.sum().backward()
    assert (w_down.grad is not None) == (ep.rank == 0)


def check_autocast(seed: int):
    import pyext

    ep = pyext.distributed.ExpertParallel()
    one, many = Model(seed).moe, Model(seed, ep).moe
    x = torch.randn(4, 9, 16, generator=torch.Generator().manual_seed(seed))
    with torch.autocast("cpu", torch.bfloat16):
        out, own = one(x), many(parts(x))
    assert own.dtype == torch.bfloat16
    torch.testing.assert_close(own, parts(out), rtol=2e-2, atol=2e-2)


def check_compiled(seed: int):
    import pyext

    many = Model(seed, pyext.distributed.ExpertParallel()).moe
    compiled = torch.compile(many, backend="eager")
    for length in (9, 11):
        x = torch.randn(2, length, 16)
        assert torch.equal(compiled(x), many(x))


CHECKS = (
    check_module,
    check_state_dicts,
    check_second_derivative,
    check_nothing_recorded,
    check_autocast,
    check_compiled,
    check_ddp,
    check_fsdp,
)


def run(seed: int, has_kernels: bool) -> list[str]:
    """All cases, on the reference and on what "auto" picks, and all checks; returns the failures.

    Where "auto" picks the reference for some steps only (not `has_kernels`), sums are in no common order.
    """

    failures = []

    def attempt(name, check, *args):
        try:
            check(*args)
        except Exception:
            failures.append(f"{name}\n{traceback.format_exc()}")

    for n, (name, case) in enumerate(CASES.items()):
        for impl in ("reference", "auto"):
            for dtype in (torch.float32, torch.float64, torch.bfloat16)[: 1 if n % 3 and impl == "reference" else 3]:
                exact = has_kernels if impl == "auto" else case.width % 16 == 0
                attempt(f"{name}, {impl}, {dtype}", compare, case, dtype, impl, seed + n, exact)
    if dist.get_world_size() == 2:
        for check in CHECKS:
            attempt(check.__name__, check, seed)
    return failures
