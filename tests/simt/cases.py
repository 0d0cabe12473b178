"""What the emulated kernels are run on: inputs, the call, and the fp64 result they are compared with.

Each case draws its inputs from a seed, registers memory with the machine, calls the launcher and returns the error of
the result in units of what rounding explains: above 1 it is wrong.
"""

from __future__ import annotations

import ctypes
import functools
import zlib
from collections.abc import Callable

import torch

from .build import Kernel
from .runtime import Machine

NAMES = ("elementwise", "reduce", "gemm_sm80", "gemm_sm90", "boxes", "misuse", "conformance")
SOURCES = {name: f"tests/simt/kernels/{name}.cu" for name in NAMES}
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def kernel(source: str, defect: int = 0) -> Kernel:
    return Kernel(SOURCES[source], (("DEFECT", defect),) if defect else ())


def _random(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{shape}".encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised, with room around it: what a defect writes there hurts nobody."""
    room = 4096
    count = torch.Size(shape).numel()
    return torch.empty(count + 2 * room, dtype=dtype)[room : room + count].view(shape)


def _ratio(result: torch.Tensor, reference: torch.Tensor, terms: int) -> float:
    """Largest error over its bound: half an ulp of the result's format and an fp32 ulp per term; inf for NaN."""
    if not result.is_floating_point():
        return 0.0 if torch.equal(result.long(), reference.long()) else float("inf")
    half_ulp = torch.finfo(result.dtype).eps / 2
    bound = half_ulp * reference.abs() + terms * torch.finfo(torch.float32).eps * reference.abs().max()
    ratio = ((result.double() - reference).abs() / bound).max().item()
    return ratio if ratio == ratio else float("inf")


def elementwise(library, gpu: Machine, seed: int, format: str = "bf16", count: int = 1016) -> float:
    dtype = FORMATS[format]
    x, y = _random(seed, (count,), dtype), _random(seed + 1, (count,), dtype)
    out = _empty(*x.shape, dtype=x.dtype)
    gpu.memory(x=x, y=y)
    gpu.memory(out=out, writable=True)
    a = ctypes.c_float(0.5)
    gpu.call(library.simt_axpy, list(FORMATS).index(format), a, x, y, out, ctypes.c_int64(count), None)
    return _ratio(out, 0.5 * x.double() + y.double(), 2)


def row_sum(library, gpu: Machine, seed: int, rows: int = 8, columns: int = 333) -> float:
    x, out = _random(seed, (rows, columns), torch.float32), _empty(rows, dtype=torch.float32)
    gpu.memory(x=x)
    gpu.memory(out=out, writable=True)
    gpu.call(library.simt_row_sum, x, out, rows, columns, None)
    return _ratio(out, x.double().sum(1), columns)


def scan(library, gpu: Machine, seed: int, count: int = 400) -> float:
    x = (_random(seed, (count,), torch.float32) * 100).int()
    out = _empty(*x.shape, dtype=x.dtype)
    gpu.memory(x=x)
    gpu.memory(out=out, writable=True)
    gpu.call(library.simt_scan, x, out, count, None)
    return _ratio(out, x.long().cumsum(0), 0)


def histogram(library, gpu: Machine, seed: int, count: int = 500, bins: int = 37) -> float:
    x = (_random(seed, (count,), torch.float32) * 1000).int().abs() % bins
    counts = _empty(bins, dtype=torch.int32).zero_()
    gpu.memory(x=x)
    gpu.memory(counts=counts, writable=True, initialised=True)
    gpu.call(library.simt_histogram, x, counts, count, bins, None)
    return _ratio(counts, torch.bincount(x, minlength=bins), 0)


def _gemm(call: Callable, gpu: Machine, seed: int, format: str, m: int, n: int, k: int, transpose: bool) -> float:
    a, b = _random(seed, (m, k), FORMATS[format]), _random(seed, (k, n) if transpose else (n, k), FORMATS[format])
    c = _empty(m, n, dtype=a.dtype)
    gpu.memory(a=a, b=b)
    gpu.memory(c=c, writable=True)
    gpu.call(call, a, b, c, m, n, k, None)
    return _ratio(c, a.double() @ (b.double() if transpose else b.double().T), k)


def gemm_sm80(library, gpu: Machine, seed: int, format: str = "bf16", m: int = 70, n: int = 72, k: int = 280) -> float:
    call = functools.partial(library.simt_gemm_sm80, int(format == "fp16"))
    return _gemm(call, gpu, seed, format, m, n, k, False)


def gemm_sm90(
    library,
    gpu: Machine,
    seed: int,
    format: str = "bf16",
    transpose: bool = False,
    m: int = 200,
    n: int = 136,
    k: int = 200,
) -> float:
    call = functools.partial(library.simt_gemm_sm90, int(format == "fp16"), int(transpose))
    return _gemm(call, gpu, seed, format, m, n, k, transpose)
