"""Lets `pytest benchmarks/` find `bench_*.py` and its `bench_*` functions, whatever the project's own patterns are."""

import sys
from pathlib import Path

import pytest

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.append(ROOT)  # last, so that an installed pyext stays the one that is measured


class BenchModule(pytest.Module):
    """A module whose benchmarks are named bench_*, in a file named bench_*."""

    def funcnamefilter(self, name: str) -> bool:
        return name.startswith("bench_")

    def _getobj(self):
        import importlib

        return importlib.import_module(f"benchmarks.{self.path.stem}")


def pytest_collect_file(file_path: Path, parent: pytest.Collector):
    if file_path.suffix == ".py" and file_path.name.startswith("bench_"):
        return BenchModule.from_parent(parent, path=file_path)
    return None
