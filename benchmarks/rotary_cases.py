"""The cases of `pyext.rotary` and of `rotary=` inside attention, and the figures they are to reach (one core).

Rotary moves bytes: it reads x and writes as much. The bandwidth it is held against is that of `copy_` between two
tensors that are there already; pyext's time also has the fresh result, whose pages the system has to make. The peer is
the eager `apply_rotary_pos_emb` of Transformers' LLaMA, with tables in x's dtype, as its models call it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import pyext

from .attention_cases import DTYPES, FULL, Scheme, shape_name, work_of
from .harness import Case, Contender, Tensors, Work, percent_of_bandwidth, percent_of_peak, slowdown, speedup

LLAMA = (1, 32, 2048, 128)
EAGER = "Transformers"


def tables(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    return pyext.nn.RotaryEmbedding(shape[3], shape[2])(shape[2])


def turned(x: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """The formula in the dtype of x, from the tables of its shape. The truth when given fp64."""
    cos, sin = (table.to(x.dtype) for table in tables(x.shape))
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    pair = first * cos - second * sin, second * cos + first * sin
    return torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)


# --- The op alone ---------------------------------------------------------------------------------------------------


def transformers_eager(x: torch.Tensor) -> Callable | None:
    """LLaMA's function of one tensor shaped like x: the key, which it also takes, has no heads."""
    try:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    except ImportError:
        return None
    cos, sin = (torch.cat([table, table], -1)[None].to(x.dtype) for table in tables(x.shape))
    return lambda x: apply_rotary_pos_emb(x, x[:, :0], cos, sin)[0]


def rotary_work(direction: str, dtype: str, interleaved: bool, seed: int) -> Work:
    """pyext.rotary against Transformers' eager (which has no interleaved form here), forward or backward to x."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(LLAMA, generator=generator).to(DTYPES[dtype]) for _ in range(2))
    cos, sin = tables(LLAMA)
    ways, notes = {"pyext": lambda x: pyext.rotary(x, cos, sin, interleaved=interleaved)}, []
    if not interleaved:
        ways[EAGER] = transformers_eager(x)
        if ways[EAGER] is None:
            del ways[EAGER]
            notes.append("Transformers is not compared: it is not installed")

    def forward(way):
        def call():
            with torch.no_grad():
                way(x)

        return call

    def backward(way):
        leaf = x.detach().requires_grad_()
        out = way(leaf)
        return lambda: torch.autograd.grad(out, leaf, grad, retain_graph=True)

    def both(way, to) -> Tensors:
        leaf = x.to(to).requires_grad_()
        out = way(leaf)
        return {"out": out.detach(), "grad_x": torch.autograd.grad(out, leaf, grad.to(to))[0]}

    make, present = {"forward": forward, "backward": backward}[direction], torch.empty_like(x)
    return Work(
        [Contender(name, make(way)) for name, way in ways.items()],
        bytes=2 * x.nbytes,
        got=lambda: both(ways["pyext"], x.dtype),
        truth=lambda to: both(lambda leaf: turned(leaf, interleaved), to),
        dtype=x.dtype,
        bandwidth_probe=lambda: present.copy_(x),
        notes=notes,
    )


# --- Inside attention -----------------------------------------------------------------------------------------------


@dataclass
class RotaryScheme(Scheme):
    """Query and key are rotated: by `rotary=` in pyext, by Transformers' eager function (or the formula) for SDPA."""

    def eager(self, leaves: Tensors) -> torch.Tensor:
        return super().eager(_with_turned(leaves, turned))

    def sdpa(self, leaves: Tensors) -> torch.Tensor:
        return super().sdpa(_with_turned(leaves, transformers_eager(leaves["query"]) or turned))

    def sdpa_with_mask_made_before(self, bias: torch.Tensor | None) -> Callable[[Tensors], torch.Tensor]:
        return self.sdpa


def _with_turned(leaves: Tensors, turn: Callable) -> Tensors:
    return {**leaves, "query": turn(leaves["query"]), "key": turn(leaves["key"])}


def attention_work(direction: str, dtype: str, seed: int) -> Work:
    rotation = pyext.Rotary(*tables(FULL))
    scheme = RotaryScheme(lambda _: {"rotary": rotation}, lambda _: None)
    without = Scheme(lambda _: {}, lambda _: None)
    return work_of(direction, scheme, FULL, dtype, seed, [("no rotary", without)])


# --- The list -------------------------------------------------------------------------------------------------------


def all_cases() -> list[Case]:
    cases = []
    for dtype in ("fp32", "bf16"):
        copying = percent_of_bandwidth(what="copy")
        for direction in ("forward", "backward"):
            name, title = f"rotary/{direction}/{shape_name(LLAMA)}/{dtype}", f"rotary, {direction}, {LLAMA}"
            figures = speedup(EAGER, 3 if direction == "forward" else None), copying
            setup = partial(rotary_work, direction, dtype, False)
            cases.append(Case(name, "rotary", title, dtype, figures, setup))
        name = f"rotary/interleaved/{shape_name(LLAMA)}/{dtype}"
        title = f"rotary, interleaved, forward, {LLAMA}"
        cases.append(Case(name, "rotary", title, dtype, (copying,), partial(rotary_work, "forward", dtype, True)))
        for direction in ("forward", "forward+backward"):
            name = f"rotary/attention/{direction}/{shape_name(FULL)}/{dtype}"
            title = f"attention with rotary, {direction}, {FULL}"
            limit = 5 if direction == "forward" else None
            figures = slowdown("no rotary", limit), speedup("SDPA"), percent_of_peak()
            setup = partial(attention_work, direction, dtype)
            cases.append(Case(name, "rotary", title, dtype, figures, setup, peak=dtype))
    return [dataclasses.replace(case, op="rotary") for case in cases]
