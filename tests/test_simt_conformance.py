"""The program that will compare emulator and GPU: here it runs in the emulator, and compiles for GPUs where nvcc is."""

import re
import shutil

import pytest
import torch
from simt import cases, conformance
from simt.build import ROOT
from simt.runtime import COMPLETIONS, SCHEDULES


def test_results_do_not_depend_on_the_schedule(seed):
    runs = [
        conformance.emulated(seed, schedule=schedule, completion=completion, seed=seed % 2**31)
        for schedule, completion in zip(SCHEDULES, COMPLETIONS)
    ]
    assert len(runs[0]) > 100
    for run in runs[1:]:
        assert not any(conformance.compare(run, runs[0]).values())


def test_comparison_sees_a_difference(seed):
    results = conformance.emulated(seed)
    for name, (rule, words) in results.items():
        changed = words.clone()
        # The last bit of some number, or the last of the largest one's exponent.
        changed[(changed & 0x7FFFFFFF).argmax()] ^= 1 if rule == "exact" else 1 << 23
        assert conformance.disagreement(rule, changed, words), name


def test_units_in_the_last_place():
    one = torch.tensor([0x3F800000, 0x40000000])  # 1, 2
    assert conformance.disagreement("ulp", one + torch.tensor([2, -2]), one) == 0
    assert conformance.disagreement("ulp", one + torch.tensor([3, 0]), one) == 3
    assert conformance.disagreement("sum", one + torch.tensor([4, 0]), one) == 0
    assert conformance.disagreement("exact", one + torch.tensor([1, 0]), one) == float("inf")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ["80", "90a", "100"])
def test_compiles_for_gpus(arch, tmp_path):
    report = conformance.compile_program(arch, tmp_path / "conformance.cubin", "-cubin")
    spills = [line for line in report.splitlines() if "spill" in line]
    assert spills and all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills)


def test_every_wrapper_has_a_kernel():
    headers = "".join((ROOT / "csrc" / "cuda" / name).read_text() for name in ("ptx.h", "wgmma.h"))
    wrappers = set(re.findall(r"^ *PYEXT_DEVICE [\w ]+? (\w+)(?:<\w+>)?\(", headers, re.M))
    called = set(re.findall(r"ptx::(\w+)", (ROOT / cases.SOURCES["conformance"]).read_text()))
    assert len(wrappers) > 30
    # Two that change how many registers a warp may have, and one that is no instruction, compute nothing.
    idle = {"setmaxnreg_dec", "setmaxnreg_inc", "hide_value"}
    assert wrappers - called - idle <= {"shared_address", "mbarrier_try_wait"}
