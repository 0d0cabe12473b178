"""The Triton kernels compile for every GPU they are meant for, see `triton_aot.py`; and its checks can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import backends

pytestmark = pytest.mark.skipif(not backends.TRITON, reason="Triton is not installed")
ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str, program: str | None = None) -> subprocess.CompletedProcess:
    """In a process that does not interpret."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = ["-c", program] if program else ["-m", "tests.triton_aot"]
    return subprocess.run(
        [sys.executable, *command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_every_configuration_compiles():
    """For sm_80, 90 and 100: no spills, shared memory within limits, matrix units, wide accesses."""
    result = run()
    print(result.stdout)
    assert result.returncode == 0 and " 0 wrong" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("defect", ["registers", "shared memory"])
def test_defect_is_seen(defect):
    """A configuration that does not fit the GPU."""
    config = {"registers": (256, 128, 64, 4, 2), "shared memory": (128, 128, 128, 8, 6)}[defect]
    program = f"""
import sys
from tests import triton_aot
table = triton_aot.gated_linear.CONFIGS["forward", 2]
few, _, odd = table[90]
table[90] = (few, triton_aot.gated_linear.Config(*{config}), odd)
sys.argv[1:] = ["--arch", "90", "--only", "many rows bf16: forward", "--all", "--jobs", "1"]
sys.exit(triton_aot.main())
"""
    result = run(program=program)
    expected = {"registers": "bytes of stack", "shared memory": "shared memory above|OutOfResources"}[defect]
    assert result.returncode == 1 and "1 kernels, 1 wrong" in result.stdout, result.stdout + result.stderr
    assert any(words in result.stdout for words in expected.split("|")), result.stdout
