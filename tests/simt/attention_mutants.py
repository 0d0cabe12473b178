"""Seeded defects of csrc/cuda/attention_sm80*.cu and the headers they share, and the runs that look for them."""

from __future__ import annotations

import functools

from .mutants import Mutant
from .runtime import COMPLETIONS, SCHEDULES

#: Of each defect, with the small tiles of mutants.SMALL.
RUNS = [
    dict(schedule=schedule, completion=completion, preempt=preempt)
    for schedule, completion, preempt in zip(SCHEDULES, COMPLETIONS, (0, 20, 0))
]
_Forward = functools.partial(Mutant, "attention_sm80")
_Backward = functools.partial(Mutant, "attention_sm80_backward")
_Rows = functools.partial(Mutant, "attention_sm80_relative")
_Turns = functools.partial(Mutant, "attention_sm80_relative_backward")
_Relative = functools.partial(Mutant, "attention_sm80_relative_both_backward")

MUTANTS = [
    _Forward(
        "keys are not waited for",
        "ptx::cp_async_wait<1>();\n    __syncthreads();  // the tile's keys",
        "ptx::cp_async_wait<2>();\n    __syncthreads();  // the tile's keys",
        "causal",
    ),
    _Forward(
        "no barrier before the keys are read", "__syncthreads();  // the tile's keys", "// the tile's keys", "causal"
    ),
    _Forward(
        "no barrier before keys are overwritten",
        "__syncthreads();  // the tile's values",
        "// the tile's values",
        "plain",
    ),
    _Forward(
        "copies under way where nobody sees anything",
        "ptx::cp_async_wait<0>();\n\n  const",
        "const",
        "many queries",
    ),
    _Forward("a strip is overwritten while it is read", "strips[(tile + 1) % 2]", "strips[tile % 2]", "diagonal"),
    _Forward("rows rescaled by another's factor", "*= factor[i][e / 2]", "*= factor[i][0]", "plain"),
    _Forward(
        "the highest score of two lanes of four", "high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));", "", "plain"
    ),
    _Forward("rows that see nothing yet", "high == -INFINITY ? 0.0f : scale * high", "high", "documents"),
    _Forward("the last keys left out", "(range.end - 1) / columns + 1", "range.end / columns", "plain"),
    _Forward("keys of another head", "head / (heads / int(p.kv_heads))", "head % int(p.kv_heads)", "causal"),
    _Forward("an interval begins late", "begin <= key && key < end", "begin < key && key < end", "documents"),
    _Forward(
        "tiles that are seen in part pass for seen by all",
        "all_begin <= from && to <= all_end",
        "begin <= from && to <= end",
        "causal",
    ),
    _Forward("windows aligned at the first key", "query + p.k_len - p.q_len;", "query;", "causal"),
    _Forward(
        "rows past the end are read",
        "first <= n && n < last && column",
        "column",
        "plain",
    ),
    _Forward("features past the end are read", "n < last && column + c < int(columns)", "n < last", "narrow"),
    _Forward("rows past the end are written", "if (row >= count) continue;", "", "plain"),
    _Forward(
        "fragments of keys in the wrong order",
        "lane % 8 + lane / 16 * 8, k + lane / 8 % 2 * 8",
        "lane % 16, k + lane / 16 * 8",
        "plain",
    ),
    _Rows(
        "relative rows skewed by one",
        "16 * M % columns + lane_row() + lane",
        "16 * M % columns + lane_row() + 1 + lane",
        "relative",
    ),
    _Rows("rows below not moved", "(j - octet) & 2 * N - 1", "j", "relative"),
    _Rows("odd tiles in the columns of even ones", "first + n + (tile & 1) * columns &", "first + n &", "relative"),
    _Rows(
        "products read before all lanes wrote",
        "[octet % 2 * 2 + n % 2];\n    }\n    __syncwarp();",
        "[octet % 2 * 2 + n % 2];\n    }",
        "relative",
    ),
    _Rows(
        "queries overwritten while others read them", "__syncthreads();  // all have theirs", "// theirs", "relative"
    ),
    _Rows("bands overwritten while others use them", "n % (units + 1)", "n % units", "relative"),
    _Rows("no band before the first tile", "relative.multiply_band(begin - 1);", "", "relative"),
    _Rows(
        "distances that do not occur",
        "0 <= u && u < p.q_len + p.k_len - 1 ? p.rel_index[u] : -1",
        "p.rel_index[u]",
        "clipped",
    ),
    _Rows("relative rows of the first head", "(heads == 1 ? 0 : head)", "0", "clipped"),
    _Rows("too little room for rows", "rows.bytes + rows.bytes_of_keys; }", "rows.bytes; }", "both"),
    _Rows("products of other warps read too early", "__syncthreads();  // all warps' products are there", "", "both"),
    _Rows("eight of a tile's distances left out", "warp, octets - 1)", "warp, octets - 2)", "both"),
    _Rows("bands of keys overwritten while they are read", "n % (units + 2)", "n % (units + 1)", "both"),
    _Rows("keys' products of another query", "- e % 2 * 4) * pitch", "- e % 2) * pitch", "both"),
    _Rows("scores of segments swapped", "same ? scores[half][1]", "!same ? scores[half][1]", "segments"),
    _Backward(
        "tiles of queries are not waited for",
        "ptx::cp_async_wait<0>();\n    __syncthreads();  // this",
        "__syncthreads();  // this",
        "plain",
    ),
    _Backward(
        "no barrier before queries are overwritten",
        "__syncthreads();  // this step's tiles are there, for all, and all are done with the last one's",
        "",
        "causal",
    ),
    _Backward(
        "other warps' dS read too early",
        "__syncthreads();  // all warps' dS is there, and the sums are this block's to add to",
        "",
        "plain",
    ),
    _Backward("other warps' P read too early", "rows.sync();  // P of these keys is there", "", "plain"),
    _Backward("P overwritten while others read it", "rows.sync();  // all are done with P", "", "plain"),
    _Backward(
        "blocks do not wait for those before them",
        "if (of_slot ? first_key / kKeys >= before : !step.first)",
        "if (of_slot && first_key / kKeys >= before)",
        "slopes",
    ),
    _Backward("blocks wait for a step too few", ": told) - 1", ": told) - 2", "slopes"),
    _Backward(
        "blocks wait for those behind them", "other.past - before, (of_slot", "other.past + before, (of_slot", "slopes"
    ),
    _Backward("the last step is not told", "ptx::store_release(other.past, INT32_MAX);", ";", "slopes"),
    _Backward(
        "steps are told before all have added",
        "grad_query.store(part);\n",
        "if (tells) ptx::store_release(other.past, told);\n    grad_query.store(part);\n",
        "slopes",
    ),
    _Backward("a sum begins with what was there", "if (first)", "if (false)", "plain"),
    _Backward(
        "a sum begins anew",
        "first_key / kKeys - w.chains < seen.begin / kKeys",
        "first_key / kKeys - w.chains <= seen.begin / kKeys",
        "slopes",
    ),
    _Backward("sums that nobody wrote", ">= end) continue;", "< 0) continue;", "many queries"),
    _Backward("one sum of several", "chain < w.chains", "chain < 1", "one strip"),
    _Backward("counters not zeroed", "counters[at] = 0;", ";", "plain"),
    _Backward(
        "two blocks add to the same slot",
        "if (of_slot ? first_key / kKeys >= before : !step.first)",
        "if (!of_slot && !step.first)",
        "slopes",
    ),
    _Backward("what comes next is stored too early", "stages[(n + 1) % 2]", "stages[n % 2]", "causal"),
    _Backward("the gradient of the LSE forgotten", "p.grad_lse ? sum - float(p.grad_lse[at]) : sum", "sum", "plain"),
    _Relative("the LSE of rows that see nothing", "p.lse[at] == -double(INFINITY) ? 0.0f : ", "", "both, grouped"),
    _Backward(
        "one head of those that share keys",
        "other.highest < 0 ? sharing : 0",
        "other.highest < 0 ? sharing : sharing - 1",
        "causal",
    ),
    _Backward("the first queries left out", "other.lowest = lowest,", "other.lowest = lowest + 1,", "causal"),
    _Backward("the last queries left out", "other.highest = highest;", "other.highest = highest - 1;", "causal"),
    _Backward("ranges of another batch entry", "(of.ranges) + batch * steps", "(of.ranges)", "padding"),
    _Backward(
        "queries that see a part of the keys left out",
        "begin < to && from < end",
        "begin <= from && from < end",
        "documents",
    ),
    _Backward("masked pairs count", "unsigned(key) < unsigned(length)", "true", "causal"),
    _Backward("a strip off by one", "at - query + Stage::count - 1", "at - query + Stage::count", "diagonal"),
    _Backward("keys' gradients without the scale", "RowFactors<M>(float(p.scale))", "RowFactors<M>(1)", "plain"),
    _Backward("the last diagonals left out", "carries ? N : N + carried_octets", "N", "diagonal"),
    _Backward("diagonals of lower rows to the right", "(upper ? -bit : bit)", "bit", "diagonal"),
    _Backward("diagonals of the neighbouring octet", "+ e >= g ? block", "+ e > g ? block", "diagonal"),
    _Backward("a tile's diagonals replace the others'", "= before[n] + sums.of(i)", "= sums.of(i)", "diagonal"),
    _Backward("diagonals past the strip", " && at < uint32_t(p.q_len + p.k_len - 1)", "", "diagonal"),
    _Backward("slots not zeroed", "if (at < slot_entries) slots[at] = 0;", "", "diagonal"),
    _Backward(
        "one head of those that share a strip", "i < (strip + 1) * sharing", "i < strip * sharing + 1", "one strip"
    ),
    _Backward("half of a row's distances", "u += 256)\n    if (index", "u += 512)\n    if (index", "buckets"),
    _Backward("too little workspace", "count * int64_t(sizeof(Element))", "count * int64_t(2)", "diagonal"),
    _Relative("keys before the first are read", "first <= n && n < last", "n < last", "both"),
    _Relative("what queries bring in one place", "infos[n % Tile::stages];", "infos[0];", "both"),
    _Relative(
        "a ring of distances without an end", "(group < Tile::ring ? group : group - Tile::ring)", "group", "both"
    ),
    _Relative(
        "most of a band taken as there",
        "follows = next.head == loaded.head && next.block == loaded.block + 1;",
        "follows = true;",
        "both, grouped",
    ),
    _Relative(
        "products of queries read too early",
        "__syncthreads();  // all warps' products are there\n    skewed.add_to(p_t);",
        "skewed.add_to(p_t);",
        "both",
    ),
    _Relative(
        "products of keys read too early",
        "__syncthreads();  // all warps' products are there\n    skewed_columns",
        "skewed_columns",
        "both",
    ),
    _Relative("pairs that do not meet left as they were", "i < 16 * 16; i += 32", "i < 8 * 16; i += 32", "both"),
    _Relative(
        "dS read before all lanes wrote",
        "ptx::from_float<T>(ds[0][j][e]);\n    });\n    __syncwarp();",
        "ptx::from_float<T>(ds[0][j][e]);\n    });",
        "both",
    ),
    _Relative(
        "distances of a head left out", "batches * heads; n += w.parts", "batches * heads - 1; n += w.parts", "shared"
    ),
    _Relative(
        "a block of queries overwritten while others use it",
        "__syncthreads();  // all are done with the block before",
        "// the block before",
        "both",
    ),
    _Relative(
        "gradients of keys of the step before", "if (query < 0 || query >= rows) *key", "if (query < 0) *key", "both"
    ),
    _Relative(
        "other warps' dS of keys read too early",
        "__syncthreads();  // all warps' dS is there\n    uint32_t",
        "uint32_t",
        "both",
    ),
    _Relative(
        "segments' gradients of two lanes of four",
        ", both[k] += __shfl_xor_sync(~0u, both[k], 2);",
        ";",
        "both, segments",
    ),
    _Relative("one of a row's distances", "found; found &= found - 1", "found; found = 0", "both"),
    _Relative(
        "one of the groups that share a table",
        "n < groups_b * groups_h * slots.parts",
        "n < slots.parts",
        "both, segments",
    ),
    _Relative(
        "shares of a row read too early",
        "__syncthreads();\n  for (int i = threadIdx.x; i < features",
        "for (int i = threadIdx.x; i < features",
        "both",
    ),
    _Relative("too little room for distances", "slots * length * features", "length * features", "shared"),
    _Turns(
        "tiles of queries are not waited for",
        "ptx::cp_async_wait<0>();\n    __syncthreads();  // this",
        "__syncthreads();  // this",
        "relative",
    ),
    _Turns(
        "no barrier before queries are overwritten",
        "__syncthreads();  // this step's tiles are there, for all, and all are done with the last one's",
        "",
        "relative",
    ),
    _Turns(
        "products of relative queries read too early",
        "__syncthreads();  // all warps' products are there\n    products",
        "products",
        "relative",
    ),
    _Turns(
        "other warps' dS read too early",
        "__syncthreads();  // all warps' dS is there, and the sums are this block's to add to",
        "",
        "relative",
    ),
    _Turns("products of another distance", "lane_column() / 2 + e % 2 * 4;", "lane_column() + e % 2;", "relative"),
    _Turns("a band overwritten while it is read", "ring = distances + queries;", "ring = distances;", "relative"),
    _Turns("a window taken for the next one", "next.block == step.block + 1;", "true;", "again"),
    _Turns("queries that see keys left out", "(__ffs(int(found)) - 1)", "__ffs(int(found))", "again"),
    _Turns("dS skewed by one", "key - query + Tile::queries - 1)", "key - query + Tile::queries)", "relative"),
    _Turns("what no key is at left as it was", "clear_corners<T, Tile>(skewed);", "", "relative"),
    _Turns("a chunk that begins with the one before", "clear(0), first = 0;", "first = 0;", "clipped"),
    _Turns("a chunk replaces the others' sums", "{before[i][n][e] + sum[e],", "{sum[e],", "relative"),
    _Turns("one chunk of a window", "if (--leaves == 0) break;", "break;", "relative"),
    _Turns("sums by distance not zeroed", "if (at < slot_entries) slots[at] = 0;", "", "relative"),
    _Turns(
        "blocks do not wait for those before them",
        "if (!idle && threadIdx.x == 0 && block.has_before())",
        "if (false)",
        "relative",
    ),
    _Turns("blocks wait for a step too few", "? index(step) - (step", "? index(step) - 1 - (step", "relative"),
    _Turns(
        "a window is left before its time", "max(index(step), index(next) - lead - 1)", "index(step) - lead", "grouped"
    ),
    _Turns("steps are told before all have added", "block.index(idle ? next : now)", "block.index(next)", "relative"),
    _Turns("the last step is not told", "ptx::store_release(block.info.past, INT32_MAX);", ";", "relative"),
    _Turns(
        "sums of queries that begin anew", "of.number - w.chains < seen", "of.number - w.chains <= seen", "relative"
    ),
    _Turns("one sum of several", "chain < w.chains", "chain < 1", "clipped"),
    _Turns("one head of those that share a table", "i < (strip + 1) * sharing", "i < strip * sharing + 1", "segments"),
    _Turns("one entry of those that share a table", "b < first + entries", "b < first + 1", "segments"),
    _Turns("segments' gradients of one warp", "info.segments[warp]", "info.segments[0]", "segments"),
    _Turns("segments' gradients of half of the lanes", "lanes < 32; lanes *= 2", "lanes < 16; lanes *= 2", "segments"),
    _Turns("a bias' gradient a query late", "if (in_chunk >= 0)", "if (in_chunk > 0)", "segments"),
    _Turns("tables from the first distance on", "by_table + w.before * pitch", "by_table", "relative"),
    _Turns("one of a row's distances", "found; found &= found - 1", "found; found = 0", "clipped"),
    _Turns("too little workspace", "count * int64_t(sizeof(Element))", "count * int64_t(2)", "relative"),
]
