"""`pytest benchmarks/ --benchmark-only [--benchmark-json out.json]`: one benchmark per case of `mask_cases.py`."""

import pytest

from . import mask_cases
from .pytest_case import run_benchmark


@pytest.mark.parametrize("case", mask_cases.all_cases(), ids=lambda case: case.name)
def bench_masks(benchmark, case):
    run_benchmark(benchmark, case)
