"""What the products of all ops share: configurations and how one is chosen, and the loops over the terms of a sum."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._launch import architecture


class Config(NamedTuple):
    """The tile of a program and how it is run. A program computes ROWS x COLUMNS results, DEPTH terms at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        return {
            "ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth,
            "num_warps": self.warps, "num_stages": self.stages,
        }  # fmt: skip


FEW_ROWS = 32
BAND = 8  # blocks of rows that go through all columns together, so that what they read stays in the L2 cache


def choose(table: dict[int, tuple[Config, Config, Config]], rows: int, tensors: tuple, numbers: tuple) -> Config:
    """One of three configurations that a table holds for each architecture. They are for
        at most FEW_ROWS rows: such calls are bound by reading the weights;
        many rows, where everything is a multiple of 16 elements and so can be read in pieces of 16 bytes;
        many rows, where it is not: single elements need more registers, which a smaller tile leaves.

    Args:
        tensors: all that the kernel gets, or None. numbers: sizes and strides, in elements.
    """
    few, aligned, odd = table[architecture(tensors[0].device)]
    if rows <= FEW_ROWS:
        return few
    addresses = (t.data_ptr() for t in tensors if isinstance(t, Tensor))
    return aligned if all(number % 16 == 0 for number in (*numbers, *addresses)) else odd


@triton.jit
def place(program, down, across, BAND: tl.constexpr):
    """The block of rows and the block of columns of a program: BAND rows by all columns, then the next."""
    first = program // (BAND * across) * BAND
    height = tl.minimum(down - first, BAND)
    within = program % (BAND * across)
    return first + within % height, within // height


@triton.jit
def accumulate(sum, a, b, b_depth, row_inside, column_inside, depth, DEPTH: tl.constexpr):
    """sum + a b for pointers to the rows of a [ROWS, 1] and to the columns of b [1, COLUMNS], whose terms are b_depth
    apart. # [ROWS, COLUMNS]"""
    k = tl.arange(0, DEPTH)
    a += k[None, :]
    b += k.to(tl.int64)[:, None] * b_depth
    for start in range(0, depth, DEPTH):
        inside = k < depth - start
        x = tl.load(a, mask=row_inside & inside[None, :], other=0.0)
        y = tl.load(b, mask=inside[:, None] & column_inside, other=0.0)
        sum = tl.dot(x, y, sum, input_precision="ieee")
        a += DEPTH
        b += DEPTH * b_depth
    return sum


@triton.jit
def accumulate_pair(gate, up, a, w_gate, w_up, row_inside, column_inside, depth, DEPTH: tl.constexpr):
    """gate + a w_gate^T and up + a w_up^T for pointers to the rows of a [ROWS, 1] and of the weights [1, COLUMNS]: a is
    read once. # 2 x [ROWS, COLUMNS]"""
    k = tl.arange(0, DEPTH)
    a += k[None, :]
    w_gate += k[:, None]
    w_up += k[:, None]
    for start in range(0, depth, DEPTH):
        inside = k < depth - start
        x = tl.load(a, mask=row_inside & inside[None, :], other=0.0)  # [ROWS, DEPTH]
        g = tl.load(w_gate, mask=inside[:, None] & column_inside, other=0.0)  # [DEPTH, COLUMNS]
        u = tl.load(w_up, mask=inside[:, None] & column_inside, other=0.0)
        gate = tl.dot(x, g, gate, input_precision="ieee")
        up = tl.dot(x, u, up, input_precision="ieee")
        a += DEPTH
        w_gate += DEPTH
        w_up += DEPTH
    return gate, up
