"""The loops over tiles of attention's kernels for sm_80 and later, and their matrix products against the arithmetic.

A kernel goes over tiles in the loop that holds most of its HMMA; within it, the products that sum over the features of
a row are loops of their own, two steps of 16 features at a time (attention_tiles.h) or as many as a kernel's name says.
Copies, which a thread makes 16 bytes at a time, may be loops, too.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

from .compiled import Kernel
from .sass import Instruction, count, instructions, loops

#: Multiplications of a warp per tile, by a kernel's name.
KERNELS: dict[str, Callable[..., int]] = {
    r"attention_forward<\w+, ForwardTile<(\d+), (\d+), \d+, (\d+), \d+>, \w+>": (
        lambda width, m, columns: 2 * 16 * m * columns * width
    ),
    r"attention_relative_forward<\w+, RelativeTile<(\d+), (\d+), \d+, \d+, false>, \w+>": (
        lambda width, m: 3 * 16 * m * 32 * width
    ),
    # With 32 keys, and 8 distances in each of a warp's turns.
    r"attention_relative_forward<\w+, RelativeTile<(\d+), 1, (\d+), \d+, true>, \w+>": (
        lambda width, warps: (3 * 16 * 32 + 32 * 8 * math.ceil((16 * warps + 32) / 8 / warps)) * width
    ),
    r"attention_backward<\w+, BackwardTile<(\d+), (\d+), \d+, (\d+), (\d+), \d+, \d+, \d+>, \w+, \w+>": (
        lambda width, m, query_warps, queries: 5 * 16 * m * queries * width // query_warps
    ),
    # Of 128 keys and some queries there are as many distances as both together, in chunks: three products with them.
    # For 64 features two groups of warps share the chunks of one; for 128 eight warps share 18 octets of another. Half
    # of the warps have the whole of the third, the others that of dQ: both are in the code.
    r"attention_relative_turns<\w+, RelativeTurns<(\d+), (\d+), \w+> ?>": (
        lambda width, queries: (
            (4 * 128 + 2 * 128 + {64: 192 + 160 + 2 * 160, 128: 144 + 192 + 2 * 144}[width]) * queries * width // 8
        )
    ),
    # With 48 distances of a warp's 16 rows, and 16 x 16 of columns and distances in three turns of the warps.
    r"attention_relative_keys<\w+, RelativeBackward<(\d+)> ?>": (
        lambda width: (4 * 16 * 32 + 3 * 16 * 16 + 2 * 16 * 48) * width
    ),
    r"attention_relative_queries<\w+, RelativeBackward<(\d+)> ?>": (
        lambda width: (3 * 16 * 32 + 2 * 16 * 48 + 3 * 16 * 16) * width
    ),
}
MULTIPLICATIONS = 16 * 8 * 16  # of one HMMA


def complaint(kernel: Kernel) -> str | None:
    """What is wrong with the loops of a kernel of attention, or None; also None for all other kernels."""
    for pattern, multiplications in KERNELS.items():
        if match := re.fullmatch(pattern, kernel.name):
            sizes = [int(group) for group in match.groups()]
            wanted = multiplications(*sizes) // MULTIPLICATIONS
            found = sum(times for i, times in per_tile(kernel, width=sizes[0]) if i.name == "HMMA")
            if re.search(r"\b(LDL|STL)\b", kernel.sass):
                return f"{kernel.name}: accesses to local memory"
            return None if found == wanted else f"{kernel.name}: {found} HMMA per tile, the arithmetic needs {wanted}"
    return None


def per_tile(kernel: Kernel, width: int, copies: int = 1) -> list[tuple[Instruction, int]]:
    """The instructions of the loop over tiles, and how often each of them runs. copies: 16 bytes by each thread, for
    the rows of one tile."""
    body, inner = _loop(kernel.sass)
    at_once = re.search(r"BackwardTile<.*, (\d+)>,", kernel.name)  # steps of 16 features of an iteration
    products = width // 16 // (int(at_once[1]) if at_once else 1 if "Turns<128" in kernel.name else 2)

    def times(loop: list[Instruction]) -> int:
        if count(loop, "HMMA"):
            return products
        if count(loop, "LDGSTS"):
            return copies // count(loop, "LDGSTS")
        # The search for the next tile that is seen by anybody: not where all are. CCTL: a wait for another block.
        return 0 if count(loop, "LDG") and not count(loop, "STS", "CCTL") else 1

    often = {i.address: times(loop) for loop in inner for i in loop}
    return [(i, often.get(i.address, 1)) for i in body]


@functools.cache
def _loop(sass: str) -> tuple[list[Instruction], list[list[Instruction]]]:
    """The innermost loop that holds most of the products, and the loops in it."""
    every = loops(instructions(sass))
    body = max(every, key=lambda loop: (count(loop, "HMMA"), -len(loop)), default=[])
    within = {i.address for i in body}
    return body, [loop for loop in every if loop != body and {loop[0].address, loop[-1].address} <= within]
