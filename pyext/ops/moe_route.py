"""`moe.route`: validate, lower, choose a backend, draw the random numbers, call it.

The op `moe_route_forward` (csrc/moe_route.cpp) keeps the logits and what was decided; `moe_route_backward` computes
scores and gates again.
"""

import math

import torch
from torch import Tensor

from .. import _checks, _dispatch, _native
from .._primitives import POLICIES, RouteProblem, Routing, acc_dtype
from ..reference.moe_route import route as _reference
from . import _register

_LARGEST = 2**31 - 1  # rows are counted in int32


def route(
    logits: Tensor,
    top_k: int,
    *,
    policy: str = "softmax_topk",
    capacity_factor: float | None = None,
    renormalize: bool = False,
    token_mask: Tensor | None = None,
    expert_bias: Tensor | None = None,
    jitter: float = 0.0,
    generator: torch.Generator | None = None,
    groups: tuple[int, int] | None = None,
    batch_priority: bool = False,
    impl: str = "auto",
) -> Routing:
    """Which experts compute each token, by p = softmax(logits), or s = sigmoid(logits), over experts.

    - "softmax_topk": the k largest of p, which are the weights; "topk_softmax": the softmax over the k largest logits.
      balance_loss = E sum_e f_e P_e, f_e = choices of e per token, P_e = mean of p_e.
    - "switch": the largest of p; top_k is 1. The same loss.
    - "gshard": the two largest of p, weights g1 + g2 = 1; the second is kept with probability min(1, 2 g2); top_k is 2.
      balance_loss = (1/E) sum_e f_e P_e, f_e = first choices of e per token.
    - "sigmoid": the k largest of s + expert_bias within the best groups of experts; weights s. balance_loss =
      (E/k) sum_e f_e P_e, f_e = tokens with e among their k largest s, per token, P_e = mean of s_e / sum s.
    - "expert_choice": each expert takes the tokens with the largest p_e, top_k per token on average. No balance_loss.

    With a capacity C = ceil(capacity_factor * k * S / E) an expert computes at most C of each group's S tokens. First
    choices claim slots before second ones, each in token order; the rest is dropped: index -1, weight 0. Weights are
    normalised before, and losses count dropped choices.

    Args:
        logits: (T, E), or (G, S, E) with T = G * S: capacity and balance_loss (whose mean is taken) count per group of
            S tokens. float32, bfloat16, float16 or float64; computed in fp32 (fp64 for fp64).
        top_k: choices per token.
        policy: see above.
        capacity_factor: None = nothing is dropped; for "expert_choice" 1.
        renormalize: divide the weights of a token's choices by their sum.
        token_mask: (T,) or (G, S) bool, False = padding, which neither routes nor counts (but in S).
        expert_bias: (E,), for "sigmoid": decides with the scores, but is in no weight and gets no gradient.
        jitter: multiply each logit by a random number of [1 - jitter, 1 + jitter).
        generator: source of the random numbers of jitter and "gshard"; None = the default generator of the device.
            torch.compile breaks its graph at a generator (torch 2.13); with fullgraph=True, pass None and seed torch.
        groups: (n, m), for "sigmoid": a token chooses within m of n groups of experts, those whose two largest
            s + expert_bias have the largest sum.
        batch_priority: tokens claim slots in the order of their largest score.
        impl: "auto", "reference", "cpu", "triton" or "cuda"; see `pyext.explain`.
    Returns:
        a `Routing`. expert_index is (T, top_k), the largest first; for "expert_choice" (T, E), where column e is e or
        -1. Sizes depend on shapes and arguments only. Weights and losses are differentiable. Of equal scores the one
        of the lower index (expert or token) comes first.
    Raises:
        TypeError, ValueError naming the argument; NotImplementedError if the forced backend refuses the call.
    Source: see `reference.moe_route`. Jitter: Fedus et al., "Switch Transformers" (2021), appendix, there on the input.
    """
    problem = _prepare(
        logits, top_k, policy, capacity_factor, renormalize, token_mask, expert_bias, jitter, generator, groups,
        batch_priority,
    )  # fmt: skip
    backend = _dispatch.choose("moe.route", impl, problem)
    problem = _drawn(problem, jitter, generator)
    if backend == "reference":
        return _reference(problem)
    *routing, _choice, _load = _register.call(backend, "moe_route_forward", problem)
    return Routing(*routing)


def _drawn(problem: RouteProblem, jitter: float, generator: torch.Generator | None) -> RouteProblem:
    """The problem with the random numbers that it needs, if any."""
    logits = problem.logits
    # Not generator=None, which a compiler takes for a generator and then refuses symbolic sizes.
    source = {} if generator is None else {"generator": generator}
    if jitter:
        acc = acc_dtype(logits.dtype)
        noise = torch.rand(logits.shape, dtype=acc, device=logits.device, **source)
        problem = problem._replace(logits=logits.to(acc) * (1 - jitter + 2 * jitter * noise))
    if POLICIES[problem.policy] == "gshard":
        uniform = torch.rand(logits.shape[:2], dtype=torch.float32, device=logits.device, **source)
        problem = problem._replace(uniform=uniform)
    return problem


def _prepare(
    logits, top_k, policy, capacity_factor, renormalize, token_mask, expert_bias, jitter, generator, groups,
    batch_priority,
) -> RouteProblem:  # fmt: skip
    """Validate and lower a call of `route`."""
    if _checks.floating("logits", logits).dim() not in (2, 3) or logits.shape[-1] == 0:
        raise _checks.shape_error("logits", "(T, E) or (G, S, E)", "with E > 0", logits)
    _checks.one_of("policy", policy, POLICIES)
    experts = logits.shape[-1]
    _check_top_k(top_k, policy, experts)
    if token_mask is not None:
        if _checks.boolean("token_mask", token_mask, "a token, False = padding").shape != logits.shape[:-1]:
            expected = _checks.shape_text(logits.shape[:-1])
            raise _checks.shape_error("token_mask", expected, "to match logits", token_mask)
        _checks.same_device("token_mask", token_mask, logits.device, "logits")
    if logits.dim() == 2:
        logits, token_mask = logits[None], None if token_mask is None else token_mask[None]
    if not 0 <= _checks.real("jitter", jitter) <= 1:
        raise ValueError(f"jitter must be between 0 and 1, got {jitter}")
    _checks.generator(generator, logits.device, "logits")
    _check_sigmoid_only(policy, expert_bias=expert_bias, groups=groups)
    priority = _checks.flag("batch_priority", batch_priority)
    if priority and policy == "expert_choice":
        raise ValueError("batch_priority must be False with policy='expert_choice': its tokens claim no slots")
    problem = RouteProblem(
        logits,
        token_mask,
        _bias(expert_bias, logits),
        None,
        POLICIES.index(policy),
        top_k,
        _capacity(capacity_factor, policy, logits.shape[1], experts, top_k),
        _checks.flag("renormalize", renormalize),
        priority,
        *_groups(groups, experts, top_k),
    )
    choices = logits.shape[0] * logits.shape[1] * (experts if policy == "expert_choice" else top_k)
    if choices > _LARGEST:
        raise ValueError(f"logits must have fewer than 2^31 choices (tokens times top_k, or experts), got {choices}")
    return problem


def _check_top_k(top_k, policy: str, experts: int) -> None:
    if not 1 <= _checks.whole("top_k", top_k) <= experts:
        raise ValueError(f"top_k must be between 1 and {experts}, the number of experts, got {top_k}")
    needed = {"switch": 1, "gshard": 2}.get(policy, top_k)
    if top_k != needed:
        raise ValueError(f"top_k must be {needed} with policy={policy!r}, got {top_k}")


def _check_sigmoid_only(policy: str, **arguments) -> None:
    for name, value in arguments.items():
        if value is not None and policy != "sigmoid":
            raise ValueError(f"{name} must be None with policy={policy!r}: it belongs to 'sigmoid'")


def _bias(expert_bias, logits: Tensor) -> Tensor | None:
    if expert_bias is None:
        return None
    if _checks.floating("expert_bias", expert_bias).shape != logits.shape[-1:]:
        raise _checks.shape_error("expert_bias", f"({logits.shape[-1]},)", "to match logits", expert_bias)
    _checks.same_device("expert_bias", expert_bias, logits.device, "logits")
    return expert_bias.detach().to(acc_dtype(logits.dtype))


def _groups(groups, experts: int, top_k: int) -> tuple[int, int]:
    if groups is None:
        return 1, 1
    if not isinstance(groups, (tuple, list)) or len(groups) != 2:
        raise TypeError(f"groups must be (number of groups, groups to choose within), got {groups!r}")
    count, best = (_checks.whole("groups", value) for value in groups)
    if count < 1 or experts % count != 0:
        raise ValueError(f"groups must divide the {experts} experts, got {count} groups")
    if not 1 <= best <= count or best * (experts // count) < top_k:
        raise ValueError(f"groups must leave top_k = {top_k} or more of the {experts} experts, got {tuple(groups)}")
    return count, best


def _capacity(factor, policy: str, tokens: int, experts: int, top_k: int) -> int:
    """Slots of an expert in a group: its share of the choices times the factor, rounded up; -1 for no limit."""
    if factor is None:
        if policy != "expert_choice":
            return -1
        factor = 1.0
    if _checks.real("capacity_factor", factor) <= 0:
        raise ValueError(f"capacity_factor must be positive (or None), got {factor}")
    # A factor like 5 * E / S / k should give 5 slots; that its product is off by a rounding must not add one.
    return min(math.ceil(factor * top_k * tokens / experts - 1e-6), tokens)


# --- The ops as torch sees them: fakes and derivatives ---

_INTEGER = ("expert_index", "offsets", "source", "position", "dropped")


def _forward_fake(*arguments):
    problem = RouteProblem(*arguments)
    logits, capacity = problem.logits, problem.capacity
    groups, length, experts = logits.shape
    tokens = groups * length
    columns = experts if POLICIES[problem.policy] == "expert_choice" else problem.top_k
    rows = tokens * columns
    if capacity >= 0:
        rows = torch.sym_min(rows, groups * experts * torch.sym_min(capacity, length))

    def number(*shape):
        return logits.new_empty(shape, dtype=torch.int32)

    def real(*shape):
        return logits.new_empty(shape, dtype=acc_dtype(logits.dtype))

    pairs = tokens, columns
    maps = number(*pairs), real(*pairs), number(experts + 1), number(rows), number(*pairs)
    return *maps, real(), real(), number(), number(*pairs), number(groups, experts)


def _backward_fake(grad_weights, grad_balance, grad_z, logits, *rest):
    return logits.new_empty(logits.shape)


class _Route(torch.autograd.Function):
    """`moe_route_forward` with its gradient: that of weights and losses to the logits."""

    @staticmethod
    def forward(ctx, sibling, run, *arguments):
        *routing, choice, load = run(*arguments)
        found = Routing(*routing)
        problem = RouteProblem(*arguments)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(getattr(found, name) for name in _INTEGER), choice, load)
        ctx.save_for_backward(problem.logits, problem.token_mask, found.expert_index, choice, load)
        ctx.sibling, ctx.rule = sibling, (problem.policy, problem.renormalize)
        return *routing, choice, load

    @staticmethod
    def backward(ctx, *grads):
        grads = Routing(*grads[: len(Routing._fields)])
        grads = grads.weights, grads.balance_loss, grads.z_loss
        nothing = (None,) * (1 + len(RouteProblem._fields))
        if all(grad is None for grad in grads):
            return None, *nothing
        found = ctx.sibling("moe_route_backward")(*grads, *ctx.saved_tensors, *ctx.rule)
        return None, None, found, *nothing[2:]


_dispatch.register(route, _prepare, ("cuda", "cpu", "triton"), "moe.route")
if _native.module() is not None:
    _register.register("moe_route_forward", _forward_fake, _Route.apply, "moe_route")
    _register.register("moe_route_backward", _backward_fake, _register.once_differentiable("moe.route"), "moe_route")
