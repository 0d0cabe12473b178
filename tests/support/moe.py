"""Routing and experts by loops over tokens, in fp64: nothing is shared with the package but the rules themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

Tensor = torch.Tensor
POLICIES = ("softmax_topk", "topk_softmax", "switch", "gshard", "sigmoid", "expert_choice")
GATED = {"geglu": "none", "geglu_tanh": "tanh", "swiglu": None, "reglu": None}
ACTIVATIONS = (*GATED, "gelu", "gelu_tanh", "silu", "relu")


@dataclass(frozen=True)
class Case:
    """One call of `route` on logits (g, s, e), or (s, e) with g None."""

    policy: str = "softmax_topk"
    g: int | None = 2
    s: int = 13
    e: int = 6
    k: int = 2
    capacity_factor: float | None = None
    renormalize: bool = False
    masked: bool = False
    biased: bool = False
    groups: tuple[int, int] | None = None
    batch_priority: bool = False

    def __str__(self) -> str:
        words = [self.policy, f"{self.g}x{self.s}x{self.e}k{self.k}"]
        words += [f"c{self.capacity_factor}"] if self.capacity_factor else []
        words += [f"groups{self.groups}".replace(" ", "")] if self.groups else []
        return "+".join(words + [n for n in ("renormalize", "masked", "biased", "batch_priority") if getattr(self, n)])

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.s,) if self.g is None else (self.g, self.s)

    @property
    def capacity(self) -> int | None:
        factor = self.capacity_factor or (1.0 if self.policy == "expert_choice" else None)
        return None if factor is None else min(math.ceil(round(factor * self.k * self.s / self.e, 6)), self.s)

    def options(self, generator: torch.Generator) -> dict:
        """The arguments of `route` besides logits."""
        options = dict(policy=self.policy, capacity_factor=self.capacity_factor, renormalize=self.renormalize)
        options.update(groups=self.groups, batch_priority=self.batch_priority)
        if self.masked:
            options["token_mask"] = torch.rand(self.shape, generator=generator) < 0.7
        if self.biased:
            options["expert_bias"] = torch.randn(self.e, generator=generator, dtype=torch.float64)
        return options


@dataclass
class Routed:
    """What the loops find. index[t][k]: an expert or None; gate[t][k]: a 0-dim tensor."""

    index: list = field(default_factory=list)
    gate: list = field(default_factory=list)
    balance: Tensor | None = None
    z: Tensor | None = None
    dropped: int = 0

    @property
    def rows(self) -> list[tuple[int, int, int]]:
        """(expert, token, column), as rows are ordered."""
        found = [(e, t, k) for t, row in enumerate(self.index) for k, e in enumerate(row) if e is not None]
        return sorted(found)


def best(values: list[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def route(case: Case, logits: Tensor, options: dict, uniform: Tensor | None = None) -> Routed:
    """logits (g, s, e) or (s, e) in fp64. uniform: (g, s), what decides the second choices of "gshard"."""
    logits = logits if case.g is not None else logits[None]
    mask = options.get("token_mask")
    mask = torch.ones(logits.shape[:2], dtype=torch.bool) if mask is None else mask.view(logits.shape[:2])
    result, balances, squares = Routed(), [], []
    for g in range(logits.shape[0]):
        alive = [s for s in range(case.s) if mask[g, s]]
        group = _Group(case, logits[g], alive, options, None if uniform is None else uniform[g])
        index, dropped = group.claim()
        result.index += index
        result.gate += group.gates
        result.dropped += dropped
        squares += [torch.logsumexp(logits[g, s], 0) ** 2 for s in alive]
        if alive:
            balances.append(group.balance())
    zero = logits.new_zeros(())
    result.balance = sum(balances, zero) / max(len(balances), 1)
    result.z = sum(squares, zero) / max(len(squares), 1)
    return result


class _Group:
    """The tokens that share slots."""

    def __init__(self, case: Case, logits: Tensor, alive: list[int], options: dict, uniform: Tensor | None):
        self.case, self.logits, self.alive, self.uniform = case, logits, alive, uniform
        self.bias = options.get("expert_bias")
        self.score = [logits[s].sigmoid() if case.policy == "sigmoid" else logits[s].softmax(0) for s in range(case.s)]
        self.choice = self._experts_choose() if case.policy == "expert_choice" else self._tokens_choose()
        self.gates = [self._gates(s, chosen) for s, chosen in enumerate(self.choice)]

    def _tokens_choose(self) -> list[list]:
        case = self.case
        width = case.e // case.groups[0] if case.groups else case.e
        choice = [[None] * case.k for _ in range(case.s)]
        for s in self.alive:
            values = self.score[s] if self.bias is None else self.score[s] + self.bias
            values = values.tolist() if case.policy == "sigmoid" else self.logits[s].tolist()
            if case.groups:
                parts = [values[n * width : (n + 1) * width] for n in range(case.groups[0])]
                kept = best([sum(sorted(part)[-2:]) for part in parts], case.groups[1])
                values = [v if e // width in kept else -math.inf for e, v in enumerate(values)]
            choice[s] = best(values, case.k)
        return choice

    def _experts_choose(self) -> list[list]:
        choice = [[None] * self.case.e for _ in range(self.case.s)]
        for e in range(self.case.e):
            for i in best([float(self.score[s][e].detach()) for s in self.alive], self.case.capacity):
                choice[self.alive[i]][e] = e
        return choice

    def _gates(self, s: int, chosen: list) -> list:
        policy, score, logits = self.case.policy, self.score[s], self.logits[s]
        if policy == "topk_softmax" and chosen[0] is not None:
            return list(logits[torch.tensor(chosen)].softmax(0))
        gates = [score.new_zeros(()) if e is None else score[e] for e in chosen]
        total = sum(gates, score.new_zeros(()))
        normal = (self.case.renormalize or policy == "gshard") and float(total.detach()) > 0
        return [gate / total for gate in gates] if normal else gates

    def claim(self) -> tuple[list[list], int]:
        """The choices that found a slot, and how many did not (for expert choice: tokens that none chose)."""
        case, slots = self.case, [0] * self.case.e
        if case.policy == "expert_choice":
            return self.choice, sum(all(e is None for e in self.choice[s]) for s in self.alive)
        order = self.alive
        if case.batch_priority:
            order = sorted(order, key=lambda s: (-float(self.score[s].detach().max()), s))
        index, dropped = [[None] * case.k for _ in range(case.s)], 0
        for k in range(case.k):
            for s in order:
                e = self.choice[s][k]
                unlucky = (
                    case.policy == "gshard"
                    and k == 1
                    and not 2 * float(self.gates[s][1].detach()) > float(self.uniform[s])
                )
                if unlucky or (case.capacity is not None and slots[e] >= case.capacity):
                    dropped += 1
                    continue
                slots[e] += 1
                index[s][k] = e
        return index, dropped

    def balance(self) -> Tensor:
        case, tokens = self.case, len(self.alive)
        total = self.logits.new_zeros(())
        if case.policy == "expert_choice":
            return total
        for e in range(case.e):
            share, mean = 0, self.logits.new_zeros(())
            for s in self.alive:
                if case.policy == "sigmoid":
                    share += e in best(self.score[s].tolist(), case.k)
                    mean = mean + self.score[s][e] / self.score[s].sum()
                else:
                    share += e in (self.choice[s][:1] if case.policy == "gshard" else self.choice[s])
                    mean = mean + self.score[s][e]
            total = total + share / tokens * mean / tokens
        return total * {"gshard": 1 / case.e, "sigmoid": case.e / case.k}.get(case.policy, case.e)


def check(case: Case, logits: Tensor, options: dict, got, uniform: Tensor | None = None, tolerance: float = 1e-11):
    """A `Routing` against the loops, decisions index by index, and the gradient of weights and losses to the logits."""
    exact = logits.detach().double().cpu().requires_grad_()
    uniform = None if uniform is None else uniform.cpu()
    options = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in options.items()}
    got = type(got)(*(x.cpu() for x in got))
    wanted = route(case, exact, options, uniform)
    index = torch.tensor([[-1 if e is None else e for e in row] for row in wanted.index], dtype=torch.int32)
    columns = case.e if case.policy == "expert_choice" else case.k
    assert torch.equal(got.expert_index, index.view(-1, columns))
    assert int(got.dropped) == wanted.dropped
    rows = wanted.rows
    most = got.expert_index.numel()
    if case.capacity is not None:
        most = min(most, (case.g or 1) * case.e * case.capacity)
    assert got.source.tolist() == [t for _, t, _ in rows] + [-1] * (most - len(rows))
    assert got.offsets.tolist() == [sum(r[0] < e for r in rows) for e in range(case.e + 1)]
    position = torch.full_like(index.view(-1, columns), -1)
    for n, (_, t, k) in enumerate(rows):
        position[t, k] = n
    assert torch.equal(got.position, position)
    for name in ("expert_index", "offsets", "source", "position", "dropped"):
        assert getattr(got, name).dtype == torch.int32, name
    kept = [torch.zeros((), dtype=torch.float64) if e is None else gate
            for row, gates in zip(wanted.index, wanted.gate) for e, gate in zip(row, gates)]  # fmt: skip
    weights = torch.stack(kept).view(-1, columns) if kept else torch.zeros(0, columns, dtype=torch.float64)
    cotangent = torch.randn(weights.shape, dtype=torch.float64)

    def gradient(leaf, weights, balance, z):
        total = (weights * cotangent.to(weights.dtype)).sum() + 0.7 * balance + 0.3 * z + 0 * leaf.sum()
        return torch.autograd.grad(total, leaf)[0].cpu()

    pairs = [
        (got.weights, weights),
        (got.balance_loss, wanted.balance),
        (got.z_loss, wanted.z),
    ]
    if logits.requires_grad and logits.numel():
        ours = gradient(logits, got.weights, got.balance_loss, got.z_loss)
        pairs.append((ours, gradient(exact, weights, wanted.balance, wanted.z)))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


# --- Experts ---


def act(pre: Tensor, activation: str) -> Tensor:
    """The hidden layer of an expert from its pre-activations, by torch's own functions."""
    functional = torch.nn.functional
    plain = {
        "geglu": functional.gelu,
        "geglu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "swiglu": functional.silu,
        "reglu": torch.relu,
    }
    plain.update(gelu=plain["geglu"], gelu_tanh=plain["geglu_tanh"], silu=plain["swiglu"], relu=plain["reglu"])
    if activation in GATED:
        gate, up = pre.chunk(2, dim=-1)
        return plain[activation](gate) * up
    return plain[activation](pre)


def forward(x, weights, w_gate_up, w_down, b_gate_up, b_down, routing, activation: str) -> Tensor:
    """out (T, J), one token and one choice after the other, in the dtype of x."""
    outs = []
    for t, row in enumerate(routing.expert_index.tolist()):
        total = x.new_zeros(w_down.shape[1], dtype=weights.dtype)
        for k, e in enumerate(row):
            if e >= 0:
                pre = w_gate_up[e] @ x[t]
                pre = pre if b_gate_up is None else pre + b_gate_up[e]
                y = w_down[e] @ act(pre, activation)
                y = y if b_down is None else y + b_down[e]
                total = total + weights[t, k] * y
        outs.append(total.to(x.dtype))
    return torch.stack(outs) if outs else x.new_zeros(0, w_down.shape[1])
