"""Routing of tokens to experts: choices, weights and losses in one pass over the logits, then the maps of rows.

Who gets which slot and row is counted (`_places`). What is sorted - tokens by their largest score, or by the score for
each expert - torch sorts, stably. No number is read back.

Scores are compared as integers of the same order, in which NaN is largest and 0 equals -0, as torch sorts; of equal
ones the first is chosen.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._primitives import POLICIES
from . import _places
from ._launch import DTYPES, check, on, power_of_two, readable

ELEMENTS = 512  # of a tile of tokens and experts: four per thread; twice as many where no choice is searched
MOST_TOKENS = 16
PARTS = 128  # programs at most that go through the tokens of a group; what they sum is summed by another
BLOCK = 128  # experts, or groups, that are summed together

GSHARD, SIGMOID, EXPERT_CHOICE = (tl.constexpr(POLICIES.index(name)) for name in ("gshard", "sigmoid", "expert_choice"))
TAKEN = tl.constexpr(-(2**31))  # less than the key of any number
LEAST = tl.constexpr(-2139095041)  # the key of -inf
EPSILON = tl.constexpr(1e-20)  # as in the reference


# --- Choices, weights, losses. Offsets are 64 bits wide. ---


@triton.jit
def _key(x):
    """int32 in the order of x: NaN above all, -0 like 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFF, bits)


@triton.jit
def _best(key, value, choices, column, COLUMNS: tl.constexpr):
    """The `choices` largest keys of each row, the first of equal ones first: their columns and values [ROWS, COLUMNS],
    and the keys with those `TAKEN`."""
    slot = tl.arange(0, COLUMNS)[None, :]
    picked = tl.zeros((key.shape[0], COLUMNS), tl.int32)
    found = tl.zeros((key.shape[0], COLUMNS), tl.float32)
    for k in range(choices):
        _, at = tl.max(key, 1, return_indices=True)
        hit = column == at[:, None]
        picked = tl.where(slot == k, at[:, None], picked)
        found = tl.where(slot == k, tl.sum(tl.where(hit, value, 0.0), 1)[:, None], found)
        key = tl.where(hit, TAKEN, key)
    return picked, found, key


@triton.jit
def _in_best_groups(key, ranked, column, width, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, PADDED: tl.constexpr):
    """The keys of experts outside the groups whose two best have the largest sum become that of -inf."""
    group = column // width
    member = tl.arange(0, PADDED)[None, :]
    sums = tl.full((key.shape[0], PADDED), TAKEN, tl.int32)
    for g in range(GROUPS):
        mine = tl.where(group == g, key, TAKEN)
        _, first = tl.max(mine, 1, return_indices=True)
        mine = tl.where(column == first[:, None], TAKEN, mine)
        largest, second = tl.max(mine, 1, return_indices=True)
        second = tl.where(largest == TAKEN, first, second)  # a group of one
        best_two = tl.where((column == first[:, None]) | (column == second[:, None]), ranked, 0.0)
        sums = tl.where(member == g, _key(tl.sum(best_two, 1))[:, None], sums)
    _, _, sums = _best(sums, tl.zeros(sums.shape, tl.float32), TOP_GROUPS, member, PADDED)
    kept = tl.zeros(key.shape, tl.int32)
    for g in range(GROUPS):
        is_kept = tl.sum(tl.where((member == g) & (sums == TAKEN), 1, 0), 1)
        kept += tl.where(group == g, is_kept[:, None], 0)
    return tl.where((kept > 0) | (key == TAKEN), key, LEAST)


@triton.jit
def _scores(x, inside, POLICY: tl.constexpr):
    """What experts score by logits x [TOKENS, EXPERTS], 0 outside; and log sum exp x, largest x, sum of all exp."""
    most = tl.max(tl.where(inside, x, -float("inf")), 1)
    powers = tl.where(inside, tl.exp(x - most[:, None]), 0.0)
    total = tl.sum(powers, 1)
    lse = most + tl.log(total)
    if POLICY == SIGMOID:
        scores = tl.where(inside, 1.0 / (1.0 + tl.exp(-x)), 0.0)
    else:
        scores = powers / total[:, None]
    return scores, lse, most, total


@triton.jit
def _choose_kernel(
    logits, token_mask, expert_bias, uniform, choice, index, weights, priority, scores_out,
    part_load, part_score, part_z, part_count,
    tokens, experts, choices, parts, width, group_stride, token_stride,
    POLICY: tl.constexpr, SHARES: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Choices before any drop and after chance, weights, and the sums over tokens that losses need; one program per
    group and part of its tokens."""
    g, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    column = tl.arange(0, EXPERTS)[None, :]
    slot = tl.arange(0, COLUMNS)[None, :]
    load = tl.zeros((EXPERTS,), tl.int32)
    score = tl.zeros((EXPERTS,), tl.float32)
    z = tl.zeros((TOKENS,), tl.float32)
    count = tl.zeros((TOKENS,), tl.int32)
    for start in range(part * TOKENS, tokens, parts * TOKENS):
        s = start + tl.arange(0, TOKENS)
        token = g * tokens + s
        alive = s < tokens
        if token_mask is not None:
            alive = alive & (tl.load(token_mask + token, mask=s < tokens, other=0) != 0)
        real = column < experts
        at = logits + g * group_stride + (s.to(tl.int64) * token_stride)[:, None] + column
        x = tl.load(at, mask=alive[:, None] & real, other=0.0).to(tl.float32)  # padding holds anything: 0
        scores, lse, most, total = _scores(x, real, POLICY)
        z += tl.where(alive, lse * lse, 0.0)
        count += alive.to(tl.int32)
        if POLICY == EXPERT_CHOICE:
            # Masked tokens come after all others.
            to = scores_out + token[:, None] * experts + column
            tl.store(to, tl.where(alive[:, None], scores, -1.0), mask=(s < tokens)[:, None] & real)
        else:
            ranked = x
            if POLICY == SIGMOID:
                ranked = scores
                if expert_bias is not None:
                    ranked += tl.load(expert_bias + column, mask=real, other=0.0)
            key = tl.where(real, _key(ranked), TAKEN)
            if TOP_GROUPS < GROUPS:
                key = _in_best_groups(key, ranked, column, width, GROUPS, TOP_GROUPS, PADDED_GROUPS)
            picked, found, key = _best(key, x, choices, column, COLUMNS)
            chosen = key == TAKEN
            own = slot < choices
            if POLICY == SIGMOID:
                gates = tl.where(own, 1.0 / (1.0 + tl.exp(-found)), 0.0)
                if SHARES:
                    gates = gates / (tl.sum(gates, 1)[:, None] + EPSILON)
                if (expert_bias is not None) or (TOP_GROUPS < GROUPS):
                    key = tl.where(real, _key(scores), TAKEN)
                    _, _, key = _best(key, x, choices, column, COLUMNS)
                    chosen = key == TAKEN
                scores = scores / (tl.sum(scores, 1)[:, None] + EPSILON)
            else:
                gates = tl.where(own, tl.exp(found - most[:, None]), 0.0)
                if SHARES:
                    gates = gates / tl.sum(gates, 1)[:, None]
                else:
                    gates = gates / total[:, None]
            if POLICY == GSHARD:
                chosen = column == tl.sum(tl.where(slot == 0, picked, 0), 1)[:, None]
            counted = alive[:, None] & real
            load += tl.sum((counted & chosen).to(tl.int32), 0)
            score += tl.sum(tl.where(counted, scores, 0.0), 0)
            picked = tl.where(alive[:, None], picked, -1)
            at = token[:, None] * choices + slot
            valid = (s < tokens)[:, None] & own
            tl.store(choice + at, picked, mask=valid)
            if POLICY == GSHARD:
                # Kept with probability min(1, 2 g2).
                luck = tl.load(uniform + token, mask=s < tokens, other=0.0)[:, None]
                picked = tl.where((slot == 1) & (2.0 * gates <= luck), -1, picked)
            tl.store(index + at, picked, mask=valid)
            tl.store(weights + at, tl.where(picked >= 0, gates, 0.0), mask=valid)
            if priority is not None:
                if POLICY == SIGMOID:
                    largest = 1.0 / (1.0 + tl.exp(-most))
                else:
                    largest = 1.0 / total
                tl.store(priority + token, largest, mask=s < tokens)
    entry = g * parts + part
    tl.store(part_z + entry, tl.sum(z, 0))
    tl.store(part_count + entry, tl.sum(count, 0))
    if POLICY != EXPERT_CHOICE:
        expert = tl.arange(0, EXPERTS)
        tl.store(part_load + entry * experts + expert, load, mask=expert < experts)
        tl.store(part_score + entry * experts + expert, score, mask=expert < experts)


@triton.jit
def _taken_kernel(
    scores, token_mask, taken, choice, index, weights, part_lonely, tokens, experts,
    SHARES: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Choices (column e is e or -1) and weights of tokens that experts have chosen, and how many tokens none has."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, EXPERTS)[None, :]
    inside = token < tokens
    alive = inside
    if token_mask is not None:
        alive = alive & (tl.load(token_mask + token, mask=inside, other=0) != 0)
    valid = inside[:, None] & (column < experts)
    at = token[:, None] * experts + column
    chosen = (tl.load(taken + at, mask=valid, other=0) != 0) & alive[:, None]
    gates = tl.where(chosen, tl.load(scores + at, mask=valid, other=0.0), 0.0)
    if SHARES:
        total = tl.sum(gates, 1)[:, None]
        gates = gates / tl.where(total == 0.0, 1.0, total)
    picked = tl.where(chosen, column, -1)
    tl.store(choice + at, picked, mask=valid)
    tl.store(index + at, picked, mask=valid)
    tl.store(weights + at, gates, mask=valid)
    lonely = alive & (tl.sum(chosen.to(tl.int32), 1) == 0)
    tl.store(part_lonely + tl.program_id(0), tl.sum(lonely.to(tl.int32), 0))


@triton.jit
def _balance_kernel(
    part_load, part_score, part_z, part_count, load, balance, z, count,
    experts, parts, factor, BALANCED: tl.constexpr, PARTS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """For each group: how often each expert is counted, factor * sum_e f_e P_e, and the sums of z and of tokens."""
    g = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    squares = tl.sum(tl.load(part_z + g * parts + part, mask=part < parts, other=0.0), 0)
    tokens = tl.sum(tl.load(part_count + g * parts + part, mask=part < parts, other=0), 0)
    tl.store(z + g, squares)
    tl.store(count + g, tokens)
    per_token = 1.0 / tl.maximum(tokens, 1).to(tl.float32)
    sum = tl.zeros((EXPERTS,), tl.float32)
    for first in range(0, experts, EXPERTS):
        expert = first + tl.arange(0, EXPERTS)
        times = tl.zeros((EXPERTS,), tl.int32)
        score = tl.zeros((EXPERTS,), tl.float32)
        if BALANCED:
            for p in range(parts):
                at = (g * parts + p) * experts + expert
                times += tl.load(part_load + at, mask=expert < experts, other=0)
                score += tl.load(part_score + at, mask=expert < experts, other=0.0)
        tl.store(load + g * experts + expert, times, mask=expert < experts)
        sum += times.to(tl.float32) * per_token * (score * per_token)
    tl.store(balance + g, factor * tl.sum(sum, 0))


@triton.jit
def _finish_kernel(
    totals, balance, z, count, part_lonely, offsets, balance_loss, z_loss, dropped,
    groups, experts, choices, lonely_parts, BLOCK: tl.constexpr,
):  # fmt: skip
    """offsets, from the number of rows of each expert; the losses, means over groups or tokens; what was dropped."""
    used = 0
    tl.store(offsets, 0)
    for start in range(0, experts, BLOCK):
        expert = start + tl.arange(0, BLOCK)
        rows = tl.load(totals + expert, mask=expert < experts, other=0)
        tl.store(offsets + 1 + expert, used + tl.cumsum(rows, 0), mask=expert < experts)
        used += tl.sum(rows, 0)
    loss = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    tokens = tl.zeros((BLOCK,), tl.int32)
    alive = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, groups, BLOCK):
        g = start + tl.arange(0, BLOCK)
        own = tl.load(count + g, mask=g < groups, other=0)
        tokens += own
        alive += (own > 0).to(tl.int32)
        loss += tl.load(balance + g, mask=g < groups, other=0.0)
        squares += tl.load(z + g, mask=g < groups, other=0.0)
    total = tl.sum(tokens, 0)
    tl.store(balance_loss, tl.sum(loss, 0) / tl.maximum(tl.sum(alive, 0), 1).to(tl.float32))
    tl.store(z_loss, tl.sum(squares, 0) / tl.maximum(total, 1).to(tl.float32))
    if part_lonely is not None:
        lonely = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, lonely_parts, BLOCK):
            part = start + tl.arange(0, BLOCK)
            lonely += tl.load(part_lonely + part, mask=part < lonely_parts, other=0)
        tl.store(dropped, tl.sum(lonely, 0))
    else:
        tl.store(dropped, total * choices - used)


# --- The gradient ---


@triton.jit
def _gradient_kernel(
    grad_weights, grad_balance, grad_z, logits, token_mask, index, choice, load, count, out,
    groups, tokens, experts, choices, blocks, factor, group_stride, token_stride,
    POLICY: tl.constexpr, SHARES: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits, from those of weights and losses that are given; one program per group and block of
    tokens."""
    g = (tl.program_id(0) // blocks).to(tl.int64)
    s = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    token, inside = g * tokens + s, s < tokens
    column = tl.arange(0, EXPERTS)[None, :]
    alive, real = inside, column < experts
    own, all_tokens, all_groups = tokens, groups * tokens, groups
    if token_mask is not None:
        alive = alive & (tl.load(token_mask + token, mask=inside, other=0) != 0)
        own, all_tokens, all_groups = tl.load(count + g), 0, 0
        for start in range(0, groups, TOKENS):
            other = start + tl.arange(0, TOKENS)
            of_group = tl.load(count + other, mask=other < groups, other=0)
            all_tokens += tl.sum(of_group, 0)
            all_groups += tl.sum((of_group > 0).to(tl.int32), 0)
    at = logits + g * group_stride + (s.to(tl.int64) * token_stride)[:, None] + column
    x = tl.load(at, mask=alive[:, None] & real, other=0.0).to(tl.float32)
    scores, lse, most, total = _scores(x, real, POLICY)
    powers = tl.where(real, tl.exp(x - most[:, None]), 0.0)
    grad_scores = tl.zeros((TOKENS, EXPERTS), tl.float32)
    if grad_weights is not None:
        chosen, terms = _by_expert(grad_weights, index, choice, token, inside, column, choices, POLICY, TOKENS, EXPERTS)
        if SHARES:
            # As shares of the scores, softmaxes over chosen logits included: what is wrong with their sum cancels.
            gates = tl.where(chosen, scores, 0.0)
            sum = tl.sum(gates, 1)[:, None]
            if POLICY == SIGMOID:
                sum += EPSILON
            else:
                sum = tl.where(sum == 0.0, 1.0, sum)
            terms = tl.where(chosen, (terms - tl.sum(gates / sum * terms, 1)[:, None]) / sum, 0.0)
        grad_scores += terms
    if grad_balance is not None:
        per_token = 1.0 / tl.maximum(own, 1).to(tl.float32)
        each = tl.load(grad_balance) * factor / tl.maximum(all_groups, 1).to(tl.float32) * per_token * per_token
        share = each * tl.load(load + g * experts + column, mask=real, other=0).to(tl.float32)
        if POLICY == SIGMOID:
            sum = tl.sum(scores, 1)[:, None] + EPSILON
            share = (share - tl.sum(share * (scores / sum), 1)[:, None]) / sum
        grad_scores += share
    if POLICY == SIGMOID:
        grad = grad_scores * scores * (1.0 - scores)
    else:
        grad = scores * (grad_scores - tl.sum(grad_scores * scores, 1)[:, None])
    if grad_z is not None:
        each = tl.load(grad_z) * 2.0 / tl.maximum(all_tokens, 1).to(tl.float32)
        grad += (each * lse / total)[:, None] * powers
    grad = tl.where(alive[:, None], grad, 0.0)
    tl.store(out + token[:, None] * experts + column, grad.to(out.dtype.element_ty), mask=inside[:, None] & real)


@triton.jit
def _by_expert(
    grad_weights, index, choice, token, inside, column, choices,
    POLICY: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Which experts each token chose, and the gradients of their weights, 0 where dropped. # 2 x [TOKENS, EXPERTS]"""
    if POLICY == EXPERT_CHOICE:
        at, valid = token[:, None] * choices + column, inside[:, None] & (column < choices)
        chosen = tl.load(choice + at, mask=valid, other=-1) >= 0
        terms = tl.load(grad_weights + at, mask=valid & chosen, other=0.0)
    else:
        chosen = tl.zeros((TOKENS, EXPERTS), tl.int1)
        terms = tl.zeros((TOKENS, EXPERTS), tl.float32)
        for k in range(choices):
            at = token * choices + k
            hit = column == tl.load(choice + at, mask=inside, other=-1)[:, None]
            kept = tl.load(index + at, mask=inside, other=-1) >= 0
            term = tl.load(grad_weights + at, mask=kept, other=0.0)
            chosen = chosen | hit
            terms = tl.where(hit, term[:, None], terms)
    return chosen, terms


# --- Launchers: the arguments of the ops in csrc/moe_route.cpp ---


def _tile(experts: int, elements: int = ELEMENTS) -> dict[str, int]:
    padded = power_of_two(experts, 16, 2**30)
    warps = power_of_two(padded // 256, 4, 16)
    return {"TOKENS": power_of_two(elements // padded, 1, MOST_TOKENS), "EXPERTS": padded, "num_warps": warps}


def _check(logits: Tensor, token_mask: Tensor | None, policy: int) -> None:
    check(logits.dim() == 3 and logits.shape[2] > 0, "logits must have shape (G, S, E) with E > 0")
    check(logits.dtype in DTYPES, "logits must be float32, bfloat16 or float16")
    check(0 <= policy < len(POLICIES), "policy must be an index into POLICIES")
    check(
        token_mask is None or (token_mask.shape == logits.shape[:2] and token_mask.dtype == torch.bool),
        "token_mask must be bool (G, S)",
    )


def _check_rule(
    logits: Tensor, expert_bias: Tensor | None, uniform: Tensor | None, policy: int, top_k: int, capacity: int,
    groups: int, top_groups: int,
) -> None:  # fmt: skip
    experts, gshard = logits.shape[2], POLICIES[policy] == "gshard"
    check(1 <= top_k <= experts and (top_k == 2 or not gshard), "top_k must be in [1, E]")
    check(capacity >= (0 if POLICIES[policy] == "expert_choice" else -1), "capacity must be positive, or -1 for none")
    check(
        groups >= 1
        and experts % groups == 0
        and 1 <= top_groups <= groups
        and top_groups * (experts // groups) >= top_k,
        "groups must divide E, and top_groups be some of them with top_k experts",
    )
    check(
        expert_bias is None or (expert_bias.shape == (experts,) and expert_bias.dtype == torch.float32),
        "expert_bias must be float32 (E,)",
    )
    check(gshard == (uniform is not None), "uniform must be given for gshard, and only there")
    check(
        uniform is None or (uniform.shape == logits.shape[:2] and uniform.dtype == torch.float32),
        "uniform must be float32 (G, S)",
    )


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _shares(policy: int, renormalize: bool) -> bool:
    """Whether the weights of a token's choices are shares of their sum: so is a softmax over the chosen logits."""
    return renormalize or POLICIES[policy] in ("topk_softmax", "gshard")


def _factor(policy: int, experts: int, top_k: int) -> float:
    """Of the balance loss."""
    name = POLICIES[policy]
    return {"gshard": 1.0 / experts, "sigmoid": experts / top_k, "expert_choice": 0.0}.get(name, float(experts))


def moe_route_forward(
    logits: Tensor, token_mask: Tensor | None, expert_bias: Tensor | None, uniform: Tensor | None, policy: int,
    top_k: int, capacity: int, renormalize: bool, batch_priority: bool, groups: int, top_groups: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The fields of `Routing`, then choice (T, K) and load (G, E), int32."""
    _check(logits, token_mask, policy)
    _check_rule(logits, expert_bias, uniform, policy, top_k, capacity, groups, top_groups)
    outer, tokens, experts = logits.shape
    experts_choose = POLICIES[policy] == "expert_choice"
    columns = experts if experts_choose else top_k
    choices = outer * tokens * columns
    rows = choices if capacity < 0 else min(choices, outer * experts * min(capacity, tokens))

    def fresh(*shape, dtype=torch.int32):
        return logits.new_empty(shape, dtype=dtype)

    index, choice, position = (fresh(outer * tokens, columns) for _ in range(3))
    weights = fresh(outer * tokens, columns, dtype=torch.float32)
    load, source = fresh(outer, experts), logits.new_full((rows,), -1, dtype=torch.int32)
    offsets, dropped = logits.new_zeros((experts + 1,), dtype=torch.int32), logits.new_zeros((), dtype=torch.int32)
    balance_loss, z_loss = (logits.new_zeros((), dtype=torch.float32) for _ in range(2))
    if choices == 0:
        load.zero_()
        return index, weights, offsets, source, position, balance_loss, z_loss, dropped, choice, load
    with on(logits.device):
        sums, lonely, order = _choose(
            logits, _bytes(token_mask), expert_bias, uniform, choice, index, weights, load,
            policy, top_k, capacity, renormalize, batch_priority, groups, top_groups,
        )  # fmt: skip
        if capacity >= 0 and not experts_choose:
            _places.claim(index, weights, order, outer, experts, capacity)
        places = _places.find(index, None, 1, experts, queue=False)
        _finish_kernel[(1,)](
            places.totals, *sums, lonely, offsets, balance_loss, z_loss, dropped,
            outer, experts, columns, 0 if lonely is None else lonely.shape[0], BLOCK=BLOCK,
        )  # fmt: skip
        _places.fill(index, places, offsets, position, source)
    return index, weights, offsets, source, position, balance_loss, z_loss, dropped, choice, load


def _choose(
    logits, token_mask, expert_bias, uniform, choice, index, weights, load,
    policy, top_k, capacity, renormalize, batch_priority, groups, top_groups,
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:  # fmt: skip
    """Fill choice, index, weights (before any claim) and load. Returns the sums of the losses of each group and its
    tokens, the numbers of tokens that no expert chose, and the order in which tokens claim."""
    logits = readable(logits)
    outer, tokens, experts = logits.shape
    experts_choose = POLICIES[policy] == "expert_choice"
    tile = _tile(experts)
    parts = min(triton.cdiv(tokens, tile["TOKENS"]), PARTS)

    def fresh(*shape, dtype=torch.float32):
        return logits.new_empty(shape, dtype=dtype)

    priority = fresh(outer, tokens) if batch_priority and capacity >= 0 else None
    scores = fresh(outer, tokens, experts) if experts_choose else None
    per_expert = (0,) if experts_choose else (outer, parts, experts)
    part_load, part_score = fresh(*per_expert, dtype=torch.int32), fresh(*per_expert)
    part_z, part_count = fresh(outer, parts), fresh(outer, parts, dtype=torch.int32)
    expert_bias = None if expert_bias is None else expert_bias.contiguous()
    uniform = None if uniform is None else uniform.contiguous()
    _choose_kernel[(outer * parts,)](
        logits, token_mask, expert_bias, uniform, choice, index, weights, priority, scores,
        part_load, part_score, part_z, part_count,
        tokens, experts, top_k, parts, experts // groups, *logits.stride()[:2],
        POLICY=policy, SHARES=_shares(policy, renormalize), GROUPS=groups, TOP_GROUPS=top_groups,
        PADDED_GROUPS=power_of_two(groups, 1, 2**30), COLUMNS=power_of_two(top_k, 2, 2**30), **tile,
    )  # fmt: skip
    lonely = None
    if experts_choose:
        best = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :capacity]
        taken = torch.zeros_like(scores, dtype=torch.uint8).scatter_(1, best, 1)
        blocks = triton.cdiv(outer * tokens, tile["TOKENS"])
        lonely = fresh(blocks, dtype=torch.int32)
        _taken_kernel[(blocks,)](
            scores, token_mask, taken, choice, index, weights, lonely, outer * tokens, experts,
            SHARES=renormalize, **tile,
        )  # fmt: skip
    sums = [fresh(outer), fresh(outer), fresh(outer, dtype=torch.int32)]
    _balance_kernel[(outer,)](
        part_load, part_score, part_z, part_count, load, *sums, experts, parts, _factor(policy, experts, top_k),
        BALANCED=not experts_choose, PARTS=PARTS, EXPERTS=BLOCK,
    )  # fmt: skip
    order = None
    if priority is not None:
        order = torch.sort(priority, dim=1, descending=True, stable=True).indices
    return sums, lonely, order


def moe_route_backward(
    grad_weights: Tensor | None, grad_balance: Tensor | None, grad_z: Tensor | None, logits: Tensor,
    token_mask: Tensor | None, expert_index: Tensor, choice: Tensor, load: Tensor, policy: int, renormalize: bool,
) -> Tensor:  # fmt: skip
    """The gradient of the logits (G, S, E), contiguous."""
    _check(logits, token_mask, policy)
    outer, tokens, experts = logits.shape
    columns = choice.shape[-1]
    check(
        choice.shape == expert_index.shape == (outer * tokens, columns)
        and choice.dtype == expert_index.dtype == torch.int32
        and (columns == experts or POLICIES[policy] != "expert_choice"),
        "expert_index and choice must be int32 (T, K)",
    )
    check(load.shape == (outer, experts) and load.dtype == torch.int32, "load must be int32 (G, E)")
    check(
        grad_weights is None or (grad_weights.shape == choice.shape and grad_weights.dtype == torch.float32),
        "grad_weights must be float32 (T, K)",
    )
    for grad in (grad_balance, grad_z):
        check(
            grad is None or (grad.numel() == 1 and grad.dtype == torch.float32), "the gradient of a loss is a float32"
        )
    out = logits.new_empty(logits.shape)
    if out.numel() == 0:
        return out
    logits, tile = readable(logits), _tile(experts, 2 * ELEMENTS)
    blocks = triton.cdiv(tokens, tile["TOKENS"])
    alive = None if token_mask is None else token_mask.sum(1, dtype=torch.int32)
    with on(logits.device):
        _gradient_kernel[(outer * blocks,)](
            None if grad_weights is None else grad_weights.contiguous(), grad_balance, grad_z,
            logits, _bytes(token_mask), expert_index.contiguous(), choice.contiguous(), load.contiguous(), alive, out,
            outer, tokens, experts, columns, blocks, _factor(policy, experts, columns), *logits.stride()[:2],
            POLICY=policy, SHARES=_shares(policy, renormalize), **tile,
        )  # fmt: skip
    return out
