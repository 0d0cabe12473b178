"""CUDA sources run on the CPU (tests/simt): right results, and no alarm, under every schedule."""

import ctypes
import itertools

import pytest
import torch
from simt.build import Kernel
from simt.runtime import COMPLETIONS, SCHEDULES, machine

FORMATS = (torch.float32, torch.bfloat16, torch.float16)
RUNS = [
    dict(schedule=schedule, completion=completion, preempt=preempt)
    for schedule, completion, preempt in itertools.product(SCHEDULES, COMPLETIONS, (0, 20))
]


def name_of(run):
    return "-".join(map(str, run.values()))


@pytest.mark.parametrize("run", RUNS, ids=name_of)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_elementwise(run, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(1016, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(x)
    with machine(seed=seed, **run) as gpu:
        gpu.memory(x=x, y=y)
        gpu.memory(out=out, writable=True)
        kernels = gpu.load(Kernel("tests/simt/kernels/elementwise.cu"))
        launch = kernels.simt_axpy
        gpu.call(launch, FORMATS.index(dtype), ctypes.c_float(0.5), x, y, out, ctypes.c_int64(x.numel()), None)
    assert torch.equal(out, (0.5 * x.float() + y.float()).to(dtype))
