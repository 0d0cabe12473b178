"""Routing of tokens to experts, the specification: plain PyTorch on the flat problem, differentiable at any order.

A policy turns logits into choices (which experts each token wants, or each expert), gates (with what weights) and a
balance loss; where experts have a capacity, choices claim slots and the rest is dropped; what is left becomes rows.

Sources:
    softmax over the best k logits ("topk_softmax"): Shazeer et al., "Outrageously large neural networks" (2017), eq. 3
        to 5; Mixtral (Jiang et al., 2024), section 2.1. The softmax over all, then the best k ("softmax_topk"), is the
        same after `renormalize`
    "switch": Fedus et al., "Switch Transformers" (2021): the best expert (section 2.1), capacity (eq. 3), balance loss
        (eq. 4 to 6), of which the two policies above count all k choices, as Transformers does for Mixtral
    "gshard": Lepikhin et al., "GShard" (2020), algorithm 1; a second choice that chance leaves out claims no slot, as
        in the published code
    z-loss: Zoph et al., "ST-MoE" (2022), eq. 5
    "sigmoid": DeepSeek-V3 report (2024), eq. 12 to 16; best groups of experts, section 2.1.2 and code; balance loss,
        eq. 17 to 20
    "expert_choice": Zhou et al., "Mixture-of-experts with expert choice routing" (2022), section 3.2
    tokens claim in the order of their largest gate: Riquelme et al., "Scaling vision with sparse mixture of experts"
        (2021), section 4.1
"""

import torch
from torch import Tensor

from .._primitives import POLICIES, RouteProblem, Routing, acc_dtype

#: Keeps a sum of sigmoids that are all 0 from being divided by, as in DeepSeek's code.
_EPSILON = 1e-20


def route(problem: RouteProblem) -> Routing:
    """Forward pass of `RouteProblem`; autograd gives the derivatives of weights and losses, of every order.

    Of equal scores the one of the lower index comes first, among experts and among tokens.
    """
    policy = POLICIES[problem.policy]
    logits = problem.logits.to(acc_dtype(problem.logits.dtype))
    tokens = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    if problem.token_mask is not None:
        tokens = problem.token_mask
        logits = logits.masked_fill(~tokens[..., None], 0.0)  # whatever padding holds, infinities included
    scores = torch.sigmoid(logits) if policy == "sigmoid" else torch.softmax(logits, dim=-1)
    if policy == "expert_choice":
        choice = _experts_choose(scores.detach(), tokens, problem.capacity)
    else:
        choice = _best(_ranked(logits, scores, problem).detach(), problem.top_k)
    choice = choice.masked_fill(~tokens[..., None], -1)
    gates = _gates(logits, scores, choice, problem)
    index = choice
    if policy == "gshard":
        # The probability min(1, 2 g2), with gates that sum to 1 before anything is dropped.
        unlucky = 2 * gates[..., 1].detach() <= problem.uniform
        index = torch.stack([choice[..., 0], choice[..., 1].masked_fill(unlucky, -1)], dim=-1)
    if problem.capacity >= 0 and policy != "expert_choice":
        index = _claimed(index, scores.detach(), problem)
    used = (index >= 0).flatten(0, 1)
    offsets, source, position = maps(index.flatten(0, 1), logits.shape[2], _rows(problem, index))
    if policy == "expert_choice":
        dropped = (tokens.flatten() & ~used.any(dim=1)).sum()
    else:
        dropped = (choice >= 0).sum() - used.sum()
    return Routing(
        expert_index=index.flatten(0, 1).to(torch.int32),
        weights=gates.flatten(0, 1).masked_fill(~used, 0.0),
        offsets=offsets,
        source=source,
        position=position,
        balance_loss=_balance_loss(logits, scores, choice, tokens, problem),
        z_loss=_mean(torch.logsumexp(logits, dim=-1).square(), tokens),
        dropped=dropped.to(torch.int32),
    )


def maps(expert_index: Tensor, experts: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """offsets (E + 1), source (rows) and position (T, K) of `Routing`, int32, for expert_index (T, K)."""
    columns = expert_index.shape[1]
    key = torch.where(expert_index < 0, experts, expert_index).flatten()  # what has no expert comes last
    order = torch.argsort(key, stable=True)  # by expert, then by token
    bounds = torch.arange(experts + 1, dtype=key.dtype, device=key.device)
    offsets = torch.searchsorted(key[order], bounds)
    row = torch.arange(rows, device=key.device)
    source = torch.where(row < offsets[experts], order[:rows] // columns, -1)
    position = torch.where(expert_index < 0, -1, torch.argsort(order).view(expert_index.shape))
    return offsets.to(torch.int32), source.to(torch.int32), position.to(torch.int32)


def _rows(problem: RouteProblem, index: Tensor) -> int:
    """The number of rows that are ever needed: known without looking at the choices."""
    groups, tokens, experts = problem.logits.shape
    every = groups * tokens * index.shape[2]
    return every if problem.capacity < 0 else min(every, groups * experts * problem.capacity)


# --- Choices: int64, (G, S, K) ---


def _best(ranked: Tensor, count: int) -> Tensor:
    """The positions of the `count` largest values of the last dimension, the largest first."""
    return torch.sort(ranked, dim=-1, descending=True, stable=True).indices[..., :count]


def _ranked(logits: Tensor, scores: Tensor, problem: RouteProblem) -> Tensor:
    """What tokens choose by: the logits, of which softmax and sigmoid keep the order, but round different ones alike.

    In DeepSeek-V3 score + bias, in the groups whose two best experts have the largest sum.
    """
    if problem.expert_bias is None and problem.top_groups == problem.groups:
        return logits
    if problem.expert_bias is not None:
        scores = scores + problem.expert_bias
    if problem.top_groups == problem.groups:
        return scores
    grouped = scores.unflatten(-1, (problem.groups, -1))
    best_two = torch.sort(grouped, dim=-1, descending=True).values[..., :2].sum(dim=-1)
    kept = _best(best_two, problem.top_groups)
    group = torch.arange(problem.groups, device=scores.device)
    inside = (kept[..., None] == group).any(dim=-2)  # (G, S, groups)
    return grouped.masked_fill(~inside[..., None], -torch.inf).flatten(-2)


def _experts_choose(scores: Tensor, tokens: Tensor, capacity: int) -> Tensor:
    """Each expert takes the `capacity` best tokens of the group: column e of the result is e where e took the token."""
    experts = scores.shape[2]
    wanted = _best(scores.masked_fill(~tokens[..., None], -1.0).transpose(1, 2), capacity)  # (G, E, C)
    taken = torch.zeros(scores.transpose(1, 2).shape, dtype=torch.bool, device=scores.device)
    taken = taken.scatter(2, wanted, True).transpose(1, 2)
    return torch.where(taken, torch.arange(experts, device=scores.device), -1)


def _claimed(index: Tensor, scores: Tensor, problem: RouteProblem) -> Tensor:
    """The choices that find a free slot, others -1.

    All first choices claim before any second, and so on; among them tokens claim in their own order, or those with the
    largest score first.
    """
    groups, tokens, columns = index.shape
    if problem.batch_priority:
        order = _best(scores.amax(dim=-1), tokens)  # (G, S)
        index = index.gather(1, order[..., None].expand_as(index))
    queue = index.transpose(1, 2).flatten(1)  # (G, K * S), in the order of claiming
    claims = queue[..., None] == torch.arange(scores.shape[2], device=queue.device)
    before = claims.cumsum(dim=1, dtype=torch.int32) - claims.to(torch.int32)
    slot = before.gather(2, queue.clamp(min=0)[..., None])[..., 0]
    queue = queue.masked_fill(slot >= problem.capacity, -1)
    index = queue.view(groups, columns, tokens).transpose(1, 2)
    if problem.batch_priority:
        index = index.gather(1, torch.argsort(order, dim=1)[..., None].expand_as(index))
    return index


# --- Weights and losses: differentiable, in the accumulation dtype ---


def _gates(logits: Tensor, scores: Tensor, choice: Tensor, problem: RouteProblem) -> Tensor:
    """The weights of all choices (G, S, K), before any drop. Masked tokens have weights of some value."""
    policy, column = POLICIES[problem.policy], choice.clamp(min=0)
    if policy == "expert_choice":
        gates = scores.masked_fill(choice < 0, 0.0)
        if not problem.renormalize:
            return gates
        total = gates.sum(dim=-1, keepdim=True)
        return gates / total.masked_fill(total == 0, 1.0)
    if policy == "sigmoid":
        gates = scores.gather(-1, column)
        return gates / (gates.sum(dim=-1, keepdim=True) + _EPSILON) if problem.renormalize else gates
    if problem.renormalize or policy in ("topk_softmax", "gshard"):
        return torch.softmax(logits.gather(-1, column), dim=-1)
    return scores.gather(-1, column)


def _balance_loss(logits: Tensor, scores: Tensor, choice: Tensor, tokens: Tensor, problem: RouteProblem) -> Tensor:
    """factor * sum_e f_e P_e, the mean over groups with tokens: f_e choices of expert e per token, P_e its mean score.

    Expert choice is balanced by construction, and its loss is 0.
    """
    policy, experts = POLICIES[problem.policy], logits.shape[2]
    if policy == "expert_choice":
        return logits.new_zeros(())
    counted, factor = choice, float(experts)
    if policy == "gshard":
        counted, factor = choice[..., :1], 1.0 / experts
    elif policy == "sigmoid":
        # Eq. 18 ranks the scores alone, without bias and groups, and eq. 19 makes them shares.
        counted = _best(logits.detach(), problem.top_k).masked_fill(~tokens[..., None], -1)
        factor = experts / problem.top_k
        scores = scores / (scores.sum(dim=-1, keepdim=True) + _EPSILON)
    expert = torch.arange(experts, device=logits.device)
    chosen = (counted[..., None] == expert).sum(dim=2).to(scores.dtype)  # (G, S, E)
    count = tokens.sum(dim=1, keepdim=True)
    total = count.clamp(min=1).to(scores.dtype)
    share = chosen.sum(dim=1) / total
    mean = scores.masked_fill(~tokens[..., None], 0.0).sum(dim=1) / total
    return _mean(factor * (share * mean).sum(dim=1), count[:, 0] > 0)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """The mean of the values where `where` holds; 0 where it holds nowhere."""
    return values.masked_fill(~where, 0.0).sum() / where.sum().clamp(min=1).to(values.dtype)
