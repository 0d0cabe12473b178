"""Reading cuobjdump's SASS: instructions, loops, and what a branch skips."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass


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

    @property
    def words(self) -> int:
        """Of 32 bits that a thread reads or writes in shared memory; 0 for what does not go there, or never runs."""
        if self.name in ("LDS", "STS", "SHFL", "LDSM", "STSM", "LDGSTS") and "RZ, [RZ]" not in self.text:
            wide = re.search(r"\.(128|64)\b|\.MT?88\.([24])\b", self.text)
            return 1 if wide is None else int(wide[1]) // 32 if wide[1] else int(wide[2])
        return 0

    @property
    def multiplications(self) -> int:
        """Of a product of matrices, per warp of those that it takes: one for HMMA.16816, which multiplies 16 x 8 by 16
        numbers, and four for HGMMA.64xNx16, which multiplies 64 x N by 16; 0 for all else."""
        match = re.match(r"HMMA\.(16)(8)(16|8)\.|HGMMA\.(\d+)x(\d+)x(\d+)\.", self.text)
        sizes = [int(size) for size in match.groups() if size] if match else [0]
        return math.prod(sizes) // (4 if self.name == "HGMMA" else 1)


def matrix_flops(sass: str, warps: int) -> int | None:
    """Floating-point operations of the matrix instructions of a program of that many warps, each counted once, however
    often loops run it. None where instructions do not name their shape: sm_100's read it from a register."""
    code = instructions(sass)
    if any(re.fullmatch(r"UTC\w*MMA", i.name) for i in code):
        return None
    return 2 * warps * sum(i.multiplications for i in code)


def instructions(sass: str) -> list[Instruction]:
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(.*?) *; ", sass, re.MULTILINE)
    return [Instruction(int(address, 16), text) for address, text in found]


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Bodies, by their branches backwards."""
    return [
        [i for i in code if branch.target <= i.address <= branch.address]
        for branch in code
        if branch.target is not None and branch.target < branch.address
    ]


def count(code: list[Instruction], *names: str) -> int:
    return sum(i.name in names for i in code)


def of_full_tiles(body: list[Instruction]) -> list[Instruction]:
    """Without what masks need, which a forward branch skips on all but edge tiles, and what segments need."""
    skipped: set[int] = set()
    for branch in body:
        if branch.target is not None and branch.address < branch.target <= body[-1].address:
            inside = [i for i in body if branch.address < i.address < branch.target]
            names = Counter(i.name for i in inside)
            if names["FSEL"] >= 16 and not (names["HGMMA"] or names["HMMA"] or names["MUFU"]):
                skipped |= {i.address for i in inside}
    return [i for i in body if i.address not in skipped]


def alternatives(body: list[Instruction]) -> Iterator[tuple[list[Instruction], list[Instruction]]]:
    """Two branches with products, of which a warp takes one: if (...) {first} else {second}."""
    at = {i.address: n for n, i in enumerate(body)}
    for n, branch in enumerate(body):
        middle = at.get(branch.target, 0)
        end = at.get(body[middle - 1].target, 0) if middle > n and body[middle - 1].name == "BRA" else 0
        first, second = body[n + 1 : middle], body[middle:end]
        if end > middle and count(first, "HMMA") and count(second, "HMMA"):
            yield first, second
