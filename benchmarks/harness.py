"""Interleaved timing, the peak probes and the error rule that every benchmark shares.

A case declares its work (flops, bytes) and its contenders; the harness checks the result against fp64 first, and only
measures what is right: a wrong result has no speed. All contenders of a case, and the probe that says what this core
can do at most, take turns within one loop, so that a noisy or throttled machine slows them all alike. Figures are
ratios of medians.

Times are in seconds, rates in flop/s and byte/s; the JSON (see `report.py`) holds milliseconds, Gflop/s and GB/s.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import platform
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import pyext

try:
    from pyext import _C as native
except ImportError:  # no native module on this machine: the reference is measured, and no share of peak is known
    native = None

Tensors = dict[str, torch.Tensor]
PROBE_SECONDS = 0.01
#: After a longer pause than this a contender runs once before its clock starts. A virtual machine hands memory that has
#: been free for two seconds back to its host (free page reporting); what then first touches it waits for the host, as
#: long as 40 to 100 ms for 200 MB. So a peer that takes seconds would slow down whoever comes after it.
PAUSE_SECONDS = 1.0


# --- What a case is -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """One way to do the work. `threads` and `isa` are set before the clock starts."""

    name: str
    call: Callable[[], Any]
    threads: int | None = None
    isa: str | None = None


@dataclass
class Work:
    """What a case's setup returns: inputs are allocated, nothing has been computed.

    contenders: the first is pyext's. flops, bytes: what one call has to compute and to read.
    got: pyext's result and gradients. truth(dtype): the same from eager PyTorch, computed in that dtype.
    """

    contenders: list[Contender]
    flops: float = 0.0
    bytes: float = 0.0
    got: Callable[[], Tensors] | None = None
    truth: Callable[[torch.dtype], Tensors] | None = None
    dtype: torch.dtype = torch.float32
    bandwidth_probe: Callable[[], Any] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Measured:
    """Medians of one interleaved run, for the figures to be made of."""

    seconds: dict[str, float]
    flops: float = 0.0
    bytes: float = 0.0
    peak: float | None = None  # flop/s of all threads in use
    bandwidth: float | None = None  # byte/s
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """A number that is reported, and the target it is held against (None: reported only)."""

    name: str
    unit: str
    compute: Callable[[Measured], float | None]
    at_least: float | None = None
    at_most: float | None = None

    def result(self, measured: Measured | None) -> dict:
        value = None if measured is None else self.compute(measured)
        met = None
        if self.at_least is not None or self.at_most is not None:
            target_is_upper = self.at_least is None
            target = self.at_most if target_is_upper else self.at_least
            if value is not None:
                met = value <= target if target_is_upper else value >= target
            sign = "<=" if target_is_upper else ">="
        else:
            target = sign = None
        return {"name": self.name, "value": value, "unit": self.unit, "sign": sign, "target": target, "met": met}


@dataclass(frozen=True)
class Case:
    """name: stable key, `group/shape/dtype`. setup(seed) makes the Work; special cases measure themselves in `run`."""

    name: str
    group: str
    title: str
    dtype: str
    figures: tuple[Figure, ...]
    setup: Callable[[int], Work] | None = None
    run: Callable[[int], tuple[Measured, dict]] | None = None
    threads: int = 1
    isa: str | None = None
    peak: str | None = None
    op: str = "attention"

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode()) & 0xFFFF


# --- Figures --------------------------------------------------------------------------------------------------------


def percent_of_peak(at_least: float | None = None, who: str = "pyext") -> Figure:
    """100 * flops / seconds / peak, with the peak measured in the same run."""

    def compute(m: Measured) -> float | None:
        return 100 * m.flops / m.seconds[who] / m.peak if m.peak and who in m.seconds else None

    return Figure("share of peak", "%", compute, at_least=at_least)


def percent_of_bandwidth(at_least: float | None = None, who: str = "pyext", what: str = "read") -> Figure:
    """100 * bytes / seconds / best sustained rate of the same run, of reading or whatever the probe does."""

    def compute(m: Measured) -> float | None:
        return 100 * m.bytes / m.seconds[who] / m.bandwidth if m.bandwidth else None

    return Figure(f"share of {what} bandwidth", "%", compute, at_least=at_least)


def speedup(peer: str, at_least: float | None = None, who: str = "pyext", name: str | None = None) -> Figure:
    """seconds(peer) / seconds(who)."""

    def compute(m: Measured) -> float | None:
        return m.seconds[peer] / m.seconds[who] if peer in m.seconds else None

    return Figure(name or f"speed-up over {peer}", "x", compute, at_least=at_least)


def slowdown(base: str, at_most: float | None = None, who: str = "pyext") -> Figure:
    """Percent by which `who` is slower than `base`."""

    def compute(m: Measured) -> float:
        return 100 * (m.seconds[who] / m.seconds[base] - 1)

    return Figure(f"slower than {base}", "%", compute, at_most=at_most)


def time_ratio(base: str, at_most: float | None = None, who: str = "pyext") -> Figure:
    """seconds(who) / seconds(base)."""

    def compute(m: Measured) -> float:
        return m.seconds[who] / m.seconds[base]

    return Figure(f"time against {base}", "x", compute, at_most=at_most)


def microseconds(at_most: float | None = None, who: str = "pyext") -> Figure:
    """Time of one call in microseconds."""
    return Figure("one call", "us", lambda m: m.seconds[who] * 1e6, at_most=at_most)


# --- The error rule -------------------------------------------------------------------------------------------------


def _worst(difference: torch.Tensor) -> tuple[float, float]:
    """Largest and root-mean-square entry; a NaN anywhere gives NaN in both."""
    if difference.numel() == 0:
        return 0.0, 0.0
    return difference.abs().max().item(), difference.square().mean().sqrt().item()


def compare(got: Tensors, truth: Tensors, eager: Tensors) -> dict:
    """Error of every tensor against the fp64 truth, and what PyTorch eager's own error allows.

    max|err| <= 2 max|err of eager in the same dtype| + 2 max|(ref + 0.3 - 0.3) - ref| with the middle sum in the
    dtype under test, and the same with root mean squares at factor 1.5. -inf (a row that sees nothing) must match.
    """
    tensors = {}
    for name, reference in truth.items():
        if name not in got:
            raise KeyError(f"the checked result must have {name!r}, got {sorted(got)}")
        dtype = eager[name].dtype
        reference = reference.double()
        finite = torch.isfinite(reference)
        mine, theirs = got[name].double(), eager[name].double()
        if mine.shape != reference.shape:
            raise ValueError(f"{name} must have shape {tuple(reference.shape)}, got {tuple(mine.shape)}")
        same_infinite = torch.equal(mine[~finite], reference[~finite])
        reference, mine, theirs = reference[finite], mine[finite], theirs[finite]
        error, rms = _worst(mine - reference)
        eager_error, eager_rms = _worst(theirs - reference)
        rounding, rounding_rms = _worst(((reference.to(dtype) + 0.3) - 0.3).double() - reference)
        allowed, allowed_rms = 2 * eager_error + 2 * rounding, 1.5 * eager_rms + 1.5 * rounding_rms
        ok = same_infinite and error <= allowed and rms <= allowed_rms  # a NaN compares false
        tensors[name] = {
            "ok": ok,
            "max": error,
            "allowed": allowed,
            "rms": rms,
            "allowed_rms": allowed_rms,
            "eager_max": eager_error,
        }
    worst = max(tensors, key=lambda name: _badness(tensors[name]))
    return {"ok": all(t["ok"] for t in tensors.values()), "worst": worst, "tensors": tensors}


def _badness(entry: dict) -> float:
    if not (math.isfinite(entry["max"]) and math.isfinite(entry["rms"])):
        return math.inf
    return max(
        (entry["max"] + 1e-300) / (entry["allowed"] + 1e-300),
        (entry["rms"] + 1e-300) / (entry["allowed_rms"] + 1e-300),
    )


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors start as NaN, so that a result which is never written cannot pass by luck."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])


def check(work: Work) -> dict | None:
    """The work's error report, None if the case has nothing to compare."""
    if work.got is None:
        return None
    with poisoned_memory():
        got = work.got()
    return compare(got, work.truth(torch.float64), work.truth(work.dtype))


Found = tuple[int, dict | None]  # the seed of the draw that is to be timed, and the error report


def check_case(case: Case, seed: int | None = None) -> Found:
    """Checks the case, on a second draw if the first is wrong: the largest of a million errors crosses its limit by
    chance now and then; a wrong kernel does it each time."""
    seed = case.seed if seed is None else seed
    with machine_state(case.threads, case.isa):
        for draw in (seed, seed + 1):
            error = check(case.setup(draw))
            if error is None or error["ok"]:
                break
    return draw, error


# --- Timing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def machine_state(threads: int, isa: str | None) -> Iterator[None]:
    """Threads and instruction set for a case, put back afterwards."""
    old_threads, old_isa = torch.get_num_threads(), native.isa() if native else None
    try:
        set_state(threads, isa)
        yield
    finally:
        set_state(old_threads, old_isa)


def set_state(threads: int | None, isa: str | None) -> None:
    if threads and threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    if isa and native and native.isa() != isa:
        native.set_isa(isa)


class Rotation:
    """One interleaved run. Each round is `peers()` (everyone else and the probes), then `own()` (pyext).

    The two halves are separate so that pytest-benchmark can own the clock around `own`; both also time themselves.
    """

    def __init__(self, case: Case, work: Work):
        self.case, self.work = case, work
        self.own_contender, *self.peer_contenders = work.contenders
        self.seconds: dict[str, list[float]] = {c.name: [] for c in work.contenders}
        self.peaks: list[float] = []
        self.bandwidths: list[float] = []
        self.loops: dict[str, int] = {}
        self.ended: dict[str, float] = {}  # when each contender's last call did
        self.home_isa = native.isa() if native else None

    def warm_up(self) -> float:
        """Runs everyone twice, picks inner loops for calls too short for the clock; returns seconds of one round."""
        total = 0.0
        for contender in self.work.contenders:
            self._prepare(contender)
            contender.call()
            start = time.perf_counter()
            contender.call()
            elapsed = time.perf_counter() - start
            self.loops[contender.name] = max(1, math.ceil(2e-3 / max(elapsed, 1e-7))) if elapsed < 1e-3 else 1
            total += elapsed * self.loops[contender.name]
        return total + (PROBE_SECONDS if self.case.peak else 0.0)

    def peers(self) -> None:
        for contender in self.peer_contenders:
            self._timed(contender)
        self._prepare(self.own_contender)
        if self.case.peak and native:
            self.peaks.append(native.peak_flops(self.case.peak, PROBE_SECONDS) * self.case.threads)
        if self.work.bandwidth_probe:
            start = time.perf_counter()
            self.work.bandwidth_probe()
            self.bandwidths.append(self.work.bytes / (time.perf_counter() - start))

    def own(self) -> None:
        self._timed(self.own_contender, prepared=True)

    def _prepare(self, contender: Contender) -> None:
        set_state(contender.threads or self.case.threads, contender.isa or self.case.isa or self.home_isa)

    def _timed(self, contender: Contender, prepared: bool = False) -> None:
        if not prepared:
            self._prepare(contender)
        call, loops = contender.call, self.loops.get(contender.name, 1)
        start = time.perf_counter()
        if start - self.ended.get(contender.name, start) > PAUSE_SECONDS:
            call()
            start = time.perf_counter()
        for _ in range(loops):
            call()
        end = self.ended[contender.name] = time.perf_counter()
        self.seconds[contender.name].append((end - start) / loops)

    def measured(self) -> Measured:
        return Measured(
            seconds={name: statistics.median(times) for name, times in self.seconds.items() if times},
            flops=self.work.flops,
            bytes=self.work.bytes,
            peak=statistics.median(self.peaks) if self.peaks else None,
            bandwidth=statistics.median(self.bandwidths) if self.bandwidths else None,
        )

    def disturbances(self) -> list[str]:
        """A note where the probe, which does the same thing each time, did not take the same time."""
        if not self.peaks:
            return []
        best, middle = max(self.peaks), statistics.median(self.peaks)
        if best < 1.15 * middle:
            return []
        return [f"the machine was busy: the peak probe's best was {best / middle:.2f} of its median"]


def rounds_for(round_seconds: float, budget: float, least: int = 5, most: int = 25) -> int:
    """As many rounds as the budget (seconds) allows, an odd number so that the median is one that happened."""
    rounds = int(budget / max(round_seconds, 1e-6))
    return max(least, min(most, rounds)) | 1


Repeat = Callable[[Rotation, int], None]


def plain_repeat(rotation: Rotation, rounds: int) -> None:
    for _ in range(rounds):
        rotation.peers()
        rotation.own()


def run_case(
    case: Case, budget: float = 3.0, repeat: Repeat = plain_repeat, seed: int | None = None, found: Found | None = None
) -> dict:
    """Measures one case if it is right; returns its JSON entry.

    `repeat` drives the rounds (pytest-benchmark's hook). `found`: what `check_case` found, where that ran elsewhere.
    """
    with machine_state(case.threads, case.isa):
        isa = native.isa() if native else ""
        if case.run is not None:
            measured, error = case.run(case.seed if seed is None else seed)
            return _entry(case, isa, error, measured if error is None or error["ok"] else None)
        seed, error = check_case(case, seed) if found is None else found
        work = case.setup(seed)
        if error is not None and not error["ok"]:
            return _entry(case, isa, error, None, notes=work.notes)
        rotation = Rotation(case, work)
        gc.collect()
        gc.disable()
        try:
            repeat(rotation, rounds_for(rotation.warm_up(), budget))
        finally:
            gc.enable()
        return _entry(case, isa, error, rotation.measured(), rotation.seconds, work.notes + rotation.disturbances())


def _entry(case: Case, isa: str, error: dict | None, measured: Measured | None, samples=None, notes=()) -> dict:
    """One result of the JSON. Keys are always present; what was not measured is None."""
    times = None
    if measured is not None:
        times = {
            name: {
                "median_ms": seconds * 1e3,
                "min_ms": min(samples[name]) * 1e3 if samples else seconds * 1e3,
                "rounds": len(samples[name]) if samples else 1,
                "gflops": measured.flops / seconds / 1e9 if measured.flops else None,
            }
            for name, seconds in measured.seconds.items()
        }
    return {
        "name": case.name,
        "op": case.op,
        "group": case.group,
        "title": case.title,
        "dtype": case.dtype,
        "threads": case.threads,
        "isa": isa,
        "status": "wrong" if error is not None and not error["ok"] else "ok",
        "times": times,
        "peak_gflops": measured.peak / 1e9 if measured and measured.peak else None,
        "bandwidth_gbs": measured.bandwidth / 1e9 if measured and measured.bandwidth else None,
        "figures": [figure.result(measured) for figure in case.figures],
        "error": error,
        "notes": list(notes),
    }


# --- Where it ran ---------------------------------------------------------------------------------------------------


def cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as info:
        for line in info:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine_facts(threads: int) -> dict:
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "isa": native.isa() if native else "",
        "features": list(native.cpu_features()) if native else [],
        "threads": threads,
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "pyext": getattr(pyext, "__version__", ""),
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
