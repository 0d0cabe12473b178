"""What the machine code of a kernel says of its arithmetic."""

from __future__ import annotations

import re


def matrix_flops(assembly: str, warps: int) -> int | None:
    """Floating-point operations of the matrix instructions of a program of that many warps, each counted once, however
    often loops run it. None where instructions do not name their shape: sm_100's read it from a register.

    HMMA.16816 is a warp's product of 16 x 8 by 16 numbers; HGMMA.64xNx16 that of four warps, 64 x N by 16.
    """
    if re.search(r"\bUTC\w*MMA", assembly):
        return None
    of_warps = sum(2 * 16 * 8 * int(k) for k in re.findall(r"\bHMMA\.168(16|8)\.", assembly))
    shapes = re.findall(r"\bHGMMA\.(\d+)x(\d+)x(\d+)\.", assembly)
    of_groups = sum(2 * int(m) * int(n) * int(k) for m, n, k in shapes)
    return warps * of_warps + warps // 4 * of_groups
