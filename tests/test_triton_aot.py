"""The Triton kernels compile for every GPU they are meant for, see `triton_aot.py`; and its checks can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_resources.sass import matrix_flops

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


def test_repeated_products_are_seen():
    """What one tile needs, counted as if the source had one product less."""
    program = """
import sys
from tests import triton_aot, triton_aot_attention
triton_aot_attention.PRODUCTS["_forward_kernel"] = (1, 0)
sys.argv[1:] = ["--arch", "90", "--only", "attention, nothing 128", "--jobs", "1"]
sys.exit(triton_aot.main())
"""
    result = run(program=program)
    assert result.returncode == 1 and "times what the tiles need" in result.stdout, result.stdout + result.stderr


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


def test_matrix_instructions_are_counted():
    """By their shapes; those of sm_100 do not name any."""

    def sass(*code):
        return "".join(f"  /*{16 * n:04x}*/  {text} ;  /* 0x0 */\n" for n, text in enumerate(code))

    code = "HMMA.16816.F32.BF16 R4, R8, R2, R4", "@!P0 HMMA.1688.F32 R4, R8, R2, R4", "FFMA R0, R1, R2, R3"
    assert matrix_flops(sass(*code), 8) == 8 * 2 * (16 * 8 * 16 + 16 * 8 * 8)
    assert matrix_flops(sass("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24"), 8) == 2 * 2 * 64 * 128 * 16
    assert matrix_flops(sass(*code, "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8]"), 8) is None
    assert matrix_flops(sass("FFMA R0, R1, R2, R3"), 4) == 0
