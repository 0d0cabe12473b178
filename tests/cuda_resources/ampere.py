"""Attention on an A100 from its machine code: a model of the speed of csrc/cuda/attention_sm80*.cu.

`python -m tests.cuda_resources.ampere` prints it. It is a prediction, not a measurement.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from pyext.ops._cuda_attention import TILES

from .compiled import SOURCES, Kernel, kernels
from .loops import MULTIPLICATIONS, per_tile
from .model import A100, ALU, FMA, NAMES, table
from .sass import Instruction, alternatives, count, of_full_tiles

#: What FlashAttention-2 reaches of the tensor cores' peak with these products, its only bound: forward, A100.
EFFICIENCY = 0.73
#: Cycles from an instruction to its result: Sun et al., "Dissecting tensor cores" (2022), for the first three.
LATENCY = defaultdict(lambda: 5, HMMA=33, LDSM=33, LDS=23, SHFL=23, MUFU=18, LDG=200, S2R=20)


@dataclass(frozen=True)
class Tile:
    kind: str  # as the table calls it
    width: int
    warps: int
    rows: int
    columns: int
    bias: str
    flops: int  # two products forward, five backward
    moved: int  # bytes that come from L2 or go there
    shared: int  # bytes

    @classmethod
    def of(cls, kernel: Kernel) -> Tile:
        if match := re.search(r"(Forward|Relative)Tile<(\d+), (\d+), (\d+), ([\w, ]+)>, (\w+)", kernel.name):
            width, m, warps = map(int, match.groups()[1:4])
            rows, bias = 16 * m * warps, "diagonal" if match[6] == "true" else ""
            if match[1] == "Forward":
                kind, columns, shared = "forward", int(match[5].split(",")[0]), TILES[width].forward
            elif match[5].endswith("true"):
                kind, columns, shared = "relative, both", 32, TILES[width].relative_both
            else:
                kind, columns, shared = "relative", 32, TILES[width].relative
            tables = ("forward", "relative", "relative, both").index(kind)
            moved = 2 * (2 + tables) * columns * width
            return cls(kind, width, warps, rows, columns, bias, 4 * rows * columns * width, moved, shared)
        if match := re.search(r"_relative_(keys|queries)<\w+, RelativeBackward<(\d+)>", kernel.name):
            width, kind = int(match[2]), "dK, dV" if match[1] == "keys" else "dQ"
            shared = TILES[width].relative_both_backward
            moved = 2 * (2 + 2 + (match[1] == "keys")) * 32 * width  # relative queries, too, beside keys
            return cls(kind, width, 4, 64, 32, "rows of both", 10 * 64 * 32 * width, moved, shared)
        if match := re.search(r"_relative_turns<\w+, RelativeTurns<(\d+), (\d+), (\w+)>", kernel.name):
            width, columns = map(int, match.groups()[:2])
            # Q, rel_query, dO, and a chunk of relative rows; the sums of dQ and two more of its size, forth and back.
            moved = (2 * 4 + 2 * 3 * 4) * columns * width
            flops = 10 * 128 * columns * width
            bias = "" if match[3] == "false" else "segments, diagonal"
            return cls("relative", width, 8, 128, columns, bias, flops, moved, TILES[width].relative_backward)
        match = re.search(r"_backward<\w+, BackwardTile<([\d, ]+)>, (\w+), (\w+)>", kernel.name)
        width, m, key_warps, query_warps, columns = map(int, match[1].split(", ")[:5])
        gradient = match[3] == "true"
        shared = TILES[width].strip_gradient if gradient else TILES[width].backward
        bias = "with gradient" if gradient else "diagonal" if match[2] == "true" else ""
        rows, warps = 16 * m * key_warps, key_warps * query_warps
        moved = (2 * 2 + 2 * 4) * columns * width  # Q and dO; the sum of dQ, forth and back
        return cls("backward", width, warps, rows, columns, bias, 10 * rows * columns * width, moved, shared)


def code(kernel: Kernel) -> list[tuple[Instruction, int]]:
    """Of a warp, per tile that no mask cuts."""
    tile = Tile.of(kernel)
    copies = 1 if "_relative_" in kernel.name else tile.columns * tile.width // 8 // (32 * tile.warps)
    every = per_tile(kernel, tile.width, copies)
    full = {i.address for i in of_full_tiles([i for i, _ in every])}
    return [(i, times) for i, times in every if i.address in full]


def shared_out(body: list[tuple[Instruction, int]]) -> list[tuple[Instruction, float]]:
    """As the mean warp has it: half of the warps take each of two branches."""
    halves = {i.address for pair in alternatives([i for i, _ in body]) for half in pair for i in half}
    return [(i, times / 2 if i.address in halves else times) for i, times in body]


def longest(body: list[tuple[Instruction, int]]) -> list[tuple[Instruction, int]]:
    """As those warps have it that take the branches with most products."""
    pairs = alternatives([i for i, _ in body])
    left = {i.address for pair in pairs for i in min(pair, key=lambda half: count(half, "HMMA"))}
    return [(i, times) for i, times in body if i.address not in left]


def cycles(kernel: Kernel) -> dict[str, float]:
    tile, body = Tile.of(kernel), shared_out(code(kernel))
    products = sum(times for i, times in body if i.name == "HMMA")
    units = A100.units(body, tile.warps, 2 * MULTIPLICATIONS * products * tile.warps, 0, 0)
    return units | {"L2": tile.moved / A100.l2_bytes}


# --- A warp by itself ---

_WIDE = {"HMMA": (4, 4, 2, 4)}  # registers of the operands


def _registers(i: Instruction) -> tuple[set[int], set[int]]:
    """Written and read."""
    operands = i.text.partition(" ")[2].split(",")
    wide = 4 if ".128" in i.text else 2 if ".64" in i.text.split(" ")[0] else 1  # of global memory
    found: list[set[int]] = []
    for n, operand in enumerate(operands):
        here = set()
        for match in re.finditer(r"\bR(\d+)(\.64)?", operand):
            size = _WIDE[i.name][n] if i.name in _WIDE else 2 if match[2] else 1
            if n == 0 and (i.words or i.name == "LDG"):
                size = i.words or wide
            if n == 1 and i.name == "STG":
                size = wide
            here |= set(range(int(match[1]), int(match[1]) + size))
        found.append(here)
    if i.name in ("STS", "LDGSTS", "BRA", "BAR", "ISETP", "FSETP", "STG"):
        return set(), set().union(*found)
    return (found[0] if found else set()), set().union(*found[1:])


def _occupied(i: Instruction) -> tuple[str, float]:
    """A unit, and for how many cycles a warp's instruction takes it."""
    schedulers = A100.schedulers
    if i.name == "HMMA":
        return "tensor", 2 * MULTIPLICATIONS * schedulers / A100.flops
    if i.words:
        return "shared", i.words * 4 * 32 / A100.shared_bytes  # all of them share it, but nobody else is there
    for unit, names in (("mufu", ("MUFU",)), ("fma", FMA), ("alu", ALU)):
        if i.name in names:
            return unit, 32 * schedulers / getattr(A100, unit)
    return "other", 1


def alone(kernel: Kernel) -> float:
    """Cycles per tile of a warp that has a multiprocessor to itself: instructions in order, each when its unit is free
    and its operands are there. Barriers cost nothing, and copies have arrived."""
    body: list[Instruction] = []
    run: list[Instruction] = []
    repeated = 1
    for i, times in [*longest(code(kernel)), (Instruction(0, "NOP"), 0)]:
        if times != repeated:
            body, run, repeated = body + run * repeated, [], times
        run.append(i)
    ready, free, now, ends = defaultdict(float), defaultdict(float), 0.0, []
    for _ in range(3):
        for i in body:
            unit, cycles_ = _occupied(i)
            written, read = _registers(i)
            now = max([now + 1, free[unit], *(ready[r] for r in read | written)])
            free[unit] = now + cycles_
            for r in written:
                ready[r] = now + LATENCY[i.name]
        ends.append(now)
    return ends[2] - ends[1]


@dataclass(frozen=True)
class Prediction:
    tile: Tile
    units: dict[str, float]
    alone: float  # see above
    blocks: int  # of a multiprocessor
    limit: str
    cycles: float  # per tile

    @classmethod
    def of(cls, kernel: Kernel) -> Prediction | None:
        """None if a block does not fit on a multiprocessor."""
        tile, units, path = Tile.of(kernel), cycles(kernel), alone(kernel)
        blocks = A100.blocks(32 * tile.warps, kernel.registers, tile.shared)
        if not blocks:
            return None
        times = units | {"a warp": path / blocks}  # as many tiles at the same time
        limit = max(times, key=times.get)
        return cls(tile, units, path, blocks, limit, times[limit])


def predictions(stem: str) -> list[Prediction]:
    source = next(source for source in SOURCES if source.stem == stem)
    every = [
        Prediction.of(k)
        for k in kernels(source, "sm_80")
        if "<bf16" in k.name and k.uses("HMMA") and "_relative_distances" not in k.name
    ]
    return sorted((p for p in every if p), key=lambda p: (p.tile.kind, p.tile.width))


def _cells(p: Prediction) -> list:
    t = p.tile
    cells = [t.kind, t.width, f"{t.rows} x {t.columns}", t.bias, p.blocks, *(p.units[name] for name in NAMES)]
    return [*cells, p.alone, p.limit]


def _speed(flops: float, cycles: float) -> list:
    bound = A100.rate(flops, cycles)
    return [bound, bound * EFFICIENCY, f"{bound * EFFICIENCY / A100.peak:.0%}"]


def of(stem: str) -> Iterator[list]:
    for p in predictions(stem):
        yield [*_cells(p), *_speed(p.tile.flops, p.cycles)]


def of_both_backward() -> Iterator[list]:
    """Of the kernels that have a block of keys or of queries; those of tables are not in it."""
    every = {(p.tile.kind, p.tile.width): p for p in predictions("attention_sm80_relative_both_backward")}
    for width in (64, 128):
        keys, queries = every["dK, dV", width], every["dQ", width]
        yield [*_cells(keys), "", "", ""]
        yield [*_cells(queries), *_speed(queries.tile.flops, keys.cycles + queries.cycles)]


def main() -> None:
    titles = ("kernel", "width", "rows x keys", "bias", "blocks", *NAMES, "a warp alone", "limit")
    titles = (*titles, "at most", "predicted", "of peak")
    forward = (row for stem in ("attention_sm80", "attention_sm80_relative") for row in of(stem))
    backward = (row for stem in ("attention_sm80_backward", "attention_sm80_relative_backward") for row in of(stem))
    for rows in (forward, backward, of_both_backward()):
        print("\n".join([*table(titles, rows), ""]))


if __name__ == "__main__":
    main()
