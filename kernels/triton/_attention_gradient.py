"""A tile of attention in the backward: what the kernels of `attention_backward` and `attention_sums` share.

Names as in `_attention_tile`. P is computed again from the scores and the log-sum-exp; with delta = <dO, O> - dLSE
    dS = P (dP - delta), dP = dO V^T (after dropout: where kept, times `survivors`).
"""

import triton
import triton.language as tl

from ._attention_tile import (
    TABLE_BLOCK,
    _stretch,
    keep,
    key_range,
    limits,
    load_rows,
    power,
    product,
    relative_numbers,
    relative_scores,
    rows_of,
    scores,
    softcapped,
    table_entry,
    table_row,
    visible,
)


@triton.jit
def sequence(p, n):
    """The place of sequence n of a packed call."""
    first_query, queries = _stretch(p.starts_q, n, p.queries)
    first_key, keys = _stretch(p.starts_k, n, p.keys)
    return tl.cast(n, tl.int64) * 0, n, first_query, queries, first_key, keys


@triton.jit
def load_queries(p, place, head, rows, grad, lse, delta, WIDTH: tl.constexpr, PADDED: tl.constexpr,
                 VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr):  # fmt: skip
    """What a tile needs of its queries: rows of query, rel_query (of query without rel_q) and grad_out, by `rows_of`;
    lse in units, delta.

    grad: `Rows` of grad_out. lse, delta: (B, H, Lq) fp32.
    """
    b, n, first_query, queries, first_key, keys = place
    inside, row = rows < queries, first_query + rows
    query = rows_of(p.query + b * p.query_b + head * p.query_h, row, inside, p.query_l, WIDTH, PADDED)
    rel_query = query
    if p.rel_q is not None:
        at = p.rel_query + b * p.rel_query_b + head * p.rel_query_h
        rel_query = rows_of(at, row, inside, p.rel_query_l, WIDTH, PADDED)
    out = rows_of(grad.at + b * grad.b + head * grad.h, row, inside, grad.l, VALUE_WIDTH, VALUE_PADDED)
    at = (b * p.heads + head) * p.queries + row
    # A query that is not there, or sees nothing, has lse inf: all its probabilities are 0.
    return (
        query, rel_query, out,
        tl.load(lse + at, mask=inside, other=float("inf")), tl.load(delta + at, mask=inside, other=0.0),
    )  # fmt: skip


@triton.jit
def load_keys(p, place, head, cols, WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUE_WIDTH: tl.constexpr,
              VALUE_PADDED: tl.constexpr):  # fmt: skip
    """Rows of key and value, as by `rows_of`; `head` is theirs. # [COLUMNS, PADDED], [COLUMNS, VALUE_PADDED]"""
    b, n, first_query, queries, first_key, keys = place
    inside, row = (cols >= 0) & (cols < keys), first_key + cols
    return (
        rows_of(p.key + b * p.key_b + head * p.key_h, row, inside, p.key_l, WIDTH, PADDED),
        rows_of(p.value + b * p.value_b + head * p.value_h, row, inside, p.value_l, VALUE_WIDTH, VALUE_PADDED),
    )


@triton.jit
def _keep_each(p, place, head, rows, cols):
    """`keep` for keys that begin anywhere: each takes its one word of four."""
    zero = rows[:, None] * 0 + cols[None, :] * 0
    words = tl.philox(
        tl.load(p.seed), (zero + cols[None, :] // 4).to(tl.uint32), (zero + rows[:, None]).to(tl.uint32),
        zero.to(tl.uint32) + tl.cast(head, tl.uint32), zero.to(tl.uint32) + tl.cast(place[1], tl.uint32),
    )  # fmt: skip
    which = zero + cols[None, :] % 4
    low, high = tl.where(which == 0, words[0], words[1]), tl.where(which == 2, words[2], words[3])
    return tl.where(which < 2, low, high) >= tl.cast(p.threshold, tl.uint32)


@triton.jit
def _product(of_queries, of_keys, width, BY_KEYS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """of_queries of_keys^T. BY_KEYS: computed as its transpose, whose registers a product of the transpose then takes
    as they are. # [ROWS, COLUMNS] fp32"""
    if BY_KEYS:
        result = tl.trans(product(of_keys, of_queries, width, WIDTH, PADDED))
    else:
        result = product(of_queries, of_keys, width, WIDTH, PADDED)
    return result


@triton.jit
def score_gradients(p, place, head, rows, cols, low, high, bitmap, row, start, of_queries, key, value, scratch,
                    MASKED: tl.constexpr, ALIGNED: tl.constexpr, BY_KEYS: tl.constexpr, WIDTH: tl.constexpr,
                    PADDED: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr, ROWS: tl.constexpr,
                    COLUMNS: tl.constexpr, BAND: tl.constexpr):  # fmt: skip
    """(P after dropout, dS, the gradient of scale * q k^T) of the tile from query `row` and key `start` on, from what
    `load_queries` and `load_keys` gave. Not MASKED: every query sees every key.
    ALIGNED: `start` is a multiple of 4. BY_KEYS: see `_product`. # 3 x [ROWS, COLUMNS] fp32"""
    query, rel_query, out, lse, delta = of_queries
    by_query = _product(query, key, p.width, BY_KEYS, WIDTH, PADDED)
    gradient = _product(out, value, p.value_width, BY_KEYS, VALUE_WIDTH, VALUE_PADDED)
    relative = None
    if p.rel_index is not None:
        relative = relative_scores(
            p, place, head, rel_query, key, row, start, scratch, WIDTH, PADDED, ROWS, COLUMNS, BAND
        )
    weights = power(p, scores(p, place, head, rows, cols, by_query, relative) - lse[:, None])
    if MASKED:
        weights = tl.where(visible(p, place, head, rows, cols, low, high, bitmap), weights, 0.0)
    dropped = weights
    if p.seed is not None:
        if ALIGNED:
            kept = keep(p, place, head, rows, start, ROWS, COLUMNS)
        else:
            kept = _keep_each(p, place, head, rows, cols)
        dropped = tl.where(kept, weights * p.survivors, 0.0)
        gradient = tl.where(kept, gradient * p.survivors, 0.0)
    gradient = weights * (gradient - delta[:, None])
    _, slope = softcapped(p, by_query)
    return dropped, gradient, gradient * slope


@triton.jit
def spread(tile, scratch, OF_KEYS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BAND: tl.constexpr):
    """A tile by distance: what stands at distance w of the tile's band, from the smallest on; 0 where nothing does.
    Goes through `scratch`. # [ROWS, BAND], or OF_KEYS [COLUMNS, BAND]"""
    i, j, w = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, BAND)
    tl.store(scratch + i[:, None] * COLUMNS + j[None, :], tile)
    tl.debug_barrier()
    if OF_KEYS:
        other = j[:, None] - w[None, :] + (ROWS - 1)
        result = tl.load(scratch + other * COLUMNS + j[:, None], mask=(other >= 0) & (other < ROWS), other=0.0)
    else:
        other = w[None, :] + i[:, None] - (ROWS - 1)
        result = tl.load(scratch + i[:, None] * COLUMNS + other, mask=(other >= 0) & (other < COLUMNS), other=0.0)
    tl.debug_barrier()
    return result


@triton.jit
def add_by_distance(
    p, place, tile, table, stride, row, start, sum, scratch, OF_KEYS: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """sum + `spread` of the tile from query `row` and key `start` on, times the rows of `table` at its distances, few
    of them at a time, up to the largest there is: registers. # [ROWS, PADDED], or OF_KEYS [COLUMNS, PADDED]"""
    PIECE: tl.constexpr = min(ROWS, COLUMNS)
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    tl.store(scratch + i[:, None] * COLUMNS + j[None, :], tile)
    tl.debug_barrier()
    offset = start - (row + ROWS - 1)
    for first in range(0, tl.minimum(ROWS + COLUMNS, place[5] - offset), PIECE):
        w = tl.cast(first, tl.int32) + tl.arange(0, PIECE)  # interpreted, a loop counts in Python's numbers
        number, known = relative_numbers(p, place, offset + w)
        band = load_rows(table, number, known, stride, WIDTH, PADDED)  # [PIECE, PADDED]
        if OF_KEYS:
            other = j[:, None] - w[None, :] + (ROWS - 1)
            part = tl.load(scratch + other * COLUMNS + j[:, None], mask=(other >= 0) & (other < ROWS), other=0.0)
        else:
            other = w[None, :] + i[:, None] - (ROWS - 1)
            part = tl.load(scratch + i[:, None] * COLUMNS + other, mask=(other >= 0) & (other < COLUMNS), other=0.0)
        sum = tl.dot(part.to(band.dtype), band, sum, input_precision="ieee")
    tl.debug_barrier()
    return sum


@triton.jit
def listed(p, place, head, row, start):
    """Whether the block table lists the block of query `row` and key `start`, and its bitmap."""
    first, last = table_row(p, place, head, row)
    end = last
    while last - first > 1:  # entries rise
        middle = (first + last) // 2
        key, bitmap = table_entry(p, middle)
        below = key <= start
        first = tl.where(below, middle, first)
        last = tl.where(below, last, middle)
    found, bitmap = start < 0, start * 0
    if first < end:
        key, bitmap = table_entry(p, first)
        found = (key <= start) & (start < key + TABLE_BLOCK)
    return found, bitmap


@triton.jit
def look_at_tile(p, place, head, rows, row, start, COLUMNS: tl.constexpr):
    """(whether any query may see any of the keys from `start` on, low, high, bitmap); a tile lies in one block of the
    block table."""
    low, high = limits(p, place, rows)
    begin, end, _, _ = key_range(low, high, rows < place[3])
    seen = (begin < start + COLUMNS) & (end > start)
    bitmap = start * 0
    if p.block_offsets is not None:
        found, bitmap = listed(p, place, head, row, tl.maximum(start, 0))
        seen = seen & found
    return seen, low, high, bitmap
