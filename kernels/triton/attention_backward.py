"""The gradients of attention: of queries (with rel_query and segments) by one kernel, of keys and values by another, so
that no two programs add to one number; sums over tiles are in `attention_sums`.

FlashAttention-2's algorithm (Dao, 2023, section 3.1.2), dQ and dK, dV apart.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._primitives import BLOCK, AttentionProblem
from . import attention_sums
from ._attention_autotune import tuned
from ._attention_gradient import add_by_distance, load_keys, load_queries, score_gradients
from ._attention_gradient_plan import Listing, Rows, scratch_of, tile_of, widths
from ._attention_plan import grid, like_output, padded, prepared, slots, with_bands
from ._attention_tile import (
    TABLE_BLOCK,
    Problem,
    key_range,
    limits,
    load_rows,
    packed,
    same_segment,
    store_rows,
    table_entry,
    table_row,
    to_units,
    values_of,
    whole,
)
from ._launch import check, on, readable

CHUNK = 1024  # intervals that are read at a time
PREPARED = 2048  # elements of a tile
#: What `attention_backward` returns, in this order; and what of it is laid out as outputs are.
LIKE_OUTPUT = ("query", "key", "value", "rel_query")
GRADIENTS = ("query", "key", "value", "dense", "diag", "rel_query", "rel_q", "rel_k", "segment", "sinks")


# --- Kernels ---


@triton.jit
def _prepare_kernel(
    p, out, grad, lse, grad_lse, units, delta,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """units = lse in the units of scores, inf where it is -inf, and delta = <grad, out> - grad_lse, both (B, H, Lq)
    fp32; one program per batch, head and block of queries."""
    program, blocks = tl.program_id(0), tl.cdiv(p.queries, ROWS)
    head, b = (program // blocks % p.heads).to(tl.int64), (program // blocks // p.heads).to(tl.int64)
    rows = program % blocks * ROWS + tl.arange(0, ROWS)
    inside = rows < p.queries
    o = load_rows(out.at + b * out.b + head * out.h, rows, inside, out.l, WIDTH, PADDED).to(tl.float32)
    g = load_rows(grad.at + b * grad.b + head * grad.h, rows, inside, grad.l, WIDTH, PADDED).to(tl.float32)
    at = (b * p.heads + head) * p.queries + rows
    exponent = to_units(p, tl.load(lse + at, mask=inside, other=0.0)).to(tl.float32)
    sum = tl.sum(o * g, 1)
    if grad_lse is not None:
        sum -= tl.load(grad_lse + at, mask=inside, other=0.0).to(tl.float32)
    dead = exponent == -float("inf")
    tl.store(units + at, tl.where(dead, float("inf"), exponent), mask=inside)
    tl.store(delta + at, tl.where(dead, 0.0, sum), mask=inside)


@triton.jit
def _reach_kernel(p, reach, CHUNK: tl.constexpr, SIZE: tl.constexpr):
    """(first, last + 1) of the queries that see any of SIZE keys, (slots, 2) int32; one program per block of keys."""
    place, block, _ = _place(p, p.starts_k, p.keys, 1, SIZE)
    start, queries = block * SIZE, place[3]
    first, end = tl.full((CHUNK,), queries, tl.int32), tl.zeros((CHUNK,), tl.int32)
    for row in range(0, queries, CHUNK):
        rows = row + tl.arange(0, CHUNK)
        low, high = limits(p, place, rows)
        reached = (low < start + SIZE) & (high > start) & (low < high)
        first = tl.where(reached, tl.minimum(first, rows), first)
        end = tl.where(reached, rows + 1, end)
    tl.store(reach + tl.program_id(0) * 2, tl.min(first, 0))
    tl.store(reach + tl.program_id(0) * 2 + 1, tl.max(end, 0))


@triton.jit
def _place(p, starts, rows, heads, SIZE: tl.constexpr):
    """The place, the block of SIZE rows and the head of a program: blocks run fastest, then heads, then the batch."""
    program = tl.program_id(0)
    if starts is None:
        blocks = tl.cdiv(rows, SIZE)
        place, block = whole(p, (program // blocks // heads).to(tl.int64)), program % blocks
    else:
        blocks = rows // SIZE + p.sequences
        place, block = packed(p, starts, program % blocks, SIZE)
    return place, block, (program // blocks % heads).to(tl.int64)


@triton.jit
def _tiles(begin, end, full_begin, full_end, ANY_FULL: tl.constexpr, SIZE: tl.constexpr):
    """The tiles of a range, begin <= full_begin <= full_end <= end, in multiples of SIZE; those of the range within are
    full."""
    begin = begin // SIZE * SIZE
    end = tl.maximum(tl.cdiv(end, SIZE) * SIZE, begin)
    full_begin = tl.minimum(tl.maximum(tl.cdiv(full_begin, SIZE) * SIZE, begin), end)
    full_end = tl.minimum(tl.maximum(full_end // SIZE * SIZE, full_begin), end)
    if not ANY_FULL:
        full_end = full_begin
    return begin, full_begin, full_end, end


@triton.jit
def _queries_step(
    p, place, head, kv_head, rows, low, high, bitmap, row, start, of_queries, sums, scratch, MASKED: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """`sums`, (dQ, d rel_query, d segment for different, for equal ones), with the terms of one tile added."""
    to_query, to_rel_query, to_different, to_same = sums
    cols = start + tl.arange(0, COLUMNS)
    key, value = load_keys(p, place, kv_head, cols, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED)
    _, ds, d_product = score_gradients(
        p, place, head, rows, cols, low, high, bitmap, row, start, of_queries, key, value, scratch,
        MASKED, True, False, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, ROWS, COLUMNS, BAND,
    )  # fmt: skip
    key = values_of(key, WIDTH, PADDED)
    to_query = tl.dot(d_product.to(key.dtype), key, to_query, input_precision="ieee")
    if p.rel_q is not None:
        table = p.rel_q + place[0] * p.rel_q_b + head * p.rel_q_h
        to_rel_query = add_by_distance(
            p, place, ds, table, p.rel_q_l, row, start, to_rel_query, scratch, False, WIDTH, PADDED, ROWS, COLUMNS
        )
    if p.segment is not None:
        same = same_segment(p, place, rows, cols)
        to_different += tl.sum(tl.where(same, 0.0, ds), 1)
        to_same += tl.sum(tl.where(same, ds, 0.0), 1)
    return to_query, to_rel_query, to_different, to_same


@triton.jit
def _queries_kernel(
    p, grad, lse, delta, to_query, to_rel_query, to_segment, scratch,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of queries, of their rel_query and of their scores of segments; one program per batch or
    sequence, head and block.

    grad, to_query, to_rel_query: `Rows`. scratch: see `relative_scores`.
    """
    place, block, head = _place(p, p.starts_q, p.queries, p.heads, ROWS)
    b, n, first_query, queries, first_key, keys = place
    row, kv_head = block * ROWS, head // p.group
    rows = row + tl.arange(0, ROWS)
    of_queries = load_queries(p, place, head, rows, grad, lse, delta, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED)
    low, high = limits(p, place, rows)
    begin, end, full_begin, full_end = key_range(low, high, rows < queries)
    if scratch is not None:
        scratch += tl.program_id(0).to(tl.int64) * (ROWS if ROWS > COLUMNS else COLUMNS) * BAND
    # What a call does not have is a number that is never added to.
    rel_sum, different, same = 0.0, 0.0, 0.0
    if p.rel_q is not None:
        rel_sum = tl.zeros((ROWS, PADDED), tl.float32)
    if p.segment is not None:
        different, same = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, PADDED), tl.float32), rel_sum, different, same
    if p.block_offsets is not None:
        first, last = table_row(p, place, head, row)
        TILES: tl.constexpr = TABLE_BLOCK // COLUMNS
        for step in range((last - first) * TILES):
            tile = tl.cast(step, tl.int32)  # interpreted, a loop counts in Python's numbers
            start, bitmap = table_entry(p, first + tile // TILES)
            start += tile % TILES * COLUMNS
            sums = _queries_step(
                p, place, head, kv_head, rows, low, high, bitmap, row, start, of_queries, sums, scratch, True,
                WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, ROWS, COLUMNS, BAND,
            )  # fmt: skip
    else:
        begin, full_begin, full_end, end = _tiles(begin, end, full_begin, full_end, p.mask is None, COLUMNS)
        if p.mask is None:
            for start in range(full_begin, full_end, COLUMNS):
                sums = _queries_step(
                    p, place, head, kv_head, rows, low, high, 0, row, start, of_queries, sums, scratch, False,
                    WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, ROWS, COLUMNS, BAND,
                )  # fmt: skip
        for step in range(begin, end - (full_end - full_begin), COLUMNS):  # around the full tiles
            start = step + tl.where(step < full_begin, 0, full_end - full_begin)
            sums = _queries_step(
                p, place, head, kv_head, rows, low, high, 0, row, start, of_queries, sums, scratch, True,
                WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, ROWS, COLUMNS, BAND,
            )  # fmt: skip
    sum, rel_sum, different, same = sums
    inside = rows < queries
    to, at = to_query.at + b * to_query.b + head * to_query.h, first_query + rows
    store_rows(to, at, inside, to_query.l, sum * p.scale, WIDTH, PADDED)
    if p.rel_q is not None:
        to = to_rel_query.at + b * to_rel_query.b + head * to_rel_query.h
        store_rows(to, at, inside, to_rel_query.l, rel_sum * p.scale, WIDTH, PADDED)
    if to_segment is not None:
        at = to_segment + ((b * p.heads + head) * p.queries + rows) * 2
        tl.store(at, different, mask=inside)
        tl.store(at + 1, same, mask=inside)


@triton.jit
def _keys_step(
    p, place, head, cols, bitmap, row, start, key, value, sums, grad, lse, delta, scratch, MASKED: tl.constexpr,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """`sums`, (dK by scores, dK by relative rows, dV), with the terms of one tile added."""
    to_key, to_key_by_rows, to_value = sums
    rows = row + tl.arange(0, ROWS)
    of_queries = load_queries(p, place, head, rows, grad, lse, delta, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED)
    low, high = rows, rows
    if MASKED:
        low, high = limits(p, place, rows)
    weights, ds, d_product = score_gradients(
        p, place, head, rows, cols, low, high, bitmap, row, start, of_queries, key, value, scratch,
        MASKED, True, True, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, ROWS, COLUMNS, BAND,
    )  # fmt: skip
    out = values_of(of_queries[2], VALUE_WIDTH, VALUE_PADDED)
    to_value = tl.dot(tl.trans(weights.to(out.dtype)), out, to_value, input_precision="ieee")
    query = values_of(of_queries[0], WIDTH, PADDED)
    to_key = tl.dot(tl.trans(d_product.to(query.dtype)), query, to_key, input_precision="ieee")
    if p.rel_k is not None:
        table = p.rel_k + place[0] * p.rel_k_b + head * p.rel_k_h
        to_key_by_rows = add_by_distance(
            p, place, ds, table, p.rel_k_l, row, start, to_key_by_rows, scratch, True, WIDTH, PADDED, ROWS, COLUMNS
        )
    return to_key, to_key_by_rows, to_value


@triton.jit
def _query_range(p, place, start, reach, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """As `_tiles`, of the queries that see any of the keys from `start` on, and those that see all."""
    queries, keys = place[3], place[5]
    last = tl.minimum(start + COLUMNS, keys) - 1
    begin, end = start * 0, start * 0 + queries
    full_begin, full_end = begin, end
    if p.right is not None:
        begin = tl.maximum(begin, start - p.right - (keys - queries))
        full_begin = tl.maximum(full_begin, last - p.right - (keys - queries))
    if p.left is not None:
        end = tl.minimum(end, last + p.left - (keys - queries) + 1)
        full_end = tl.minimum(full_end, start + p.left - (keys - queries) + 1)
    if reach is not None:
        begin, end = tl.load(reach), tl.load(reach + 1)
    end = tl.where(start < keys, end, 0)
    # Of the last tile all queries count that are there: the others have probability 0.
    full_end = tl.where(full_end == queries, tl.cdiv(full_end, ROWS) * ROWS, tl.maximum(full_end, 0))
    return _tiles(begin, end, full_begin, full_end, p.mask is None and p.intervals is None, ROWS)


@triton.jit
def _keys_kernel(
    p, grad, lse, delta, to_key, to_value, reach, listing, scratch,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of keys and values; one program per batch or sequence, head of theirs and block. It goes
    through the query heads of the group, one after the other.

    grad, to_key, to_value: `Rows`. reach: see `_reach_kernel`, or None. listing: the block table, or None.
    """
    place, block, kv_head = _place(p, p.starts_k, p.keys, p.heads // p.group, COLUMNS)
    b, n, first_query, queries, first_key, keys = place
    start = block * COLUMNS
    cols = start + tl.arange(0, COLUMNS)
    key, value = load_keys(p, place, kv_head, cols, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED)
    if scratch is not None:
        scratch += tl.program_id(0).to(tl.int64) * (ROWS if ROWS > COLUMNS else COLUMNS) * BAND
    if reach is not None:
        blocks = tl.cdiv(p.keys, COLUMNS)
        if p.starts_k is not None:
            blocks = p.keys // COLUMNS + p.sequences
        slot = tl.program_id(0) % blocks + tl.where(p.intervals_b == 0, 0, b) * blocks
        reach += slot * 2
    begin, full_begin, full_end, end = _query_range(p, place, start, reach, ROWS, COLUMNS)
    by_rows = 0.0
    if p.rel_k is not None:
        by_rows = tl.zeros((COLUMNS, PADDED), tl.float32)
    sums = tl.zeros((COLUMNS, PADDED), tl.float32), by_rows, tl.zeros((COLUMNS, VALUE_PADDED), tl.float32)
    if p.block_offsets is not None:
        for member in range(p.group):
            head = kv_head * p.group + member
            at = listing.offsets + b * listing.offsets_b + head * listing.offsets_h + start // TABLE_BLOCK
            entries = listing.index + b * listing.index_b + head * listing.index_h
            first = tl.load(at)
            TILES: tl.constexpr = TABLE_BLOCK // ROWS
            for step in range((tl.load(at + 1) - first) * TILES):
                tile = tl.cast(step, tl.int32)  # interpreted, a loop counts in Python's numbers
                entry = entries + (first + tile // TILES) * 2
                row, bitmap = tl.load(entry) * TABLE_BLOCK + tile % TILES * ROWS, tl.load(entry + 1)
                sums = _keys_step(
                    p, place, head, cols, bitmap, row, start, key, value, sums, grad, lse, delta, scratch, True,
                    WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, ROWS, COLUMNS, BAND,
                )  # fmt: skip
    else:  # one loop over heads and tiles: what nested ones keep in registers for both spills
        full = (full_end - full_begin) // ROWS
        if p.mask is None and p.intervals is None:
            for step in range(full * p.group):
                head, row = kv_head * p.group + step // full, full_begin + step % full * ROWS
                sums = _keys_step(
                    p, place, head, cols, 0, row, start, key, value, sums, grad, lse, delta, scratch, False,
                    WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, ROWS, COLUMNS, BAND,
                )  # fmt: skip
        others = (end - begin) // ROWS - full
        for step in range(others * p.group):  # around the full tiles
            head, row = kv_head * p.group + step // others, begin + step % others * ROWS
            row += tl.where(row < full_begin, 0, full_end - full_begin)
            sums = _keys_step(
                p, place, head, cols, 0, row, start, key, value, sums, grad, lse, delta, scratch, True,
                WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, ROWS, COLUMNS, BAND,
            )  # fmt: skip
    by_scores, by_rows, by_weights = sums
    inside, at = cols < keys, first_key + cols
    to = to_key.at + b * to_key.b + kv_head * to_key.h
    store_rows(to, at, inside, to_key.l, (by_scores + by_rows) * p.scale, WIDTH, PADDED)
    to = to_value.at + b * to_value.b + kv_head * to_value.h
    store_rows(to, at, inside, to_value.l, by_weights, VALUE_WIDTH, VALUE_PADDED)


# --- Launchers ---


def _by_keys(problem: AttentionProblem) -> Listing:
    """The block table by blocks of keys, made on the device."""
    offsets, index = problem.block_offsets, problem.block_index
    batch, heads, rows = offsets.shape[0], offsets.shape[1], offsets.shape[2] - 1
    columns = triton.cdiv(problem.key.shape[2], BLOCK)
    most = min(index.shape[0], rows * columns)
    tables = offsets.flatten(0, 1)
    entry = tables[:, :1] + torch.arange(most, device=index.device, dtype=torch.int32)  # (T, most)
    row = torch.searchsorted(tables, entry, right=True) - 1
    column, bitmap = index[entry.clamp(max=max(index.shape[0] - 1, 0)).to(torch.int64)].unbind(-1)
    place = torch.where(entry < tables[:, -1:], column * rows + row, rows * columns)
    place, order = place.sort(dim=1, stable=True)
    starts = torch.arange(columns + 1, device=index.device, dtype=place.dtype) * rows
    starts = torch.searchsorted(place, starts.expand(tables.shape[0], -1).contiguous(), out_int32=True)
    listing = torch.stack([row.gather(1, order), bitmap.gather(1, order)], -1).to(torch.int32)
    steps = 0 if batch == 1 else heads, 0 if heads == 1 else 1
    return Listing(listing, *(2 * most * s for s in steps), starts, *((columns + 1) * s for s in steps))


def _prepare(p: Problem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """lse in units and delta of every query, see `_prepare_kernel`."""
    batch, heads, queries, width = out.shape
    units, delta = (out.new_empty((batch, heads, queries), dtype=torch.float32) for _ in range(2))
    rows = PREPARED // padded(width)
    _prepare_kernel[grid(triton.cdiv(queries, rows) * heads * batch)](
        p, Rows.of(out), Rows.of(grad_out), lse, grad_lse, units, delta,
        WIDTH=width, PADDED=padded(width), ROWS=rows,
    )  # fmt: skip
    return units, delta


def _of_sinks(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """-sum over batch and queries of exp(sink - lse) delta, (H,) fp32."""
    weight = torch.exp(sinks.to(torch.float64)[:, None] - lse)
    return -(weight.masked_fill(lse == -torch.inf, 0.0) * delta).sum((0, 2)).to(sinks.dtype)


def _check_outputs(problem: AttentionProblem, grad_out, grad_lse, out, lse) -> None:
    batch, heads, queries, _ = problem.query.shape
    shape = (batch, heads, queries, problem.value.shape[3])
    for tensor in (grad_out, out):
        check(
            tensor.shape == shape and tensor.dtype == problem.query.dtype and tensor.device == problem.query.device,
            "grad_out and out must match the forward's results",
        )
    for tensor in (lse, lse if grad_lse is None else grad_lse):
        check(
            tensor.shape == shape[:3] and tensor.dtype == torch.float64 and tensor.device == out.device,
            "lse and grad_lse must match the forward's results",
        )


def attention_backward(grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
                       out: Tensor, lse: Tensor, *rest) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of query, key, value, dense, diag, rel_query, rel_q, rel_k, segment, sinks; shape (0,) for what is
    absent or not needed. `rest`: the other fields of `AttentionProblem`, then need_dense, need_diag, need_rel_q,
    need_rel_k, need_segment."""
    fields = len(AttentionProblem._fields) - 3
    problem, p = prepared(AttentionProblem(query, key, value, *rest[:fields]))
    needs = dict(zip(("dense", "diag", "rel_q", "rel_k", "segment"), rest[fields:], strict=True))
    _check_outputs(problem, grad_out, grad_lse, out, lse)
    grads = _empty(problem, needs)
    grad_out, out, lse = readable(grad_out), readable(out), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    batch, heads, queries, _ = query.shape
    with on(query.device):
        if batch * heads * queries > 0:
            units, delta = _prepare(p, out, lse, grad_out, grad_lse)
            if problem.sinks is not None:
                grads["sinks"] = _of_sinks(problem.sinks, lse, delta)
            if key.shape[2] > 0:
                upstream = Rows.of(grad_out), units, delta
                _of_queries(problem, p, upstream, grads)
                _of_keys(problem, p, upstream, grads)
                for name in ("dense", "diag", "rel_q", "rel_k"):
                    if grads[name] is None:
                        grads[name] = getattr(attention_sums, f"of_{name}")(problem, p, upstream)
                return tuple(grads[name] for name in GRADIENTS)
    for name in GRADIENTS:  # no pair of query and key
        if grads[name] is None:
            grads[name] = query.new_zeros(getattr(problem, name).shape, dtype=torch.float32)
        elif name in LIKE_OUTPUT:
            grads[name].zero_()
    return tuple(grads[name] for name in GRADIENTS)


def _empty(problem: AttentionProblem, needs: dict[str, bool]) -> dict[str, Tensor | None]:
    """Memory for the gradients that look like outputs; shape (0,) for those not needed; None for the others."""
    grads: dict[str, Tensor | None] = {}
    for name in GRADIENTS:
        tensor = getattr(problem, name)
        if tensor is None or not needs.get(name, True):
            grads[name] = problem.query.new_empty((0,), dtype=torch.float32)
        else:
            grads[name] = like_output(tensor, *tensor.shape[1:]) if name in LIKE_OUTPUT else None
    return grads


@tuned("queries", partial(tile_of, "queries"))
def _of_queries(problem: AttentionProblem, p: Problem, upstream: tuple, grads: dict[str, Tensor]) -> None:
    """Fills the gradients of query and rel_query, and that of segment if it is None."""
    batch, heads, queries, width = problem.query.shape
    tile = tile_of("queries", problem)
    if grads["segment"] is None:
        grads["segment"] = problem.query.new_empty((batch, heads, queries, 2), dtype=torch.float32)
    segment = grads["segment"] if grads["segment"].numel() else None
    programs = slots(problem, tile.rows) * batch * heads
    scratch, band = scratch_of(problem, tile, programs)
    to_rel_query = None if problem.rel_query is None else Rows.of(grads["rel_query"])
    _queries_kernel[grid(programs)](
        with_bands(p, tile.rows, tile.columns), *upstream, Rows.of(grads["query"]), to_rel_query, segment, scratch,
        BAND=band, **widths(problem), **tile.options(),
    )  # fmt: skip


@tuned("keys", partial(tile_of, "keys"))
def _of_keys(problem: AttentionProblem, p: Problem, upstream: tuple, grads: dict[str, Tensor]) -> None:
    """Fills the gradients of key and value."""
    batch, kv_heads, _, _ = problem.key.shape
    tile = tile_of("keys", problem)
    blocks = slots(problem, tile.columns, "key")
    reach = listing = None
    if problem.intervals is not None:
        rows = blocks * problem.intervals.shape[0]
        reach = problem.query.new_empty((rows, 2), dtype=torch.int32)
        _reach_kernel[grid(rows)](p, reach, CHUNK=CHUNK, SIZE=tile.columns)
    if problem.block_offsets is not None:
        listing = _by_keys(problem)
    programs = blocks * batch * kv_heads
    scratch, band = scratch_of(problem, tile, programs)
    _keys_kernel[grid(programs)](
        with_bands(p, tile.rows, tile.columns), *upstream, Rows.of(grads["key"]), Rows.of(grads["value"]),
        reach, listing, scratch,
        BAND=band, **widths(problem), **tile.options(),
    )  # fmt: skip
