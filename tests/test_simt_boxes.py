"""TMA as emulated, against slices of padded tensors: every rank and swizzle, inside and over the edges."""

import ctypes
import random

import pytest
import torch
from simt import cases
from simt.runtime import machine

SIZES = (72, 11, 4, 3, 3)  # fastest dimension first
BOXES = (9, 3, 2, 2)  # after the row


def part(shape, box, corner):
    """Where a box lies in a tensor, and which part of the box that is: slices of both, slowest dimension first."""
    outer, inner = [], []
    for size, width, at in zip(reversed(shape), reversed(box), reversed(corner)):
        first, last = max(at, 0), min(at + width, size)
        outer.append(slice(first, max(first, last)))
        inner.append(slice(first - at, max(first, last) - at))
    return tuple(outer), tuple(inner)


@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_box(rank, span, seed):
    draw = random.Random(seed)
    sizes, boxes = SIZES[:rank], (span // 2 or 24, *BOXES[: rank - 1])
    corners = [[draw.randrange(-box, size + 1) for size, box in zip(sizes, boxes)] for _ in range(2)]
    x = torch.randint(1, 2**15, sizes[::-1], generator=torch.Generator().manual_seed(seed), dtype=torch.int16)
    y, out = torch.zeros_like(x), torch.empty(boxes[::-1], dtype=torch.int16)
    with machine(seed=seed % 2**31) as gpu:
        gpu.memory(x=x)
        gpu.memory(y=y, writable=True, initialised=True)
        gpu.memory(out=out, writable=True)
        lists = [(ctypes.c_int * rank)(*values) for values in (sizes, boxes, *corners)]
        gpu.call(gpu.load(cases.kernel("boxes")).simt_boxes, rank, x, y, out, *lists, span, None)
    loaded, stored = torch.zeros_like(out), torch.zeros_like(y)
    outer, inner = part(sizes, boxes, corners[0])
    loaded[inner] = x[outer]
    assert torch.equal(out, loaded)
    outer, inner = part(sizes, boxes, corners[1])
    stored[outer] = loaded[inner]
    assert torch.equal(y, stored)
