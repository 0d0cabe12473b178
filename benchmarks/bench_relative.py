"""`pytest benchmarks/ --benchmark-only [--benchmark-json out.json]`: one benchmark per case of `relative_cases.py`."""

import pytest

from . import relative_cases
from .pytest_case import run_benchmark


@pytest.mark.parametrize("case", relative_cases.all_cases(), ids=lambda case: case.name)
def bench_relative(benchmark, case):
    run_benchmark(benchmark, case)
