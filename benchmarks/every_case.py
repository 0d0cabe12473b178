"""The cases of this machine's CPU, by name, and one of them measured apart from all others.

What ran before in a process changes what comes after it: by the sizes that were freed, the allocator decides which ones
to map anew each time, and fresh pages cost as much as some kernels. Behind a comparison with fp64, for example,
`grouped_mm` trains a mixture of experts in 98 to 102 ms, in a process of its own in 104 to 112. So every case is
checked in one process and timed in another, which does nothing else.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

from . import attention_cases, glu_cases, length_cases, mask_cases, moe_cases, relative_cases, rotary_cases
from . import systems_cases as systems
from .harness import Case, Found, check_case, run_case

ROOMS = attention_cases, relative_cases, mask_cases, rotary_cases, glu_cases, moe_cases, length_cases, systems


def selected(pattern: str, threads: int) -> list[Case]:
    """Those whose name matches the regular expression."""
    cases = [case for case in itertools.chain(*(room.all_cases() for room in ROOMS)) if re.search(pattern, case.name)]
    if not cases:
        raise SystemExit(f"--cases {pattern!r} matches none of the cases; see --list")
    if threads != 1:  # the two-thread cases say themselves how many they take
        cases = [dataclasses.replace(c, threads=threads) if c.threads == 1 else c for c in cases]
    return cases


def run_apart(name: str, threads: int, budget: float, seed: int | None) -> dict:
    """The entry of one case."""
    found = _apart(_check, name, threads, seed)
    return _apart(_measure, name, threads, budget, seed, found)


def _apart(function: Callable, *arguments):
    """function(*arguments) in a process that has imported what it needs and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, context) as process:
        return process.submit(function, *arguments).result()


def _named(name: str, threads: int) -> Case:
    (case,) = selected(f"^{re.escape(name)}$", threads)
    return case


def _check(name: str, threads: int, seed: int | None) -> Found | None:
    case = _named(name, threads)
    return check_case(case, seed) if case.setup else None


def _measure(name: str, threads: int, budget: float, seed: int | None, found: Found | None) -> dict:
    return run_case(_named(name, threads), budget, seed=seed, found=found)
