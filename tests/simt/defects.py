"""The seeded defects: what -DDEFECT=n breaks in which kernel, and the runs that look for it.

`python -m tests.simt` prints who catches what; tests/test_simt_defects.py asserts that every one is caught.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from . import cases
from .build import Kernel
from .runtime import COMPLETIONS, SCHEDULES, Found, machine

# Every schedule with every completion.
RUNS = [
    dict(schedule=schedule, completion=completion) for schedule, completion in itertools.product(SCHEDULES, COMPLETIONS)
]


@dataclass(frozen=True)
class Defect:
    number: int
    source: str
    case: str
    title: str
    arguments: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.number}-{self.title.replace(' ', '-')}"

    @property
    def kernel(self) -> Kernel:
        return cases.kernel(self.source, self.number)


DEFECTS = [
    Defect(1, "reduce", "row_sum", "no barrier before the partial sums are read"),
    Defect(2, "reduce", "row_sum", "no barrier before they are overwritten"),
    Defect(3, "reduce", "row_sum", "shuffle from the wrong lane"),
    Defect(4, "reduce", "row_sum", "reads a partial sum that nobody wrote"),
    Defect(5, "reduce", "row_sum", "row overrun by one element"),
    Defect(6, "reduce", "scan", "lane mask off by one"),
    Defect(7, "reduce", "scan", "lanes leave a shuffle that names them"),
    Defect(8, "reduce", "scan", "no barrier before the carry is overwritten"),
    Defect(9, "reduce", "histogram", "shared counters not zeroed"),
    Defect(10, "reduce", "histogram", "no __syncwarp between lanes that exchange"),
    Defect(11, "reduce", "histogram", "plain add where lanes of all warps count"),
    Defect(12, "reduce", "histogram", "plain add where all blocks count"),
    Defect(13, "gemm_sm80", "gemm_sm80", "stage refilled while others read it"),
    Defect(14, "gemm_sm80", "gemm_sm80", "cp.async wait one group short"),
    Defect(15, "gemm_sm80", "gemm_sm80", "no barrier after the wait"),
    Defect(16, "gemm_sm80", "gemm_sm80", "wrong swizzle"),
    Defect(17, "gemm_sm80", "gemm_sm80", "stores one row too many"),
    Defect(18, "gemm_sm80", "gemm_sm80", "rows past the matrix are loaded"),
    Defect(19, "gemm_sm80", "gemm_sm80", "ldmatrix of the wrong rows"),
    Defect(20, "gemm_sm80", "gemm_sm80", "returns with copies under way"),
    Defect(21, "gemm_sm90", "gemm_sm90", "no barrier after mbarrier.init"),
    Defect(22, "gemm_sm90", "gemm_sm90", "no fence after mbarrier.init"),
    Defect(23, "gemm_sm90", "gemm_sm90", "consumer waits for the wrong phase"),
    Defect(24, "gemm_sm90", "gemm_sm90", "producer does not wait for empty stages"),
    Defect(25, "gemm_sm90", "gemm_sm90", "stage released before wgmma has read it"),
    Defect(26, "gemm_sm90", "gemm_sm90", "too few bytes expected"),
    Defect(27, "gemm_sm90", "gemm_sm90", "too many bytes expected"),
    Defect(28, "gemm_sm90", "gemm_sm90", "wrong stride in a matrix descriptor"),
    Defect(29, "gemm_sm90", "gemm_sm90", "no wgmma.fence"),
    Defect(30, "gemm_sm90", "gemm_sm90", "sums read while wgmma is under way"),
    Defect(31, "gemm_sm90", "gemm_sm90", "no proxy fence before the TMA store"),
    Defect(32, "gemm_sm90", "gemm_sm90", "no barrier before the TMA store"),
    Defect(33, "gemm_sm90", "gemm_sm90", "staging overwritten while TMA reads it"),
    Defect(34, "gemm_sm90", "gemm_sm90", "empty barrier counts one warpgroup of two"),
    Defect(35, "gemm_sm90", "gemm_sm90", "returns with stores under way"),
    Defect(36, "elementwise", "elementwise", "misaligned vector store"),
    Defect(37, "elementwise", "elementwise", "one vector too many"),
    Defect(38, "gemm_sm90", "gemm_sm90", "sums staged without the swizzle"),
    Defect(39, "gemm_sm90", "gemm_sm90", "one lane releases what the others still load", {"format": "fp16"}),
]


def outcomes(defect: Defect, hooks: bool, seed: int = 1) -> Iterator[str]:
    """One word per run: "missed", "values" (a wrong result), or what the emulator said."""
    for i, run in enumerate(RUNS):
        with machine(**run, seed=seed + i, hooks=hooks) as gpu:
            try:
                error = getattr(cases, defect.case)(gpu.load(defect.kernel), gpu, seed, **defect.arguments)
                yield "values" if error > 1 else "missed"
            except Found as found:
                yield str(found)
