"""`rotary`: validate, lower, choose a backend, call it; `Rotary`, by which `attention` rotates its query and key.

The op `pyext::rotary_forward` (csrc/rotary.cpp) is its own family of derivatives. Its gradient to x is the rotation by
the opposite angle; `pyext::rotary_backward` sums the gradients to the tables; and the gradients of that one are
rotations again, with the incoming gradients as tables. So derivatives of every order are right.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks, _dispatch, _native
from .._primitives import AttentionProblem, RotaryProblem, acc_dtype, dense_in_order_of
from ..reference.rotary import rotary as _reference
from . import _register


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
    inverse: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Rotary position embedding: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) for each pair of features.

    Args:
        x: (B, H, L, D). float32, bfloat16, float16 or float64; any strides.
        cos, sin: (L_max, R/2) or (B, L, R/2) with R <= D: one entry per pair, of any float dtype, which need not be
            x's. The first R features are rotated, the others copied. `pyext.nn.RotaryEmbedding` makes such tables.
        interleaved: pairs are features (2k, 2k + 1), as in GPT-J; else (k, k + R/2), as in LLaMA and GPT-NeoX.
        positions: (L,) or (B, L) integers, the row of the tables for each token; None = row i for token i. On a GPU,
            where to look at them is to wait for the device, a token whose row no table has becomes NaN.
        inverse: rotate by the opposite angle, which undoes the rotation.
        impl: "auto", "reference", "cpu", "triton" or "cuda"; see `pyext.explain`.
    Returns:
        a new (B, H, L, D) of x's dtype, computed in fp32 (fp64 for fp64) and rounded once; the kernels keep x's order
        of dimensions in memory. Differentiable, also with respect to cos and sin, and at any order.
    Raises:
        TypeError, ValueError naming the argument; NotImplementedError if the forced backend refuses the call.
    Source: Su et al., "RoFormer" (2021), eq. 34; pairs and partial rotation as in GPT-J and GPT-NeoX.
    """
    problem = _prepare(x, cos, sin, interleaved, positions, inverse)
    return rotate(problem, _dispatch.choose("rotary", impl, problem))


def rotate(problem: RotaryProblem, backend: str) -> Tensor:
    """The rotated x, by a backend that was chosen before."""
    if backend == "reference":
        return _reference(problem)
    return _register.call(backend, "rotary_forward", problem)


def _prepare(x, cos, sin, interleaved, positions, inverse) -> RotaryProblem:
    """Validate and lower a call of `rotary`."""
    if _checks.floating("x", x).dim() != 4:
        raise _checks.shape_error("x", "(B, H, L, D)", "", x)
    interleaved, inverse = _checks.flag("interleaved", interleaved), _checks.flag("inverse", inverse)
    check_tables(cos, sin)
    return _problem(x, cos, sin, positions, interleaved, inverse)


def check_tables(cos, sin, owner: str = "") -> None:
    """Two float tables of one shape, dtype and device. `owner` begins their names in messages."""
    if _checks.floating(f"{owner}cos", cos).dim() not in (2, 3):
        raise _checks.shape_error(f"{owner}cos", "(L_max, R/2) or (B, L, R/2)", "", cos)
    if _checks.floating(f"{owner}sin", sin).shape != cos.shape:
        expected = _checks.shape_text(cos.shape)
        raise _checks.shape_error(f"{owner}sin", expected, f"to match {owner}cos", sin)
    if sin.dtype != cos.dtype:
        raise TypeError(f"{owner}sin must have dtype {cos.dtype} to match {owner}cos, got {sin.dtype}")
    if sin.device != cos.device:
        raise ValueError(f"{owner}sin must be on {cos.device} like {owner}cos, got {sin.device}")


def _problem(x, cos, sin, positions, interleaved, inverse, owner="", name="x", rows_name="positions") -> RotaryProblem:
    """Check tables and positions against x. The names are those of the arguments, for messages."""
    batch, _, length, width = x.shape
    rows, half = cos.shape[-2], cos.shape[-1]
    if cos.device != x.device:
        raise ValueError(f"{owner}cos must be on {x.device} like {name}, got {cos.device}")
    if 2 * half > width:
        why = f"with R/2 <= {width // 2} to match the {width} features of {name}"
        raise _checks.shape_error(f"{owner}cos", "(L_max, R/2) or (B, L, R/2)", why, cos)
    if cos.dim() == 3 and cos.shape[0] != 1 and cos.shape[0] != batch:
        raise _checks.shape_error(f"{owner}cos", f"({batch}, L, R/2)", f"(or 1 in batch) to match {name}", cos)
    if positions is None:
        if rows < length or (cos.dim() == 3 and rows != length):
            expected = f"(L_max, R/2) with L_max >= {length}, or ({batch}, {length}, R/2),"
            raise _checks.shape_error(f"{owner}cos", expected, f"to match {name} without {rows_name}", cos)
    else:
        positions = _positions(f"{owner}{rows_name}", positions, x, name, rows)
    return RotaryProblem(x, cos, sin, positions, interleaved, inverse)


def _positions(name: str, value, x: Tensor, x_name: str, rows: int) -> Tensor:
    """Positions as (B|1, L) int64; their range is checked where that needs no device sync."""
    batch, length = x.shape[0], x.shape[2]
    shape = _checks.integer(name, value).shape
    if not (len(shape) in (1, 2) and shape[-1] == length and (len(shape) == 1 or shape[0] in (1, batch))):
        raise _checks.shape_error(name, f"({length},) or ({batch}, {length})", f"to match {x_name}", value)
    if value.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like {x_name}, got {value.device}")
    if value.numel() and _checks.is_readable(value):
        low, high = (int(bound) for bound in value.aminmax())
        if low < 0 or high >= rows:
            raise ValueError(f"{name} must lie in [0, {rows}), the rows of cos and sin, got {low if low < 0 else high}")
    value = value.to(torch.int64)
    return value[None] if len(shape) == 1 else value


# --- Rotary: attention's argument ---


class Rotary:
    """Rotary position embedding of `attention`'s query and key: `attention(q, k, v, rotary=pyext.Rotary(cos, sin))`.

    Args:
        cos, sin, interleaved: as for `pyext.rotary`; one pair of tables for query and key.
        positions_q: (Lq,) or (B, Lq), the rows of the tables for the queries; None = Lk - Lq to Lk - 1: the last query
            stands at the last key. In `varlen_attention` (total_q,), and None counts within each sequence.
        positions_k: (Lk,) or (B, Lk), the rows for the keys; None = 0 to Lk - 1. In `varlen_attention` (total_k,).
    Raises:
        TypeError, ValueError naming the argument.
    """

    def __init__(
        self,
        cos: Tensor,
        sin: Tensor,
        *,
        interleaved: bool = False,
        positions_q: Tensor | None = None,
        positions_k: Tensor | None = None,
    ):
        check_tables(cos, sin, "Rotary ")
        self.cos, self.sin = cos, sin
        self.interleaved = _checks.flag("Rotary interleaved", interleaved)
        self.positions_q, self.positions_k = positions_q, positions_k
        for name in ("positions_q", "positions_k"):
            if getattr(self, name) is not None:
                _checks.integer(f"Rotary {name}", getattr(self, name))


class Rotation(NamedTuple):
    """The rotary problems of attention's query and key."""

    query: RotaryProblem
    key: RotaryProblem

    def apply(self, problem: AttentionProblem, backend: str) -> AttentionProblem:
        """The attention problem with query and key rotated, by the backend that will attend."""
        return problem._replace(query=rotate(self.query, backend), key=rotate(self.key, backend))

    def arguments(self) -> tuple:
        """What `attention_rotated_forward` takes after those of `attention_forward`."""
        tables = ((part.cos, part.sin, part.positions) for part in self)
        return *next(tables), *next(tables), self.query.interleaved


def lower(
    value: Rotary | None, names: tuple[str, str], query: Tensor, key: Tensor, cu_seqlens_q=None, cu_seqlens_k=None
) -> Rotation | None:
    """A `Rotary` against query and key (B, H, L, D) of these names. Packed sequences have B = 1 and their offsets."""
    if value is None:
        return None
    if not isinstance(value, Rotary):
        raise TypeError(f"rotary must be a pyext.Rotary, got {type(value).__name__}")
    tables = tables_q = value.cos, value.sin
    positions_q, positions_k = value.positions_q, value.positions_k
    positions_name = "positions_q"
    if positions_k is None and cu_seqlens_k is not None:
        positions_k = _local_positions(key, cu_seqlens_k, cu_seqlens_k)
    if positions_q is None:
        positions_name = "positions_q (by default the last query stands at the last key)"
        if cu_seqlens_q is not None:
            positions_q = _local_positions(query, cu_seqlens_q, cu_seqlens_k)
        else:
            tables_q = _last_rows(value, query.shape[2], key.shape[2])
    kind = value.interleaved, False, "Rotary "
    # The key first: its tables are whole, and so are their sizes in messages.
    turned_key = _problem(key, *tables, positions_k, *kind, names[1], "positions_k")
    return Rotation(_problem(query, *tables_q, positions_q, *kind, names[0], positions_name), turned_key)


def _last_rows(value: Rotary, queries: int, keys: int) -> tuple[Tensor, Tensor]:
    """The rows keys - queries to keys - 1 of the tables: where the queries stand."""
    if queries > keys:
        raise ValueError(f"Rotary positions_q must be given for more queries ({queries}) than keys ({keys}), got None")
    if value.cos.shape[-2] < keys:
        raise _checks.shape_error("Rotary cos", f"(L_max, R/2) with L_max >= {keys}", "without positions", value.cos)
    return value.cos.narrow(-2, keys - queries, queries), value.sin.narrow(-2, keys - queries, queries)


def _local_positions(packed: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor) -> Tensor:
    """(total,): the position of each packed row (1, H, total, D) in its sequence, whose last row is at its last key."""
    row = torch.arange(packed.shape[2], dtype=cu_seqlens.dtype, device=packed.device)
    ends = cu_seqlens[1:].contiguous()
    sequence = torch.bucketize(row, ends, right=True)
    return row - ends[sequence] + (cu_seqlens_k[1:] - cu_seqlens_k[:-1])[sequence]


# --- The ops as torch sees them: fakes and derivatives ---


def _forward_fake(x, cos, sin, positions, interleaved, inverse):
    return dense_in_order_of(x)


def _backward_fake(grad, x, positions, table_batch, table_rows, half, interleaved, inverse):
    shape, dtype = (table_batch, table_rows, half), acc_dtype(x.dtype)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


class _Rotary(torch.autograd.Function):
    """`rotary_forward` with its gradient. Saves the tables, and x only if they need a gradient."""

    @staticmethod
    def forward(ctx, sibling, run, x, cos, sin, positions, interleaved, inverse):
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:5]) else None, cos, sin, positions)
        ctx.sibling, ctx.flags = sibling, (interleaved, inverse)
        return run(x, cos, sin, positions, interleaved, inverse)

    @staticmethod
    def backward(ctx, grad):
        x, cos, sin, positions = ctx.saved_tensors
        interleaved, inverse = ctx.flags
        grad_x = grad_cos = grad_sin = None
        if ctx.needs_input_grad[2]:
            grad_x = ctx.sibling("rotary_forward")(grad, cos, sin, positions, interleaved, not inverse)
        if x is not None:
            sizes = (1, *cos.shape)[-3:]
            tables = ctx.sibling("rotary_backward")(grad, x, positions, *sizes, interleaved, inverse)
            grad_cos, grad_sin = (table.view(cos.shape).to(cos.dtype) for table in tables)
        return None, None, grad_x, grad_cos, grad_sin, None, None, None


class _Tables(torch.autograd.Function):
    """`rotary_backward` with its gradient: it is bilinear in grad and x, a rotation of either gives the other's."""

    @staticmethod
    def forward(ctx, sibling, run, grad, x, positions, *numbers):
        ctx.save_for_backward(grad, x, positions)
        ctx.sibling, ctx.numbers = sibling, numbers
        return run(grad, x, positions, *numbers)

    @staticmethod
    def backward(ctx, cos, sin):
        grad, x, positions = ctx.saved_tensors
        *_, half, interleaved, inverse = ctx.numbers

        def turned(tensor, inverse):
            part = tensor[..., : 2 * half]  # features that are only copied reach no table
            part = ctx.sibling("rotary_forward")(part, cos, sin, positions, interleaved, inverse)
            return torch.nn.functional.pad(part, (0, tensor.shape[3] - 2 * half))

        needs_grad, needs_x = ctx.needs_input_grad[2:4]
        grads = turned(x, inverse) if needs_grad else None, turned(grad, not inverse) if needs_x else None
        return None, None, *grads, *(None,) * 6


_dispatch.register(rotary, _prepare, ("cuda", "cpu", "triton"))
if _native.module() is not None:
    _register.register("rotary_forward", _forward_fake, _Rotary.apply, "rotary")
    _register.register("rotary_backward", _backward_fake, _Tables.apply, "rotary")
