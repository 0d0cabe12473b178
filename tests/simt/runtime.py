"""Runs CUDA sources on the CPU: loads what `build` made, lends it torch tensors as device memory, says what it finds.

with machine(schedule="lifo", completion="late", seed=3) as gpu:
    kernels = gpu.load(Kernel("csrc/cuda/rotary.cu"))
    gpu.memory(x=x, cos=cos)          # read only
    gpu.memory(out=out, writable=True)  # uninitialised unless initialised=True
    gpu.call(kernels.pyext_rotary, problem, None)   # raises Found if a check fails
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator

import torch

from .build import OUT, Kernel, build

SCHEDULES = ("fifo", "lifo", "random")  # who runs next among the threads that can
COMPLETIONS = ("late", "early", "random")  # when asynchronous copies and matrix products take effect


class Found(AssertionError):
    """A kernel failed a check of the emulator; the message says where and why."""


@functools.cache
def _load(kernel: Kernel) -> ctypes.CDLL:
    build([kernel])
    return ctypes.CDLL(str(kernel.library))


@functools.cache
def _simt() -> ctypes.CDLL:
    build([])
    library = ctypes.CDLL(str(OUT / "libsimt.so"))
    library.simt_error.restype = ctypes.c_char_p
    library.simt_shared_bytes.restype = ctypes.c_size_t
    return library


def shared_bytes() -> int:
    """The most shared memory that a block of any launch took since a machine was made last."""
    return _simt().simt_shared_bytes()


class Machine:
    def load(self, kernel: Kernel) -> ctypes.CDLL:
        """The library of a kernel source, built unless it is up to date."""
        return _load(kernel)

    def memory(self, *, writable: bool = False, initialised: bool = False, **tensors: torch.Tensor) -> None:
        """What kernels may touch: each tensor from its first element to its last. Touching anything else is an error,
        and so is reading what nobody wrote."""
        for name, tensor in tensors.items():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
            _simt().simt_register(
                ctypes.c_void_p(tensor.data_ptr()),
                ctypes.c_size_t((last + 1) * tensor.element_size() if tensor.numel() else 0),
                name.encode(),
                int(writable),
                int(initialised),
            )

    def call(self, launcher, *arguments) -> None:
        """Calls a C launcher. Pointers of tensors are passed for tensors, all else as ctypes takes it."""
        converted = [
            ctypes.c_void_p(argument.data_ptr()) if isinstance(argument, torch.Tensor) else argument
            for argument in arguments
        ]
        status = launcher(*converted)
        message = _simt().simt_error().decode()
        if message:
            raise Found(message)
        if status:
            raise Found(f"the launcher returned {status}")


@contextlib.contextmanager
def machine(
    schedule: str = "random", completion: str = "random", preempt: int = 0, seed: int = 1, hooks: bool = True
) -> Iterator[Machine]:
    """preempt: threads also switch at one in so many memory accesses. hooks=False: only what kernels compute counts."""
    _simt().simt_configure(SCHEDULES.index(schedule), COMPLETIONS.index(completion), preempt, seed, int(hooks))
    try:
        yield Machine()
    finally:
        _simt().simt_forget_buffers()
