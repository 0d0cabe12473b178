"""`pytest benchmarks/ --benchmark-only [--benchmark-json out.json]`: one benchmark per case of `rotary_cases.py`."""

import pytest

from . import rotary_cases
from .pytest_case import run_benchmark


@pytest.mark.parametrize("case", rotary_cases.all_cases(), ids=lambda case: case.name)
def bench_rotary(benchmark, case):
    run_benchmark(benchmark, case)
