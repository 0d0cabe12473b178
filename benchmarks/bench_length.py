"""`pytest benchmarks/ --benchmark-only [--benchmark-json out.json]`: one benchmark per case of `length_cases.py`."""

import pytest

from . import length_cases
from .pytest_case import run_benchmark


@pytest.mark.parametrize("case", length_cases.all_cases(), ids=lambda case: case.name)
def bench_length(benchmark, case):
    run_benchmark(benchmark, case)
