"""Benchmarks of pyext's ops: `python -m benchmarks.report --run`, or `pytest benchmarks/ --benchmark-only`."""
