"""`pytest benchmarks/ --benchmark-only [--benchmark-json out.json]`: one benchmark per case of `attention_cases.py`."""

import pytest

from . import attention_cases
from .pytest_case import run_benchmark


@pytest.mark.parametrize("case", attention_cases.all_cases(), ids=lambda case: case.name)
def bench_attention(benchmark, case):
    run_benchmark(benchmark, case)
