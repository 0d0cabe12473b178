"""The cases of mixtures of experts, and the figures they are to reach (one core).

Routing reads the logits once; its floor is that, and what it is held against is a time. Dispatch and combine move
bytes: each row of an expert is read and written (the gradients of combine: read twice, and written). What they are held
against is the bandwidth of `copy_` between two tensors that are there already; pyext's time also has the fresh results,
whose pages the system has to make.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

import pyext

from .attention_cases import DTYPES
from .harness import Case, Contender, Figure, Tensors, Work, percent_of_bandwidth, speedup

ROUTED = (32768, 128, 8)  # tokens, experts, choices
MOVED = (32768, 1024, 8, 2)  # tokens, features, experts, choices
EAGER = "eager"
#: (policy, what else `route` gets) of the cases of routing.
POLICIES = (
    ("softmax_topk", {}),
    ("softmax_topk", dict(capacity_factor=1.25)),
    ("sigmoid", {}),
    ("expert_choice", {}),
)


def milliseconds(at_most: float | None = None, who: str = "pyext") -> Figure:
    return Figure("time", "ms", lambda m: 1e3 * m.seconds[who], at_most=at_most)


def name_of(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


# --- Routing ---------------------------------------------------------------------------------------------------------


def eager_route(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, ...]:
    """What a router of Transformers and its block compute: weights, balance loss (Mixtral's), z-loss and the rows.

    Softmax, top k, one-hot masks for the loss, and the permutation by a sort of the experts.
    """
    scores = torch.softmax(logits, dim=-1)
    weights, index = torch.topk(scores, top_k, dim=-1)
    experts = logits.shape[1]
    share = F.one_hot(index, experts).to(scores.dtype).mean(dim=0)
    balance = experts * (share * scores.mean(dim=0)).sum()
    z = torch.logsumexp(logits, dim=-1).square().mean()
    flat = index.flatten()
    order = torch.argsort(flat, stable=True)
    return weights, index, order // top_k, torch.bincount(flat, minlength=experts).cumsum(0), balance, z


def _loss(weights, balance, z, cotangent):
    return (weights * cotangent).sum() + balance + z


def route_work(policy: str, options: dict, direction: str, dtype: str, seed: int) -> Work:
    """Routing of all tokens, and its derivative; eager PyTorch is a peer of the plain policy."""
    tokens, experts, top_k = ROUTED
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator).to(DTYPES[dtype])
    columns = experts if policy == "expert_choice" else top_k
    cotangent = torch.randn(tokens, columns, generator=generator)

    def own(logits, impl="auto"):
        routing = pyext.moe.route(logits, top_k, policy=policy, impl=impl, **options)
        return routing.weights, routing.balance_loss, routing.z_loss

    def eager(logits):
        weights, *_, balance, z = eager_route(logits.float(), top_k)
        return weights, balance, z

    def both(way):
        leaf = logits.detach().requires_grad_()
        return lambda: torch.autograd.grad(_loss(*way(leaf), cotangent), leaf)

    def forward(way):
        def call():
            with torch.no_grad():
                way(logits)

        return call

    def found(way, to) -> Tensors:
        leaf = logits.to(to).requires_grad_()
        weights, balance, z = way(leaf)
        grad = torch.autograd.grad(_loss(weights, balance, z, cotangent.to(weights.dtype)), leaf)[0]
        return {"weights": weights.detach(), "balance": balance.detach(), "z": z.detach(), "grad_logits": grad}

    make = forward if direction == "forward" else both
    ways = {"pyext": own, EAGER: eager} if policy == "softmax_topk" and not options else {"pyext": own}
    return Work(
        [Contender(name, make(way)) for name, way in ways.items()],
        bytes=logits.nbytes * (1 if direction == "forward" else 3),
        got=lambda: found(own, logits.dtype),
        truth=lambda to: found(lambda leaf: own(leaf, "reference"), to),
        dtype=logits.dtype,
    )


# --- Dispatch and combine --------------------------------------------------------------------------------------------


def _moved(dtype: str, seed: int):
    """A routing without a capacity, x, ys and the gradient of out."""
    tokens, features, experts, top_k = MOVED
    generator = torch.Generator().manual_seed(seed)
    routing = pyext.moe.route(torch.randn(tokens, experts, generator=generator), top_k, renormalize=True)
    rows = tokens * top_k
    return routing, *(torch.randn(n, features, generator=generator).to(DTYPES[dtype]) for n in (tokens, rows, tokens))


def _copies(like: torch.Tensor, rows: int) -> Callable:
    """A copy that reads and writes so many rows in all, half of them each."""
    source = torch.ones(rows // 2, like.shape[1], dtype=like.dtype)
    present = torch.ones_like(source)
    return lambda: present.copy_(source)


def dispatch_work(dtype: str, seed: int) -> Work:
    """Rows by expert, against index_select."""
    routing, x, ys, _ = _moved(dtype, seed)
    source = routing.source.long()
    return Work(
        [
            Contender("pyext", lambda: pyext.moe.dispatch(x, routing)),
            Contender(EAGER, lambda: x.index_select(0, source)),
        ],
        bytes=2 * ys.nbytes,
        got=lambda: {"xs": pyext.moe.dispatch(x, routing)},
        truth=lambda to: {"xs": x.to(to).index_select(0, source)},
        dtype=x.dtype,
        bandwidth_probe=_copies(ys, 2 * len(ys)),
    )


def combine_work(direction: str, dtype: str, seed: int) -> Work:
    """Weighted sums of rows, against index_add_; or the gradients of rows and weights."""
    routing, x, ys, grad = _moved(dtype, seed)
    source, position, weights = routing.source.long(), routing.position.long(), routing.weights
    tokens, top_k = weights.shape

    def eager(ys, weights):
        by_row = torch.empty_like(weights.flatten()).scatter(0, position.flatten(), weights.flatten())
        return ys.new_zeros(tokens, ys.shape[1]).index_add(0, source, ys * by_row[:, None].to(ys.dtype))

    def own(ys, weights):
        return pyext.moe.combine(ys, routing._replace(weights=weights))

    def call(way):
        if direction == "forward":
            return lambda: way(ys, weights)
        leaves = ys.detach().requires_grad_(), weights.detach().requires_grad_()
        out = way(*leaves)
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    def found(way, to) -> Tensors:
        leaves = ys.to(to).requires_grad_(), weights.to(torch.promote_types(to, torch.float32)).requires_grad_()
        out = way(*leaves)
        gradients = torch.autograd.grad(out, leaves, grad.to(to))
        return {"out": out.detach(), "grad_ys": gradients[0], "grad_weights": gradients[1]}

    rows = tokens * top_k + tokens if direction == "forward" else 2 * tokens * top_k + tokens
    return Work(
        [Contender("pyext", call(own)), Contender(EAGER, call(eager))],
        bytes=rows * ys.nbytes / len(ys),
        got=lambda: found(own, ys.dtype),
        truth=lambda to: found(eager, to),
        dtype=ys.dtype,
        bandwidth_probe=_copies(ys, rows),
    )


# --- The list --------------------------------------------------------------------------------------------------------


def _setup(make, *args) -> Callable[[int], Work]:
    return lambda seed: make(*args, seed)


def all_cases() -> list[Case]:
    cases = []
    for dtype in ("fp32", "bf16"):
        for policy, options in POLICIES:
            for direction in ("forward", "forward+backward"):
                words = "".join(f"+{name}={value}" for name, value in options.items())
                name = f"moe/route/{policy}{words}/{direction}/{name_of(ROUTED)}/{dtype}"
                plain = policy == "softmax_topk" and not options
                figures = (milliseconds(5 if plain and direction == "forward" else None),)
                figures += (speedup(EAGER),) if plain else ()
                setup = _setup(route_work, policy, options, direction, dtype)
                title = f"{policy}{words}, {direction}, {ROUTED}"
                cases.append(Case(name, "moe_route", title, dtype, figures, setup, op="moe_route"))
        moves = {"dispatch": _setup(dispatch_work, dtype)}
        moves |= {f"combine/{d}": _setup(combine_work, d, dtype) for d in ("forward", "backward")}
        for what, setup in moves.items():
            figures = speedup(EAGER), percent_of_bandwidth(70, what="copy")
            name, title = f"moe/{what}/{name_of(MOVED)}/{dtype}", f"{what.replace('/', ', ')}, {MOVED}"
            cases.append(Case(name, "moe_dispatch", title, dtype, figures, setup, op="moe_dispatch"))
    return cases
