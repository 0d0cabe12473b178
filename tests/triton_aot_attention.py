"""Calls of attention for `triton_aot.py`: every configuration, every primitive, and the primitives that may meet."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch

from pyext._primitives import BLOCK, AttentionProblem
from pyext.kernels import attention, attention_backward
from pyext.kernels._attention_tile import Problem

FP32, INT32 = torch.float32, torch.int32


def meta(*shape, dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def problem(dtype, features=(), batch=2, heads=8, kv_heads=4, queries=4096, keys=4096, width=64, value=None):
    """A call with these features; rows of batch, length, heads as projections leave them."""

    def rows(length, count, features):
        return meta(batch, length, count, features, dtype=dtype).transpose(1, 2)

    query, key = rows(queries, heads, width), rows(keys, kv_heads, width)
    strip = queries + keys - 1
    index, blocks = meta(strip, dtype=INT32), queries // BLOCK + 1
    fields = {
        "causal": {"right": 0},
        "window": {"left": 256, "right": 0},
        "softcap": {"softcap": 30.0},
        "sinks": {"sinks": meta(heads, dtype=FP32)},
        "dense": {"dense": meta(1, heads, queries, keys, dtype=dtype)},
        "diag": {"diag": meta(heads, strip, dtype=FP32)},
        "rel_q": {"rel_query": query, "rel_q": meta(1, heads, 512, width, dtype=dtype), "rel_index": index},
        "rel_k": {"rel_k": meta(1, heads, 512, width, dtype=dtype), "rel_index": index},
        "segment": {
            "segment": meta(batch, heads, queries, 2, dtype=FP32),
            "segment_q": meta(batch, queries, dtype=INT32),
            "segment_k": meta(batch, keys, dtype=INT32),
        },
        "mask": {"mask": meta(batch, 1, queries, keys, dtype=torch.bool)},
        "intervals": {"intervals": meta(batch, queries, 2, dtype=INT32)},
        "blocks": {
            "block_offsets": meta(1, 1, blocks, dtype=INT32),
            "block_index": meta(600, 2, dtype=INT32),
            "block_bits": meta(100, BLOCK, BLOCK // 8, dtype=torch.uint8),
        },
        "dropout": {"dropout_p": 0.1, "seed": meta(1, dtype=torch.int64)},
        "packed": {"cu_seqlens_q": meta(17, dtype=INT32), "cu_seqlens_k": meta(17, dtype=INT32)},
    }
    chosen = {name: value for feature in features for name, value in fields[feature].items()}
    return AttentionProblem(query, key, rows(keys, kv_heads, value or width), scale=0.125, **chosen)


#: What fills each kind of configuration, and all that may meet in a call where more meets than it is for.
FULL = {
    "plain": ("window", "intervals", "softcap", "sinks"),
    "pairs": ("causal", "diag", "dropout"),
    "relative": ("rel_q", "rel_k", "segment"),
}
BACKWARD_FULL = FULL | {"strip": ("causal", "diag")}
CROWDED = {
    "pairs": ("causal", "dense", "diag", "segment", "mask", "intervals", "blocks", "dropout", "softcap", "sinks"),
    "relative": ("rel_q", "rel_k", "dense", "segment", "mask", "intervals", "dropout", "softcap", "sinks"),
}
#: What calls usually have.
USUAL = ((), ("dense",), ("blocks",), ("packed", "causal"), ("packed", "diag", "intervals"))


def scenarios(dtypes: Callable, everything: bool) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """(name, whether accesses should be wide, the call). `dtypes` chooses among some, as in `triton_aot`."""
    half = (torch.bfloat16, torch.float16)
    for kind, width in itertools.product(FULL, (64, 128, 256)):
        for dtype in (*dtypes(half), FP32):
            yield _scenario(f"full of {kind}", dtype, FULL[kind], width)
    for kind, width in itertools.product(CROWDED, (64, 128, 256)):
        for dtype in dtypes((*half, FP32)):
            yield _scenario(f"all of {kind}", dtype, CROWDED[kind], width)
    for features in USUAL:
        for width in (64, 128) if everything else (128,):
            for dtype in dtypes(half):
                batch = 1 if "packed" in features else 2
                yield _scenario(" ".join(features) or "nothing", dtype, features, width, batch=batch)
    for queries in (1, 16):
        for dtype in (*dtypes(half), FP32):
            yield _scenario(f"{queries} queries", dtype, ("causal",), 128, queries=queries, keys=32768)
    for dtype in dtypes((*half, FP32)):
        yield _scenario("odd sizes", dtype, ("causal", "diag"), 72, queries=333, keys=555, value=40)
    yield from _backward(dtypes)


def _backward(dtypes: Callable) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """The same of the backward, which has several kernels for a call: widths take turns over GPUs, too."""
    half = (torch.bfloat16, torch.float16)
    for kind, features in BACKWARD_FULL.items():
        for width in dtypes((64, 128, 256)):
            for dtype in dtypes((*half, *half, FP32)):
                yield _scenario(f"backward of {kind}", dtype, features, width, backward=True)
    for features in dtypes((("dense", "mask"), ("blocks", "sinks"), ("packed", "diag", "intervals"))):
        for dtype in dtypes(half):
            batch = 1 if "packed" in features else 2
            yield _scenario(f"backward, {' '.join(features)}", dtype, features, 128, backward=True, batch=batch)
    for dtype in dtypes((*half, FP32)):
        sizes = {"queries": 333, "keys": 555, "value": 40, "backward": True}
        yield _scenario("backward, odd sizes", dtype, ("causal", "diag"), 72, **sizes)


def gradients(p: AttentionProblem, out: torch.Tensor, lse: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """All gradients, for the gradient `out` of `out`."""
    lse = out.new_empty(out.shape[:3], dtype=torch.float64) if lse is None else lse
    return attention_backward.attention_backward(out, None, *p[:3], out, lse, *p[3:], *[True] * 5)


def _scenario(
    name: str, dtype, features: tuple, width: int, backward: bool = False, **sizes
) -> tuple[str, bool, Callable[[], object]]:
    def call():
        p = problem(dtype, features, width=width, **sizes)
        if backward:
            gradients(p, torch.empty_like(p.query[..., :1].expand(*p.query.shape[:3], p.value.shape[3])))
        else:
            attention.attention_forward(*p)

    return f"attention, {name} {width} {str(dtype)[6:]}", width % 64 == 0, call


# --- The arithmetic of a tile ---

#: Kernel -> how many products of a tile have depth (or width) PADDED, and how many that of the value.
PRODUCTS = {
    "_forward_kernel": (1, 1), "_queries_kernel": (2, 1), "_keys_kernel": (2, 2), "_dense_kernel": (1, 1),
    "_sum_bands_kernel": (1, 1),
}  # fmt: skip


def tile_flops(kernel) -> int | None:
    """Floating-point operations of one tile, times the copies of the loop body in the kernel (for tiles with masks and
    without). None for other kernels and for relative rows, whose inner loops may be unrolled."""
    constants = dict(kernel.constants)
    absent = {Problem._fields[path[1]] for path in constants if isinstance(path, tuple) and constants[path] is None}
    if kernel.name not in PRODUCTS or "rel_index" not in absent:
        return None
    copies = 1
    if kernel.name == "_forward_kernel" and constants["EXACT"]:
        copies = 2 if {"left", "intervals"} <= absent else 3
    elif kernel.name == "_queries_kernel":
        copies = 2 if {"block_offsets", "mask"} <= absent else 1
    elif kernel.name == "_keys_kernel":
        copies = 2 if {"block_offsets", "mask", "intervals"} <= absent else 1
    of_query, of_value = PRODUCTS[kernel.name]
    value = constants["VALUE_PADDED"]
    return 2 * constants["ROWS"] * constants["COLUMNS"] * (of_query * constants["PADDED"] + of_value * value) * copies


def repeats(kernel) -> int:
    """How often at most the warps of a program compute the same: each takes 16 rows or 8 columns (of K Q^T the other
    way around), so that more warps than that, which a configuration has for their registers, repeat."""
    constants, warps = dict(kernel.constants), dict(kernel.options)["num_warps"]
    rows, columns = constants["ROWS"], constants["COLUMNS"]
    if kernel.name == "_keys_kernel":
        rows, columns = columns, rows
    return max(16 * warps // rows, 8 * warps // columns, 1)
