"""Attention in one pass over the keys: softmax(S) v with a running maximum and sum, so that S never exists as a whole.

A program computes a block of queries of one head; of few queries it takes all heads that share a key head at once, and
several programs take a part of the keys each, whose results a second kernel merges by their LSE. The keys that a block
sees are a range: its middle, which all its queries see, needs no masks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._primitives import AttentionProblem
from ._attention_autotune import chosen, tuned
from ._attention_configs import FEW, Config, forward_config, kind_of, with_registers
from ._attention_plan import grid, like_output, padded, prepared, processors, slots, with_bands
from ._attention_tile import (
    LN2,
    LOG2E,
    TABLE_BLOCK,
    Problem,
    keep,
    key_range,
    limits,
    load_rows,
    log_sum,
    packed,
    power,
    product,
    relative_scores,
    rows_of,
    scores,
    store_rows,
    table_entry,
    table_row,
    to_units,
    visible,
    whole,
)
from ._launch import on, power_of_two

LEAST_KEYS = 256  # of a program that takes a part of the keys
MERGED = 16  # rows of a program of the merge


# --- Kernels ---


@triton.jit
def _tile(
    p, place, head, rows, low, high, query, rel_query, key, value, scratch, start, bitmap, maximum, total, sum,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUE: tl.constexpr, VALUE_PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: maximum [ROWS] in units of `scores`, total [ROWS], sum [ROWS, VALUE_PADDED]."""
    cols = start + tl.arange(0, COLUMNS)
    present = cols < place[5]
    inside = present if MASKED else None
    k = load_rows(key, cols, inside, p.key_l, WIDTH, PADDED), key, cols, present, p.key_l  # as by `rows_of`
    by_query = product(query, k, p.width, WIDTH, PADDED)  # [ROWS, COLUMNS]
    relative = None
    if p.rel_index is not None:
        relative = relative_scores(
            p, place, head, rel_query, k, tl.min(rows, 0), start, scratch, WIDTH, PADDED, ROWS, COLUMNS,
            2 * max(ROWS, COLUMNS),
        )  # fmt: skip
    score = scores(p, place, head, rows, cols, by_query, relative)
    if MASKED:
        score = tl.where(visible(p, place, head, rows, cols, low, high, bitmap), score, float("-inf"))
    highest = tl.maximum(maximum, tl.max(score, 1))
    origin = tl.where(highest == float("-inf"), 0.0, highest)
    probability = power(p, score - origin[:, None])
    shrink = power(p, maximum - origin)
    total = total * shrink + tl.sum(probability, 1)
    if p.seed is not None:
        probability = tl.where(keep(p, place, head, rows, start, ROWS, COLUMNS), probability, 0.0)
    v = load_rows(value, cols, inside, p.value_l, VALUE, VALUE_PADDED)
    sum = tl.dot(probability.to(v.dtype), v, sum * shrink[:, None], input_precision="ieee")
    return highest, total, sum


@triton.jit
def _tiles(
    p, place, head, rows, low, high, query, rel_query, key, value, scratch, begin, end, maximum, total, sum,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUE: tl.constexpr, VALUE_PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The tiles from key `begin` to `end`; of a call with a block table entries of the table, COLUMNS keys as one."""
    for start in range(begin, end, COLUMNS):
        start = tl.cast(start, tl.int32)  # the interpreter's is Python's
        bitmap = None
        first = start
        if p.block_offsets is not None:
            first, bitmap = table_entry(p, start // TABLE_BLOCK)
            first += start % TABLE_BLOCK
        maximum, total, sum = _tile(
            p, place, head, rows, low, high, query, rel_query, key, value, scratch, first, bitmap, maximum, total, sum,
            WIDTH, PADDED, VALUE, VALUE_PADDED, ROWS, COLUMNS, MASKED,
        )  # fmt: skip
    return maximum, total, sum


@triton.jit
def _part(begin, end, split, splits, COLUMNS: tl.constexpr):
    """The part of the tiles from `begin`, a multiple of COLUMNS, to `end` that one of the splits takes."""
    tiles = tl.cdiv(tl.maximum(end - begin, 0), COLUMNS)
    return begin + tiles * split // splits * COLUMNS, tl.minimum(end, begin + tiles * (split + 1) // splits * COLUMNS)


@triton.jit
def _keys(
    p, place, head, rows, split, splits, query, rel_query, key, value, scratch, maximum, total, sum,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUE: tl.constexpr, VALUE_PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """All keys that the queries see. EXACT: what they all see needs no masks."""
    low, high = limits(p, place, rows)
    begin, end, full_begin, full_end = key_range(low, high, rows < place[3])
    begin = begin // COLUMNS * COLUMNS
    if p.block_offsets is not None:
        first, last = table_row(p, place, head, tl.minimum(tl.min(rows, 0), p.queries - 1))
        begin, end = first * TABLE_BLOCK, last * TABLE_BLOCK
    begin, end = _part(begin, end, split, splits, COLUMNS)
    if EXACT:
        full_begin = tl.minimum(tl.maximum(tl.cdiv(full_begin, COLUMNS) * COLUMNS, begin), end)
        full_end = tl.maximum(tl.minimum(full_end, end) // COLUMNS * COLUMNS, full_begin)
        if p.left is not None or p.intervals is not None:
            maximum, total, sum = _tiles(
                p, place, head, rows, low, high, query, rel_query, key, value, scratch, begin, full_begin,
                maximum, total, sum, WIDTH, PADDED, VALUE, VALUE_PADDED, ROWS, COLUMNS, True,
            )  # fmt: skip
        maximum, total, sum = _tiles(
            p, place, head, rows, low, high, query, rel_query, key, value, scratch, full_begin, full_end,
            maximum, total, sum, WIDTH, PADDED, VALUE, VALUE_PADDED, ROWS, COLUMNS, False,
        )  # fmt: skip
        begin = full_end
    return _tiles(
        p, place, head, rows, low, high, query, rel_query, key, value, scratch, begin, end,
        maximum, total, sum, WIDTH, PADDED, VALUE, VALUE_PADDED, ROWS, COLUMNS, True,
    )  # fmt: skip


@triton.jit
def _block(
    p, out, lse, scratch, program, blocks, splits, out_s, out_b, out_h, out_l, lse_s,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUE: tl.constexpr, VALUE_PADDED: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One block of queries: the results of its part of the keys."""
    QUERIES: tl.constexpr = ROWS // HEADS
    owners = p.heads // p.group if HEADS > 1 else p.heads
    block = blocks - 1 - program % blocks  # under a causal mask the last blocks take longest
    split = program // blocks % splits
    owner = (program // blocks // splits % owners).to(tl.int64)
    if p.starts_q is None:
        place = whole(p, (program // blocks // splits // owners).to(tl.int64))
    else:
        place, block = packed(p, p.starts_q, block, QUERIES)
    b, n, first_query, queries, first_key, keys = place
    row = tl.arange(0, ROWS)
    if HEADS > 1:
        kv_head = owner
        head = owner * p.group + tl.minimum(row // QUERIES, p.group - 1)[:, None]  # [ROWS, 1]
        rows = tl.where(row // QUERIES < p.group, block * QUERIES + row % QUERIES, queries)
    else:
        kv_head, head = owner // p.group, owner
        rows = block * QUERIES + row
    inside, at = rows < queries, first_query + rows
    query = rows_of(p.query + b * p.query_b + head * p.query_h, at, inside, p.query_l, WIDTH, PADDED)
    rel_query = None
    if p.rel_query is not None:
        rel_query = rows_of(
            p.rel_query + b * p.rel_query_b + head * p.rel_query_h, at, inside, p.rel_query_l, WIDTH, PADDED
        )
    key = p.key + b * p.key_b + kv_head * p.key_h + tl.cast(first_key, tl.int64) * p.key_l
    value = p.value + b * p.value_b + kv_head * p.value_h + tl.cast(first_key, tl.int64) * p.value_l
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if p.sinks is not None:  # one more key, of the first part
        sink = tl.reshape(tl.zeros((ROWS, 1), tl.float32) + tl.load(p.sinks + head), (ROWS,))
        maximum = tl.where(split == 0, to_units(p, sink), maximum)
        total = tl.where(maximum == float("-inf"), 0.0, 1.0)
    maximum, total, sum = _keys(
        p, place, head, rows, split, splits, query, rel_query, key, value, scratch, maximum, total,
        tl.zeros((ROWS, VALUE_PADDED), tl.float32),
        WIDTH, PADDED, VALUE, VALUE_PADDED, ROWS, COLUMNS, EXACT,
    )  # fmt: skip
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    sum = sum / total[:, None]
    if p.seed is not None:
        sum *= p.survivors
    out += split.to(tl.int64) * out_s + b * out_b + head * out_h
    store_rows(out, at, inside, out_l, sum, VALUE, VALUE_PADDED)
    lse += split.to(tl.int64) * lse_s + ((b * p.heads + head) * p.queries + at[:, None])
    result = tl.where(nothing, float("-inf"), log_sum(p, maximum, total))
    tl.store(lse, result[:, None].to(lse.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _forward_kernel(
    p, out, lse, scratch, tiles, blocks, splits, out_s, out_b, out_h, out_l, lse_s,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, VALUE: tl.constexpr, VALUE_PADDED: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out and lse. With relative rows a fixed number of programs, each with its scratch, walk the blocks."""
    program = tl.program_id(0)
    if scratch is None:
        _block(
            p, out, lse, None, program, blocks, splits, out_s, out_b, out_h, out_l, lse_s,
            WIDTH, PADDED, VALUE, VALUE_PADDED, HEADS, ROWS, COLUMNS, EXACT,
        )  # fmt: skip
    else:
        scratch += program.to(tl.int64) * (2 * max(ROWS, COLUMNS) * max(ROWS, COLUMNS))
        for tile in range(program, tiles, tl.num_programs(0)):
            _block(
                p, out, lse, scratch, tile, blocks, splits, out_s, out_b, out_h, out_l, lse_s,
                WIDTH, PADDED, VALUE, VALUE_PADDED, HEADS, ROWS, COLUMNS, EXACT,
            )  # fmt: skip


@triton.jit
def _merge_kernel(
    parts, part_lse, out, lse, rows, splits, heads, queries, out_b, out_h, out_l,
    VALUE: tl.constexpr, VALUE_PADDED: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """out = sum_s exp(lse_s - lse) out_s, lse = log sum_s exp(lse_s), for the parts s of the keys."""
    row = tl.program_id(0).to(tl.int64) * MERGED + tl.arange(0, MERGED)
    inside = row < rows
    maximum = tl.full((MERGED,), float("-inf"), tl.float32)
    for split in range(splits):
        at = part_lse + tl.cast(split, tl.int64) * rows + row
        maximum = tl.maximum(maximum, tl.load(at, mask=inside, other=float("-inf")))
    origin = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.zeros((MERGED,), tl.float32)
    sum = tl.zeros((MERGED, VALUE_PADDED), tl.float32)
    for split in range(splits):
        first = tl.cast(split, tl.int64) * rows
        weight = tl.load(part_lse + first + row, mask=inside, other=float("-inf"))
        weight = tl.exp2((weight - origin) * LOG2E)
        total += weight
        sum += weight[:, None] * load_rows(parts, first + row, inside, VALUE, VALUE, VALUE_PADDED)
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    head = row // queries
    out += (head // heads * out_b + head % heads * out_h)[:, None]
    store_rows(out, row % queries, inside, out_l, sum / total[:, None], VALUE, VALUE_PADDED)
    result = tl.where(nothing, float("-inf"), origin + tl.log2(total) * LN2)
    tl.store(lse + row, result.to(lse.dtype.element_ty), mask=inside)


# --- Launcher: the arguments of the op in csrc/attention.cpp ---


class _Shape(NamedTuple):
    """How a call is cut into programs."""

    heads: int  # of a block of queries, 1 or at least as many as share a key head
    config: Config
    blocks: int  # of a batch row and a head (or the heads of a key head); packed: of all sequences
    tiles: int  # programs, but for relative rows
    splits: int  # parts of the keys

    @classmethod
    def of(cls, problem: AttentionProblem, p: Problem) -> "_Shape":
        batch, heads, queries, _ = problem.query.shape
        each = queries
        if p.starts_q is not None:  # a sequence's, about
            each = triton.cdiv(queries, max(p.sequences, 1))
        config = with_registers(chosen("forward", forward_config(problem)), problem)
        per_block, together = power_of_two(each, 1, config.rows), 1
        alone = p.rel_index is not None or p.block_offsets is not None
        together_rows = power_of_two(each, 1, FEW) * power_of_two(p.group, 1, FEW)
        if 1 < p.group <= FEW and not alone and together_rows <= min(max(config.rows, 16), FEW):
            together = max(power_of_two(p.group, 1, FEW), 16 // per_block)
        rows = max(per_block * together, 16)
        config = config._replace(rows=rows)
        blocks = slots(problem, rows // together)
        tiles = blocks * batch * (heads if together == 1 else heads // p.group)
        splits = 1
        if each <= FEW:
            splits = max(min(2 * processors(problem.query.device) // tiles, problem.key.shape[2] // LEAST_KEYS), 1)
        return cls(together, config, blocks, tiles * splits, splits)


def attention_forward(*arguments) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Lq, Dv) and lse (B, Hq, Lq) fp64 of `AttentionProblem(*arguments)`."""
    problem, p = prepared(AttentionProblem(*arguments))
    query, (batch, heads, queries, _), value = problem.query, problem.query.shape, problem.value.shape[3]
    out = like_output(query, heads, queries, value)
    lse = query.new_empty((batch, heads, queries), dtype=torch.float64)
    if lse.numel() > 0:
        _launch(problem, p, out, lse)
    return out, lse


@tuned("forward", forward_config)
def _launch(problem: AttentionProblem, p: Problem, out: Tensor, lse: Tensor) -> None:
    """Fills out and lse."""
    query, (batch, heads, queries, width), value = problem.query, problem.query.shape, problem.value.shape[3]
    shape = _Shape.of(problem, p)
    parts, part_lse = out, lse
    if shape.splits > 1:
        parts = query.new_empty((shape.splits, batch, heads, queries, value), dtype=torch.float32)
        part_lse = query.new_empty((shape.splits, batch, heads, queries), dtype=torch.float32)
    programs, scratch = shape.tiles, None
    rows, columns = shape.config.rows, shape.config.columns
    if p.rel_index is not None:
        programs = min(shape.tiles, shape.config.resident * processors(query.device))
        scratch = query.new_empty((programs, 2 * max(rows, columns) ** 2), dtype=torch.float32)
    exact = kind_of(problem) == "plain"  # a second loop holds what it needs in registers, too
    strides = (parts.stride(0) if shape.splits > 1 else 0, *parts.stride()[-4:-1], lse.numel())
    widths = {"VALUE": value, "VALUE_PADDED": padded(value)}
    with on(query.device):
        if shape.heads == 1:
            p = with_bands(p, rows, columns)
        _forward_kernel[grid(programs)](
            p, parts, part_lse, scratch, shape.tiles, shape.blocks, shape.splits, *strides,
            WIDTH=width, PADDED=padded(width), **widths, HEADS=shape.heads, EXACT=exact, **shape.config.options(),
        )  # fmt: skip
        if shape.splits > 1:
            _merge_kernel[grid(triton.cdiv(lse.numel(), MERGED))](
                parts, part_lse, out, lse, lse.numel(), shape.splits, heads, queries, *out.stride()[:3],
                **widths, MERGED=MERGED,
            )  # fmt: skip
