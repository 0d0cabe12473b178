"""The cases of mixtures of experts, and the figures they are to reach (one core).

Routing reads the logits once; its floor is that, and what it is held against is a time. Dispatch and combine move
bytes: each row of an expert is read and written (the gradients of combine: read twice, and written). What they are held
against is `copy_` of as many bytes, as many of them into a new tensor as the op makes, of huge pages too: the system
zeroes the pages of a new tensor, at 25 GB/s where `copy_` reads and writes 42 GB/s in all, which is half of the time of
a dispatch and no part of its work. Reported as well: the share of `copy_` between tensors that are there already. A
bare loop that moves the same rows into new pages reaches 65 to 75 % of that (dispatch 67-73, combine 68-75 forward and
65-69 backward), and into pages that are there 97 to 160 %.

Experts multiply: 2 flops for each weight of a row forward, twice as many backward; one token reads the weights of its
experts. What is timed is the whole block, routing included, beside Transformers' Mixtral with the same weights in each
of its ways to run experts; what is checked is the layer behind one fixed routing, since a router's decisions may
differ with its dtype.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import pyext

from .attention_cases import DTYPES
from .harness import (
    Case,
    Contender,
    Figure,
    Tensors,
    Work,
    percent_of_bandwidth,
    percent_of_peak,
    speedup,
    time_ratio,
)
from .peers import fastest_reader

ROUTED = (32768, 128, 8)  # tokens, experts, choices
MOVED = (32768, 1024, 8, 2)  # tokens, features, experts, choices
LAYERS = (2048, 512, 1024, 8, 2), (512, 512, 512, 64, 4)  # tokens, features, hidden features, experts, choices
ONE_TOKEN = (1, 512, 1024, 8, 2)
COPIES = 4  # of the weights of one token, taken in turn, so that they come from memory
EAGER = "eager"
PRESENT = "copy between present tensors"
#: Transformers' ways to run the experts of a block.
IMPLEMENTATIONS = (EAGER, "grouped_mm", "batched_mm")
#: Speed-ups over the best of them: (shape, dtype) -> forward, forward and backward.
TIMES = {
    (LAYERS[0], "fp32"): (2.1, 2.0), (LAYERS[0], "bf16"): (1.1, 1.2),
    (LAYERS[1], "fp32"): (2.6, 2.4), (LAYERS[1], "bf16"): (1.8, 1.8),
}  # fmt: skip
#: (policy, what else `route` gets) of the cases of routing.
POLICIES = (
    ("softmax_topk", {}),
    ("softmax_topk", dict(capacity_factor=1.25)),
    ("sigmoid", {}),
    ("expert_choice", {}),
)


def milliseconds(at_most: float | None = None, who: str = "pyext") -> Figure:
    return Figure("time", "ms", lambda m: 1e3 * m.seconds[who], at_most=at_most)


def share_of_time(peer: str, who: str = "pyext") -> Figure:
    return Figure(f"share of {peer}", "%", lambda m: 100 * m.seconds[peer] / m.seconds[who])


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


def _new_of_huge_pages(rows: int, like: torch.Tensor) -> torch.Tensor:
    """A tensor made as the ops make their results (use_huge_pages of csrc/tensors.h)."""
    made, huge, small = torch.empty(rows, like.shape[1], dtype=like.dtype), 2 << 20, 4096
    begin, end = made.data_ptr(), made.data_ptr() + made.nbytes
    first, last = -(-begin // huge) * huge, end // huge * huge
    if sys.platform == "linux" and first < last:
        populate = 23  # MADV_POPULATE_WRITE
        advice = (first, last, mmap.MADV_HUGEPAGE), (begin // small * small, first, populate)
        for start, stop, what in (*advice, (last, -(-end // small) * small, populate)):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), what)
    return made


def _copies(like: torch.Tensor, rows: int, new: int) -> tuple[Contender, Callable]:
    """Copies that read and write so many rows in all, half of them each.

    First between tensors that are there already; then with so many of the rows written to a new tensor.
    """
    source = torch.ones(rows // 2, like.shape[1], dtype=like.dtype)
    present = torch.ones_like(source)

    def into_new():
        _new_of_huge_pages(new, like).copy_(source[:new])
        present[new:].copy_(source[new:])

    return Contender(PRESENT, lambda: present.copy_(source)), into_new


def dispatch_work(dtype: str, seed: int) -> Work:
    """Rows by expert, against index_select."""
    routing, x, ys, _ = _moved(dtype, seed)
    source = routing.source.long()
    present, into_new = _copies(ys, 2 * len(ys), len(ys))
    return Work(
        [
            Contender("pyext", lambda: pyext.moe.dispatch(x, routing)),
            Contender(EAGER, lambda: x.index_select(0, source)),
            present,
        ],
        bytes=2 * ys.nbytes,
        got=lambda: {"xs": pyext.moe.dispatch(x, routing)},
        truth=lambda to: {"xs": x.to(to).index_select(0, source)},
        dtype=x.dtype,
        bandwidth_probe=into_new,
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

    rows, new = (len(ys) + tokens, tokens) if direction == "forward" else (2 * len(ys) + tokens, len(ys))
    present, into_new = _copies(ys, rows, new)
    return Work(
        [Contender("pyext", call(own)), Contender(EAGER, call(eager)), present],
        bytes=rows * ys.nbytes / len(ys),
        got=lambda: found(own, ys.dtype),
        truth=lambda to: found(eager, to),
        dtype=ys.dtype,
        bandwidth_probe=into_new,
    )


# --- Experts ---------------------------------------------------------------------------------------------------------


class Layer:
    """x and the weights of a Mixtral block: router, experts."""

    def __init__(self, shape: tuple[int, ...], dtype: str, generator: torch.Generator):
        tokens, features, hidden, experts, self.top_k = shape
        sizes = (tokens, features), (experts, features), (experts, 2 * hidden, features), (experts, features, hidden)
        drawn = [torch.randn(size, generator=generator) for size in sizes]
        self.leaves = [(t if i == 0 else t / t.shape[-1] ** 0.5).to(DTYPES[dtype]) for i, t in enumerate(drawn)]
        # As many weights as a token needs, in two halves for `fastest_reader`.
        used = self.top_k * sum(w[0].numel() for w in self.leaves[2:])
        self.key, self.value = self.leaves[2].view(-1)[:used].chunk(2)

    def own(self, x, router, w_gate_up, w_down):
        routing = pyext.moe.route(F.linear(x, router), self.top_k, renormalize=True)
        return pyext.moe.forward(x, routing, w_gate_up, w_down)

    def peer(self, implementation: str) -> Callable:
        """The block of Transformers; gradients go to its own parameters, which share the memory of ours."""
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        x, router, w_gate_up, w_down = self.leaves
        experts, _, hidden = w_down.shape
        config = MixtralConfig(
            hidden_size=x.shape[1], intermediate_size=hidden, num_local_experts=experts, num_experts_per_tok=self.top_k
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            block = MixtralSparseMoeBlock(config)

        def call(x, router, w_gate_up, w_down):
            named = {"gate.weight": router, "experts.gate_up_proj": w_gate_up, "experts.down_proj": w_down}
            out = torch.func.functional_call(block, named, (x[None],))
            return (out[0] if isinstance(out, tuple) else out).view(x.shape)

        return call

    def ways(self) -> dict[str, Callable]:
        # batched_mm copies the weights of every token's experts, which many tokens have no memory for.
        peers = IMPLEMENTATIONS if len(self.leaves[0]) == 1 else IMPLEMENTATIONS[:2]
        return {"pyext": self.own, **{name: self.peer(name) for name in peers}}


def _results(layer: Layer, grad: torch.Tensor, way: Callable, to: torch.dtype) -> Tensors:
    """out and gradients of way(x, w_gate_up, w_down)."""
    x, _, w_gate_up, w_down = (t.to(to).requires_grad_() for t in layer.leaves)
    out = way(x, w_gate_up, w_down)
    grads = torch.autograd.grad(out, (x, w_gate_up, w_down), grad.to(to))
    return {"out": out.detach(), **dict(zip(("grad_x", "grad_w_gate_up", "grad_w_down"), grads, strict=True))}


def _checked(layer: Layer, grad: torch.Tensor) -> dict[str, Callable]:
    """`got` and `truth` of a Work, behind the routing that the router of this dtype decides."""
    x, router, *_ = layer.leaves
    routing = pyext.moe.route(F.linear(x, router), layer.top_k, renormalize=True)

    def own(x, w_gate_up, w_down):
        return pyext.moe.forward(x, routing, w_gate_up, w_down)

    def eager(x, w_gate_up, w_down):
        out = torch.zeros_like(x)
        for e in range(len(w_down)):
            token, choice = (routing.expert_index == e).nonzero(as_tuple=True)
            gate, up = F.linear(x[token], w_gate_up[e]).chunk(2, -1)
            y = F.linear(F.silu(gate) * up, w_down[e]) * routing.weights[token, choice, None].to(x.dtype)
            out = out.index_add(0, token, y)
        return out

    return {
        "got": lambda: _results(layer, grad, own, x.dtype),
        "truth": lambda to: _results(layer, grad, eager, to),
        "dtype": x.dtype,
    }


def _call(direction: str, way: Callable, leaves: list[torch.Tensor], grad: torch.Tensor) -> Callable:
    def forward():
        with torch.no_grad():
            way(*leaves)

    recorded = [t.detach().requires_grad_() for t in leaves]
    return forward if direction == "forward" else lambda: torch.autograd.grad(way(*recorded), recorded, grad)


def layer_work(shape: tuple[int, ...], direction: str, dtype: str, seed: int) -> Work:
    """The whole block, many tokens."""
    generator = torch.Generator().manual_seed(seed)
    layer, (tokens, features, hidden, _, top_k) = Layer(shape, dtype, generator), shape
    grad = torch.randn(tokens, features, generator=generator).to(DTYPES[dtype])
    flops = 6.0 * tokens * top_k * features * hidden
    return Work(
        [Contender(name, _call(direction, way, layer.leaves, grad)) for name, way in layer.ways().items()],
        flops=flops if direction == "forward" else 3 * flops,
        **_checked(layer, grad),
    )


def skewed_work(shape: tuple[int, ...], dtype: str, seed: int) -> Work:
    """moe.forward with four choices of five at one expert, beside the same number of rows spread evenly."""
    generator = torch.Generator().manual_seed(seed)
    layer, (tokens, features, _, experts, _) = Layer(shape, dtype, generator), shape
    x, _, w_gate_up, w_down = layer.leaves
    token = torch.arange(tokens)
    choices = {"pyext": torch.where(token % 5 < 4, 0, 1 + token % (experts - 1)), "balanced": token % experts}

    def call(expert):
        routing = pyext.moe.route(20 * F.one_hot(expert, experts).float(), 1)
        return _call("forward", lambda *_: pyext.moe.forward(x, routing, w_gate_up, w_down), layer.leaves, x)

    grad = torch.randn(tokens, features, generator=generator).to(DTYPES[dtype])
    return Work([Contender(name, call(expert)) for name, expert in choices.items()], **_checked(layer, grad))


def one_token_work(dtype: str, seed: int) -> Work:
    """One token: bound by reading the weights of its experts. Every call takes the next of several layers."""
    generator = torch.Generator().manual_seed(seed)
    copies = [Layer(ONE_TOKEN, dtype, generator) for _ in range(COPIES)]
    turn = 0

    def following() -> Layer:
        nonlocal turn
        turn += 1
        return copies[turn % COPIES]

    def call(name):
        ways = {id(layer): layer.ways()[name] for layer in copies}

        def run():
            layer = following()
            with torch.no_grad():
                ways[id(layer)](*layer.leaves)

        return run

    read = fastest_reader([(layer.key, layer.value) for layer in copies])
    grad = torch.randn(copies[0].leaves[0].shape, generator=generator).to(DTYPES[dtype])
    return Work(
        [Contender(name, call(name)) for name in ("pyext", *IMPLEMENTATIONS)],
        bytes=copies[0].key.nbytes + copies[0].value.nbytes,
        bandwidth_probe=lambda: read(following()),
        **_checked(copies[0], grad),
    )


# --- The list --------------------------------------------------------------------------------------------------------


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
                setup = partial(route_work, policy, options, direction, dtype)
                title = f"{policy}{words}, {direction}, {ROUTED}"
                cases.append(Case(name, "moe_route", title, dtype, figures, setup, op="moe_route"))
        moves = {"dispatch": partial(dispatch_work, dtype)}
        moves |= {f"combine/{d}": partial(combine_work, d, dtype) for d in ("forward", "backward")}
        for what, setup in moves.items():
            figures = speedup(EAGER), percent_of_bandwidth(70, what="copy"), share_of_time(PRESENT)
            name, title = f"moe/{what}/{name_of(MOVED)}/{dtype}", f"{what.replace('/', ', ')}, {MOVED}"
            cases.append(Case(name, "moe_dispatch", title, dtype, figures, setup, op="moe_dispatch"))
        cases += _expert_cases(dtype)
    return cases


def _expert_cases(dtype: str) -> list[Case]:
    cases = []
    for shape in LAYERS:
        for direction, times in zip(("forward", "forward+backward"), TIMES[shape, dtype], strict=True):
            name, title = f"moe/layer/{direction}/{name_of(shape)}/{dtype}", f"experts, {direction}, {shape}"
            figures = *(speedup(peer, times) for peer in IMPLEMENTATIONS[:2]), percent_of_peak()
            setup = partial(layer_work, shape, direction, dtype)
            cases.append(Case(name, "moe_experts", title, dtype, figures, setup, peak=dtype, op="moe_experts"))
    name, title = f"moe/skewed/{name_of(LAYERS[0])}/{dtype}", f"experts, four fifths to one, {LAYERS[0]}"
    figures = (time_ratio("balanced", 1.15),)
    setup = partial(skewed_work, LAYERS[0], dtype)
    cases.append(Case(name, "moe_experts", title, dtype, figures, setup, op="moe_experts"))
    name, title = f"moe/one_token/{name_of(ONE_TOKEN)}/{dtype}", f"experts, one token, {ONE_TOKEN}"
    figures = *(speedup(peer) for peer in IMPLEMENTATIONS), percent_of_bandwidth(70)
    cases.append(Case(name, "moe_experts", title, dtype, figures, partial(one_token_work, dtype), op="moe_experts"))
    return cases
