"""The cases of the gated units and layers, and the figures they are to reach (one core).

The units move bytes: 3 tensors forward, 8 forward and backward (the inputs are read again, with the gradient, and two
gradients are written). What they are held against is the bandwidth of `copy_` between two tensors that are there
already; pyext's time also has the fresh results, whose pages the system has to make. The layers multiply: 2 flops for
each weight and row forward, twice as many backward; with one row they read the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import pyext

from .attention_cases import DTYPES
from .harness import Case, Contender, Tensors, Work, percent_of_bandwidth, percent_of_peak, speedup
from .peers import fastest_reader, time_limit

UNIT = (4096, 4096)
LAYER = (2048, 512, 1408, 512)  # rows, features, hidden features, features of the result
ONE_ROW = (1, 2048, 5504, 2048)  # LLaMA's shape; the weights are larger than the caches
COPIES = 4  # of the weights of one row, taken in turn, so that they come from memory
EAGER, COMPILED = "eager", "torch.compile"
ACTIVATIONS = {"geglu": F.gelu, "swiglu": F.silu, "reglu": F.relu}


def name_of(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


# --- Units ----------------------------------------------------------------------------------------------------------


def _calls(direction: str, ways: dict[str, Callable], leaves: list[torch.Tensor], grad: torch.Tensor):
    """A contender for each way: forward without autograd, or forward and backward, or backward alone."""

    def forward(way):
        def call():
            with torch.no_grad():
                way(*leaves)

        return call

    def both(way):
        recorded = [x.detach().requires_grad_() for x in leaves]
        return lambda: torch.autograd.grad(way(*recorded), recorded, grad)

    def backward(way):
        recorded = [x.detach().requires_grad_() for x in leaves]
        out = way(*recorded)
        return lambda: torch.autograd.grad(out, recorded, grad, retain_graph=True)

    make = {"forward": forward, "forward+backward": both, "backward": backward}[direction]
    return [Contender(name, make(way)) for name, way in ways.items()]


def _results(way: Callable, leaves: list[torch.Tensor], grad: torch.Tensor, names: list[str], to) -> Tensors:
    leaves = [x.to(to).requires_grad_() for x in leaves]
    out = way(*leaves)
    grads = torch.autograd.grad(out, leaves, grad.to(to))
    return {"out": out.detach(), **{f"grad_{name}": g for name, g in zip(names, grads, strict=True)}}


def unit_work(activation: str, direction: str, dtype: str, seed: int) -> Work:
    """pyext's function of two tensors against eager PyTorch and torch.compile."""
    generator = torch.Generator().manual_seed(seed)
    gate, up, grad = (torch.randn(UNIT, generator=generator).to(DTYPES[dtype]) for _ in range(3))

    def eager(gate, up):
        return ACTIVATIONS[activation](gate) * up

    own = getattr(pyext, activation)
    ways, notes = {"pyext": own, EAGER: eager}, []
    try:
        with time_limit(120):
            torch._dynamo.reset()  # which counts how often it has compiled a function of this place
            compiled = torch.compile(eager)
            for contender in _calls(direction, {COMPILED: compiled}, [gate, up], grad):
                contender.call()
        ways[COMPILED] = compiled
    except Exception as error:  # no compiler here, or a bug in there: the peer is missing, we go on
        notes.append(f"{COMPILED}: {type(error).__name__}: {error}".splitlines()[0][:200])
    present = torch.empty_like(gate)
    passes = 3 if direction == "forward" else 8
    return Work(
        _calls(direction, ways, [gate, up], grad),
        bytes=passes * gate.nbytes,
        got=lambda: _results(own, [gate, up], grad, ["gate", "up"], gate.dtype),
        truth=lambda to: _results(eager, [gate, up], grad, ["gate", "up"], to),
        dtype=gate.dtype,
        bandwidth_probe=lambda: [present.copy_(gate) for _ in range((passes + 1) // 2)],
        notes=notes,
    )


# --- Layers ---------------------------------------------------------------------------------------------------------


def eager_mlp(x, w_gate, w_up, w_down):
    return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


def layer_leaves(shape: tuple[int, ...], dtype: str, generator: torch.Generator) -> list[torch.Tensor]:
    rows, features, hidden, result = shape
    sizes = (rows, features), (hidden, features), (hidden, features), (result, hidden)
    drawn = [torch.randn(size, generator=generator) for size in sizes]
    return [(t if i == 0 else t / t.shape[1] ** 0.5).to(DTYPES[dtype]) for i, t in enumerate(drawn)]


def layer_work(direction: str, dtype: str, seed: int) -> Work:
    """pyext.gated_mlp against three linear layers of PyTorch."""
    generator = torch.Generator().manual_seed(seed)
    leaves = layer_leaves(LAYER, dtype, generator)
    rows, features, hidden, result = LAYER
    grad = torch.randn(rows, result, generator=generator).to(leaves[0].dtype)
    names = ["x", "w_gate", "w_up", "w_down"]
    flops = 2.0 * rows * hidden * (2 * features + result)
    return Work(
        _calls(direction, {"pyext": pyext.gated_mlp, EAGER: eager_mlp}, leaves, grad),
        flops=flops if direction == "forward" else 2 * flops,
        got=lambda: _results(pyext.gated_mlp, leaves, grad, names, leaves[0].dtype),
        truth=lambda to: _results(eager_mlp, leaves, grad, names, to),
        dtype=leaves[0].dtype,
    )


class _Weights:
    """Copies of the weights in one piece of memory, whose halves `key` and `value` are for `fastest_reader`."""

    def __init__(self, w_gate: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor):
        memory = torch.cat([w.flatten() for w in (w_gate, w_up, w_down)])
        gate_up, down = memory.split([2 * w_gate.numel(), w_down.numel()])
        self.gate_up, self.down = gate_up.view(-1, w_gate.shape[1]), down.view(w_down.shape)
        self.key, self.value = memory.chunk(2)


def one_row_work(dtype: str, seed: int) -> Work:
    """One row, packed weights: bound by reading them. Every call takes the next of several copies."""
    generator = torch.Generator().manual_seed(seed)
    x, w_gate, w_up, w_down = layer_leaves(ONE_ROW, dtype, generator)
    copies = [_Weights(w_gate, w_up, w_down) for _ in range(COPIES)]
    turn = 0

    def following() -> _Weights:
        nonlocal turn
        turn += 1
        return copies[turn % COPIES]

    def own():
        weights = following()
        with torch.no_grad():
            pyext.gated_mlp(x, weights.gate_up, None, weights.down)

    def eager():
        weights = following()
        with torch.no_grad():
            gate, up = F.linear(x, weights.gate_up).chunk(2, -1)
            F.linear(F.silu(gate) * up, weights.down)

    read = fastest_reader([(weights.key, weights.value) for weights in copies])
    leaves = [x, w_gate, w_up, w_down]
    return Work(
        [Contender("pyext", own), Contender(EAGER, eager)],
        bytes=sum(w.nbytes for w in leaves[1:]),
        got=lambda: {"out": pyext.gated_mlp(*leaves)},
        truth=lambda to: {"out": eager_mlp(*(t.to(to) for t in leaves))},
        dtype=x.dtype,
        bandwidth_probe=lambda: read(following()),
    )


# --- The list -------------------------------------------------------------------------------------------------------


def all_cases() -> list[Case]:
    cases = []
    for dtype in ("fp32", "bf16"):
        for activation in ACTIVATIONS:
            for direction in ("forward", "forward+backward"):
                name, title = (
                    f"glu/{activation}/{direction}/{name_of(UNIT)}/{dtype}",
                    f"{activation}, {direction}, {UNIT}",
                )
                forward = direction == "forward"
                figures = (
                    speedup(EAGER, 2.5 if forward else 2),
                    speedup(COMPILED, None if forward else 1.3),
                    percent_of_bandwidth(what="copy"),
                )
                setup = partial(unit_work, activation, direction, dtype)
                cases.append(Case(name, "glu", title, dtype, figures, setup, op="glu"))
        for direction, times in (("forward", 2), ("backward", 1.8)):
            name, title = f"gated_mlp/{direction}/{name_of(LAYER)}/{dtype}", f"gated_mlp, {direction}, {LAYER}"
            figures = speedup(EAGER, times if dtype == "fp32" else 1), percent_of_peak(80)
            setup = partial(layer_work, direction, dtype)
            cases.append(Case(name, "gated_mlp", title, dtype, figures, setup, peak=dtype, op="gated_linear"))
        name, title = f"gated_mlp/one_row/{name_of(ONE_ROW)}/{dtype}", f"gated_mlp, one row, {ONE_ROW}"
        figures = speedup(EAGER), percent_of_bandwidth(70)
        cases.append(Case(name, "gated_mlp", title, dtype, figures, partial(one_row_work, dtype), op="gated_linear"))
    return cases
