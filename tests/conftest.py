"""Seeds that change with every run, poisoned fresh memory, and the list of backends."""

from __future__ import annotations

import ctypes
import os
import random
import sys
import zlib

import pytest
import torch
import torch.utils.deterministic

from support import backends

if backends.TRITON and not backends.HAS_GPU:
    from support import triton_interpreter

SESSION_SEED = int(os.environ.get("PYEXT_TEST_SEED") or random.SystemRandom().randrange(2**31))
os.environ["PYEXT_TEST_SEED"] = str(SESSION_SEED)  # for the workers of pytest-xdist, which must choose the same cases
M_PERTURB, FRESH_BYTES = -6, 0x01  # glibc fills fresh memory with the complement, 0xFE: -1.7e38 in fp32, NaN in fp16


def pytest_report_header(config):
    names = ", ".join(map(str, backends.ALL + backends.TRITON + backends.CUDA)) or "none"
    return [f"pyext seed: {SESSION_SEED} (PYEXT_TEST_SEED={SESSION_SEED} repeats this run)", f"pyext backends: {names}"]


def pytest_configure(config):
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_PERTURB, FRESH_BYTES)


#: Of a test of attention, interpreted Triton runs so many cases, others every time: a tile takes it milliseconds, and
#: test_attention_triton.py holds what must run always. PYEXT_TEST_INTERPRETED=all runs all.
MOST_INTERPRETED = 3


def pytest_collection_modifyitems(config, items):
    left_out = {id(item) for item in _left_out(items)}
    config.hook.pytest_deselected(items=[item for item in items if id(item) in left_out])
    items[:] = [item for item in items if id(item) not in left_out]
    _sort_by_case(items)


def _left_out(items):
    """Cases of attention in Triton: those of a dtype or a width that it refuses, and when interpreted most of many."""
    tests = {}
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        chosen = [parameters[name] for name in CHOICES if getattr(parameters.get(name), "impl", "") == "triton"]
        if not chosen or getattr(item.module, "OP", "attention") != "attention":
            continue
        shape = getattr(parameters.get("which"), "shape", None)
        too_wide = shape is not None and max(shape.d, shape.dv) > 256
        if too_wide or chosen[0].refuses(parameters.get("dtype")):
            yield item
        else:
            tests.setdefault(item.nodeid.split("[")[0], []).append(item)
    if backends.HAS_GPU or backends.INTERPRET_ALL:
        return
    for name, cases in tests.items():
        surplus = len(cases) - MOST_INTERPRETED
        if surplus > 0:
            yield from random.Random(f"{SESSION_SEED}/{name}").sample(cases, surplus)


def _sort_by_case(items):
    """Run the backends of one case after each other: they share its inputs and its oracle, which are cached."""
    order = {}

    def key(item):
        parameters = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        for name in (*CHOICES, "cpu"):
            parameters.pop(name, None)
        case = (item.nodeid.split("[")[0], *((name, id(value)) for name, value in parameters.items()))
        return order.setdefault(case, len(order))

    items.sort(key=key)


@pytest.fixture
def seed(request) -> int:
    """A number that differs between tests and between runs."""
    return zlib.crc32(f"{SESSION_SEED}/{request.node.nodeid}".encode())


@pytest.fixture
def session_seed() -> int:
    """A number that differs between runs only, so that all backends of one case see the same inputs."""
    return SESSION_SEED


@pytest.fixture(autouse=True)
def clean_slate(request):
    """Seed torch, use one thread, fill fresh tensors with NaN; put torch's switches back afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(zlib.crc32(f"{SESSION_SEED}/{request.node.nodeid}".encode()))
    if backends.TRITON and not backends.HAS_GPU:
        triton_interpreter.shuffle_programs(torch.initial_seed())
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


#: Fixtures that run over the implementations of the op that a test module names in OP (attention by default).
CHOICES = {
    "backend": lambda backend: True,
    "kernel": lambda backend: backend.impl != "reference",
    "family": lambda backend: backend in backends.CPU[-1:] + backends.TRITON,
    "fp64_backend": lambda backend: backend.widest == torch.float64,
}


def pytest_generate_tests(metafunc):
    for name, choice in CHOICES.items():
        if name in metafunc.fixturenames:
            chosen = filter(choice, backends.of(getattr(metafunc.module, "OP", "attention")))
            metafunc.parametrize(name, backends.as_parameters(chosen), indirect=True)


@pytest.fixture
def backend(request):
    """Every implementation."""
    with request.param.selected():
        yield request.param


@pytest.fixture
def kernel(request):
    """Every implementation but the reference."""
    with request.param.selected():
        yield request.param


@pytest.fixture
def family(request):
    """One of each family of kernels, the CPU's on the best instruction set: for what does not depend on it."""
    with request.param.selected():
        yield request.param


@pytest.fixture
def fp64_backend(request):
    """Every implementation that computes in fp64."""
    with request.param.selected():
        yield request.param


def _name(backend) -> str:
    return str(backend) if backend else "cpu-missing"


def _use(backend):
    """Select a CPU backend for a test. Missing where it should run is a failure, not a skip."""
    if backend is None:
        if backends.cpu_kernels_expected() and not os.environ.get("PYEXT_TEST_BACKENDS"):
            pytest.fail("this machine has AVX2, FMA and F16C, but pyext._C offers no kernel")
        pytest.skip("no CPU kernel is to run here")
    return backend.selected()


@pytest.fixture(params=backends.CPU or [None], ids=_name)
def cpu(request):
    """The CPU kernels, once per instruction set."""
    with _use(request.param) as backend:
        yield backend


@pytest.fixture(params=backends.CPU[-1:] or [None], ids=_name)
def cpu_best(request):
    """The CPU kernels, on the best instruction set only: for what does not depend on it."""
    with _use(request.param) as backend:
        yield backend
