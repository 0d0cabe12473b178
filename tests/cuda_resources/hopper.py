"""Attention on Hopper from its machine code: whether the softmax overlaps with products, and a model of its speed.

`python -m tests.cuda_resources.hopper` prints the model. It is a prediction, not a measurement.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from .compiled import SOURCES, Kernel, kernels

# An H200 at the clock at which its peak is quoted: 132 multiprocessors x 4096 flops per cycle = 989 TF/s.
MULTIPROCESSORS, CLOCK, FLOPS = 132, 1.83e9, 4096
SCHEDULERS, SHARED_BYTES, L2_BYTES = 4, 128, 32  # of a multiprocessor; bytes per cycle, the latter about
LANES = {"mufu": 16, "fma": 128, "alu": 64}  # per cycle and multiprocessor
FMA = ("FFMA", "FMUL", "FADD", "IMAD")
ALU = ("FMNMX", "FSEL", "FSETP", "ISETP", "LOP3", "F2FP", "SEL", "IADD3", "VIADD", "LEA", "PLOP3", "SHF", "MOV", "PRMT")
SHUFFLE, LATENCY = 30, 1500  # cycles: of a shuffle; about, from taking an item to its first scores, and to its end
#: What FlashAttention-3 reaches of its own bound with this structure: 661 of 989 TF/s (its table 2).
EFFICIENCY = 0.67


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str  # without predicate

    @property
    def name(self) -> str:
        return re.split(r"[. ]", self.text)[0]

    @property
    def target(self) -> int | None:
        match = re.match(r"BRA.* 0x([0-9a-f]+)$", self.text)
        return int(match[1], 16) if match else None


def instructions(sass: str) -> list[Instruction]:
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(.*?) *; ", sass, re.MULTILINE)
    return [Instruction(int(address, 16), text) for address, text in found]


@dataclass(frozen=True)
class Tile:
    """Of csrc/cuda/attention_sm90.cu."""

    width: int
    consumers: int
    columns: int
    queries_in_registers: bool
    biased: bool

    @classmethod
    def of(cls, kernel: Kernel) -> Tile:
        numbers, registers, biased = re.search(r"HopperTile<([\d, ]+), (\w+)>, (\w+)", kernel.name).groups()
        return cls(*map(int, numbers.split(",")), registers == "true", biased == "true")

    @property
    def rows(self) -> int:
        return 64 * self.consumers

    @property
    def shared_bytes(self) -> int:
        panels = -(-self.width // 64)
        strip = 2 * 4 * (self.rows + self.columns + 4)
        return (self.rows + 4 * self.columns) * panels * 128 + strip + 32 + 14 * 8

    @property
    def products(self) -> Counter:
        """The wgmma of one tile and warpgroup, by their N: what the arithmetic needs."""
        return Counter({self.columns: self.width // 16}) + Counter({self.width: self.columns // 16})


class Loop:
    """The loop over tiles of a kernel: the innermost one with products."""

    def __init__(self, kernel: Kernel):
        self.tile, everything = Tile.of(kernel), instructions(kernel.sass)
        loops = []
        for branch in everything:
            if branch.target is not None and branch.target < branch.address:
                body = [i for i in everything if branch.target <= i.address <= branch.address]
                if any(i.name == "HGMMA" for i in body):
                    loops.append(body)
        self.body = min(loops, key=len)
        self.kernel = everything

    def positions(self, pattern: str) -> list[int]:
        return [n for n, i in enumerate(self.body) if re.match(pattern, i.text)]

    @property
    def products(self) -> Counter:
        return Counter(int(i.text.split("x")[1]) for i in self.body if i.name == "HGMMA")

    @cached_property
    def of_full_tiles(self) -> Counter:
        """Instructions by name without those that masks need, which a forward branch skips on all but edge tiles."""
        skipped: set[int] = set()
        for branch in self.body:
            if branch.target is not None and branch.address < branch.target <= self.body[-1].address:
                inside = [i for i in self.body if branch.address < i.address < branch.target]
                names = Counter(i.name for i in inside)
                if names["FSEL"] >= self.tile.columns // 2 and not names["HGMMA"] and not names["MUFU"]:
                    skipped |= {i.address for i in inside}
        return Counter(i.name for i in self.body if i.address not in skipped)


def complaints(kernel: Kernel) -> list[str]:
    """What keeps products and softmax from running side by side; nothing, if all is well."""
    loop, found = Loop(kernel), []
    tile = loop.tile
    if any(i.name == "HMMA" for i in loop.kernel):
        found.append("HMMA among wgmma")
    if not any(i.text.startswith("UTMALDG.4D") for i in loop.kernel):
        found.append("no UTMALDG")
    if loop.products != tile.products:
        found.append(f"products {dict(loop.products)}, expected {dict(tile.products)}")
    waits = {n: loop.positions(rf"WARPGROUP\.DEPBAR\.LE gsb0, 0x{n}") for n in range(3)}
    if [len(at) for at in waits.values()] != [1, 1, 0] or len(loop.positions(r"WARPGROUP\.ARRIVE")) != 1:
        return [*found, "other waits for products than one for the scores and one for the sums"]
    issued, exponentials = loop.positions("HGMMA"), loop.positions(r"MUFU\.EX2")
    if max(issued) > waits[1][0]:
        found.append("a product is issued after the wait for the scores")
    if len(exponentials) != tile.columns // 2 + 2:  # of a thread: its scores, and the factors of its two rows
        found.append(f"{len(exponentials)} exponentials, expected {tile.columns // 2 + 2}")
    outside = [n for n in exponentials if not waits[1][0] < n < waits[0][0]]
    if outside:
        found.append(f"{len(outside)} exponentials not between the waits for the scores and for the sums")
    return found


# --- The model: cycles of a multiprocessor per tile, for each unit as if nothing else were ---


def cycles(kernel: Kernel) -> dict[str, float]:
    loop = Loop(kernel)
    tile, count = loop.tile, loop.of_full_tiles
    warps = 4 * tile.consumers
    by_products = sum(n * times for n, times in tile.products.items()) // 2 * tile.consumers
    operands = tile.width // 16 * (32 * tile.columns + (0 if tile.queries_in_registers else 2048))
    operands += tile.columns // 16 * 32 * tile.width
    loaded = 4 * tile.columns * tile.width + (4 * (tile.rows + tile.columns) if tile.biased else 0)
    return {
        "tensor": by_products * 64 * 16 * 2 * 2 / FLOPS,
        "mufu": count["MUFU"] * warps * 32 / LANES["mufu"],
        "issue": sum(count.values()) * warps / SCHEDULERS,
        "fma": sum(count[name] for name in FMA) * warps * 32 / LANES["fma"],
        "alu": sum(count[name] for name in ALU) * warps * 32 / LANES["alu"],
        "shared": (tile.consumers * operands + loaded) / SHARED_BYTES + count["LDS"] * warps,
        "L2": loaded / L2_BYTES,
    }


def softmax_path(kernel: Kernel) -> tuple[float, float]:
    """Cycles that a warpgroup's softmax takes by itself, one warp to a scheduler, and those it has until its turn for
    the tensor cores comes again."""
    loop, tile = Loop(kernel), Loop(kernel).tile
    count = loop.of_full_tiles
    highest = 2 * count["FMNMX"] + 2 * SHUFFLE
    weights = max(8 * count["MUFU"], count["FFMA"] + count["FADD"])
    alone = highest + weights + 2 * count["F2FP"] + count["FMUL"] + (2 * count["LDS"] if tile.biased else 0)
    return alone, cycles(kernel)["tensor"] - tile.width // 16 * tile.columns // 2


def predicted(kernel: Kernel) -> tuple[str, float, float]:
    """The unit that limits, the TF/s it allows, and those that a kernel of this structure reaches of them."""
    tile, units = Tile.of(kernel), cycles(kernel)
    limit = max(units, key=units.get)
    bound = 4 * tile.rows * tile.columns * tile.width / units[limit] * MULTIPROCESSORS * CLOCK / 1e12
    return limit, bound, bound * EFFICIENCY


def predicted_call(kernel: Kernel, pairs: int, length: int, causal: bool) -> float:
    """TF/s of a whole call with this many (batch, head) pairs: items of work in the kernel's order, each taken by the
    multiprocessor that is free first. Masked halves of the square do not count as work, but tiles on the edge do."""
    tile, busy = Tile.of(kernel), [0.0] * MULTIPROCESSORS
    per_tile = max(cycles(kernel).values()) / EFFICIENCY
    start = softmax_path(kernel)[0] + LATENCY  # the first tile's softmax has nothing to run beside
    blocks = -(-length // tile.rows)
    for block in reversed(range(blocks)):
        keys = min(length, (block + 1) * tile.rows) if causal else length
        for _ in range(pairs):
            heapq.heapreplace(busy, busy[0] + start + -(-keys // tile.columns) * per_tile)
    work = 4 * pairs * length * length * tile.width / (2 if causal else 1)
    return work / max(busy) * CLOCK / 1e12


def hopper_kernels() -> list[Kernel]:
    source = next(source for source in SOURCES if source.stem == "attention_sm90")
    return [kernel for kernel in kernels(source, "sm_90a") if "HopperTile" in kernel.name]


def of_units() -> Iterator[str]:
    names = ("tensor", "mufu", "issue", "fma", "alu", "shared", "L2")
    yield (
        "| width | rows x keys | bias | shared | " + " | ".join(names) + " | softmax in | limit | at most | predicted |"
    )
    yield (
        "| ----: | ----------: | :--: | -----: | "
        + " | ".join("---:" for _ in names)
        + " | ---: | :---- | ---: | ---: |"
    )
    for kernel in hopper_kernels():
        if "<bf16" in kernel.name:
            tile, units = Tile.of(kernel), cycles(kernel)
            limit, bound, likely = predicted(kernel)
            cells = [tile.width, f"{tile.rows} x {tile.columns}", "yes" if tile.biased else ""]
            cells += [f"{tile.shared_bytes / 1024:.0f} KiB", *(f"{units[name]:.0f}" for name in names)]
            cells += ["{:.0f} of {:.0f}".format(*softmax_path(kernel)), limit, f"{bound:.0f}", f"{likely:.0f}"]
            yield "| " + " | ".join(map(str, cells)) + " |"


def of_calls() -> Iterator[str]:
    """16384 tokens and heads of 2048 features in all, as FlashAttention-3 measures."""
    lengths = (1024, 2048, 4096, 8192, 16384)
    yield "| width | bias | mask | " + " | ".join(map(str, lengths)) + " |"
    yield "| ----: | :--: | :--- | " + " | ".join("---:" for _ in lengths) + " |"
    for kernel in hopper_kernels():
        tile = Tile.of(kernel)
        if "<bf16" not in kernel.name or 2048 % tile.width:
            continue
        for causal in (False, True):
            if tile.width == 128 and causal == (tile.columns > 128):
                continue  # the tile for the other
            cells = [tile.width, "yes" if tile.biased else "", "causal" if causal else "none"]
            for length in lengths:
                cells.append(f"{predicted_call(kernel, 16384 // length * 2048 // tile.width, length, causal):.0f}")
            yield "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    print("Cycles of a multiprocessor per tile of scores, unit by unit; TF/s at most, and predicted.\n")
    print("\n".join(of_units()))
    print("\nTF/s predicted by length. Nothing here is measured.\n")
    print("\n".join(of_calls()))


if __name__ == "__main__":
    main()
