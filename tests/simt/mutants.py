"""Seeded defects of the ops in csrc/cuda: the sources with one line changed, and the runs that look for it.

A copy is cut down to fp16 and two activations, to compile in a second or two. SMALL is no defect: with grids of a
few blocks, and with small tiles, the kernels must go round.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import pyext
from support import rotary
from support.backends import Backend
from support.rotary import Case
from support.tolerance import assert_close_to_reference, decisive

from . import attention_probes, moe_probes
from .build import OUT, ROOT, Kernel
from .ops import instead_of_cpu
from .runtime import SCHEDULES, Found

RUNS = [dict(schedule=schedule, preempt=preempt) for schedule, preempt in itertools.product(SCHEDULES, (0, 20))]
DTYPE = torch.float16
_ROUNDS = (("(int64_t(1) << 31) - 1", "3"), ("65535", "2"))
_TILES = (
    ("kTokens = 64", "kTokens = 5"),
    ("kMostWarps = 8", "kMostWarps = 2"),
    ("kTallyWarps = 4", "kTallyWarps = 2"),
    ("kTile = 1024", "kTile = 32"),
    ("kBinsAtOnce = 2048", "kBinsAtOnce = 4"),
    ("kParts = 16", "kParts = 2"),
)
SMALL = {
    "rotary": _ROUNDS,
    "glu": _ROUNDS,
    "moe_route": (*_ROUNDS, *_TILES),
    "moe_dispatch": _ROUNDS,
    "attention_sm80": (
        ("ForwardTile<64, 2, 4, 32, 3>", "ForwardTile<64, 2, 2, 16, 3>"),
        _ROUNDS[1],
    ),
    "attention_sm80_relative": (
        ("RelativeTile<64, 2, 4, 2, false>", "RelativeTile<64, 2, 1, 2, false>"),
        ("RelativeTile<64, 1, 8, 1, true>", "RelativeTile<64, 1, 2, 1, true>"),
        _ROUNDS[1],
    ),
    "attention_sm80_backward": (
        ("BackwardTile<64, 2, 4, 1, 32, 1, 2, 2>", "BackwardTile<64, 1, 2, 2, 32, 1, 2, 2>"),
        ("kStrips = 512", "kStrips = 8"),
        ("kChains = 16", "kChains = 4"),
        _ROUNDS[1],
    ),
    "attention_sm80_relative_backward": (
        ("RelativeTurns<64, 32, true>", "RelativeTurns<64, 16, true>"),
        ("warps = 8, threads", "warps = 2, threads"),
        ("kThreads = 256,", "kThreads = 64,"),
        ("kChains = 16", "kChains = 4"),
        _ROUNDS[1],
    ),
    "attention_sm80_relative_both_backward": (
        ("kThreads = 256,", "kThreads = 64,"),
        ("kStepRows = 64,", "kStepRows = 32,"),
        ("kRelativeRows = 64, kRelativeColumns = 32", "kRelativeRows = 32, kRelativeColumns = 16"),
        ("kDistanceBlocks = 512", "kDistanceBlocks = 12"),
        _ROUNDS[1],
    ),
}
#: Routing with rows of logits that do not fit into shared memory.
WIDE = (*SMALL["moe_route"], ("kSharedBytes = 96 << 10", "kSharedBytes = 0"), ("kWideBlocks = 256", "kWideBlocks = 2"))


_REFUSED = "return cudaErrorInvalidValue;"
_OTHER_DTYPES = tuple((f"return of_type({other}());", _REFUSED) for other in ("float", "bf16"))
_OTHER_ACTIVATIONS = tuple(
    (f"return f(std::integral_constant<Activation, Activation::{other}>());", "break;")
    for other in ("geglu_tanh", "reglu")
)
_OTHER_WIDTHS = "if (width <= {0}) return {1}<T, {2}>(p, w, stream);".format
#: What a copy of a source goes without.
_CUTS = {
    "glu": (*_OTHER_DTYPES, *_OTHER_ACTIVATIONS),
    "attention_sm80": (
        ("return of_type(bf16());", _REFUSED),
        *((_OTHER_WIDTHS(n, "with_bias", f"ForwardTile<{n}, 2, 4, {m}, 2>"), "") for n, m in ((96, 64), (128, 32))),
        (_OTHER_WIDTHS(256, "with_bias", "ForwardTile<256, 1, 8, 32>"), ""),
    ),
    "attention_sm80_relative": (
        ("return of_type(bf16());", _REFUSED),
        *(
            (_OTHER_WIDTHS(tile[0], "with_bias", "RelativeTile<{}, {}, {}, {}, {}>".format(*tile)), "")
            for tile in ((96, 1, 4, 2, "false"), (128, 1, 4, 2, "false"), (96, 1, 6, 1, "true"), (128, 1, 4, 1, "true"))
        ),
    ),
    "attention_sm80_backward": (
        ("return of_type(bf16());", _REFUSED),
        *(
            (f"if (width <= {n}) return f(BackwardTile<{n}, 2, 4, 2, 64, 2, 1, {m}>());", "")
            for n, m in ((96, 2), (128, 1))
        ),
    ),
    "attention_sm80_relative_backward": (
        ("return of_type(bf16());", _REFUSED),
        ("const bool extras = p.segment || p.diag;", "const bool extras = true;"),
        ("f(RelativeTurns<64, 32, false>())", "cudaErrorInvalidValue"),
        (
            "if (width <= 128) return extras ? f(RelativeTurns<128, 16, true>()) : f(RelativeTurns<128, 16, false>());",
            "",
        ),
    ),
    "attention_sm80_relative_both_backward": (
        ("return of_type(bf16());", _REFUSED),
        (_OTHER_WIDTHS(128, "launch_relative", "RelativeBackward<128>"), ""),
    ),
}


def source(stem: str, *changes: tuple[str, str]) -> Kernel:
    """csrc/cuda/<stem>.cu with its headers in it, cut down, with each text replaced by another."""
    text = _with_headers(f"{stem}.cu", {"ptx.h"})
    for old, new in (*_CUTS.get(stem, _OTHER_DTYPES), *changes):
        text = _replaced(text, old, new)
    path = OUT / "sources" / f"{stem}_{zlib.crc32(repr(changes).encode()):08x}.cu"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)
    return Kernel(str(path.relative_to(ROOT)))


def _with_headers(name: str, taken: set[str]) -> str:
    """The text of csrc/cuda/<name> with the headers beside it, but those that were taken before."""

    def content(match: re.Match) -> str:
        if match[1] in taken:
            return match[0] if match[1] == "ptx.h" else ""
        taken.add(match[1])
        return _with_headers(match[1], taken)

    text = (ROOT / "csrc" / "cuda" / name).read_text().replace("#pragma once\n", "")
    return re.sub(r'#include "(\w+\.h)"', content, text)


def _replaced(text: str, old: str, new: str) -> str:
    if text.count(old) != 1:
        raise ValueError(f"{old!r} stands {text.count(old)} times in the source, expected once")
    return text.replace(old, new)


# --- What the sources are run on ---


ROTARY = (
    Case(h=9, d=48, r=32),  # vectors, features that are copied, a number of heads that no group divides
    Case(h=5, d=48, r=32, positions="batch"),
    Case(d=48, r=32, tables="batch", positions="batch", interleaved=True, inverse=True),
    Case(b=1, h=2, n=3, d=134, r=132, positions="row"),  # single elements, more pairs than a block has columns
    Case(d=48, r=32, layout="padded_rows", grad_layout="padded_rows"),  # rows that are not aligned
)


def _uniform(seed: int, *shape: int) -> torch.Tensor:
    """In (-3, 3). Products of normal numbers have one far largest, and its rounding alone would decide a comparison."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{shape}".encode()))
    return 6 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 3


#: (gate, up, options) of a seed.
GLU: dict[str, Callable[[int], tuple[torch.Tensor, torch.Tensor | None, dict]]] = {
    "halves": lambda seed: (_uniform(seed, 5, 7, 80), None, {}),
    "halves, up first": lambda seed: (_uniform(seed, 9, 66), None, dict(gate_first=False)),
    "neighbours": lambda seed: (_uniform(seed, 9, 48), None, dict(interleaved=True)),
    "neighbours, up first": lambda seed: (
        _uniform(seed, 3, 45)[:, :42],
        None,
        dict(interleaved=True, gate_first=False),
    ),
    "one long row": lambda seed: (_uniform(seed, 7, 33), _uniform(seed + 1, 7, 33), {}),
    "rows with an end": lambda seed: (_uniform(seed, 7, 40)[:, :33], _uniform(seed + 1, 7, 40)[:, :33], {}),
    "unaligned": lambda seed: (_uniform(seed, 7, 40)[:, 1:], _uniform(seed + 1, 7, 40)[:, :39], {}),
    "three dimensions": lambda seed: (
        _uniform(seed, 3, 5, 4, 16).transpose(1, 2),
        _uniform(seed + 1, 3, 4, 5, 16),
        {},
    ),
}


def _with_gradients(op, impl: str, inputs: list[torch.Tensor], options: dict, seed: int) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = op(*leaves, impl=impl, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, (_uniform(seed + 2, *out.shape) / 3).to(out.dtype))]


def _as(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in another dtype, at the same place of a storage of the same shape: a conversion would close the gaps."""
    storage = torch.as_strided(x, (x.untyped_storage().nbytes() // 8,), (1,), 0).to(dtype)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def check_glu(op, probe: str, dtype: torch.dtype, seed: int) -> None:
    """out and gradients of an op against the fp64 reference, by the tolerance rule."""
    gate, up, options = GLU[probe](seed)
    inputs = [_as(x, dtype) for x in (gate, up) if x is not None]
    got = _with_gradients(op, "cpu", inputs, options, seed)
    exact = _with_gradients(op, "reference", [x.double() for x in inputs], options, seed)
    plain = _with_gradients(op, "reference", inputs, options, seed)
    for name, *three in zip(("out", "grad gate", "grad up"), got, exact, plain):
        assert_close_to_reference(*three, name=f"{name} of {probe}", independent=decisive(three[1]))


def check(stem: str, dtype: torch.dtype, seed: int, probe: str = "") -> None:
    """Every call of an op above, or of its probes (of routing, dispatch, combine and attention), or one of them."""
    for stems, probes, look in (
        ("moe_route", moe_probes.ROUTES, moe_probes.check_route),
        ("moe_dispatch", moe_probes.ROWS, moe_probes.check_rows),
        ("attention_sm80", attention_probes.PROBES, attention_probes.check),
        ("attention_sm80_relative", attention_probes.RELATIVE, attention_probes.check),
        ("attention_sm80_backward", attention_probes.PROBES, attention_probes.check),
        ("attention_sm80_relative_backward", attention_probes.OF_QUERIES, attention_probes.check),
        ("attention_sm80_relative_both_backward", attention_probes.OF_BOTH, attention_probes.check),
    ):
        if stem == stems:
            for name in [probe] if probe else probes:
                look(name, dtype, seed)
            return
    if stem == "rotary":
        for case in ROTARY:
            rotary.check(case, dtype, Backend("cpu"), seed)
        return
    for probe in GLU:
        for op in (pyext.geglu, pyext.swiglu):
            check_glu(op, probe, dtype, seed)


# --- The defects ---


@dataclass(frozen=True)
class Mutant:
    stem: str
    title: str
    old: str
    new: str
    probe: str = ""  # the one that finds it

    def __str__(self) -> str:
        return f"{self.stem}: {self.title}".replace(" ", "-")

    @property
    def kernel(self) -> Kernel:
        return source(self.stem, (self.old, self.new), *SMALL[self.stem])

    def outcomes(self, seed: int = 1, runs: list[dict] = RUNS) -> Iterator[str]:
        """One word per run: "missed", "values" (a wrong result), or what the emulator said."""
        for i, run in enumerate(runs):
            try:
                with instead_of_cpu({self.stem: self.kernel}, seed=seed + i, **run):
                    check(self.stem, DTYPE, seed, self.probe)
                yield "missed"
            except Found as found:
                yield str(found)
            except AssertionError:
                yield "values"


MUTANTS = [
    Mutant("rotary", "token past the end", "if (token >= p.length) return;", ""),
    Mutant("rotary", "head past the end is read", "if (head + i < heads) pairs", "pairs"),
    Mutant("rotary", "head past the end is written", "if (head + i >= heads) break;", ""),
    Mutant(
        "rotary",
        "an end of the row is not copied",
        "chunks = turned + (p.head_dim - 2 * p.half) / N;",
        "chunks = turned;",
    ),
    Mutant(
        "rotary",
        "vectors whatever the strides",
        "has_whole_vectors(p) && has_aligned_rows(p.dtype, p.x, p.out) &&",
        "has_whole_vectors(p) &&",
    ),
    Mutant(
        "rotary",
        "heads beyond the grid left out",
        "head < p.heads; head += int64_t(gridDim.y) * kHeads",
        "head < p.heads; head += p.heads",
    ),
    Mutant("rotary", "no barrier before the parts are summed", "__syncthreads();\n      for", "for"),
    Mutant("rotary", "no barrier before the parts are overwritten", "__syncthreads();  // before", "// before"),
    Mutant("rotary", "the last part is not summed", "s < slots; ++s", "s < slots - 1; ++s"),
    Mutant("rotary", "too little shared memory", "size_t(x) * y * z * 2 * N", "size_t(x) * y * z * N"),
    Mutant("rotary", "search off by one", "< row + i) range", "<= row + i) range"),
    Mutant("rotary", "search past the end", "range[i] + step <= size && sorted", "sorted"),
    Mutant(
        "rotary", "row of the wrong batch entry", "batch = token / p.length, token -= batch * p.length;", "batch = 0;"
    ),
    Mutant("glu", "row overrun by a vector", "if (column + N <= p.width)", "if (column < p.width)"),
    Mutant("glu", "the end of a row left out", "last < p.width; ++last", "last < p.width - 1; ++last"),
    Mutant("glu", "rows joined across gaps", "tensors.row == width", "tensors.row >= width"),
    Mutant(
        "glu",
        "vectors whatever the strides",
        "vectors = has_aligned_rows(p.dtype,",
        "vectors = true || has_aligned_rows(p.dtype,",
    ),
    Mutant("glu", "heads beyond the grid left out", "z += gridDim.z", "z += p.batch * p.heads"),
    Mutant(
        "glu", "neighbours swapped in the gradient", "first[j] = swapped ? grad_up : grad_gate", "first[j] = grad_gate"
    ),
    Mutant(
        "glu", "two threads on one vector", "* blockDim.x + threadIdx.x) * N;", "* blockDim.x + threadIdx.x / 2) * N;"
    ),
    Mutant(
        "moe_route",
        "lanes that count do not wait",
        "__syncwarp();\n          if (counted && before == 0)",
        "if (counted && before == 0)",
        "capacity",
    ),
    Mutant("moe_route", "ranks begin at the tile", "ranked ? table[b] : 0", "0", "capacity"),
    Mutant(
        "moe_route", "a part of the tiles left out", "other < part; ++other", "other < part - 1; ++other", "capacity"
    ),
    Mutant(
        "moe_route",
        "sums of tiles are read too early",
        "__syncthreads();\n    int before = 0;",
        "int before = 0;",
        "plain",
    ),
    Mutant("moe_route", "the best is chosen again", "if (place < last &&", "if (place <= last &&", "plain"),
    Mutant("moe_route", "-0 below 0", "__float_as_uint(x + 0.0f)", "__float_as_uint(x)", "many choices"),
    Mutant(
        "moe_route",
        "choices of the last lanes left out",
        "k == columns - 1) && mine",
        "k == columns) && mine",
        "many choices",
    ),
    Mutant("moe_route", "a slot too many", "rank < p.capacity", "rank <= p.capacity", "capacity"),
    Mutant(
        "moe_route",
        "tokens claim in their own order",
        "order[segment * p.tokens + place] : place",
        "place : place",
        "priority",
    ),
    Mutant("moe_route", "keys not sorted by their last digit", "pass < 4; ++pass", "pass < 3; ++pass", "priority"),
    Mutant(
        "moe_route", "unused rows keep what was there", "i >= p.offsets[p.experts]", "i > p.offsets[p.experts]", "plain"
    ),
    Mutant("moe_route", "second choices kept too often", "2 * weights[1] <= p", "weights[1] <= p", "second choices"),
    Mutant("moe_route", "the second best of a group is the best", "fminf(best, value))", "value)", "groups"),
    Mutant("moe_route", "every lane counts", "if (lane == 0) atomicAdd(counts", "atomicAdd(counts", "groups"),
    Mutant(
        "moe_route",
        "scores read before all are written",
        "__syncwarp();\n  if (p.top_groups",
        "if (p.top_groups",
        "groups",
    ),
    Mutant(
        "moe_route",
        "sums of warps read too early",
        "__syncthreads();\n    for (int e = int(threadIdx.x); e < experts; e += int(blockDim.x)) {\n      float sum",
        "for (int e = int(threadIdx.x); e < experts; e += int(blockDim.x)) {\n      float sum",
        "plain",
    ),
    Mutant(
        "moe_route", "padding counted", "if (is_masked(p, group * p.tokens + s)) {", "if (false) {", "experts choose"
    ),
    Mutant("moe_route", "one token too few of equal ones", "s <= w.cuts", "s < w.cuts", "experts share"),
    Mutant(
        "moe_route",
        "digits read while they are counted",
        "__syncthreads();\n      // The thread of the digit",
        "// The thread of the digit",
        "experts share",
    ),
    Mutant("moe_route", "gradients of dropped choices", "if (kept[k] >= 0) product", "product", "capacity"),
    Mutant(
        "moe_route",
        "lanes add weights before the balance",
        "__syncwarp();\n    if (p.grad_weights)",
        "if (p.grad_weights)",
        "plain",
    ),
    Mutant("moe_dispatch", "row overrun by a vector", "if (first + i * step < p.width) store", "store", "vectors"),
    Mutant(
        "moe_dispatch",
        "vectors whatever the width",
        "return width % vector_size(dtype) == 0 && has",
        "return has",
        "weights alone",
    ),
    Mutant(
        "moe_dispatch",
        "vectors whatever the address",
        "== 0 && has_aligned_rows(dtype, tensors...)",
        "== 0",
        "unaligned",
    ),
    Mutant("moe_dispatch", "unused rows take the first token", "if (found && first", "if (first", "vectors"),
    Mutant("moe_dispatch", "a choice too many", "k + i < p.choices ?", "true ?", "vectors"),
    Mutant("moe_dispatch", "the weight of another choice", "(p.weights)[at]", "(p.weights)[at - i]", "vectors"),
    Mutant("moe_dispatch", "unused rows keep what was there", "if (p.used[row]) continue;", "continue;", "vectors"),
    Mutant("moe_dispatch", "no row is forgotten", "p.used[row] = 0;", "continue;", "gaps"),
    Mutant("moe_dispatch", "a lane's part of a product", "warp_sum(products[i])", "products[i]", "gaps"),
    Mutant("moe_dispatch", "two warps at a row", "blockDim.y + threadIdx.y; unit", "blockDim.y; unit", "vectors"),
]
