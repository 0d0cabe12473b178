"""Rows of experts from tokens (`dispatch`) and back (`combine`): gathers along the maps of a routing.

No row is added to by two programs, so there are no atomics: a token's sum goes through its choices in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import DTYPES, check, on, power_of_two, readable

ELEMENTS = 1024  # of a tile: eight per thread; twice as many in sums over choices, which hold little else
#: Columns of a tile; its rows follow from them. Wider rows take several tiles.
LEAST_COLUMNS, MOST_COLUMNS = 64, 1024


# --- Kernels. Offsets are 64 bits wide: pointers to rows, then columns within them. ---


@triton.jit
def _tile(columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows and columns of this program."""
    program, across = tl.program_id(0), tl.cdiv(columns, COLUMNS)
    row = (program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row, program % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _gather_kernel(x, source, out, rows, tokens, columns, x_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[n] = x[source[n]], or 0 where that is no token; one program per block of rows and block of columns."""
    row, column = _tile(columns, ROWS, COLUMNS)
    inside = row < rows
    token = tl.load(source + row, mask=inside, other=-1).to(tl.int64)
    known = (token >= 0) & (token < tokens)
    value = tl.load(x + (token * x_row)[:, None] + column, mask=known[:, None] & (column < columns), other=0.0)
    tl.store(out + (row * columns)[:, None] + column, value, mask=inside[:, None] & (column < columns))


@triton.jit
def _sum_kernel(
    ys, weights, position, out, tokens, choices, rows, columns, ys_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """out[t] = sum_k weights[t, k] ys[position[t, k]], in the order of k; one program per block of tokens and block of
    columns."""
    token, column = _tile(columns, ROWS, COLUMNS)
    inside = token < tokens
    sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(choices):
        entry = token * choices + k
        row = tl.load(position + entry, mask=inside, other=-1).to(tl.int64)
        known = (row >= 0) & (row < rows)
        y = tl.load(ys + (row * ys_row)[:, None] + column, mask=known[:, None] & (column < columns), other=0.0)
        y = y.to(tl.float32)
        if weights is not None:
            y *= tl.load(weights + entry, mask=known, other=0.0)[:, None]
        sum += y
    at = out + (token * columns)[:, None] + column
    tl.store(at, sum.to(out.dtype.element_ty), mask=inside[:, None] & (column < columns))


@triton.jit
def _combine_backward_kernel(
    grad, ys, weights, position, grad_ys, grad_weights,
    entries, choices, rows, columns, grad_row, ys_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """For the choices (t, k) of this program and their rows n, where they are given: grad_ys[n] = weights[t, k] grad[t]
    and grad_weights[t, k] = <grad[t], ys[n]>."""
    entry = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = entry < entries
    row = tl.load(position + entry, mask=inside, other=-1).to(tl.int64)
    known = (row >= 0) & (row < rows)
    grad += (entry // choices * grad_row)[:, None]
    weight = tl.full((ROWS,), 1.0, tl.float32)
    if weights is not None:
        weight = tl.load(weights + entry, mask=known, other=0.0)
    terms = tl.zeros((ROWS, COLUMNS), tl.float32)  # short sums side by side: more exact than one long one
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        valid = known[:, None] & (column < columns)
        g = tl.load(grad + column, mask=valid, other=0.0).to(tl.float32)
        if grad_ys is not None:
            at = grad_ys + (row * columns)[:, None] + column
            tl.store(at, (weight[:, None] * g).to(grad_ys.dtype.element_ty), mask=valid)
        if grad_weights is not None:
            terms += g * tl.load(ys + (row * ys_row)[:, None] + column, mask=valid, other=0.0).to(tl.float32)
    if grad_weights is not None:
        tl.store(grad_weights + entry, tl.sum(terms, 1), mask=inside)


# --- Launchers: the arguments of the ops in csrc/moe_dispatch.cpp ---


def _shape(columns: int, elements: int = ELEMENTS) -> dict[str, int]:
    columns = power_of_two(columns, LEAST_COLUMNS, MOST_COLUMNS)
    return {"ROWS": elements // columns, "COLUMNS": columns}


def _programs(rows: int, columns: int, tile: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(columns, tile["COLUMNS"]),)


def _check(name: str, x: Tensor, position: Tensor, weights: Tensor | None) -> None:
    check(x.dim() == 2, f"{name} must have 2 dimensions")
    check(x.dtype in DTYPES, f"{name} must be float32, bfloat16 or float16")
    check(position.dim() == 2 and position.dtype == torch.int32, "position must be int32 (T, K)")
    check(
        weights is None or (weights.shape == position.shape and weights.dtype == torch.float32),
        "weights must be float32 (T, K)",
    )


def moe_dispatch_forward(x: Tensor, source: Tensor, position: Tensor) -> Tensor:
    """xs (N, H): xs[n] = x[source[n]], 0 where source[n] is -1."""
    _check("x", x, position, None)
    check(source.dim() == 1 and source.dtype == torch.int32, "source must be int32 (N,)")
    rows, (tokens, columns) = source.shape[0], x.shape
    out = x.new_empty((rows, columns))
    if out.numel() > 0:
        x, source, tile = readable(x), source.contiguous(), _shape(columns)
        with on(x.device):
            _gather_kernel[_programs(rows, columns, tile)](
                x, source, out, rows, tokens, columns, x.stride(0), **tile
            )  # fmt: skip
    return out


def moe_combine_forward(ys: Tensor, weights: Tensor | None, position: Tensor) -> Tensor:
    """out (T, J) in the dtype of ys: out[t] = sum_k weights[t, k] ys[position[t, k]]."""
    _check("ys", ys, position, weights)
    return sum_rows(ys, weights, position, ys.dtype)


def sum_rows(ys: Tensor, weights: Tensor | None, position: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in any dtype, without the checks."""
    (tokens, choices), (rows, columns) = position.shape, ys.shape
    out = ys.new_empty((tokens, columns), dtype=dtype)
    if out.numel() > 0:
        ys, position, tile = readable(ys), position.contiguous(), _shape(columns, 2 * ELEMENTS)
        weights = weights if weights is None else weights.contiguous()
        with on(ys.device):
            _sum_kernel[_programs(tokens, columns, tile)](
                ys, weights, position, out, tokens, choices, rows, columns, ys.stride(0), **tile
            )
    return out


def moe_combine_backward(
    grad: Tensor, ys: Tensor, weights: Tensor | None, position: Tensor, need_ys: bool, need_weights: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of ys (N, J) and weights (T, K); shape (0,) for what is not needed."""
    _check("ys", ys, position, weights)
    rows, columns = ys.shape
    check(grad.shape == (position.shape[0], columns) and grad.dtype == ys.dtype, "grad must match the output")
    grad_ys = ys.new_zeros(ys.shape if need_ys else (0,))
    grad_weights = ys.new_empty(position.shape if need_weights else (0,), dtype=torch.float32)
    if position.numel() > 0 and (need_ys or need_weights):
        grad, ys, position, tile = readable(grad), readable(ys), position.contiguous(), _shape(columns)
        weights = weights if weights is None else weights.contiguous()
        with on(ys.device):
            _combine_backward_kernel[(triton.cdiv(position.numel(), tile["ROWS"]),)](
                grad, ys, weights, position, grad_ys if need_ys else None, grad_weights if need_weights else None,
                position.numel(), position.shape[1], rows, columns, grad.stride(0), ys.stride(0), **tile,
            )  # fmt: skip
    return grad_ys, grad_weights
