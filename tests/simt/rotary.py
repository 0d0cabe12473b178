"""csrc/cuda/rotary.cu on the emulator, called as csrc/rotary.cpp calls it on a GPU."""

from __future__ import annotations

import ctypes

import torch

from .build import Kernel
from .problems import DTYPES, RotaryProblem, Strided, view
from .runtime import Machine

SOURCE = Kernel("csrc/cuda/rotary.cu")
Tensor = torch.Tensor


def _problem(gpu: Machine, x: Tensor, positions: Tensor | None, half: int, interleaved: bool, inverse: bool):
    batch, heads, length, head_dim = x.shape
    gpu.memory(x=x)
    p = RotaryProblem(dtype=DTYPES.index(x.dtype), x=view(x), interleaved=interleaved, inverse=inverse)
    p.batch, p.heads, p.length, p.head_dim, p.half = batch, heads, length, head_dim, half
    if positions is not None:
        positions = positions.reshape(-1, length)
        gpu.memory(positions=positions)
        p.positions, p.positions_batch = positions.data_ptr(), 0 if positions.shape[0] == 1 else length
    return p, positions


def forward(gpu: Machine, x: Tensor, cos: Tensor, sin: Tensor, positions, interleaved, inverse, kernel=SOURCE) -> Tensor:
    p, positions = _problem(gpu, x, positions, cos.shape[-1], interleaved, inverse)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    gpu.memory(cos=cos, sin=sin), gpu.memory(out=out, writable=True)
    p.out, p.table_rows, p.table_dtype = view(out), cos.shape[-2], DTYPES.index(cos.dtype)
    for name, table in (("cos", cos), ("sin", sin)):
        batch = 0 if table.dim() == 2 or table.shape[0] == 1 else table.stride(0)
        setattr(p, name, Strided(table.data_ptr(), batch, 0, table.stride(-2)))
    gpu.call(gpu.load(kernel).pyext_cuda_rotary_forward, ctypes.byref(p), None)
    return out


def backward(gpu: Machine, grad: Tensor, x: Tensor, tables: tuple[int, ...], positions, interleaved, inverse, kernel=SOURCE):
    """Gradients of cos and sin, fp32; `tables` is their shape."""
    p, positions = _problem(gpu, x, positions, tables[-1], interleaved, inverse)
    p.table_batch, p.table_rows = (1, *tables)[-3:-1]
    gpu.memory(grad=grad)
    p.grad = view(grad)
    if positions is not None:
        positions = positions.reshape(1, -1) if p.table_batch == 1 else positions
        in_order, order = positions.sort(stable=True)
        gpu.memory(sorted=in_order, order=order)
        p.sorted, p.order = in_order.data_ptr(), order.data_ptr()
    cos, sin = torch.empty(tables), torch.empty(tables)
    gpu.memory(writable=True, grad_cos=cos, grad_sin=sin)
    p.grad_cos, p.grad_sin = cos.data_ptr(), sin.data_ptr()
    gpu.call(gpu.load(kernel).pyext_cuda_rotary_backward, ctypes.byref(p), None)
    return cos, sin
