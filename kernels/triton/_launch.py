"""What the launchers of all ops share: checks, layouts, the device of a launch, the tables of configurations."""

import contextlib

import torch
import triton
from torch import Tensor

#: The GPUs that there are configurations for, as 10 * major + minor of the compute capability.
ARCHITECTURES = (80, 90, 100)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(condition: bool, message: str) -> None:
    """What protects memory: friendly messages come from pyext/ops, but the operators are public to torch."""
    if not condition:
        raise RuntimeError(message)


def readable(tensor: Tensor | None) -> Tensor | None:
    """The tensor itself if neighbours of a row are neighbours in memory, else a contiguous copy."""
    if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] <= 1:
        return tensor
    return tensor.contiguous()


def architecture(device: torch.device) -> int:
    """The newest of `ARCHITECTURES` that is not newer than the device; the oldest for the interpreter."""
    if device.type != "cuda":
        return ARCHITECTURES[0]
    major, minor = torch.cuda.get_device_capability(device)
    return max(a for a in ARCHITECTURES if a <= max(10 * major + minor, ARCHITECTURES[0]))


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device and stream: make it that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def power_of_two(size: int, least: int, most: int) -> int:
    """The smallest power of two that is at least `size`, within [least, most]."""
    return min(max(triton.next_power_of_2(max(size, 1)), least), most)


def leading(tensors: list[Tensor]) -> tuple[list[int], list[list[int]]] | None:
    """The leading dimensions of tensors that agree in them, as three: their sizes, and the strides of each tensor.

    Each is merged from neighbours that every tensor steps through evenly; the last is the longest. None where that
    takes more than three.
    """
    sizes, strides = [], [[] for _ in tensors]
    for d in reversed(range(tensors[0].dim() - 1)):
        count = tensors[0].shape[d]
        if count == 1:
            continue
        if sizes and all(t.stride(d) == sizes[0] * s[0] for t, s in zip(tensors, strides, strict=True)):
            sizes[0] *= count
            continue
        sizes.insert(0, count)
        for t, s in zip(tensors, strides, strict=True):
            s.insert(0, t.stride(d))
    missing = 3 - len(sizes)
    if missing < 0:
        return None
    return [1] * missing + sizes, [[0] * missing + s for s in strides]
