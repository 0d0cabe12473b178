"""`pytest benchmarks/ --benchmark-only [--benchmark-json out.json]`: one benchmark per case of `glu_cases.py`."""

import pytest

from . import glu_cases
from .pytest_case import run_benchmark


@pytest.mark.parametrize("case", glu_cases.all_cases(), ids=lambda case: case.name)
def bench_glu(benchmark, case):
    run_benchmark(benchmark, case)
