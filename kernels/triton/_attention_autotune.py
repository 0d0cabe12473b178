"""Tiles of attention other than the table's: tried on the GPU if `PYEXT_AUTOTUNE=1` asks for it, or given by a tuner.

The first call of a (kernel, kind of call, dtype, widths, rough sizes) runs with the table's tile and with its
neighbours; the fastest is kept as long as the process lives. All of them are right, but they add in different orders:
with the switch, results may differ in rounding from one process to the next.
"""

import contextlib
import contextvars
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from .._primitives import AttentionProblem
from ._attention_configs import Config, kind_of

SIZES = (16, 32, 64, 128)  # rows or columns of a tile; with a block table, parts of its blocks
WARPS, STAGES = (4, 8), (1, 2, 3)
SQUARE = ("sums",)  # kernels whose tiles have as many rows as columns
MILLISECONDS = 20  # for each candidate, or one call where that takes longer

_given: contextvars.ContextVar[Mapping[str, Config]] = contextvars.ContextVar("given", default=MappingProxyType({}))
_fastest: dict[tuple, Config] = {}


def chosen(kernel: str, config: Config) -> Config:
    """The tile that a kernel runs with: the one of the table, `config`, unless another is being tried or was faster."""
    return _given.get().get(kernel, config)


@contextlib.contextmanager
def using(kernel: str, config: Config) -> Iterator[None]:
    """Calls inside run this kernel with this tile."""
    token = _given.set({**_given.get(), kernel: config})
    try:
        yield
    finally:
        _given.reset(token)


def neighbours(kernel: str, config: Config) -> list[Config]:
    """The tile itself, then those with one of its numbers doubled, halved or one more or less."""
    found = [config]
    for rows in (config.rows // 2, config.rows * 2):
        found.append(config._replace(rows=rows, columns=rows if kernel in SQUARE else config.columns))
    if kernel not in SQUARE:
        found += [config._replace(columns=columns) for columns in (config.columns // 2, config.columns * 2)]
    found += [config._replace(warps=warps) for warps in WARPS if warps != config.warps]
    found += [config._replace(stages=config.stages + step) for step in (-1, 1)]
    return [found[0]] + [c for c in found[1:] if {c.rows, c.columns} <= set(SIZES) and c.stages in STAGES]


def milliseconds(launch: Callable[[], object]) -> float:
    return triton.testing.do_bench(launch, warmup=MILLISECONDS // 4, rep=MILLISECONDS, return_mode="median")


def fastest(kernel: str, launch: Callable[[], object], candidates: Iterable[Config]) -> Config:
    """The candidate with which `launch` takes the least time. The first must run; others may ask for too much."""
    times: dict[Config, float] = {}
    for config in candidates:
        with using(kernel, config):
            try:
                times[config] = milliseconds(launch)
            except (TritonError, RuntimeError):  # too much shared memory, or a compiler that gives up
                if not times:
                    raise
    return min(times, key=times.__getitem__)


def asked(device: torch.device) -> bool:
    """Whether to try: where there is a clock of the GPU, and nothing is being captured for a graph."""
    wanted = os.environ.get("PYEXT_AUTOTUNE", "0") == "1"
    return wanted and device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def _key(kernel: str, problem: AttentionProblem, others: tuple) -> tuple:
    """Sizes up to a factor of two; of the primitives, which there are; of the other arguments, the numbers."""
    (batch, heads, queries, width), (_, kv_heads, keys, value) = problem.query.shape, problem.value.shape
    defaults, parts = AttentionProblem._field_defaults, problem._asdict()
    present = tuple(n for n, usual in defaults.items() if isinstance(parts[n], Tensor) or parts[n] != usual)
    rough = (batch * heads).bit_length(), queries.bit_length(), keys.bit_length()
    numbers = tuple(part.bit_length() for part in others if isinstance(part, int))
    return (
        kernel, kind_of(problem), present, problem.query.dtype, problem.query.device,
        heads // max(kv_heads, 1), width, value, rough, numbers,
    )  # fmt: skip


def tuned(kernel: str, table: Callable[[AttentionProblem], Config]) -> Callable[[Callable], Callable]:
    """For a launcher of (problem, ...) that may run again, and takes its tile from `chosen(kernel, table(problem))`."""

    def decorate(launch: Callable) -> Callable:
        @functools.wraps(launch)
        def run(problem: AttentionProblem, *others):
            if not asked(problem.query.device) or kernel in _given.get():
                return launch(problem, *others)
            key = (launch.__name__, *_key(kernel, problem, others))
            if key not in _fastest:
                again = functools.partial(launch, problem, *others)
                _fastest[key] = fastest(kernel, again, neighbours(kernel, table(problem)))
            with using(kernel, _fastest[key]):
                return launch(problem, *others)

        return run

    return decorate
