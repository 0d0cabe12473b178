"""The problem structs of csrc/<op>.h for ctypes, made of torch tensors as csrc/<op>.cpp makes them."""

from __future__ import annotations

import ctypes

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # DType of csrc/strided.h
Size, Pointer, Flag, Enum = ctypes.c_int64, ctypes.c_void_p, ctypes.c_bool, ctypes.c_int


class Strided(ctypes.Structure):
    _fields_ = [("data", Pointer), ("batch", Size), ("head", Size), ("row", Size)]


class RotaryProblem(ctypes.Structure):
    _fields_ = [
        ("dtype", Enum),
        *((name, Size) for name in ("batch", "heads", "length", "head_dim", "half")),
        *((name, Flag) for name in ("interleaved", "inverse")),
        ("positions", Pointer),
        *((name, Size) for name in ("positions_batch", "table_rows")),
        *((name, Strided) for name in ("x", "out", "cos", "sin")),
        ("table_dtype", Enum),
        ("grad", Strided),
        ("table_batch", Size),
        *((name, Pointer) for name in ("grad_cos", "grad_sin", "sorted", "order")),
    ]


class GluProblem(ctypes.Structure):
    _fields_ = [
        *((name, Enum) for name in ("dtype", "activation")),
        *((name, Size) for name in ("batch", "heads", "rows", "width")),
        *((name, Flag) for name in ("interleaved", "up_first")),
        *((name, Strided) for name in ("gate", "up", "out", "grad", "grad_gate", "grad_up")),
    ]


class RouteProblem(ctypes.Structure):
    _fields_ = [
        *((name, Enum) for name in ("dtype", "policy")),
        *((name, Size) for name in ("groups", "tokens", "experts", "columns", "rows", "capacity")),
        *((name, Flag) for name in ("renormalize", "batch_priority")),
        *((name, Size) for name in ("expert_groups", "top_groups")),
        ("logits", Strided),
        *((name, Pointer) for name in ("token_mask", "expert_bias", "uniform")),
        *((name, Pointer) for name in ("expert_index", "position", "choice", "weights", "offsets", "source")),
        *((name, Pointer) for name in ("balance_loss", "z_loss", "dropped", "load")),
        *((name, Pointer) for name in ("grad_weights", "grad_balance", "grad_z", "kept", "chosen", "counted")),
        *((name, Pointer) for name in ("grad_logits", "workspace")),
    ]


class DispatchProblem(ctypes.Structure):
    _fields_ = [
        ("dtype", Enum),
        *((name, Size) for name in ("tokens", "choices", "rows", "width")),
        *((name, Pointer) for name in ("source", "position")),
        *((name, Strided) for name in ("x", "out")),
    ]


class CombineProblem(ctypes.Structure):
    _fields_ = [
        ("dtype", Enum),
        *((name, Size) for name in ("tokens", "choices", "rows", "width")),
        *((name, Pointer) for name in ("weights", "position")),
        *((name, Strided) for name in ("ys", "out", "grad", "grad_ys")),
        *((name, Pointer) for name in ("used", "grad_weights")),
    ]


class AttentionProblem(ctypes.Structure):
    _fields_ = [
        ("dtype", Enum),
        *((name, Size) for name in ("batch", "heads", "kv_heads", "q_len", "k_len", "head_dim", "value_dim")),
        *((name, Strided) for name in ("query", "key", "value")),
        *((name, Pointer) for name in ("rotate_query", "rotate_key")),
        ("out", Strided),
        ("lse", Pointer),
        ("dense", Strided),
        ("dense_dtype", Enum),
        ("diag", Pointer),
        *((name, Size) for name in ("diag_heads", "diag_rows")),
        ("diag_index", Pointer),
        *((name, Strided) for name in ("rel_query", "rel_q", "rel_k")),
        *((name, Size) for name in ("rel_rows", "rel_q_batch", "rel_q_heads", "rel_k_batch", "rel_k_heads")),
        *((name, Pointer) for name in ("rel_index", "segment", "segment_q", "segment_k")),
        *((name, Size) for name in ("segment_q_batch", "segment_k_batch")),
        ("mask", Strided),
        ("intervals", Pointer),
        ("intervals_batch", Size),
        *((name, Pointer) for name in ("block_offsets", "block_index", "block_bits")),
        *((name, Size) for name in ("block_batch", "block_head")),
        *((name, Pointer) for name in ("sinks", "cu_seqlens_q", "cu_seqlens_k")),
        *((name, Size) for name in ("sequences", "left", "right")),
        *((name, ctypes.c_double) for name in ("scale", "softcap", "dropout_p")),
        ("seed", ctypes.c_uint64),
        ("grad_out", Strided),
        ("grad_lse", Pointer),
        *((name, Strided) for name in ("grad_query", "grad_key", "grad_value", "grad_rel_query", "grad_dense")),
        *((name, Pointer) for name in ("grad_diag", "grad_rel_q", "grad_rel_k", "grad_segment", "grad_sinks")),
        ("workspace", Pointer),
    ]


def view(tensor: torch.Tensor, feature: int = 0) -> Strided:
    """A (batch, head, row, feature) tensor from this feature on; dimensions of size 1 broadcast."""
    strides = (0 if size == 1 else step for size, step in zip(tensor.shape[:3], tensor.stride()))
    return Strided(tensor.data_ptr() + feature * tensor.element_size(), *strides)
