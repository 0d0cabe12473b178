"""Attention on Hopper from its machine code: whether the softmax overlaps with products, and a model of its speed.

`python -m tests.cuda_resources.hopper` prints the model. It is a prediction, not a measurement.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from .compiled import SOURCES, Kernel, kernels
from .model import H200, NAMES, table
from .sass import Instruction, count, loops, of_full_tiles
from .sass import instructions as sass_of

SHUFFLE, LATENCY = 30, 1500  # cycles: of a shuffle; about, from taking an item to its first scores, and to its end
BACKWARD = ("attention_sm90_backward", "attention_sm90_relative_backward")
#: What FlashAttention-3 reaches of its own bound with this structure: 661 of 989 TF/s (its table 2).
EFFICIENCY = 0.67


@dataclass(frozen=True)
class Tile:
    """Of csrc/cuda/attention_sm90.cu."""

    width: int
    consumers: int
    columns: int
    queries_in_registers: bool
    relative: bool  # rows of queries
    biased: bool

    @classmethod
    def of(cls, kernel: Kernel) -> Tile:
        numbers, *flags = re.search(r"HopperTile<([\d, ]+), (\w+), (\w+)>, (\w+)", kernel.name).groups()
        return cls(*map(int, numbers.split(",")), *(flag == "true" for flag in flags))

    @property
    def bias(self) -> str:
        return "relative rows" if self.relative else "diagonal" if self.biased else ""

    @property
    def rows(self) -> int:
        return 64 * self.consumers

    @property
    def shared_bytes(self) -> int:
        panels = -(-self.width // 64)
        tiles, strip = (self.rows + 4 * self.columns) * panels * 128, 2 * 4 * (self.rows + self.columns + 4)
        if self.relative:  # a tile of strips keeps its place, three bands of relative rows, and products with them
            return -(-(tiles + strip) // 1024) * 1024 + 3 * 64 * panels * 128 + self.rows * 136 * 4 + 32 + 20 * 8
        return tiles + strip + 32 + 14 * 8

    @property
    def products(self) -> Counter:
        """The wgmma of one tile and warpgroup, by their N: what the arithmetic needs."""
        of_scores = Counter({self.columns: self.width // 16 * (2 if self.relative else 1)})
        return of_scores + Counter({self.width: self.columns // 16})


@dataclass(frozen=True)
class Backward:
    """Of csrc/cuda/attention_sm90*_backward.cu: which of its kernels."""

    width: int
    biased: bool = False
    relative: bool = False  # rows of queries
    keys: bool = False  # dK and dV; else some of the next three
    of_queries: bool = False  # dQ
    of_rel_queries: bool = False  # d rel_query
    of_rows: bool = False  # dR
    of_bias: bool = False  # the gradient of a diagonal bias
    consumers = 2
    rows = 128
    columns = 64

    @classmethod
    def of(cls, kernel: Kernel) -> Backward:
        if match := re.search(r"RelativeQueryTile<\w+, (\d+), (\w+), (\w+), (\w+)>", kernel.name):
            return cls(int(match[1]), False, True, False, *(flag == "true" for flag in match.groups()[1:]))
        which, width, biased, last = re.search(r"_(keys|queries)_sm90<\w+, (\d+), (\w+), (\w+)>", kernel.name).groups()
        keys = which == "keys"
        last = last == "true"
        return cls(int(width), biased == "true", keys and last, keys, not keys, of_bias=not keys and last)

    @classmethod
    def whole(cls, width: int, biased: bool, relative: bool) -> list[Backward]:
        """All that a call needs whose bias wants its gradient."""
        of_keys = cls(width, biased, relative, keys=True)
        if not relative:
            return [of_keys, cls(width, biased, of_queries=True, of_bias=biased)]
        made = [(True, True, True)] if width <= 64 else [(True, False, False), (False, True, True)]
        return [of_keys, *(cls(width, False, True, False, *of) for of in made)]

    @property
    def made(self) -> str:
        names = {"dQ": self.of_queries, "d rel_query": self.of_rel_queries, "dR": self.of_rows}
        return "dK, dV" if self.keys else ", ".join(name for name, has in names.items() if has)

    @property
    def bias(self) -> str:
        return "relative rows" if self.relative else "with gradient" if self.biased else ""

    @property
    def bands(self) -> int:
        """Products of relative queries and a band of rows."""
        return self.relative * (2 if self.keys else 1)

    @property
    def panels(self) -> int:
        """Products of dS' and relative queries, 64 features each."""
        return self.of_rows * -(-self.width // 64)

    @property
    def products(self) -> Counter:
        """S and dP, bands, and dR, of 64 columns; dV and dK, or dQ and d rel_query, of the width."""
        each = self.columns // 16
        wide = each * (2 if self.keys else self.of_queries + self.of_rel_queries)
        narrow = (2 + self.bands) * (self.width // 16) + each * self.panels
        return Counter({self.columns: narrow}) + Counter({self.width: wide})

    @property
    def waits_and_fences(self) -> tuple[int, int]:
        """For products. Bands come before all others, and sums by distance are read before each of their products."""
        if self.keys or not self.relative:
            return 3 + self.keys + self.relative, 3 + self.relative
        products = 3 + self.of_queries + self.of_rel_queries
        return products + self.panels, products + max(0, self.panels - 1)

    @property
    def left_bytes(self) -> int:
        """Left operands of a warpgroup in shared memory: of S and dP, of bands, and dS'."""
        of_width = self.width // 16 * (2 * (self.keys and self.width > 64) + self.bands * (self.width > 64))
        return 2048 * (of_width + self.columns // 16 * (self.of_rel_queries + self.panels))

    @property
    def loaded(self) -> int:
        """By TMA: two tiles, and with relative rows a band, and for keys the relative queries."""
        return 2 * self.columns * self.width * (2 + self.relative * (1 + self.keys))

    @property
    def overlaps(self) -> bool:
        """Whether a warpgroup's exponentials run beside a product of its own. Registers do not allow it everywhere."""
        return not self.keys or self.width <= 96


class Loop:
    """The loop over tiles of a kernel: the innermost one with products."""

    def __init__(self, sass: str):
        self.kernel = sass_of(sass)
        self.body = min((body for body in loops(self.kernel) if count(body, "HGMMA")), key=len)

    def count(self, pattern: str) -> int:
        return sum(re.match(pattern, i.text) is not None for i in self.body)

    @property
    def products(self) -> Counter:
        return Counter(int(i.text.split("x")[1]) for i in self.body if i.name == "HGMMA")

    def under_way(self, name: str) -> list[int]:
        """For each instruction of this name, how many groups of products are issued and not waited for."""
        groups, found = 0, []
        for i in self.body:
            if i.name == "HGMMA" and i.text.endswith("gsb0"):
                groups += 1
            elif wait := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", i.text):
                groups = min(groups, int(wait[1]))
            elif i.name == name:
                found.append(groups)
        return found

    @functools.cached_property
    def full(self) -> list[Instruction]:
        """What a tile costs that no mask cuts."""
        return of_full_tiles(self.body)


loop_of = functools.cache(Loop)


def complaints(kernel: Kernel) -> list[str]:
    """What keeps products and exponentials from running side by side; nothing, if all is well."""
    loop, backward = loop_of(kernel.sass), "backward" in kernel.name
    tile = Backward.of(kernel) if backward else Tile.of(kernel)
    found = []
    if any(i.name == "HMMA" for i in loop.kernel):
        found.append("HMMA among wgmma")
    if not any(i.text.startswith("UTMALDG.4D") for i in loop.kernel):
        found.append("no UTMALDG")
    if loop.products != tile.products:
        found.append(f"products {dict(loop.products)}, expected {dict(tile.products)}")
    waits, fences = loop.count(r"WARPGROUP\.DEPBAR"), loop.count(r"WARPGROUP\.ARRIVE")
    expected = tile.waits_and_fences if backward else (3, 2) if tile.relative else (2, 1)
    if (waits, fences) != expected:
        found.append(f"{waits} waits for products and {fences} fences, expected {expected[0]} and {expected[1]}")
    exponentials = loop.under_way("MUFU")
    # Of a thread: its scores and, forward, the factors of its two rows.
    if len(exponentials) != tile.columns // 2 + (0 if backward else 2):
        found.append(f"{len(exponentials)} exponentials")
    alone = exponentials.count(0)
    if alone and (tile.overlaps if backward else True):
        found.append(f"{alone} exponentials while no product is under way")
    return found


# --- The model ---


def _units(kernel: Kernel, tile: Tile | Backward, operands: int, loaded: int) -> dict[str, float]:
    """operands: bytes of shared memory that one warpgroup's products read; loaded: by TMA."""
    flops = sum(n * times for n, times in tile.products.items()) * tile.consumers * 64 * 16 * 2
    code = ((i, 1) for i in loop_of(kernel.sass).full)
    return H200.units(code, 4 * tile.consumers, flops, tile.consumers * operands, loaded)


def cycles(kernel: Kernel) -> dict[str, float]:
    tile = Tile.of(kernel)
    operands = sum(times * 32 * n for n, times in tile.products.items())
    operands += 0 if tile.queries_in_registers else tile.width // 16 * 2048
    loaded = (6 if tile.relative else 4) * tile.columns * tile.width
    loaded += 4 * (tile.rows + tile.columns) if tile.biased else 0
    return _units(kernel, tile, operands, loaded)


def cycles_backward(kernel: Kernel) -> dict[str, float]:
    """Sums by distance are read past shared memory."""
    tile = Backward.of(kernel)
    operands = sum(times * 32 * n for n, times in tile.products.items()) + tile.left_bytes
    units = _units(kernel, tile, operands, tile.loaded)
    units["L2"] += tile.of_rows * 4 * tile.rows * tile.width / H200.l2_bytes
    return units


def softmax_path(kernel: Kernel) -> tuple[float, float]:
    """Cycles that a warpgroup's softmax takes by itself, one warp to a scheduler, and those it has until its turn for
    the tensor cores comes again."""
    tile, count = Tile.of(kernel), Counter(i.name for i in loop_of(kernel.sass).full)
    highest = 2 * count["FMNMX"] + 2 * SHUFFLE
    weights = max(8 * count["MUFU"], count["FFMA"] + count["FADD"])
    alone = highest + weights + 2 * count["F2FP"] + count["FMUL"] + (2 * count["LDS"] if tile.biased else 0)
    return alone, cycles(kernel)["tensor"] - tile.width // 16 * tile.columns // 2


def predicted(kernel: Kernel) -> tuple[str, float, float]:
    """The unit that limits, the TF/s it allows, and those that a kernel of this structure reaches of them."""
    tile, units = Tile.of(kernel), cycles(kernel)
    limit = max(units, key=units.get)
    bound = H200.rate(4 * tile.rows * tile.columns * tile.width, units[limit])
    return limit, bound, bound * EFFICIENCY


def predicted_call(kernel: Kernel, pairs: int, length: int, causal: bool) -> float:
    """TF/s of a whole call with this many (batch, head) pairs: items of work in the kernel's order, each taken by the
    multiprocessor that is free first. Masked halves of the square do not count as work, but tiles on the edge do."""
    tile, busy = Tile.of(kernel), [0.0] * H200.multiprocessors
    per_tile = max(cycles(kernel).values()) / EFFICIENCY
    start = softmax_path(kernel)[0] + LATENCY  # the first tile's softmax has nothing to run beside
    blocks = -(-length // tile.rows)
    for block in reversed(range(blocks)):
        keys = min(length, (block + 1) * tile.rows) if causal else length
        for _ in range(pairs):
            heapq.heapreplace(busy, busy[0] + start + -(-keys // tile.columns) * per_tile)
    work = 4 * pairs * length * length * tile.width / (2 if causal else 1)
    return work / max(busy) * H200.clock / 1e12


def hopper_kernels(stem: str = "attention_sm90") -> list[Kernel]:
    source = next(source for source in SOURCES if source.stem == stem)
    found = [kernel for kernel in kernels(source, "sm_90a") if "_sm90" in kernel.name]
    return sorted(found, key=lambda kernel: [int(number) for number in re.findall(r"\d+", kernel.name)])


def of_units() -> Iterator[str]:
    def rows() -> Iterator[list]:
        for kernel in hopper_kernels():
            if "<bf16" in kernel.name:
                tile, units = Tile.of(kernel), cycles(kernel)
                cells = [tile.width, f"{tile.rows} x {tile.columns}", tile.bias]
                cells += [f"{tile.shared_bytes / 1024:.0f} KiB", *(units[name] for name in NAMES)]
                yield [*cells, "{:.0f} of {:.0f}".format(*softmax_path(kernel)), *predicted(kernel)]

    titles = ("width", "rows x keys", "bias", "shared", *NAMES, "softmax in", "limit", "at most", "predicted")
    return table(titles, rows())


def of_calls() -> Iterator[str]:
    """16384 tokens and heads of 2048 features in all, as FlashAttention-3 measures."""
    lengths = (1024, 2048, 4096, 8192, 16384)

    def rows() -> Iterator[list]:
        for kernel, causal in itertools.product(hopper_kernels(), (False, True)):
            tile = Tile.of(kernel)
            for_the_other = tile.width == 128 and not tile.relative and causal == (tile.columns > 128)
            if "<bf16" not in kernel.name or 2048 % tile.width or for_the_other:
                continue
            pairs = [16384 // length * 2048 // tile.width for length in lengths]
            calls = [predicted_call(kernel, n, length, causal) for n, length in zip(pairs, lengths)]
            yield [tile.width, tile.bias, "causal" if causal else "none", *calls]

    return table(("width", "bias", "mask", *map(str, lengths)), rows())


def of_backward() -> Iterator[str]:
    """All kernels of a call make S and dP again: ten products count, and sixteen with relative rows."""
    every = [k for stem in BACKWARD for k in hopper_kernels(stem) if "<bf16" in k.name]
    kernel_of = {Backward.of(kernel): kernel for kernel in every}

    def rows() -> Iterator[list]:
        for width, (biased, relative) in itertools.product(
            (64, 96, 128), ((False, False), (True, False), (False, True))
        ):
            if relative and width == 96:  # that for 128
                continue
            tiles = Backward.whole(width, biased, relative)
            units = [cycles_backward(kernel_of[tile]) for tile in tiles]
            total = sum(max(u.values()) for u in units)
            bound = H200.rate((16 if relative else 10) * tiles[0].rows * tiles[0].columns * width, total)
            for tile, u in zip(tiles, units):
                last = (total, bound, bound * EFFICIENCY) if tile == tiles[-1] else ("", "", "")
                yield [width, tile.bias, tile.made, *(u[name] for name in NAMES), max(u, key=u.get), *last]

    return table(("width", "bias", "kernel", *NAMES, "limit", "all", "at most", "predicted"), rows())


def main() -> None:
    print("Cycles of a multiprocessor per tile of scores, unit by unit; TF/s at most, and predicted.\n")
    print("\n".join(of_units()))
    print("\nTF/s predicted by length. Nothing here is measured.\n")
    print("\n".join(of_calls()))
    print("\nBackward, cycles per tile of 128 x 64 scores; of all kernels of a call, each at its limit, and at most.\n")
    print("\n".join(of_backward()))


if __name__ == "__main__":
    main()
