"""Rotary position embedding: (x1, x2) -> (x1 c - x2 s, x2 c + x1 s) for each pair, and the gradients of the tables.

A program holds a block of tokens and a block of pairs; it reads its part of the tables once and goes through heads.
Interleaved pairs are read as whole rows and split in registers, so that accesses stay wide.

The gradient of a row of the tables is a sum over heads and over the tokens at that row. Heads are summed in a kernel,
per token and in order; tokens that share a row are brought together by a stable sort, and a second kernel sums them in
that order: no atomics, so the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._primitives import dense_in_order_of
from ._launch import DTYPES, check, on, power_of_two, readable

HEADS = 4  # heads per program of the forward kernel: they share what it read from the tables
ELEMENTS = 1024  # pairs per tile: eight per thread
#: Pairs of a row per tile; the tokens per tile follow from it. Wider rows take several steps.
LEAST_PAIRS, MOST_PAIRS = 16, 128


# --- Kernels. Offsets are 64 bits wide: a pointer to a row, then columns within it. ---


@triton.jit
def _table_rows(positions, stride, b, token, inside, rows):
    """The row of the tables for each token, and whether it exists. # [TOKENS]"""
    if positions is None:
        row, known = token, inside
    else:
        row = tl.load(positions + b * stride + token, mask=inside, other=0)
        known = inside & (row >= 0) & (row < rows)
    return row, known


@triton.jit
def _load_pairs(row, start, half, inside, INTERLEAVED: tl.constexpr, TOKENS: tl.constexpr, PAIRS: tl.constexpr):
    """Both features of PAIRS pairs, from pointers to the rows [TOKENS, 1]; fp32, 0 outside. # 2 x [TOKENS, PAIRS]"""
    if INTERLEAVED:
        column = 2 * start + tl.arange(0, 2 * PAIRS)[None, :]
        both = tl.load(row + column, mask=inside & (column < 2 * half), other=0.0)
        first, second = tl.split(tl.reshape(both, (TOKENS, PAIRS, 2)))
    else:
        pair = start + tl.arange(0, PAIRS)[None, :]
        first = tl.load(row + pair, mask=inside & (pair < half), other=0.0)
        second = tl.load(row + half + pair, mask=inside & (pair < half), other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store_pairs(
    row, first, second, start, half, inside, INTERLEAVED: tl.constexpr, TOKENS: tl.constexpr, PAIRS: tl.constexpr
):
    """The reverse of `_load_pairs`, rounding to the dtype of memory."""
    first, second = first.to(row.dtype.element_ty), second.to(row.dtype.element_ty)
    if INTERLEAVED:
        column = 2 * start + tl.arange(0, 2 * PAIRS)[None, :]
        both = tl.reshape(tl.join(first, second), (TOKENS, 2 * PAIRS))
        tl.store(row + column, both, mask=inside & (column < 2 * half))
    else:
        pair = start + tl.arange(0, PAIRS)[None, :]
        tl.store(row + pair, first, mask=inside & (pair < half))
        tl.store(row + half + pair, second, mask=inside & (pair < half))


@triton.jit
def _rotate_kernel(
    x, cos, sin, positions, out,
    heads, length, width, rows, half,
    x_batch, x_head, x_row, out_batch, out_head, out_row,
    cos_batch, cos_row, sin_batch, sin_row, positions_batch,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """out = x rotated; one program per batch, block of tokens and HEADS heads."""
    program = tl.program_id(0)
    groups, blocks = tl.cdiv(heads, HEADS), tl.cdiv(length, TOKENS)
    first_head = program % groups * HEADS
    token = (program // groups % blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    b = (program // groups // blocks).to(tl.int64)
    inside = token < length
    row, known = _table_rows(positions, positions_batch, b, token, inside, rows)
    cos += b * cos_batch + (row * cos_row)[:, None]
    sin += b * sin_batch + (row * sin_row)[:, None]
    x += b * x_batch + (token * x_row)[:, None]
    out += b * out_batch + (token * out_row)[:, None]
    token_inside = inside[:, None]
    for head in range(first_head, tl.minimum(first_head + HEADS, heads)):
        h = tl.cast(head, tl.int64)
        from_row, to_row = x + h * x_head, out + h * out_head
        for start in range(2 * half, width, 2 * PAIRS):
            column = start + tl.arange(0, 2 * PAIRS)[None, :]
            rest = tl.load(from_row + column, mask=token_inside & (column < width))
            tl.store(to_row + column, rest, mask=token_inside & (column < width))
    for start in range(0, half, PAIRS):
        pair = start + tl.arange(0, PAIRS)[None, :]
        valid = known[:, None] & (pair < half)
        # A position outside the tables cannot raise an error here: it gives NaN.
        c = tl.load(cos + pair, mask=valid, other=float("nan")).to(tl.float32)  # [TOKENS, PAIRS]
        s = tl.load(sin + pair, mask=valid, other=float("nan")).to(tl.float32)
        if INVERSE:
            s = -s
        for head in range(first_head, tl.minimum(first_head + HEADS, heads)):
            h = tl.cast(head, tl.int64)
            from_row, to_row = x + h * x_head, out + h * out_head
            x1, x2 = _load_pairs(from_row, start, half, token_inside, INTERLEAVED, TOKENS, PAIRS)
            y1, y2 = x1 * c - x2 * s, x2 * c + x1 * s
            _store_pairs(to_row, y1, y2, start, half, token_inside, INTERLEAVED, TOKENS, PAIRS)


@triton.jit
def _token_terms_kernel(
    grad, x, cos_terms, sin_terms,
    heads, length, half,
    grad_batch, grad_head, grad_row, x_batch, x_head, x_row,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, TOKENS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The sums over heads of g1 x1 + g2 x2 and g2 x1 - g1 x2 (what each token adds to its row of the gradients of cos
    and sin), each (B, L, half); one program per batch, block of tokens and block of pairs."""
    program = tl.program_id(0)
    steps, blocks = tl.cdiv(half, PAIRS), tl.cdiv(length, TOKENS)
    start = program % steps * PAIRS
    token = (program // steps % blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    b = (program // steps // blocks).to(tl.int64)
    inside = (token < length)[:, None]
    grad += b * grad_batch + (token * grad_row)[:, None]
    x += b * x_batch + (token * x_row)[:, None]
    to_cos = tl.zeros((TOKENS, PAIRS), tl.float32)
    to_sin = tl.zeros((TOKENS, PAIRS), tl.float32)
    for head in range(heads):
        h = tl.cast(head, tl.int64)
        g1, g2 = _load_pairs(grad + h * grad_head, start, half, inside, INTERLEAVED, TOKENS, PAIRS)
        x1, x2 = _load_pairs(x + h * x_head, start, half, inside, INTERLEAVED, TOKENS, PAIRS)
        to_cos += g1 * x1 + g2 * x2
        to_sin += g2 * x1 - g1 * x2
    if INVERSE:
        to_sin = -to_sin
    pair = start + tl.arange(0, PAIRS)[None, :]
    at = (b * length + token)[:, None] * half + pair
    tl.store(cos_terms + at, to_cos, mask=inside & (pair < half))
    tl.store(sin_terms + at, to_sin, mask=inside & (pair < half))


@triton.jit
def _row_sums_kernel(
    cos_terms, sin_terms, order, offsets, grad_cos, grad_sin, half, TOKENS: tl.constexpr, PAIRS: tl.constexpr
):
    """Row r of the gradients is the sum of the terms of tokens order[offsets[r]:offsets[r + 1]]; one program per row
    and block of pairs."""
    program = tl.program_id(0)
    steps = tl.cdiv(half, PAIRS)
    row = (program // steps).to(tl.int64)
    pair = program % steps * PAIRS + tl.arange(0, PAIRS)[None, :]
    end = tl.load(offsets + row + 1)
    to_cos = tl.zeros((TOKENS, PAIRS), tl.float32)  # short sums side by side: more exact than one long one
    to_sin = tl.zeros((TOKENS, PAIRS), tl.float32)
    for first in range(tl.load(offsets + row), end, TOKENS):
        place = first + tl.arange(0, TOKENS)
        token = tl.load(order + place, mask=place < end, other=0)
        at = token[:, None] * half + pair
        valid = (place < end)[:, None] & (pair < half)
        to_cos += tl.load(cos_terms + at, mask=valid, other=0.0)
        to_sin += tl.load(sin_terms + at, mask=valid, other=0.0)
    at = row * half + pair
    tl.store(grad_cos + at, tl.sum(to_cos, 0)[None, :], mask=pair < half)
    tl.store(grad_sin + at, tl.sum(to_sin, 0)[None, :], mask=pair < half)


# --- Launchers: the arguments of the ops in csrc/rotary.cpp ---


def _tile(half: int) -> dict[str, int]:
    pairs = power_of_two(half, LEAST_PAIRS, MOST_PAIRS)
    return {"TOKENS": ELEMENTS // pairs, "PAIRS": pairs}


def _check_x(x: Tensor) -> None:
    check(x.dim() == 4, "x must have 4 dimensions")
    check(x.dtype in DTYPES, "x must be float32, bfloat16 or float16")


def _check_positions(positions: Tensor | None, x: Tensor, rows: int) -> None:
    batch, _, length, _ = x.shape
    if positions is None:
        check(rows >= length, "the tables must have a row for every row of x")
        return
    check(
        positions.dtype == torch.int64 and positions.shape in ((batch, length), (1, length)),
        "positions must be int64 (batch or 1, length)",
    )


def _batch_stride(tensor: Tensor) -> int:
    """Of a table or of positions: 0 where the whole batch shares them."""
    return 0 if tensor.shape[0] == 1 else tensor.stride(0)


def rotary_forward(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> Tensor:
    """x (B, H, L, D) rotated, dense in the order of x's dimensions. A position outside the tables gives NaN."""
    _check_x(x)
    check(
        cos.dim() in (2, 3) and sin.dim() == cos.dim() and cos.dtype == sin.dtype,
        "cos and sin must have the same 2 or 3 dimensions and the same dtype",
    )
    check(cos.shape == sin.shape, "cos and sin must have the same shape")
    out = dense_in_order_of(x)
    x, cos, sin, positions = (readable(t) for t in (x, cos, sin, positions))
    batch, heads, length, width = x.shape
    cos, sin = (t if t.dim() == 3 else t[None] for t in (cos, sin))
    rows, half = cos.shape[1:]
    check(2 * half <= width, "the tables must have at most half as many columns as x")
    check(cos.shape[0] in (1, batch), "cos must have x's batch size, or 1")
    _check_positions(positions, x, rows)
    if x.numel() == 0:
        return out
    tile = _tile(half)
    grid = (triton.cdiv(heads, HEADS) * triton.cdiv(length, tile["TOKENS"]) * batch,)
    with on(x.device):
        _rotate_kernel[grid](
            x, cos, sin, positions, out,
            heads, length, width, rows, half,
            *x.stride()[:3], *out.stride()[:3],
            _batch_stride(cos), cos.stride(1), _batch_stride(sin), sin.stride(1),
            0 if positions is None else _batch_stride(positions),
            INTERLEAVED=interleaved, INVERSE=inverse, HEADS=HEADS, **tile,
        )  # fmt: skip
    return out


def rotary_backward(
    grad: Tensor, x: Tensor, positions: Tensor | None, table_batch: int, table_rows: int, half: int,
    interleaved: bool, inverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of cos and sin, (table_batch, table_rows, half) fp32."""
    _check_x(x)
    check(grad.shape == x.shape and grad.dtype == x.dtype, "grad must match x")
    batch, heads, length, width = x.shape
    check(0 <= 2 * half <= width, "the tables must have at most half as many columns as x")
    check(table_batch in (1, batch) and table_rows >= 0, "the tables must have x's batch size, or 1")
    _check_positions(positions, x, table_rows)
    grads = [x.new_zeros((table_batch, table_rows, half), dtype=torch.float32) for _ in range(2)]
    if x.numel() == 0 or grads[0].numel() == 0:
        return grads[0], grads[1]
    grad, x = readable(grad), readable(x)
    terms = [x.new_empty((batch, length, half), dtype=torch.float32) for _ in range(2)]
    tile = _tile(half)
    steps = triton.cdiv(half, tile["PAIRS"])
    with on(x.device):
        _token_terms_kernel[(steps * triton.cdiv(length, tile["TOKENS"]) * batch,)](
            grad, x, *terms, heads, length, half, *grad.stride()[:3], *x.stride()[:3],
            INTERLEAVED=interleaved, INVERSE=inverse, **tile,
        )  # fmt: skip
        if positions is None:
            for to, term in zip(grads, terms, strict=True):
                to[:, :length] = term.sum(0, keepdim=True) if table_batch == 1 else term
        else:
            order, offsets = _tokens_by_row(positions, batch, table_batch, table_rows)
            _row_sums_kernel[(steps * table_batch * table_rows,)](*terms, order, offsets, *grads, half, **tile)
    return grads[0], grads[1]


def _tokens_by_row(positions: Tensor, batch: int, table_batch: int, rows: int) -> tuple[Tensor, Tensor]:
    """The tokens (of the whole batch, counted through) in the order of their rows, and where each row's begin."""
    row = torch.where((positions >= 0) & (positions < rows), positions, -1).expand(batch, -1)
    if table_batch > 1:
        first = torch.arange(batch, device=row.device)[:, None] * rows
        row = torch.where(row >= 0, row + first, -1)
    row, order = row.flatten().sort(stable=True)
    return order, torch.searchsorted(row, torch.arange(table_batch * rows + 1, device=row.device))
