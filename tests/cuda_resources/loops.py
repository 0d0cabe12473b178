"""Matrix products in the loops of attention's SASS, against what its arithmetic needs.

A kernel goes over tiles in the loop that holds most of its HMMA; within it, the products that sum over the features of
a row are loops of their own, two steps of 16 features at a time (attention_tiles.h), and run features / 32 times.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from .compiled import Kernel

#: Multiplications of a warp per tile, by a kernel's name.
KERNELS: dict[str, Callable[..., int]] = {
    r"attention_forward<\w+, ForwardTile<(\d+), (\d+), \d+, (\d+)>, \w+>": (
        lambda width, m, columns: 2 * 16 * m * columns * width
    ),
    r"attention_forward<\w+, RelativeTile<(\d+), 1, \d+, (\d+)>, \w+>": (
        lambda width, columns: 3 * 16 * columns * width
    ),
    r"attention_forward<\w+, RelativeTileOfBoth<(\d+), 1, (\d+), (\d+)>, \w+>": (
        lambda width, warps, columns: (3 * 16 * columns + columns * (16 * warps + columns) // warps) * width
    ),
    r"attention_backward_keys<\w+, (\d+), \w+>": lambda width: 4 * 16 * 64 * width,
    r"attention_backward_queries<\w+, (\d+), \w+, \w+>": lambda width: 3 * 16 * 64 * width,
}
_HMMA = 16 * 8 * 16  # multiplications of one instruction


def complaint(kernel: Kernel) -> str | None:
    """What is wrong with the loops of a kernel of attention, or None; also None for all other kernels."""
    for pattern, multiplications in KERNELS.items():
        if match := re.fullmatch(pattern, kernel.name):
            sizes = list(map(int, match.groups()))
            wanted, found = multiplications(*sizes) // _HMMA, _products_per_tile(kernel.sass, width=sizes[0])
            if re.search(r"\b(LDL|STL)\b", kernel.sass):
                return f"{kernel.name}: accesses to local memory"
            return None if found == wanted else f"{kernel.name}: {found} HMMA per tile, the arithmetic needs {wanted}"
    return None


def _products_per_tile(sass: str, width: int) -> int:
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;]*);", sass)]
    products = [at for at, text in code if "HMMA" in text]
    jumps = ((at, re.search(r"\bBRA\b.*(0x[0-9a-f]+)", text)) for at, text in code)
    loops = [(int(target[1], 16), at) for at, target in jumps if target and int(target[1], 16) <= at]

    def held(loop: tuple[int, int]) -> int:
        return sum(loop[0] <= at <= loop[1] for at in products)

    tiles = max(loops, key=lambda loop: (held(loop), loop[0] - loop[1]), default=(0, 0))  # the innermost of them
    inner = sum(held(loop) for loop in loops if tiles[0] <= loop[0] and loop[1] <= tiles[1] and loop != tiles)
    return held(tiles) - inner + inner * (width // 32)
