"""Attention under sparse masks against dense causal attention of the same sizes, and the figures it is to reach.

Two kinds of targets: masks whose visible keys are brought together by reordering take a part of dense causal's time;
masks that a block table serves as they are take as long per live tile as dense causal does, a tile being 8 queries x
32 keys that hold a visible pair. The peer is compiled `flex_attention` with a block mask, forward only (it
has no backward on the CPU).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import pyext

from . import peers
from .attention_cases import CALLS, DTYPES, FLOPS, Inputs, both_ways, eager, shape_name
from .harness import Case, Contender, Figure, Measured, Tensors, Work, percent_of_peak, speedup, time_ratio

CAUSAL = "dense causal"
TILE = 8, 32
TEXT, SIDE = 256, 64
LONG, FULL, IMAGE = (1, 2, 16384, 64), (1, 8, 4096, 64), (1, 8, TEXT + SIDE**2, 64)
FLEX_LONGEST = 8192  # making its block mask takes some integers of L x L
CHUNK = 1024  # queries of which the scores are materialised at a time, where the truth is computed


@dataclass(frozen=True)
class Pattern:
    """A mask, and what it shows of positions i and j, as PyTorch says it."""

    name: str
    shape: tuple[int, ...]
    mask: pyext.masks.Mask
    shows: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ratio: float | None = None  # of dense causal's time at most
    per_tile: float | None = None  # of dense causal's time per live tile at most


def _image(near: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]):
    """near(row and column of the query, row and column of the key), in the image."""

    def shows(i, j):
        t, u = i - TEXT, j - TEXT
        return (j <= i) & ((u < 0) | (t >= 0) & near(t // SIDE, t % SIDE, u // SIDE, u % SIDE))

    return shows


def patterns() -> list[Pattern]:
    causal, masks = pyext.masks.causal(), pyext.masks
    return [
        Pattern(
            "strided", LONG, masks.strided(128) & causal,
            lambda i, j: (j <= i) & ((i - j < 128) | ((i - j) % 128 == 0)), ratio=0.3,
        ),
        Pattern(
            "image_columns", IMAGE, masks.image_columns(TEXT, SIDE) & causal,
            _image(lambda row, column, of_key, key: column == key), ratio=0.3,
        ),
        Pattern(
            "fixed", FULL, masks.fixed(128, 8) & causal,
            lambda i, j: (j <= i) & ((i // 128 == j // 128) | (j % 128 >= 120)), ratio=0.3,
        ),
        Pattern(
            "image_rows", IMAGE, masks.image_rows(TEXT, SIDE) & causal,
            _image(lambda row, column, of_key, key: row == of_key), per_tile=1.25,
        ),
        Pattern(
            "image_conv", IMAGE, masks.image_conv(TEXT, SIDE, 11) & causal,
            _image(lambda row, column, of_key, key: ((row - of_key).abs() <= 5) & ((column - key).abs() <= 5)),
            per_tile=1.25,
        ),
    ]  # fmt: skip


# --- The truth and the tiles, a stripe of queries at a time ---------------------------------------------------------


def stripes(pattern: Pattern) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some queries, and what they see as bool (queries, L)."""
    length = pattern.shape[2]
    for begin in range(0, length, CHUNK):
        i = torch.arange(begin, min(begin + CHUNK, length))
        yield slice(begin, begin + CHUNK), pattern.shows(i[:, None], torch.arange(length))


@functools.lru_cache
def live_tiles(pattern: Pattern) -> int:
    queries, keys = TILE
    return sum(
        int(shown.unflatten(1, (-1, keys)).unflatten(0, (-1, queries)).any(3).any(1).sum())
        for _, shown in stripes(pattern)
    )


def causal_tiles(length: int) -> int:
    """Row r of tiles ends with query 8 r + 7 and needs the tiles of the keys up to it."""
    queries, keys = TILE
    return sum((row * queries + queries - 1) // keys + 1 for row in range(length // queries))


def truth(pattern: Pattern, inputs: Inputs, to: torch.dtype, gradients: bool) -> Tensors:
    """Output and gradients of the eager formula, which would not fit into memory at once."""
    leaves, outs, total = inputs.leaves(to), [], None
    query, key, value = leaves["query"], leaves["key"], leaves["value"]
    for rows, shown in stripes(pattern):
        out = eager(query[:, :, rows], key, value, keep=shown)
        outs.append(out.detach())
        if gradients:
            grads = torch.autograd.grad(out, (query, key, value), inputs.grad_out[:, :, rows].to(to))
            grads = [g.double() for g in grads]
            total = grads if total is None else [a.add_(b) for a, b in zip(total, grads, strict=True)]
    result = {"out": torch.cat(outs, 2)}
    if gradients:
        named = zip(("query", "key", "value"), total, strict=True)
        result.update({f"grad_{name}": g.to(to) for name, g in named})
    return result


# --- The work -------------------------------------------------------------------------------------------------------


def mask_work(pattern: Pattern, direction: str, dtype: str, seed: int) -> Work:
    inputs = Inputs.random(pattern.shape, DTYPES[dtype], seed)
    make, gradients = CALLS[direction], direction != "forward"

    def attend(leaves: Tensors, **options) -> torch.Tensor:
        return pyext.attention(leaves["query"], leaves["key"], leaves["value"], **options)

    contenders = [
        Contender("pyext", make(inputs, lambda leaves: attend(leaves, mask=pattern.mask))),
        Contender(CAUSAL, make(inputs, lambda leaves: attend(leaves, is_causal=True))),
    ]
    notes = []
    if not gradients:
        flex, reason = None, f"its block mask is made for at most {FLEX_LONGEST} tokens here"
        if pattern.shape[2] <= FLEX_LONGEST:
            flex, reason = peers.masked_flex_attention(
                inputs.query, inputs.key, inputs.value, lambda b, h, i, j: pattern.shows(i, j)
            )
        if flex is None:
            notes.append(f"flex_attention is not compared: {reason}")
        else:
            contenders.append(Contender("flex_attention", flex))
    batch, heads, _, dim = pattern.shape
    return Work(
        contenders,
        flops=FLOPS[direction] * batch * heads * live_tiles(pattern) * TILE[0] * TILE[1] * dim,
        got=lambda: both_ways(inputs, lambda leaves: attend(leaves, mask=pattern.mask), gradients=gradients),
        truth=lambda to: truth(pattern, inputs, to, gradients),
        dtype=DTYPES[dtype],
        notes=notes,
    )


def time_per_tile(pattern: Pattern) -> Figure:
    """Seconds per live tile over those of dense causal attention."""

    def compute(m: Measured) -> float:
        share = live_tiles(pattern) / causal_tiles(pattern.shape[2])
        return m.seconds["pyext"] / m.seconds[CAUSAL] / share

    return Figure("time per live tile against dense causal", "x", compute, at_most=pattern.per_tile)


def all_cases() -> list[Case]:
    cases = []
    for dtype in ("fp32", "bf16"):
        for pattern in patterns():
            for direction in ("forward", "forward+backward"):
                figures = [time_ratio(CAUSAL, pattern.ratio)]
                if pattern.per_tile is not None:
                    figures += [time_per_tile(pattern), percent_of_peak()]
                if direction == "forward":
                    figures.append(speedup("flex_attention"))
                cases.append(
                    Case(
                        f"masks/{pattern.name}/{direction}/{shape_name(pattern.shape)}/{dtype}",
                        "masks",
                        f"{pattern.name}, causal, {direction}, {pattern.shape}",
                        dtype,
                        tuple(figures),
                        lambda seed, args=(pattern, direction, dtype): mask_work(*args, seed),
                        peak=dtype,
                    )
                )
    return cases
