"""Tensors as users have them: every stride pattern, always a view into NaN-filled storage.

A kernel that reads one element outside its view, or computes with a tail it should have masked, meets a NaN.
"""

from __future__ import annotations

import math
import mmap

import torch

MARGIN = 48
FAR = 2**31 + 2**12  # elements


def _strides(kind: str, b: int, h: int, n: int, d: int) -> tuple[int, int, int, int]:
    return {
        "contiguous": (h * n * d, n * d, d, 1),
        "blhd": (n * h * d, d, h * d, 1),
        "lbhd": (h * d, d, b * h * d, 1),
        "packed_qkv": (n * 3 * h * d, d, 3 * h * d, 1),
        "padded_rows": (h * n * (d + 3), n * (d + 3), d + 3, 1),
        "unaligned": (h * n * d + 1, n * d, d, 1),
        "every_second": (h * n * 2 * d, n * 2 * d, 2 * d, 2),
        "columns": (h * n * d, n * d, 1, n),
        "expanded_batch": (0, n * d, d, 1),
        "expanded_heads": (n * d, 0, d, 1),
        "expanded_rows": (h * d, d, 0, 1),
    }[kind]


KINDS = (
    "contiguous",
    "blhd",
    "lbhd",
    "packed_qkv",
    "padded_rows",
    "unaligned",
    "every_second",
    "columns",
    "expanded_batch",
    "expanded_heads",
    "expanded_rows",
)
# Equal keys, or equal values, make score gradients that are pure cancellation: good for comparing bits, not accuracy.
VARIED = tuple(kind for kind in KINDS if kind != "expanded_rows")


def place(values: torch.Tensor, kind: str = "contiguous") -> torch.Tensor:
    """A (B, H, L, D) view of layout `kind` in poisoned storage, holding `values` (its first slice where expanded)."""
    shape, strides = values.shape, _strides(kind, *values.shape)
    if values.numel() == 0:
        return torch.empty_strided(shape, strides, dtype=values.dtype, device=values.device)
    offset = MARGIN + (1 if kind == "unaligned" else 0)
    used = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))
    poison = math.nan if values.is_floating_point() else True
    storage = torch.full((used + 2 * MARGIN + 1,), poison, dtype=values.dtype, device=values.device)
    for dim, stride in enumerate(strides):
        if stride == 0:
            values = values.narrow(dim, 0, 1)
    storage.as_strided(values.shape, strides, offset).copy_(values)
    return storage.as_strided(shape, strides, offset)


def far_apart(values: torch.Tensor, dim: int) -> torch.Tensor:
    """`values` with slices along `dim` lying so far apart that the last one is more than 2^31 elements from the first.

    On a CPU the memory is reserved, not used: only the pages that hold the values are ever touched.
    """
    step = FAR // (values.shape[dim] - 1) + 1
    strides = [values.shape[-1] * int(torch.tensor(values.shape[n + 1 : -1]).prod()) for n in range(3)] + [1]
    strides[dim] = step
    used = sum((size - 1) * stride for size, stride in zip(values.shape, strides)) + 1
    if values.is_cpu:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        storage = torch.frombuffer(mmap.mmap(-1, used * values.element_size(), flags=flags), dtype=values.dtype)
    else:
        storage = values.new_empty(used)
    view = storage.as_strided(values.shape, strides)
    assert (values.shape[dim] - 1) * view.stride(dim) > 2**31
    return view.copy_(values)
