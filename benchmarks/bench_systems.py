"""`pytest benchmarks/ --benchmark-only [--benchmark-json out.json]`: one benchmark per case of `systems_cases.py`."""

import pytest

from . import systems_cases
from .pytest_case import run_benchmark


@pytest.mark.parametrize("case", systems_cases.all_cases(), ids=lambda case: case.name)
def bench_systems(benchmark, case):
    run_benchmark(benchmark, case)
