"""The emulated kernels are CUDA: nvcc compiles the same sources, without spills, to the instructions they mean."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
from simt import cases
from simt.build import ROOT, nvcc

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")

COMMON = ["elementwise", "reduce", "gemm_sm80", "misuse"]
SOURCES = {"80": COMMON[:3], "90a": [*COMMON, "boxes", "gemm_sm90"], "100": [*COMMON[:3], "boxes"]}
# What the sources' wrappers become, and must.
INSTRUCTIONS = {
    "elementwise": ["LDG.E", "STG.E.128"],
    "reduce": ["SHFL", "BAR.SYNC", "ATOMS"],
    "gemm_sm80": ["HMMA.16816.F32", "LDSM.16.M88.4", "LDGSTS", "DEPBAR"],
    "gemm_sm90": ["HGMMA.64x128x16.F32", "UTMALDG.2D", "UTMASTG.2D", "SYNCS", "USETMAXREG"],
    "boxes": [f"{name}.{rank}D" for name in ("UTMALDG", "UTMASTG") for rank in (2, 3, 4, 5)],
    "misuse": ["HGMMA.64x8x16.F32", "UBLKCP"],
}


def disassembler():
    """cuobjdump, of the CUDA toolkit or of Triton."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    bundled = triton and Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return found or (str(bundled) if bundled and bundled.exists() else None)


@pytest.mark.parametrize("arch, name", [(arch, name) for arch, names in SOURCES.items() for name in names])
def test_cubin(arch, name, tmp_path):
    cubin = tmp_path / "kernels.cubin"
    report = nvcc(ROOT / cases.SOURCES[name], arch, cubin, "-cubin")
    spills = [line for line in report.splitlines() if "spill" in line]
    assert spills and all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills), report
    assert "C75" not in report, report  # wgmma serialised, setmaxnreg ignored
    tool = disassembler()
    if tool is None:
        pytest.skip("compiled; neither CUDA's nor Triton's cuobjdump is there to look inside")
    assembly = subprocess.run([tool, "--dump-sass", cubin], capture_output=True, text=True, check=True).stdout
    missing = [instruction for instruction in INSTRUCTIONS[name] if instruction not in assembly]
    assert not missing, f"sm_{arch}: no {missing}"
