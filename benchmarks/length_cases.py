"""Speed and memory of T5's attention, forward and backward, against the length: what the curves of the report show.

The table of positions is learned, so that SDPA has to materialise the bias and its gradient.
"""

from __future__ import annotations

import functools

from . import long_context
from .attention_cases import shape_name, t5, work_of
from .harness import Case, Figure, percent_of_peak, speedup

HEADS, DIM = 4, 64
LENGTHS = (256, 512, 1024, 2048, 4096)
MEMORY_LENGTHS = (512, 1024, 2048, 4096)


def _setup(length: int, dtype: str):
    shape = (1, HEADS, length, DIM)
    return lambda seed: work_of("forward+backward", t5(HEADS, length), shape, dtype, seed)


def all_cases() -> list[Case]:
    cases = []
    for dtype in ("fp32", "bf16"):
        for length in LENGTHS:
            shape = (1, HEADS, length, DIM)
            name, title = f"length/t5/{shape_name(shape)}/{dtype}", f"T5, forward+backward, {shape}"
            figures = speedup("SDPA"), percent_of_peak()
            cases.append(Case(name, "length", title, dtype, figures, _setup(length, dtype), peak=dtype))
    figures = (
        Figure("memory above the inputs", "MiB", lambda m: m.extra["peak_mib"]),
        Figure("memory of SDPA", "MiB", lambda m: m.extra["peak_mib of SDPA"]),
    )
    for length in MEMORY_LENGTHS:
        shape = (1, long_context.HEADS, length, long_context.DIM)
        title = f"T5, forward+backward, {shape}"
        run = functools.partial(long_context.run, length=length, peer=True)
        cases.append(Case(f"length/memory/{shape_name(shape)}/bf16", "length", title, "bf16", figures, run=run))
    return cases
