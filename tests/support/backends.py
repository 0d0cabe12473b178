"""Which implementations the tests run: the reference, the CPU kernels once per instruction set of this machine, and the
Triton and CUDA kernels of the ops that have them, on a GPU if there is one; if not, interpreted and emulated.

PYEXT_TEST_BACKENDS=reference,cpu-avx2 narrows the list. A backend that comes later joins by adding its name here.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, for its own functions too
#: Whether interpreted Triton, which is slow, runs every case of attention, instead of some others in each run.
INTERPRET_ALL = os.environ.get("PYEXT_TEST_INTERPRETED") == "all"


@dataclass(frozen=True)
class Backend:
    """impl: the value of `impl=`. isa: the instruction set the CPU kernels are told to use, or None."""

    impl: str
    isa: str | None = None
    device: str = "cpu"  # where its tensors live

    def __str__(self) -> str:
        return self.impl + (f"-{self.isa}" if self.isa else "")

    @property
    def widest(self) -> torch.dtype:
        """The most exact dtype it computes in."""
        return torch.float32 if self.impl in ("triton", "cuda") else torch.float64

    def refuses(self, dtype: torch.dtype) -> bool:
        return dtype == torch.float64 != self.widest

    @property
    def emulated(self) -> bool:
        """Whether its launchers are called past csrc/<op>.cpp, by simt.ops."""
        return self.impl == "cuda" and self.device == "cpu"

    @property
    def operators(self):
        """The namespace of its torch operators."""
        return torch.ops.pyext_triton if self.impl == "triton" else torch.ops.pyext

    @contextmanager
    def selected(self):
        """Run with this instruction set, and put the former one back; on a GPU, make fresh tensors there."""
        if self.device != "cpu":
            with torch.device(self.device):
                yield self
            return
        if self.emulated:
            with _emulated():
                yield self
            return
        if self.isa is None:
            yield self
            return
        from pyext import _C

        former = _C.isa()
        _C.set_isa(self.isa)
        try:
            yield self
        finally:
            _C.set_isa(former)


def _cpu() -> list[Backend]:
    try:
        from pyext import _C
    except ImportError:
        return []
    return [Backend("cpu", isa) for isa in _C.available_isas()]


def _triton() -> list[Backend]:
    if importlib.util.find_spec("triton") is None:
        return []
    if HAS_GPU:
        return [Backend("triton", device="cuda")]
    from . import triton_interpreter

    triton_interpreter.install()
    return [Backend("triton")]


def _cuda() -> list[Backend]:
    from pyext import _native

    if HAS_GPU:
        return [] if _native.cuda_reason(torch.empty(0, device="cuda")) else [Backend("cuda", device="cuda")]
    return [Backend("cuda")] if _native.module() and shutil.which("g++") and shutil.which("ninja") else []


@contextmanager
def _emulated():
    """CPU tensors are taken for a GPU's, and the operators that get them run the CUDA sources on the emulator."""
    from simt.ops import instead_of_cpu

    from pyext import _native

    reason, _native.cuda_reason = _native.cuda_reason, lambda tensor: None
    try:
        with instead_of_cpu(seed=torch.initial_seed() % 2**31):
            yield
    finally:
        _native.cuda_reason = reason


def _wanted(backends: list[Backend]) -> list[Backend]:
    names = os.environ.get("PYEXT_TEST_BACKENDS")
    return backends if not names else [b for b in backends if str(b) in names.split(",")]


def cpu_kernels_expected() -> bool:
    """Whether this machine can run the CPU kernels, from what the operating system says (not from pyext)."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        with open("/proc/cpuinfo") as info:
            flags = next((line for line in info if line.startswith("flags")), "").split()
    except OSError:
        return False
    return {"avx2", "fma", "f16c"} <= set(flags)


CPU = _wanted(_cpu())
ALL = _wanted([Backend("reference")]) + CPU
TRITON = _wanted(_triton())
CUDA = _wanted(_cuda())


def of(op: str) -> list[Backend]:
    """The implementations of an op, but CUDA's where it takes some calls only: it then has tests of its own."""
    from pyext import _dispatch

    kernels, limits = _dispatch._OPS[op].kernels, _dispatch._OPS[op].limits
    cuda = CUDA if "cuda" in kernels and "cuda" not in limits else []
    return ALL + (TRITON if "triton" in kernels else []) + cuda


def as_parameters(backends: list[Backend]) -> list:
    """For pytest; what needs a GPU is marked so."""
    return [pytest.param(b, marks=pytest.mark.gpu if b.device == "cuda" else (), id=str(b)) for b in backends]
