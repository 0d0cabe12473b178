"""A model of speed from machine code: cycles that each unit of a multiprocessor needs for a tile, as if nothing else
were. It is a prediction, not a measurement."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .sass import Instruction

NAMES = ("tensor", "mufu", "issue", "fma", "alu", "shared", "L2")
FMA = ("FFMA", "FMUL", "FADD", "IMAD")
ALU = ("FMNMX", "FSEL", "FSETP", "ISETP", "LOP3", "F2FP", "SEL", "IADD3", "VIADD", "LEA", "PLOP3", "SHF", "MOV", "PRMT")


@dataclass(frozen=True)
class Machine:
    """A GPU. Rates are those of a multiprocessor per cycle."""

    multiprocessors: int
    clock: float  # at which its peak is quoted
    flops: int  # of the tensor cores
    fma: int  # lanes
    alu: int = 64
    mufu: int = 16
    schedulers: int = 4
    shared_bytes: int = 128
    l2_bytes: int = 32  # about
    registers: int = 65536
    shared_memory: int = 233472  # bytes, of which each block costs 1 KiB more than it asks for

    @property
    def peak(self) -> float:
        return self.flops * self.multiprocessors * self.clock / 1e12

    def rate(self, flops: float, cycles: float) -> float:
        """TF/s, if every multiprocessor does these flops in these cycles."""
        return flops / cycles * self.multiprocessors * self.clock / 1e12

    def blocks(self, threads: int, registers: int, shared: int) -> int:
        """That fit on a multiprocessor; registers of a thread come in eights."""
        by_registers = self.registers // (threads * math.ceil(registers / 8) * 8)
        return min(by_registers, self.shared_memory // (shared + 1024), 2048 // threads)

    def units(
        self, code: Iterable[tuple[Instruction, float]], warps: int, flops: float, operands: float, loaded: float
    ) -> dict[str, float]:
        """code: instructions of a warp, each with how often it runs; operands, loaded: bytes of shared memory that
        products read by themselves, and that copies bring, past the threads."""
        names, words, total = dict.fromkeys(FMA + ALU + ("MUFU",), 0.0), 0.0, 0.0
        for i, times in code:
            total, words = total + times, words + times * i.words
            if i.name in names:
                names[i.name] += times
        lanes = 32 * warps
        return {
            "tensor": flops / self.flops,
            "mufu": names["MUFU"] * lanes / self.mufu,
            "issue": total * warps / self.schedulers,
            "fma": sum(names[name] for name in FMA) * lanes / self.fma,
            "alu": sum(names[name] for name in ALU) * lanes / self.alu,
            "shared": (operands + loaded + words * 4 * lanes) / self.shared_bytes,
            "L2": loaded / self.l2_bytes,
        }


#: At the clocks at which their peaks are quoted: 989 and 312 TF/s.
H200 = Machine(multiprocessors=132, clock=1.83e9, flops=4096, fma=128)
A100 = Machine(multiprocessors=108, clock=1.41e9, flops=2048, fma=64, shared_memory=167936)


def table(titles: Iterable[str], rows: Iterable[Iterable], left: int = 0) -> Iterable[str]:
    """Markdown; the first `left` columns are words."""
    titles = list(titles)
    yield "| " + " | ".join(titles) + " |"
    yield "| " + " | ".join(":--" if n < left else "--:" for n in range(len(titles))) + " |"
    for row in rows:
        yield "| " + " | ".join(f"{x:.0f}" if isinstance(x, float) else str(x) for x in row) + " |"
