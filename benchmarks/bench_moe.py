"""`pytest benchmarks/ --benchmark-only [--benchmark-json out.json]`: one benchmark per case of `moe_cases.py`."""

import pytest

from . import moe_cases
from .pytest_case import run_benchmark


@pytest.mark.parametrize("case", moe_cases.all_cases(), ids=lambda case: case.name)
def bench_moe(benchmark, case):
    run_benchmark(benchmark, case)
