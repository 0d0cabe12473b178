"""CUDA sources run on the CPU (tests/simt): right results and no alarm, under every schedule and completion."""

import ctypes

import pytest
import torch
from simt import cases
from simt.defects import RUNS
from simt.runtime import Found, machine

CASES = [
    ("elementwise", "elementwise", {"format": "fp32"}),
    ("elementwise", "elementwise", {"format": "fp16"}),
    ("reduce", "row_sum", {}),
    ("reduce", "scan", {}),
    ("reduce", "histogram", {}),
    ("gemm_sm80", "gemm_sm80", {}),
    ("gemm_sm90", "gemm_sm90", {}),
    ("gemm_sm90", "gemm_sm90", {"format": "fp16"}),
]
SHAPES = [(1, 8, 8), (64, 64, 64), (65, 64, 72), (129, 200, 24), (128, 128, 256)]


def name_of(run):
    return "-".join(map(str, run.values()))


def case_name(case):
    return "-".join([case[1], *map(str, case[2].values())])


def run_case(case, seed, **run):
    source, function, arguments = case
    with machine(seed=seed % 2**31, **run) as gpu:
        error = getattr(cases, function)(gpu.load(cases.kernel(source)), gpu, seed, **arguments)
    assert error <= 1, f"{error} times the bound"


@pytest.mark.parametrize("case", CASES, ids=case_name)
@pytest.mark.parametrize("run", RUNS, ids=name_of)
def test_no_alarm(case, run, seed):
    run_case(case, seed, **run)


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_threads_switch_at_accesses(case, seed):
    run_case(case, seed, preempt=10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", ["bf16", "fp16"])
@pytest.mark.parametrize("case", ["gemm_sm80", "gemm_sm90", "gemm_sm90 transposed"])
def test_gemm(case, format, shape, seed):
    name, *transposed = case.split()
    arguments = {"format": format, **dict(zip("mnk", shape))}
    if transposed:
        arguments["transpose"] = True
    run_case((name, name, arguments), seed)


def misuses():
    with machine() as gpu:
        library = gpu.load(cases.kernel("misuse"))
    library.simt_misuse_name.restype = library.simt_misuse_message.restype = ctypes.c_char_p
    return library


@pytest.mark.parametrize("run", RUNS, ids=name_of)
def test_misuse_is_refused(run, seed):
    library = misuses()
    for i in range(library.simt_misuses()):
        out = torch.empty(128)
        with machine(seed=seed % 2**31, **run) as gpu:
            gpu.memory(out=out, writable=True, initialised=b"load" in library.simt_misuse_name(i))
            with pytest.raises(Found) as found:
                gpu.call(library.simt_misuse, i, out, None)
        message = library.simt_misuse_message(i).decode()
        assert message in str(found.value), f"{library.simt_misuse_name(i)}: {found.value}"


def test_message_names_the_line(seed):
    """of the kernel, not of a wrapper, and of both accesses."""
    library = misuses()
    out = torch.empty(128)
    with machine(seed=seed % 2**31) as gpu:
        gpu.memory(out=out, writable=True)
        with pytest.raises(
            Found, match=r"out byte \d+ \(misuse\.cu:\d+\), after block \d thread \d+ \(misuse\.cu:\d+\)"
        ):
            names = [library.simt_misuse_name(i) for i in range(library.simt_misuses())]
            gpu.call(library.simt_misuse, names.index(b"blocks_write_the_same"), out, None)


def test_machine_works_again_after_a_failure(seed):
    test_message_names_the_line(seed)
    run_case(CASES[0], seed)
