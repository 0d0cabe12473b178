"""Checks the emulator against a GPU: `python -m tests.simt.conformance [SEED]` on a machine with nvcc and a GPU.

Both run every wrapper of ptx.h on the same random inputs (kernels/conformance.cu) and dump what they get: one line per
wrapper, with the rule by which the results must agree. All else that the emulator claims stands on this agreement.
"""

from __future__ import annotations

import ctypes
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from . import cases
from .build import ROOT, nvcc
from .runtime import machine

# Device and emulator may differ by this many units in the last place of fp32: of each number ("ulp": approximations,
# whose error is documented), or of the largest one ("sum": matrix units add and round in an order of their own).
TOLERANCE = {"exact": 0, "ulp": 2, "sum": 2}

Results = dict[str, tuple[str, torch.Tensor]]


def read(dump: Path) -> Results:
    results = {}
    for line in dump.read_text().splitlines():
        name, rule, *words = line.split(" ")
        results[name] = rule, torch.tensor([int(word, 16) for word in words], dtype=torch.int64)
    return results


def emulated(inputs: int, **options) -> Results:
    """What the emulator computes of the inputs of this seed; options as of `machine`."""
    with machine(**options) as gpu, tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "dump"
        gpu.call(gpu.load(cases.kernel("conformance")).simt_conformance, str(dump).encode(), ctypes.c_uint64(inputs))
        return read(dump)


def compile_program(arch: str, output: Path, *options: str) -> str:
    return nvcc(ROOT / cases.SOURCES["conformance"], arch, output, f"-DCONFORMANCE_SM={arch.rstrip('a')}", *options)


def on_device(seed: int, folder: Path) -> Results:
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    capability = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0].replace(".", "")
    compile_program("90a" if capability == "90" else capability, folder / "conformance")
    subprocess.run([folder / "conformance", folder / "dump", str(seed)], check=True)
    return read(folder / "dump")


def disagreement(rule: str, device: torch.Tensor, emulator: torch.Tensor) -> float:
    """0 if they agree within the rule's tolerance; else the largest difference, in its units."""
    if torch.equal(device, emulator):
        return 0.0
    if rule == "exact" or device.shape != emulator.shape:
        return float("inf")
    x, y = (words.to(torch.int32).view(torch.float32).double() for words in (device, emulator))
    size = y.abs().max() if rule == "sum" else y.abs()
    exponent = torch.frexp(size.clamp(min=2.0**-126)).exponent
    distance = torch.where(x == y, 0.0, (x - y).abs())  # infinities are no distance from themselves
    ulps = (distance / torch.exp2(exponent.double() - 24)).max().item()
    return 0.0 if ulps <= TOLERANCE[rule] else ulps


def compare(device: Results, emulator: Results) -> dict[str, float]:
    """By wrapper, how far the device is from the emulator. The device may lack some wrappers."""
    return {name: disagreement(rule, words, emulator[name][1]) for name, (rule, words) in device.items()}


def main() -> int:
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else random.SystemRandom().randrange(2**31)
    with tempfile.TemporaryDirectory() as folder:
        differences = compare(on_device(seed, Path(folder)), emulated(seed))
    for name, difference in differences.items():
        if difference:
            print(f"{name}: device and emulator differ ({difference} units in the last place)")
    wrong = sum(map(bool, differences.values()))
    print(f"seed {seed}: {len(differences) - wrong} of {len(differences)} results agree")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
