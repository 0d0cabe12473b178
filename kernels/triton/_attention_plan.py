"""What the launchers of attention share: checks, and `AttentionProblem` as the `Problem` of the kernels. Nothing here
waits for the device."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._primitives import BLOCK, AttentionProblem
from ._attention_tile import Problem
from ._launch import DTYPES, check, power_of_two, readable

WIDEST = 256  # head dimension
LONGEST = 2**29  # sequence; numbers of queries and keys, and their sums, are int32 in the kernels
MOST_SEQUENCES = 2**21  # of a packed call
BANDED = 256  # queries from which on it pays to look for what a strip is in each band of distances
_LARGEST = 2**31 - 1  # programs of a launch


# --- Checks: what protects memory. What tables of numbers hold, the kernels check. ---


def _check_shapes(p: AttentionProblem) -> None:
    query, key, value = p[:3]
    check(query.dim() == key.dim() == value.dim() == 4, "query, key and value must have 4 dimensions")
    check(query.dtype in DTYPES, "query must be float32, bfloat16 or float16")
    check(key.dtype == query.dtype and value.dtype == query.dtype, "query, key and value must share a dtype")
    (batch, heads, queries, width), (_, kv_heads, keys, _) = query.shape, key.shape
    check(
        key.shape == (batch, kv_heads, keys, width)
        and value.shape[:3] == key.shape[:3]
        and (heads % kv_heads == 0 if kv_heads > 0 else heads == 0),
        "query, key and value must have matching shapes",
    )
    check(max(width, value.shape[3]) <= WIDEST, f"head dimensions must be at most {WIDEST}")
    check(max(queries, keys) < LONGEST, f"sequences must be shorter than {LONGEST}")
    for tensor in p:
        check(not isinstance(tensor, Tensor) or tensor.device == query.device, "all tensors must be on the same device")


def _fits(tensor: Tensor, *sizes: int) -> bool:
    """Whether the tensor has the shape, or 1 where a size is given as negative and the tensor broadcasts."""
    return tensor.dim() == len(sizes) and all(
        size == abs(wanted) or (size == 1 and wanted <= 0) for size, wanted in zip(tensor.shape, sizes, strict=True)
    )


def _check_biases(p: AttentionProblem) -> None:
    batch, heads, queries, width = p.query.shape
    keys, strip = p.key.shape[2], _strip(p)
    int32, acc = torch.int32, torch.float32
    for name in ("dense", "mask"):
        tensor = getattr(p, name)
        check(
            tensor is None or _fits(tensor, -batch, -heads, -queries, keys),
            f"{name} must be broadcastable to (batch, heads, query length, key length) with a full last dimension",
        )
    check(p.dense is None or p.dense.is_floating_point(), "dense must hold floating-point numbers")
    check(p.mask is None or p.mask.dtype == torch.bool, "mask must be bool")
    if p.diag is not None:
        check(
            p.diag.dim() == 2 and p.diag.shape[0] in (1, heads) and p.diag.dtype == acc,
            "diag must have shape (heads or 1, rows) and dtype float32",
        )
        check(p.diag_index is not None or p.diag.shape[1] == strip, "diag must have q_len + k_len - 1 columns")
    for name in ("diag_index", "rel_index"):
        tensor = getattr(p, name)
        check(
            tensor is None or (_fits(tensor, strip) and tensor.dtype == int32),
            f"{name} must hold q_len + k_len - 1 int32",
        )
    _check_relative(p)
    if p.segment is not None:
        check(
            _fits(p.segment, batch, heads, queries, 2) and p.segment.dtype == acc,
            "segment must have shape (batch, heads, query length, 2) and dtype float32",
        )
        for ids, length in ((p.segment_q, queries), (p.segment_k, keys)):
            check(
                ids is not None and _fits(ids, -batch, length) and ids.dtype == int32,
                "segment ids must be int32 (batch or 1, length)",
            )
    check(
        p.sinks is None or (_fits(p.sinks, heads) and p.sinks.dtype == acc),
        "sinks must have shape (heads,) and dtype float32",
    )


def _check_relative(p: AttentionProblem) -> None:
    if p.rel_q is None and p.rel_k is None:
        return
    batch, heads, _, width = p.query.shape
    check(
        p.rel_index is not None and (p.rel_query is None) == (p.rel_q is None),
        "relative rows need rel_index, and rel_q needs rel_query",
    )
    rows = (p.rel_k if p.rel_q is None else p.rel_q).shape[2]
    for tensor in (p.rel_q, p.rel_k):
        check(
            tensor is None or (_fits(tensor, -batch, -heads, rows, width) and tensor.dtype == p.query.dtype),
            "relative rows must have shape (batch or 1, heads or 1, rows, head_dim) and the query's dtype",
        )
    check(
        p.rel_query is None or (p.rel_query.shape == p.query.shape and p.rel_query.dtype == p.query.dtype),
        "rel_query must have the query's shape and dtype",
    )


def _check_masks(p: AttentionProblem) -> None:
    batch, heads, queries, _ = p.query.shape
    int32 = torch.int32
    check(
        p.intervals is None or (_fits(p.intervals, -batch, queries, 2) and p.intervals.dtype == int32),
        "intervals must be int32 (batch or 1, query length, 2)",
    )
    if p.block_offsets is not None:
        rows = triton.cdiv(queries, BLOCK)
        check(
            _fits(p.block_offsets, -batch, -heads, rows + 1) and p.block_offsets.dtype == int32,
            "block_offsets must be int32 (batch or 1, heads or 1, rows of blocks + 1)",
        )
        index, bits = p.block_index, p.block_bits
        check(
            index is not None and index.dim() == 2 and index.shape[1] == 2 and index.dtype == int32
            and bits is not None and bits.dim() == 3 and bits.shape[1:] == (BLOCK, BLOCK // 8)
            and bits.dtype == torch.uint8,
            "block_index must be int32 (entries, 2), block_bits uint8 (bitmaps, 128, 16)",
        )  # fmt: skip
    if p.cu_seqlens_q is not None:
        starts = (p.cu_seqlens_q, p.cu_seqlens_k)
        check(
            batch == 1 and all(s is not None and s.dim() == 1 and s.dtype == int32 for s in starts)
            and starts[0].shape == starts[1].shape and 0 < starts[0].shape[0] <= MOST_SEQUENCES
            and (starts[0].shape[0] > 1 or queries == 0),
            f"cu_seqlens must be int32 (sequences + 1,), at most {MOST_SEQUENCES}, with batch 1",
        )  # fmt: skip
        check(
            p.dense is None and p.mask is None and p.segment is None and p.block_offsets is None,
            "cu_seqlens must come without a dense bias or mask, segments and block tables",
        )
    check(
        p.dropout_p <= 0 or (p.seed is not None and p.seed.dtype == torch.int64 and p.seed.numel() == 1),
        "dropout needs an int64 seed",
    )


# --- The problem of the kernels ---


def _strip(p: AttentionProblem) -> int:
    return max(p.query.shape[2] + p.key.shape[2] - 1, 0)


def prepared(problem: AttentionProblem) -> tuple[AttentionProblem, Problem]:
    """The problem, checked, with tensors that kernels can read in place; and the same for the kernels."""
    _check_shapes(problem)
    _check_biases(problem)
    _check_masks(problem)
    rows = ("query", "key", "value", "dense", "rel_query", "rel_q", "rel_k", "mask")
    small = (
        "diag", "diag_index", "rel_index", "segment", "segment_q", "segment_k", "intervals", "block_offsets",
        "block_index", "block_bits", "sinks", "cu_seqlens_q", "cu_seqlens_k", "seed",
    )  # fmt: skip
    changes = {name: readable(getattr(problem, name)) for name in rows}
    changes.update({name: t.contiguous() for name in small if (t := getattr(problem, name)) is not None})
    problem = problem._replace(**changes)
    return problem, _for_kernels(problem)


def _for_kernels(p: AttentionProblem) -> Problem:
    (_, heads, queries, _), keys = p.query.shape, p.key.shape[2]
    diag = p.diag
    if diag is not None and p.diag_index is not None:
        diag = diag.index_select(1, p.diag_index)
    relative = p.rel_q is not None or p.rel_k is not None
    blocks, packed, dropout = p.block_offsets is not None, p.cu_seqlens_q is not None, p.dropout_p > 0
    fields = {
        "diag": diag, "rel_index": p.rel_index if relative else None,
        "rel_rows": (p.rel_k if p.rel_q is None else p.rel_q).shape[2] if relative else None,
        "segment": p.segment, "segment_q": p.segment_q, "segment_k": p.segment_k, "intervals": p.intervals,
        "block_index": p.block_index if blocks else None, "block_entries": p.block_index.shape[0] if blocks else None,
        "block_bits": p.block_bits if blocks else None, "block_maps": p.block_bits.shape[0] if blocks else None,
        "sinks": p.sinks, "starts_q": p.cu_seqlens_q, "starts_k": p.cu_seqlens_k,
        "sequences": p.cu_seqlens_q.shape[0] - 1 if packed else None,
        "seed": p.seed if dropout else None,
        "threshold": min(int(p.dropout_p * 2**32), 2**32 - 1) if dropout else None,
        "survivors": (1.0 / (1.0 - p.dropout_p) if p.dropout_p < 1 else 0.0) if dropout else None,
        "left": None if p.left >= keys - 1 else max(p.left, -queries),
        "right": None if p.right >= queries - 1 else max(p.right, -keys),
        "width": p.query.shape[3], "value_width": p.value.shape[3],
        "heads": heads, "group": heads // max(p.key.shape[1], 1), "queries": queries, "keys": keys, "strip": _strip(p),
        "scale": p.scale, "softcap": p.softcap or None,
    }  # fmt: skip
    for name in ("query", "key", "value", "dense", "rel_query", "rel_q", "rel_k", "mask"):
        fields[name] = tensor = getattr(p, name)
        fields.update(zip((f"{name}_b", f"{name}_h", f"{name}_l"), _strides(tensor, 3), strict=True))
    fields["block_offsets"] = p.block_offsets
    fields["block_offsets_b"], fields["block_offsets_h"] = _strides(p.block_offsets, 2)
    fields["diag_h"] = _strides(diag, 1)[0]
    fields.update(dict.fromkeys(("bands", "band_count", "band_first", "band_step")))
    for name in ("segment_q", "segment_k", "intervals"):
        fields[f"{name}_b"] = _strides(fields[name], 1)[0]
    return Problem(**fields)


@triton.jit
def _bands_kernel(
    diag, bands, diag_h, heads, strip, queries, band_count, band_first, band_step,
    ROWS: tl.constexpr, LENGTH: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One band of `Problem.bands`: the LENGTH distances that a tile of ROWS queries touches."""
    head, band = (tl.program_id(0) // band_count).to(tl.int64), tl.program_id(0) % band_count
    w = tl.arange(0, BAND)
    u = (band - band_first) * band_step - ROWS + queries + w
    known = (w < LENGTH) & (u >= 0) & (u < strip)
    value = tl.load(diag + head * diag_h + u, mask=known, other=0.0)
    first, last = tl.min(tl.where(known, w, BAND), 0), tl.max(tl.where(known, w, -1), 0)
    at_first, at_last = tl.sum(tl.where(w == first, value, 0.0), 0), tl.sum(tl.where(w == last, value, 0.0), 0)
    slope = (at_last - at_first) / tl.maximum(last - first, 1).to(tl.float32)
    error = tl.abs(value - (at_first + slope * (w - first).to(tl.float32)))
    affine = tl.max(tl.where(known & (error == error), error, tl.where(known, float("inf"), 0.0)), 0) <= (
        1.5e-7 * tl.max(tl.where(known, tl.abs(value), 0.0), 0)
    )
    at = bands + (head * band_count + band) * 2
    tl.store(at, at_first + slope * (ROWS - 1 - first).to(tl.float32))
    tl.store(at + 1, tl.where(affine, slope, float("nan")))


def with_bands(p: Problem, rows: int, columns: int) -> Problem:
    """The problem with what the strip is in each band of distances that a tile touches: (value at its first query and
    key, slope by distance), the slope NaN where it is not affine to fp32. As it is where that does not pay, where
    there is no strip, and if it is packed."""
    if p.diag is None or p.starts_q is not None or p.queries < BANDED:
        return p
    step = min(rows, columns)
    first = triton.cdiv(p.queries, rows) * rows // step
    count = first + triton.cdiv(p.keys, columns) * columns // step
    heads = p.diag.shape[0]
    bands = p.diag.new_empty((heads, count, 2))
    _bands_kernel[grid(heads * count)](
        p.diag, bands, p.diag_h, heads, p.strip, p.queries, count, first, step,
        ROWS=rows, LENGTH=rows + columns - 1, BAND=2 * max(rows, columns),
    )  # fmt: skip
    return p._replace(bands=bands, band_count=0 if heads == 1 else count, band_first=first, band_step=step)


def _strides(tensor: Tensor | None, count: int) -> list[int | None]:
    """The first strides, 0 where the tensor has one element in that dimension, and so may broadcast."""
    if tensor is None:
        return [None] * count
    return [0 if tensor.shape[d] == 1 else tensor.stride(d) for d in range(count)]


def slots(problem: AttentionProblem, size: int, of: str = "query") -> int:
    """How many blocks of `size` rows of query or key there are at most in a batch row; packed: in all sequences."""
    rows = getattr(problem, of).shape[2]
    if problem.cu_seqlens_q is None:
        return triton.cdiv(rows, size)
    return rows // size + problem.cu_seqlens_q.shape[0] - 1


def padded(width: int) -> int:
    """The features of a row in a tile."""
    return power_of_two(width, 16, WIDEST)


def like_output(tensor: Tensor, heads: int, rows: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """(B, H, L, D) laid out as (B, L, H, D), the layout of outputs and of gradients of that shape."""
    return tensor.new_empty((tensor.shape[0], rows, heads, width), dtype=dtype).transpose(1, 2)


def grid(programs: int) -> tuple[int]:
    check(programs <= _LARGEST, "the call has more blocks than a launch can have programs")
    return (programs,)


def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; without one few, so that what depends on them is computed in parts, too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
