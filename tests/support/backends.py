"""Which implementations the tests run: the reference, and the CPU kernels once per instruction set of this machine.

PYEXT_TEST_BACKENDS=reference,cpu-avx2 narrows the list. A backend that comes later joins by adding its name here.
"""

from __future__ import annotations

import os
import platform
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Backend:
    """impl: the value of `impl=`. isa: the instruction set the CPU kernels are told to use, or None."""

    impl: str
    isa: str | None = None

    def __str__(self) -> str:
        return self.impl + (f"-{self.isa}" if self.isa else "")

    @contextmanager
    def selected(self):
        """Run with this instruction set, and put the former one back."""
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
