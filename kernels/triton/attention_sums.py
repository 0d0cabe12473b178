"""Gradients of attention that are sums over tiles: of a dense bias, of diagonal strips, of relative rows.

A sum along diagonals has a program per band of distances, all tiles on one diagonal of tiles: they share their skew, so
that tiles of dS are added up as they are, or multiplied skewed, and nothing is added twice or by atomics. Bands overlap
by one tile: their halves are added in order, then distances that share a row of a table are.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._primitives import AttentionProblem
from ._attention_autotune import tuned
from ._attention_gradient import load_keys, load_queries, look_at_tile, score_gradients, sequence, spread
from ._attention_gradient_plan import scratch_of, tile_of, widths
from ._attention_plan import grid, with_bands
from ._attention_tile import Problem, store_rows, values_of, whole
from ._launch import power_of_two

TERMS = 64  # positions of a strip that are added at a time
DIAG, REL_Q, REL_K = (tl.constexpr(n) for n in range(3))  # what a band's sum is of


# --- Kernels ---


@triton.jit
def _add_tile(
    p, place, head, row, start, sum, grad, lse, delta, scratch, KIND: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """sum + dS of a tile, [ROWS, COLUMNS]; or, by distance, dS times the rows it is multiplied with, [BAND, PADDED]."""
    rows, cols = row + tl.arange(0, ROWS), start + tl.arange(0, COLUMNS)
    seen, low, high, bitmap = look_at_tile(p, place, head, rows, row, start, COLUMNS)
    if seen:
        of_queries = load_queries(p, place, head, rows, grad, lse, delta, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED)
        key, value = load_keys(p, place, head // p.group, cols, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED)
        _, ds, _ = score_gradients(
            p, place, head, rows, cols, low, high, bitmap, row, start, of_queries, key, value, scratch,
            True, p.starts_q is None, False, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, ROWS, COLUMNS, BAND,
        )  # fmt: skip
        if KIND == DIAG:
            sum += ds
        else:
            factor = values_of(of_queries[1] if KIND == REL_Q else key, WIDTH, PADDED)
            by_distance = tl.trans(spread(ds, scratch, KIND == REL_K, ROWS, COLUMNS, BAND))
            sum = tl.dot(by_distance.to(factor.dtype), factor, sum, input_precision="ieee")
    return sum


@triton.jit
def _dense_kernel(
    p, grad, lse, delta, to, heads, rows, BATCHES: tl.constexpr, HEADS: tl.constexpr, ALL_ROWS: tl.constexpr,
    scratch, WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """The gradient of a dense bias, (.., heads, rows, Lk) fp32 contiguous; one program per tile, for which it adds
    up BATCHES x HEADS tiles, or ALL_ROWS those of all queries."""
    program = tl.program_id(0)
    across, down = tl.cdiv(p.keys, COLUMNS), tl.cdiv(rows, ROWS)
    start, row = program % across * COLUMNS, program // across % down * ROWS
    first_head, first_batch = program // across // down % heads, program // across // down // heads
    steps = 1
    if ALL_ROWS:
        steps = tl.cdiv(p.queries, ROWS)
    if scratch is not None:
        scratch += program.to(tl.int64) * (ROWS if ROWS > COLUMNS else COLUMNS) * BAND
    sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for n in range(BATCHES * HEADS * steps):
        b, head = first_batch * BATCHES + n // steps // HEADS, first_head * HEADS + n // steps % HEADS
        sum = _add_tile(
            p, whole(p, tl.cast(b, tl.int64)), tl.cast(head, tl.int64), row + n % steps * ROWS, start, sum,
            grad, lse, delta, scratch, DIAG,
            WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, ROWS, COLUMNS, BAND,
        )  # fmt: skip
    cols = start + tl.arange(0, COLUMNS)
    to += (program // across // down).to(tl.int64) * rows * p.keys
    if ALL_ROWS:
        tl.store(to + cols, tl.sum(sum, 0), mask=cols < p.keys)
    else:
        at = row + tl.arange(0, ROWS)
        inside = (at < p.queries)[:, None] & (cols < p.keys)[None, :]
        tl.store(to + at.to(tl.int64)[:, None] * p.keys + cols[None, :], sum, mask=inside)


@triton.jit
def _tiles_of_band(p, place, band, SIZE: tl.constexpr):
    """(first query, number of tiles, first key - first query) of the tiles of a band in which any may be seen: those
    whose first pair is `band` tiles off the diagonal, which in packed calls runs through distance 0, so that all
    sequences have the same bands."""
    queries, keys = place[3], place[5]
    offset = band * SIZE
    nearest = offset - (keys - queries)  # distance of the first pairs
    if p.starts_q is not None:
        nearest = offset
        offset += keys - queries
    first = tl.cdiv(tl.maximum(1 - SIZE - offset, 0), SIZE) * SIZE
    end = tl.minimum(queries, keys - offset)
    if p.left is not None:
        end = tl.where(nearest + SIZE <= -p.left, 0, end)
    if p.right is not None:
        end = tl.where(nearest - SIZE >= p.right, 0, end)
    return first, tl.cdiv(tl.maximum(end - first, 0), SIZE), offset


@triton.jit
def _sum_bands_kernel(
    p, grad, lse, delta, to, bands, first_band, batches, scratch, KIND: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sums of one band of distances, the smallest first: (batch / batches, heads, bands, 2 SIZE) of dS, or the same
    times rows (.., PADDED); fp32. One program per band, head and group of `batches` batch rows; ROWS == COLUMNS."""
    SIZE: tl.constexpr = ROWS
    program = tl.program_id(0)
    band, head = program % bands + first_band, (program // bands % p.heads).to(tl.int64)
    first_batch = program // bands // p.heads * batches
    scratch += program.to(tl.int64) * (2 * SIZE * SIZE)
    if KIND == DIAG:
        sum = tl.zeros((SIZE, SIZE), tl.float32)
    else:
        sum = tl.zeros((2 * SIZE, PADDED), tl.float32)
    if p.starts_q is None:
        first, steps, offset = _tiles_of_band(p, whole(p, tl.cast(first_batch, tl.int64)), band, SIZE)
        for step in range(batches * steps):
            place, row = whole(p, tl.cast(first_batch + step // steps, tl.int64)), first + step % steps * SIZE
            sum = _add_tile(
                p, place, head, row, row + offset, sum, grad, lse, delta, scratch, KIND,
                WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, SIZE, SIZE, 2 * SIZE,
            )  # fmt: skip
    else:
        for n in range(p.sequences):
            place = sequence(p, n)
            first, steps, offset = _tiles_of_band(p, place, band, SIZE)
            for row in range(first, first + steps * SIZE, SIZE):
                sum = _add_tile(
                    p, place, head, row, row + offset, sum, grad, lse, delta, scratch, KIND,
                    WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, SIZE, SIZE, 2 * SIZE,
                )  # fmt: skip
    w = tl.arange(0, 2 * SIZE)
    to += program.to(tl.int64) * (2 * SIZE) * (1 if KIND == DIAG else WIDTH)
    if KIND == DIAG:
        tl.store(to + w, tl.sum(spread(sum, scratch, False, SIZE, SIZE, 2 * SIZE), 0))
    else:
        store_rows(to, w, w >= 0, WIDTH, sum * p.scale, WIDTH, PADDED)


@triton.jit
def _row_sums_kernel(strips, order, offsets, sums, length, rows, width, TERMS: tl.constexpr, COLUMNS: tl.constexpr):
    """sums[n, r] = the sum of strips[n, order[t]] over offsets[r] <= t < offsets[r + 1], for strips (n, length, width);
    one program per n, row and block of columns."""
    program = tl.program_id(0)
    steps = tl.cdiv(width, COLUMNS)
    column = program % steps * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = program // steps % rows
    n = (program // steps // rows).to(tl.int64)
    end = tl.load(offsets + row + 1)
    total = tl.zeros((TERMS, COLUMNS), tl.float32)  # short sums side by side: more exact than one long one
    for first in range(tl.load(offsets + row), end, TERMS):
        place = first + tl.arange(0, TERMS)
        position = tl.load(order + place, mask=place < end, other=0)  # int64
        at = (n * length + position)[:, None] * width + column
        total += tl.load(strips + at, mask=(place < end)[:, None] & (column < width), other=0.0)
    tl.store(sums + (n * rows + row) * width + column, tl.sum(total, 0)[None, :], mask=column < width)


# --- Host: the gradients that `attention_backward` returns. `upstream`: (`Rows` of grad_out, lse in units, delta) ---


def _sum_rows(strips: Tensor, index: Tensor, rows: int) -> Tensor:
    """Row r of the result, (..., rows, D): the sum of strips (..., S, D) over the positions where index (S,) is r."""
    *lead, length, width = strips.shape
    sums = strips.new_zeros((*lead, rows, width))
    if sums.numel() == 0 or length == 0:
        return sums
    row, order = index.sort(stable=True)
    offsets = torch.searchsorted(row, torch.arange(rows + 1, device=row.device, dtype=row.dtype))
    columns = power_of_two(width, 1, 64)
    count = sums.numel() // (rows * width)
    _row_sums_kernel[grid(count * rows * triton.cdiv(width, columns))](
        strips.contiguous(), order, offsets, sums, length, rows, width, TERMS=TERMS, COLUMNS=columns
    )
    return sums


def _joined(partial: Tensor, first: int, length: int) -> Tensor:
    """The strips (n, length, D) that overlapping bands make up, from position `first` of the first one on.

    partial: (n, bands, 2 * step, D); band e covers positions e * step to (e + 2) * step.
    """
    count, bands, both, width = partial.shape
    step = both // 2
    strips = partial.new_zeros((count, bands + 1, step, width))
    strips[:, :-1] = partial[:, :, :step]
    strips[:, 1:] += partial[:, :, step:]
    return strips.flatten(1, 2)[:, first : first + length]


@tuned("sums", partial(tile_of, "sums"))
def of_dense(problem: AttentionProblem, p: Problem, upstream: tuple) -> Tensor:
    batch, heads, queries, _ = problem.query.shape
    batches, own_heads, rows, keys = problem.dense.shape
    if rows < queries:  # one row for all queries: summed over batch and heads afterwards
        batches, own_heads = batch, heads
    sums = problem.query.new_empty((batches, own_heads, rows, keys), dtype=torch.float32)
    tile = tile_of("sums", problem)
    programs = batches * own_heads * triton.cdiv(rows, tile.rows) * triton.cdiv(keys, tile.columns)
    scratch, band = scratch_of(problem, tile, programs)
    _dense_kernel[grid(programs)](
        with_bands(p, tile.rows, tile.columns), *upstream, sums, own_heads, rows,
        batch // batches, heads // own_heads, rows < queries, scratch,
        BAND=band, **widths(problem), **tile.options(),
    )  # fmt: skip
    return sums.sum_to_size(problem.dense.shape)


@tuned("sums", partial(tile_of, "sums"))
def _strips(problem: AttentionProblem, p: Problem, upstream: tuple, kind: int, batches: int) -> Tensor:
    """The sums along diagonals, (batch / batches, heads, Lq + Lk - 1, 1 or D) fp32."""
    batch, heads, queries, width = problem.query.shape
    keys, tile = problem.key.shape[2], tile_of("sums", problem)
    size = tile.rows
    # Bands count from the first pair, with key - query = 0; in packed calls from distance 0, and tiles may begin before
    # the first key.
    if problem.cu_seqlens_q is None:
        smallest, before, after = 1 - queries, triton.cdiv(queries, size), triton.cdiv(keys, size)
    else:
        smallest, before, after = 1 - keys, triton.cdiv(keys, size) + 1, triton.cdiv(queries, size)
    bands = before + after - 1
    groups = batch // batches
    columns = 1 if kind == DIAG.value else width
    partial = problem.query.new_empty((groups * heads, bands, 2 * size, columns), dtype=torch.float32)
    programs = groups * heads * bands
    scratch = problem.query.new_empty((programs * 2 * size * size,), dtype=torch.float32)
    _sum_bands_kernel[grid(programs)](
        with_bands(p, tile.rows, tile.columns), *upstream, partial, bands, 1 - before, batches, scratch, KIND=kind,
        **widths(problem), **tile.options(),
    )  # fmt: skip
    first = before * size - 1 + smallest  # the first band's smallest difference is 1 - before * size
    return _joined(partial, first, queries + keys - 1).unflatten(0, (groups, heads))


def of_diag(problem: AttentionProblem, p: Problem, upstream: tuple) -> Tensor:
    strips = _strips(problem, p, upstream, DIAG.value, problem.query.shape[0])[0]
    if problem.diag.shape[0] == 1:
        strips = strips.sum(0, keepdim=True)
    if problem.diag_index is None:
        return strips[..., 0].contiguous()
    return _sum_rows(strips, problem.diag_index, problem.diag.shape[1])[..., 0]


def _of_rows(problem: AttentionProblem, p: Problem, upstream: tuple, kind: int, table: Tensor) -> Tensor:
    strips = _strips(problem, p, upstream, kind, problem.query.shape[0] // table.shape[0])
    return _sum_rows(strips, problem.rel_index, table.shape[2]).sum_to_size(table.shape)


def of_rel_q(problem: AttentionProblem, p: Problem, upstream: tuple) -> Tensor:
    return _of_rows(problem, p, upstream, REL_Q.value, problem.rel_q)


def of_rel_k(problem: AttentionProblem, p: Problem, upstream: tuple) -> Tensor:
    return _of_rows(problem, p, upstream, REL_K.value, problem.rel_k)
