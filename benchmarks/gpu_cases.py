"""The cases that run on a GPU: gated units and layers, rotary, mixtures of experts; timed by its clock, in one loop.

What streams is held against `copy_` of as many bytes, what multiplies against cuBLAS (`torch.mm`) of as many flops;
both are measured in the same loop. Before every call the L2 cache is overwritten, as between the layers of a model.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

import pyext

from .attention_cases import DTYPES
from .harness import Case, Contender, Figure, Measured, Work, check, percent_of_bandwidth, percent_of_peak, speedup

Tensor = torch.Tensor
ACTIVATIONS = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}
FLUSH_BYTES = 256 << 20  # more than any L2
ROUNDS = 20


@dataclass(frozen=True)
class Sizes:
    """Of a model of 7 to 8 billion parameters; tests take less."""

    tokens: int = 8192
    hidden: int = 4096
    inner: int = 11008
    heads: tuple[int, int, int, int] = (4, 32, 4096, 128)
    experts: tuple[int, int] = (128, 8)  # of which a token takes so many


# --- Timing ---


def measure(work: Work, rounds: int = ROUNDS) -> Measured:
    """Medians over rounds in which every contender and the probe take a turn each."""
    calls = {c.name: c.call for c in work.contenders}
    if work.bandwidth_probe:
        calls["probe"] = work.bandwidth_probe
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for call in calls.values():  # compiles, and fills the allocator's cache
        call(), call()
    clocks: dict[str, list] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(), call(), end.record()
            clocks[name].append((start, end))
    torch.cuda.synchronize()
    seconds = {n: statistics.median(s.elapsed_time(e) for s, e in pairs) / 1e3 for n, pairs in clocks.items()}
    probe = seconds.pop("probe", None)
    return Measured(
        seconds,
        flops=work.flops,
        bytes=work.bytes,
        peak=work.flops / probe if probe and work.flops else None,
        bandwidth=work.bytes / probe if probe and not work.flops else None,
    )


def _run(setup: Callable[[int], Work]) -> Callable[[int], tuple[Measured | None, dict]]:
    def run(seed: int):
        work = setup(seed)
        error = check(work)
        return (measure(work) if error["ok"] else None), error

    return run


# --- What all cases share ---


def _ways(op: Callable, leaves: tuple, others: tuple, eager: Callable, peer: Callable | None) -> dict[str, Callable]:
    """pyext as it chooses itself, its Triton kernels by name, and everybody else; functions of the leaves."""
    ways = {"pyext": lambda *t: op(*t, *others)}
    if pyext.explain(op, *leaves, *others)["triton"] == "accepts":
        ways["triton"] = lambda *t: op(*t, *others, impl="triton")
    ways["eager"], ways["torch.compile"] = eager, torch.compile(eager, dynamic=False)
    if peer is not None:
        ways["Liger"] = peer
    return ways


def _liger(module: str, name: str):
    """A function of Liger-Kernel, or None where that is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)


def _work(
    ways: dict, formula: Callable, leaves: tuple, backward: bool, moved: int, flops: float = 0.0, both: bool = False
) -> Work:
    """Forward, or backward alone to all leaves, or both. The truth is `formula` in another dtype."""
    dtype, device = leaves[0].dtype, leaves[0].device
    with torch.no_grad():
        like = formula(*leaves)
    grad = torch.randn(like.shape, device=device).to(dtype)

    def results(way, leaves, grad) -> dict[str, Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = way(*leaves)
        grads = torch.autograd.grad(out, leaves, grad) if backward else ()
        return {"out": out.detach(), **{f"grad {i}": g for i, g in enumerate(grads)}}

    def truth(dtype: torch.dtype) -> dict[str, Tensor]:
        return results(formula, [leaf.to(dtype) for leaf in leaves], grad.to(dtype))

    def call(way):
        if not backward:
            return torch.no_grad()(lambda: way(*leaves))
        own = [leaf.detach().requires_grad_() for leaf in leaves]
        if both:
            return lambda: torch.autograd.grad(way(*own), own, grad, allow_unused=True)
        out = way(*own)
        return lambda: torch.autograd.grad(out, own, grad, retain_graph=True, allow_unused=True)

    source, target = (torch.empty(moved // 2, dtype=torch.int8, device=device) for _ in range(2))
    return Work(
        [Contender(name, call(way)) for name, way in ways.items()],
        flops=flops,
        bytes=moved,
        got=lambda: results(ways["pyext"], leaves, grad),
        truth=truth,
        dtype=dtype,
        bandwidth_probe=lambda: target.copy_(source),
    )


def _draw(seed: int, device: str, dtype: str, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    return tuple(torch.randn(s, generator=generator, device=device).to(DTYPES[dtype]) for s in shapes)


# --- The cases ---


def glu(name: str, dtype: str, backward: bool, device: str, sizes: Sizes, seed: int) -> Work:
    gate, up = leaves = _draw(seed, device, dtype, *[(sizes.tokens, sizes.inner)] * 2)
    activation = ACTIVATIONS[name]
    peer = {"swiglu": ("swiglu", "LigerSiLUMulFunction")}.get(name)
    liger = _liger(*peer) if peer else None

    def eager(gate, up):
        return activation(gate) * up

    ways = _ways(getattr(pyext, name), leaves, (), eager, liger and liger.apply)
    return _work(ways, eager, leaves, backward, (5 if backward else 3) * gate.nbytes)


def rotary(dtype: str, backward: bool, device: str, sizes: Sizes, seed: int) -> Work:
    (x,) = leaves = _draw(seed, device, dtype, sizes.heads)
    cos, sin = (t.to(device) for t in pyext.nn.RotaryEmbedding(sizes.heads[3], sizes.heads[2])(sizes.heads[2]))

    def eager(x):
        first, second = x.chunk(2, -1)
        c, s = cos.to(x.dtype), sin.to(x.dtype)
        return torch.cat([first * c - second * s, second * c + first * s], -1)

    ways = _ways(pyext.rotary, leaves, (cos, sin), eager, None)
    return _work(ways, eager, leaves, backward, 2 * x.nbytes)


def rotary_tables(dtype: str, device: str, sizes: Sizes, seed: int) -> Work:
    """The gradient of the tables, for positions in random order."""
    batch, heads, length, width = sizes.heads
    x, grad = _draw(seed, device, dtype, sizes.heads, sizes.heads)
    positions = torch.randperm(batch * length, device=device).view(batch, length) % length

    def eager(grad, x):
        g1, g2, x1, x2 = (t.float() if x.dtype != torch.float64 else t for y in (grad, x) for t in y.chunk(2, -1))
        terms = torch.stack([(g1 * x1 + g2 * x2).sum(1), (g2 * x1 - g1 * x2).sum(1)])
        return torch.zeros(2, length, width // 2, dtype=terms.dtype, device=device).index_add_(
            1, positions.flatten(), terms.flatten(1, 2)
        )

    def own(grad, x):
        numbers = positions, 1, length, width // 2, False, False
        return torch.cat(torch.ops.pyext.rotary_backward(grad, x, *numbers))

    return _work({"pyext": own, "eager": eager}, eager, (grad, x), False, 2 * x.nbytes)


def gated_mlp(dtype: str, backward: bool, device: str, sizes: Sizes, seed: int) -> Work:
    shapes = [(sizes.tokens, sizes.hidden), *[(sizes.inner, sizes.hidden)] * 2, (sizes.hidden, sizes.inner)]
    x, *weights = _draw(seed, device, dtype, *shapes)
    leaves = (x, *(w / w.shape[1] ** 0.5 for w in weights))

    def eager(x, w_gate, w_up, w_down):
        return (F.silu(x @ w_gate.T) * (x @ w_up.T)) @ w_down.T

    ways = _ways(pyext.gated_mlp, leaves, (), eager, None)
    products = 3 * (2 if backward else 1)
    flops = 2.0 * sizes.tokens * sizes.hidden * sizes.inner * products
    work = _work(ways, eager, leaves, backward, 0, flops)
    work.bandwidth_probe = lambda: [x @ leaves[1].T for _ in range(products)]  # cuBLAS: the flops, and nothing else
    return work


def moe_route(dtype: str, backward: bool, device: str, sizes: Sizes, seed: int) -> Work:
    """Choices, weights and rows; the peers sort."""
    experts, choices = sizes.experts
    (logits,) = leaves = _draw(seed, device, dtype, (sizes.tokens, experts))

    def eager(logits):
        weights, index = torch.softmax(logits, -1).topk(choices, -1)
        order = index.flatten().argsort(stable=True)
        offsets = torch.searchsorted(index.flatten()[order], torch.arange(experts + 1, device=device))
        return weights + 0 * (order[0] + offsets[0])

    def own(logits, *others, impl="auto"):
        return pyext.moe.route(logits, choices, impl=impl).weights

    ways = {"pyext": own, "eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}
    moved = (2 if backward else 1) * logits.nbytes + sizes.tokens * choices * (4 if backward else 16)
    return _work(ways, eager, leaves, backward, moved)


def moe_rows(name: str, dtype: str, backward: bool, device: str, sizes: Sizes, seed: int) -> Work:
    """Dispatch or combine."""
    experts, choices = sizes.experts
    logits, *drawn = _draw(seed, device, dtype, (sizes.tokens, experts), (sizes.tokens, sizes.hidden))
    routing = pyext.moe.route(logits, choices)
    rows = routing.source.shape[0] + sizes.tokens
    if name == "dispatch":
        ways = _ways(pyext.moe.dispatch, tuple(drawn), (routing,), lambda x: x[routing.source], None)
    else:
        drawn = _draw(seed + 1, device, dtype, (routing.source.shape[0], sizes.hidden))

        def eager(ys):
            return (ys[routing.position] * routing.weights[..., None].to(ys.dtype)).sum(1)

        ways = _ways(pyext.moe.combine, tuple(drawn), (routing,), eager, None)
    return _work(ways, ways["eager"], tuple(drawn), backward, rows * sizes.hidden * drawn[0].element_size())


def moe_experts(dtype: str, backward: bool, device: str, sizes: Sizes, seed: int) -> Work:
    """Eight experts, two for each token: gather, both layers and the weighted sum. The peer is given the number of rows
    of each expert, which pyext does not read."""
    experts, choices, hidden, inner = 8, 2, sizes.hidden, sizes.inner
    shapes = (sizes.tokens, experts), (sizes.tokens, hidden), (experts, 2 * inner, hidden), (experts, hidden, inner)
    logits, x, *weights = _draw(seed, device, dtype, *shapes)
    leaves = (x, *(w / w.shape[2] ** 0.5 for w in weights))
    routing = pyext.moe.route(logits, choices, renormalize=True)
    counts = routing.offsets.diff().tolist()

    def eager(x, w_gate_up, w_down):
        parts = []
        for rows, up, down in zip(x[routing.source].split(counts), w_gate_up, w_down, strict=True):
            gate, value = (rows @ up.T).chunk(2, -1)
            parts.append((F.silu(gate) * value) @ down.T)
        return (torch.cat(parts)[routing.position] * routing.weights[..., None].to(x.dtype)).sum(1)

    def own(x, *weights, impl="auto"):
        return pyext.moe.forward(x, routing, *weights, impl=impl)

    ways = {"pyext": own}
    if pyext.explain(pyext.moe.forward, leaves[0], routing, *leaves[1:])["triton"] == "accepts":
        ways["triton"] = partial(own, impl="triton")
    ways["eager"], ways["torch.compile"] = eager, torch.compile(eager, dynamic=False)
    products = 3 * (2 if backward else 1)
    work = _work(ways, eager, leaves, backward, 0, 2.0 * sizes.tokens * choices * hidden * inner * products)
    xs, w = x.repeat(choices, 1), leaves[1][0, :inner]
    work.bandwidth_probe = lambda: [xs @ w.T for _ in range(products)]  # cuBLAS: the flops, as one dense layer
    return work


def all_cases(device: str = "cuda", sizes: Sizes | None = None) -> list[Case]:
    """For a GPU; or, to check the results of small ones, for a CPU."""
    where, cases = (device, sizes or Sizes()), []

    def add(name: str, dtype: str, setup: Callable[[int], Work], figures: tuple[Figure, ...], op: str) -> None:
        how = {"setup": setup} if device == "cpu" else {"run": _run(setup)}
        cases.append(Case(f"gpu/{name}/{dtype}", "gpu", name, dtype, figures, op=op, **how))

    streams = percent_of_bandwidth(85, what="copy"), speedup("eager"), speedup("torch.compile"), speedup("Liger")
    routes = speedup("eager"), speedup("torch.compile")
    multiplies = percent_of_peak(90), speedup("eager"), speedup("torch.compile")
    for direction, backward in (("forward", False), ("backward", True)):
        for dtype in ("bf16", "fp32"):
            for name in ACTIVATIONS:
                add(f"{name} {direction}", dtype, partial(glu, name, dtype, backward, *where), streams, "glu")
            add(f"rotary {direction}", dtype, partial(rotary, dtype, backward, *where), streams, "rotary")
            for name in ("dispatch", "combine"):
                add(f"{name} {direction}", dtype, partial(moe_rows, name, dtype, backward, *where), streams, "moe")
        add(f"route {direction}", "fp32", partial(moe_route, "fp32", backward, *where), routes, "moe")
        add(f"experts {direction}", "bf16", partial(moe_experts, "bf16", backward, *where), multiplies, "moe")
        add(f"gated_mlp {direction}", "bf16", partial(gated_mlp, "bf16", backward, *where), multiplies, "gated_linear")
    add("rotary, gradient of the tables", "bf16", partial(rotary_tables, "bf16", *where), streams, "rotary")
    return cases
