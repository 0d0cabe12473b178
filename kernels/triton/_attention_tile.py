"""A tile of attention, ROWS queries by COLUMNS keys: what forward and backward share. `_attention_plan` makes the
`Problem`; an optional tensor that a call does not have is None there, and what reads it is not compiled.

Names of all functions here:
    p        the `Problem`
    place    (b, n, first_query, queries, first_key, keys) of what the program works on, see `whole` and `packed`
    head     of the queries: a scalar, or [ROWS, 1] where a tile holds several heads; int64
    rows     numbers of the queries within their sequence, [ROWS] int32; they may lie beyond `queries`
    cols     numbers of the keys within their sequence, [COLUMNS] int32; they may lie beyond `keys`
Rows of memory are int64; numbers within a sequence are int32, which the launchers check.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .._primitives import BLOCK

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
#: Queries and keys of a block of the block table.
TABLE_BLOCK = tl.constexpr(BLOCK)
FAR = tl.constexpr(2**30)  # beyond any query and key


class Problem(NamedTuple):
    """`AttentionProblem` for kernels: pointers, strides in elements (`_b` batch, `_h` head, `_l` row; 0 where a
    dimension broadcasts), sizes, numbers. What belongs to a tensor that is not there is None, like the tensor."""

    query: object  # (B, H, Lq, D)
    query_b: object
    query_h: object
    query_l: object
    key: object  # (B, H / group, Lk, D)
    key_b: object
    key_h: object
    key_l: object
    value: object  # (B, H / group, Lk, Dv)
    value_b: object
    value_h: object
    value_l: object
    dense: object  # (B, H, Lq, Lk), any float dtype
    dense_b: object
    dense_h: object
    dense_l: object
    diag: object  # (H, strip) fp32: `diag_index` is resolved
    diag_h: object
    bands: object  # (H, band_count, 2) fp32, what the strip is in each band of distances, see `with_bands`; or None
    band_count: object
    band_first: object  # the band of query 0 and key 0
    band_step: object  # distances from one band to the next
    rel_query: object  # (B, H, Lq, D)
    rel_query_b: object
    rel_query_h: object
    rel_query_l: object
    rel_q: object  # (B, H, R, D)
    rel_q_b: object
    rel_q_h: object
    rel_q_l: object
    rel_k: object  # (B, H, R, D)
    rel_k_b: object
    rel_k_h: object
    rel_k_l: object
    rel_index: object  # (strip,) int32
    rel_rows: object  # R
    segment: object  # (B, H, Lq, 2) fp32, contiguous
    segment_q: object  # (B, Lq) int32
    segment_q_b: object
    segment_k: object  # (B, Lk) int32
    segment_k_b: object
    mask: object  # (B, H, Lq, Lk) bool
    mask_b: object
    mask_h: object
    mask_l: object
    intervals: object  # (B, Lq, 2) int32
    intervals_b: object
    block_offsets: object  # (B, H, rows of blocks + 1) int32
    block_offsets_b: object
    block_offsets_h: object
    block_index: object  # (block_entries, 2) int32
    block_entries: object
    block_bits: object  # (block_maps, BLOCK, BLOCK / 8) uint8
    block_maps: object
    sinks: object  # (H,) fp32
    starts_q: object  # (sequences + 1,) int32
    starts_k: object
    sequences: object
    seed: object  # (1,) int64
    threshold: object  # a probability is kept where its random word is at least this
    survivors: object  # factor on those that are kept
    left: object  # of the window; None = no limit
    right: object
    width: object  # features of query and key, of value
    value_width: object
    heads: object
    group: object  # query heads of one key head
    queries: object  # of the tensors
    keys: object
    strip: object  # Lq + Lk - 1
    scale: object
    softcap: object  # None = off


# --- Where a program works ---


@triton.jit
def whole(p, b):
    """The place of batch row b (int64) of a call that is not packed."""
    return b, b, 0, p.queries, 0, p.keys


@triton.jit
def _stretch(starts, n, total):
    """The first row of a sequence and their number, cut to fit the tensor."""
    begin = tl.minimum(tl.maximum(tl.load(starts + n), 0), total)
    return begin, tl.minimum(tl.maximum(tl.load(starts + n + 1), begin), total) - begin


@triton.jit
def _last_reached(p, starts, slot, low, STEP: tl.constexpr, SIZE: tl.constexpr):
    """The last of 128 sequences, STEP apart from `low` on, whose slots begin at `slot` or before. (A loop over a binary
    search would hide from Triton 3.9 how the pointers computed afterwards are aligned.)"""
    n = low + tl.arange(0, 128) * STEP
    inside = n < p.sequences
    reached = inside & (tl.load(starts + n, mask=inside, other=0) // SIZE + n <= slot)
    return low + (tl.maximum(tl.sum(reached.to(tl.int32), 0), 1) - 1) * STEP


@triton.jit
def packed(p, starts, slot, SIZE: tl.constexpr):
    """The place of one of the blocks of SIZE rows of a packed call, and the number of the block in its sequence.

    `starts` is p.starts_q for blocks of queries, p.starts_k for blocks of keys. Sequence n has the slots from
    starts[n] // SIZE + n on: at least as many as it has blocks, in total // SIZE + sequences slots. A block that
    begins beyond its sequence is empty.
    """
    low = _last_reached(p, starts, slot, slot * 0, 128 * 128, SIZE)
    low = _last_reached(p, starts, slot, low, 128, SIZE)
    low = _last_reached(p, starts, slot, low, 1, SIZE)
    first_query, queries = _stretch(p.starts_q, low, p.queries)
    first_key, keys = _stretch(p.starts_k, low, p.keys)
    block = slot - (tl.load(starts + low) // SIZE + low)
    return (low.to(tl.int64) * 0, low, first_query, queries, first_key, keys), tl.maximum(block, 0)


# --- Rows of memory ---


@triton.jit
def load_rows(tensor, row, inside, stride, WIDTH: tl.constexpr, PADDED: tl.constexpr, first=0):
    """Rows of WIDTH elements, filled with 0 to PADDED, as are rows that are not inside (None: all are). With `first`
    only PADDED elements from there on. # [rows, PADDED]"""
    WHOLE: tl.constexpr = WIDTH >= PADDED and WIDTH % PADDED == 0
    d = first + tl.arange(0, PADDED)
    at = tensor + row.to(tl.int64)[:, None] * stride + d[None, :]
    if inside is None:
        if WHOLE:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=(d < WIDTH)[None, :], other=0.0)
    elif WHOLE:
        tile = tl.load(at, mask=inside[:, None], other=0.0)
    else:
        tile = tl.load(at, mask=inside[:, None] & (d < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def rows_of(tensor, row, inside, stride, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """A tile as by `load_rows`, and what that needs to load it again: rows for `product`."""
    return load_rows(tensor, row, inside, stride, WIDTH, PADDED), tensor, row, inside, stride


@triton.jit
def values_of(rows, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """The tile of rows as by `rows_of`. That of fp32, which `product` does not use, is loaded here, not kept until now
    in registers."""
    tile = rows[0]
    if tile.dtype == tl.float32:
        tile = load_rows(rows[1], rows[2], rows[3], rows[4], WIDTH, PADDED)
    return tile


@triton.jit
def product(left, right, width, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """left . right^T for two tiles as by `rows_of`. That of fp32, which no matrix unit computes, would hold whole rows
    in registers: it loads few features at a time, of `width`, the same as WIDTH but unknown to the compiler, which
    would unroll the loop. # [rows of left, rows of right] fp32"""
    PIECE: tl.constexpr = min(PADDED, 16)
    if left[0].dtype == tl.float32:
        sum = tl.zeros((left[0].shape[0], right[0].shape[0]), tl.float32)
        for first in range(0, width, PIECE):
            of_left = load_rows(left[1], left[2], left[3], left[4], WIDTH, PIECE, first)
            of_right = load_rows(right[1], right[2], right[3], right[4], WIDTH, PIECE, first)
            sum = tl.dot(of_left, tl.trans(of_right), sum, input_precision="ieee")
    else:
        sum = tl.dot(left[0], tl.trans(right[0]), input_precision="ieee")
    return sum


@triton.jit
def store_rows(tensor, row, inside, stride, tile, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """The reverse of `load_rows`, rounding to the dtype of memory."""
    d = tl.arange(0, PADDED)
    at = tensor + row.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(at, tile.to(tensor.dtype.element_ty), mask=inside[:, None] & (d < WIDTH)[None, :])


# --- Which keys a query sees ---


@triton.jit
def limits(p, place, rows):
    """(low, high): window and intervals let a query see keys low <= j < high; 0 beyond `queries`. # 2 x [ROWS]"""
    b, n, first_query, queries, first_key, keys = place
    inside = rows < queries
    aligned = rows + (keys - queries)  # the key at distance 0
    low = rows * 0
    high = low + keys
    if p.left is not None:
        low = tl.maximum(low, aligned - p.left)
    if p.right is not None:
        high = tl.minimum(high, aligned + p.right + 1)
    if p.intervals is not None:
        at = p.intervals + b * p.intervals_b + (first_query + rows).to(tl.int64) * 2
        low = tl.maximum(low, tl.load(at, mask=inside, other=0))
        high = tl.minimum(high, tl.load(at + 1, mask=inside, other=0))
    return low, tl.where(inside, high, 0)


@triton.jit
def key_range(low, high, inside):
    """(begin, end) of the keys that any of these queries sees, and (full_begin, full_end) of those that all see that
    are `inside`. A range is empty where its end is not above its begin."""
    sees = low < high
    begin = tl.min(tl.where(sees, low, FAR), 0)
    end = tl.max(tl.where(sees, high, 0), 0)
    return begin, end, tl.max(tl.where(inside, low, 0), 0), tl.min(tl.where(inside, high, FAR), 0)


@triton.jit
def table_row(p, place, head, row):
    """(first, last + 1) of the entries that the block table lists for the block of query `row`; `head` is a scalar."""
    at = p.block_offsets + place[0] * p.block_offsets_b + head * p.block_offsets_h + row // TABLE_BLOCK
    first = tl.minimum(tl.maximum(tl.load(at), 0), p.block_entries)
    return first, tl.minimum(tl.maximum(tl.load(at + 1), first), p.block_entries)


@triton.jit
def table_entry(p, entry):
    """(the first key, the bitmap or -1) of an entry of the block table."""
    block = tl.load(p.block_index + entry.to(tl.int64) * 2)
    bitmap = tl.load(p.block_index + entry.to(tl.int64) * 2 + 1)
    return tl.minimum(tl.maximum(block, 0), p.keys // TABLE_BLOCK) * TABLE_BLOCK, tl.minimum(bitmap, p.block_maps - 1)


@triton.jit
def visible(p, place, head, rows, cols, low, high, bitmap):
    """Which keys each query sees, by all masks; False outside the tensors. `bitmap`: of the entry of the block table
    that the tile lies in, or None without a table. # [ROWS, COLUMNS]"""
    b, n, first_query, queries, first_key, keys = place
    seen = (cols[None, :] >= low[:, None]) & (cols[None, :] < high[:, None])
    if p.mask is not None:
        at = p.mask + b * p.mask_b + head * p.mask_h + rows.to(tl.int64)[:, None] * p.mask_l + cols[None, :]
        seen = seen & (tl.load(at, mask=seen, other=0) != 0)
    if p.block_offsets is not None:
        row, column = rows % TABLE_BLOCK, cols % TABLE_BLOCK
        map = p.block_bits + tl.maximum(bitmap, 0).to(tl.int64) * (TABLE_BLOCK * TABLE_BLOCK // 8)
        at = map + row[:, None] * (TABLE_BLOCK // 8) + (column // 8)[None, :]
        byte = tl.load(at, mask=seen & (bitmap + row * 0 >= 0)[:, None], other=255).to(tl.int32)
        seen = seen & (((byte >> (column % 8)[None, :]) & 1) != 0)
    return seen


# --- Scores ---


@triton.jit
def tanh(x):
    """Exact to the last places of fp32: near 0, where exponentials cancel, its series."""
    square = x * x
    series = -0.053968254 + square * (0.021869488 - square * 0.008863235)
    series = x + x * square * (-0.33333334 + square * (0.13333334 + square * series))
    small = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    large = (1.0 - small) / (1.0 + small)
    return tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0.0, -large, large))


@triton.jit
def softcapped(p, product):
    """(softcap(scale * product), its derivative by scale * product). The latter is 1 without a softcap."""
    score = product * p.scale
    slope = 1.0
    if p.softcap is not None:
        part = tanh(score / p.softcap)
        score = part * p.softcap
        slope = 1.0 - part * part
    return score, slope


@triton.jit
def strip_positions(p, place, rows, cols):
    """Where the distance of each pair stands in a strip, and whether it does. # 2 x [ROWS, COLUMNS]"""
    b, n, first_query, queries, first_key, keys = place
    u = cols[None, :] - rows[:, None] + (p.keys - 1 - (keys - queries))
    return u, (u >= 0) & (u < p.strip)


@triton.jit
def strip_values(p, place, head, rows, cols):
    """The strip's value for each pair. With `bands`, of a tile that starts at multiples of ROWS and COLUMNS, those of
    a strip that is affine there follow from two numbers: T5's is constant but near distance 0, ALiBi's always affine.
    # [ROWS, COLUMNS]"""
    u, known = strip_positions(p, place, rows, cols)
    if p.bands is None:
        values = tl.load(p.diag + head * p.diag_h + u, mask=known, other=0.0)
    else:
        row, col = tl.min(rows, 0), tl.min(cols, 0)
        at = p.bands + (head * p.band_count + (col - row) // p.band_step + p.band_first) * 2
        value, slope = tl.load(at), tl.load(at + 1)
        affine = slope == slope
        down = (rows - row).to(tl.float32) * tl.where(affine, slope, 0.0)
        across = (cols - col).to(tl.float32) * tl.where(affine, slope, 0.0) + tl.where(affine, value, 0.0)
        known = known & (slope + down != slope + down)[:, None]  # only where it is not affine is the strip read
        values = tl.load(p.diag + head * p.diag_h + u, mask=known, other=0.0) + (across[None, :] - down[:, None])
    return values


@triton.jit
def biased(p, place, head, rows, cols, score):
    """score + dense + diag + segment, natural units. # [ROWS, COLUMNS]"""
    b, n, first_query, queries, first_key, keys = place
    if p.dense is not None:
        inside = (rows < queries)[:, None] & (cols < keys)[None, :]
        at = p.dense + b * p.dense_b + head * p.dense_h + rows.to(tl.int64)[:, None] * p.dense_l + cols[None, :]
        score += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if p.diag is not None:
        score += strip_values(p, place, head, rows, cols)
    if p.segment is not None:
        at = p.segment + ((b * p.heads + head) * p.queries + rows[:, None]) * 2  # [ROWS, 1]
        inside = rows < queries
        different, same = tl.load(at, mask=inside[:, None], other=0.0), tl.load(at + 1, mask=inside[:, None], other=0.0)
        score += tl.where(same_segment(p, place, rows, cols), same, different)
    return score


@triton.jit
def same_segment(p, place, rows, cols):
    """Whether query and key are of one segment. # [ROWS, COLUMNS]"""
    b, n, first_query, queries, first_key, keys = place
    of_query = tl.load(p.segment_q + b * p.segment_q_b + rows, mask=rows < queries, other=0)
    of_key = tl.load(p.segment_k + b * p.segment_k_b + cols, mask=cols < keys, other=0)
    return of_query[:, None] == of_key[None, :]


# Scores are held in units of log2, in which exp is exp2; but with a dense bias, whose values may be as large as numbers
# get, in natural ones.


@triton.jit
def to_units(p, natural):
    """What is natural, such as a sink or an LSE, in the units of `scores`."""
    result = natural
    if p.dense is None:
        result = natural * LOG2E
    return result


@triton.jit
def power(p, difference):
    """exp of a difference of scores."""
    if p.dense is not None:
        difference *= LOG2E
    return tl.exp2(difference)


@triton.jit
def log_sum(p, maximum, total):
    """The natural log of total * exp(maximum), of a maximum in the units of `scores`; in fp64, so that `to_units` gives
    back to the last place what the probabilities were computed with."""
    result, maximum = tl.log2(total).to(tl.float64), maximum.to(tl.float64)
    if p.dense is None:
        result = (result + maximum) * LN2
    else:
        result = result * LN2 + maximum
    return result


@triton.jit
def scores(p, place, head, rows, cols, product, relative):
    """S in the units above for a tile of q k^T; `relative` as `relative_scores` gives it, or None.
    # [ROWS, COLUMNS] fp32"""
    if p.dense is None and p.diag is None and p.segment is None and relative is None and p.softcap is None:
        score = product * (p.scale * LOG2E)
    else:
        score, _ = softcapped(p, product)
        score = biased(p, place, head, rows, cols, score)
        if relative is not None:
            score += relative
        score = to_units(p, score)
    return score


# --- Relative rows ---


@triton.jit
def relative_band(p, place, row, start, ROWS: tl.constexpr, BAND: tl.constexpr):
    """The rows of rel_q and rel_k that a tile from query `row` and key `start` on touches, one per distance, the
    smallest first, and whether there is one. # 2 x [BAND]"""
    return relative_numbers(p, place, start - (row + ROWS - 1) + tl.arange(0, BAND))


@triton.jit
def relative_numbers(p, place, offset):
    """The rows of rel_q and rel_k for pairs with key - query = offset, and whether there is one. # like offset"""
    b, n, first_query, queries, first_key, keys = place
    u = offset + (p.keys - 1 - (keys - queries))
    known = (u >= 0) & (u < p.strip)
    number = tl.load(p.rel_index + u, mask=known, other=0)
    return number, known & (number >= 0) & (number < p.rel_rows)


@triton.jit
def _band_product(
    p, place, left, table, stride, offset, scratch,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr, BAND: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """scratch[:, w] = left . (the row of `table` for key - query = offset + w), w < WHOLE, PIECE of them at a time: few
    registers. left: [ROWS, PADDED], as by `rows_of`."""
    for first in range(0, WHOLE, PIECE):
        w = first + tl.arange(0, PIECE)
        number, known = relative_numbers(p, place, offset + w)
        band = rows_of(table, number, known, stride, WIDTH, PADDED)  # [PIECE, PADDED]
        to = scratch + (tl.arange(0, ROWS) * BAND)[:, None] + w[None, :]
        tl.store(to, product(left, band, p.width, WIDTH, PADDED))


@triton.jit
def relative_scores(
    p, place, head, rel_query, key, row, start, scratch,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """scale * (rel_query . rel_q + key . rel_k) of a tile from query `row` and key `start` on. # [ROWS, COLUMNS] fp32

    The products with the band of rows that the tile touches go to `scratch`, max(ROWS, COLUMNS) * BAND fp32 of this
    program alone, and come back skewed. BAND is a power of two, at least ROWS + COLUMNS. `head` is a scalar.

    Args:
        rel_query: [ROWS, PADDED] or None. key: [COLUMNS, PADDED], for rel_k. Both as by `rows_of`.
        WIDTH: the features of a row.
    """
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    skew = j[None, :] - i[:, None] + (ROWS - 1)
    offset = start - (row + ROWS - 1)
    PIECE: tl.constexpr = min(ROWS, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if p.rel_q is not None:
        table = p.rel_q + place[0] * p.rel_q_b + head * p.rel_q_h
        _band_product(
            p, place, rel_query, table, p.rel_q_l, offset, scratch, WIDTH, PADDED, ROWS, PIECE, BAND, ROWS + COLUMNS
        )
        tl.debug_barrier()
        total += tl.load(scratch + i[:, None] * BAND + skew)
        tl.debug_barrier()
    if p.rel_k is not None:
        table = p.rel_k + place[0] * p.rel_k_b + head * p.rel_k_h
        _band_product(
            p, place, key, table, p.rel_k_l, offset, scratch, WIDTH, PADDED, COLUMNS, PIECE, BAND, ROWS + COLUMNS
        )
        tl.debug_barrier()
        total += tl.load(scratch + j[None, :] * BAND + skew)
        tl.debug_barrier()
    return total * p.scale


# --- Dropout ---


@triton.jit
def keep(p, place, head, rows, start, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which probabilities dropout keeps, for keys from `start` on, a multiple of 4: one call of Philox 4x32-10 gives
    the words of four neighbours. See reference/dropout.py. # [ROWS, COLUMNS] bool"""
    zero = tl.zeros((ROWS, COLUMNS // 4), tl.uint32)
    c0 = zero + (start // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)[None, :]
    c1 = zero + rows.to(tl.uint32)[:, None]
    c2 = zero + tl.cast(head, tl.uint32)
    c3 = zero + tl.cast(place[1], tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(p.seed), c0, c1, c2, c3)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [.., 2, 2]: the word of (x, y) is 2 x + y
    return tl.reshape(words, (ROWS, COLUMNS)) >= tl.cast(p.threshold, tl.uint32)
