"""One case under pytest-benchmark: what every `bench_<op>.py` calls.

pytest-benchmark holds the clock around pyext's calls; between them, the peers and the peak probe take their turns. The
figures (share of peak, speed-ups, targets, errors) are each benchmark's `extra_info`, the machine's its `machine`.
`python -m benchmarks.report out.json` turns them into the table and the picture. A wrong result fails the test and
reports no speed; a missed target is reported, it does not fail.
"""

import os

import pytest

from .harness import Case, Rotation, machine_facts, run_case

BUDGET = float(os.environ.get("PYEXT_BENCH_SECONDS", "3"))  # seconds of timing per case


def run_benchmark(benchmark, case: Case) -> None:
    benchmark.group = case.group
    entry = None

    def repeat(rotation: Rotation, rounds: int) -> None:
        benchmark.pedantic(rotation.own, setup=rotation.peers, rounds=rounds, iterations=1)

    if case.run is not None:  # measures itself, in a process of its own

        def once():
            nonlocal entry
            entry = run_case(case)

        benchmark.pedantic(once, rounds=1, iterations=1)
    else:
        entry = run_case(case, BUDGET, repeat)
    benchmark.extra_info.update(entry, machine=machine_facts(case.threads))
    if entry["status"] != "ok":
        pytest.fail(f"{case.name}: wrong result, so no speed: {entry['error']['worst']} {entry['error']['tensors']}")
