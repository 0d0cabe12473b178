"""Gated linear units: act(gate) * up, forward and backward, each in one pass over memory.

A packed tensor of two halves is two views of one tensor. Interleaved features are read as whole rows and split in
registers, so that accesses stay wide. The backward computes the activation again from the inputs.
"""

import triton
import triton.language as tl
from torch import Tensor

from .._primitives import ACTIVATIONS
from ._launch import DTYPES, check, leading, on, readable

ELEMENTS = 2048  # of a tile: sixteen per thread; half as many where the backward holds neighbours in both orders
#: Columns of a tile, for rows of at least so many; the rows of a tile follow from it.
COLUMNS = ((16384, 2048), (128, 256), (0, 64))

GEGLU, GEGLU_TANH, SWIGLU = (tl.constexpr(ACTIVATIONS.index(name)) for name in ("geglu", "geglu_tanh", "swiglu"))


# --- The functions ---


@triton.jit
def _sigmoid(x):
    """The logistic function and its derivative, both without cancellation or overflow."""
    tail = tl.exp(-tl.abs(x))
    inverse = 1.0 / (1.0 + tail)
    return tl.where(x < 0.0, tail, 1.0) * inverse, tail * inverse * inverse


@triton.jit
def activation(x, ACTIVATION: tl.constexpr):
    """(act(x), act'(x)) in fp32; what is not used costs nothing."""
    if ACTIVATION == GEGLU:  # x Phi(x)
        phi = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return x * phi, phi + x * density
    elif ACTIVATION == GEGLU_TANH:  # (1 + tanh z) / 2 is the sigmoid of 2 z
        square = x * x
        s, slope = _sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * square))
        # From |x| = 100 on the slope is 0, and must not meet an infinite square.
        slope *= 1.5957691216057308 * (1.0 + 0.134145 * tl.minimum(square, 1e4))
        return x * s, s + x * slope
    elif ACTIVATION == SWIGLU:
        s, slope = _sigmoid(x)
        return x * s, s + x * slope
    else:  # max(x, 0); NaN stays NaN
        return tl.where(x <= 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0)


# --- Kernels. Offsets are 64 bits wide: a pointer to a row, then columns within it. ---


@triton.jit
def _row_offset(row, size1, size2, stride0, stride1, stride2, MERGED: tl.constexpr):
    """Where a row begins, in a tensor of three leading dimensions, or of one."""
    if MERGED:
        return (row * stride2)[:, None]
    outer = row // size2
    return (outer // size1 * stride0 + outer % size1 * stride1 + row % size2 * stride2)[:, None]


@triton.jit
def _load_parts(
    gate, up, column, width, inside,
    GATE_FIRST: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gate and up in fp32, from pointers to their rows [ROWS, 1] (interleaved: one row). # 2 x [ROWS, COLUMNS]"""
    if INTERLEAVED:
        at = 2 * column + tl.arange(0, 2 * COLUMNS)[None, :]
        both = tl.load(gate + at, mask=inside & (at < 2 * width), other=0.0)
        first, second = tl.split(tl.reshape(both, (ROWS, COLUMNS, 2)))
        if GATE_FIRST:
            g, u = first, second
        else:
            g, u = second, first
    else:
        at = column + tl.arange(0, COLUMNS)[None, :]
        g = tl.load(gate + at, mask=inside & (at < width), other=0.0)
        u = tl.load(up + at, mask=inside & (at < width), other=0.0)
    return g.to(tl.float32), u.to(tl.float32)


@triton.jit
def _forward_kernel(
    gate, up, out,
    rows, width, size1, size2, gate0, gate1, gate2, up0, up1, up2, out_row,
    ACTIVATION: tl.constexpr, GATE_FIRST: tl.constexpr, INTERLEAVED: tl.constexpr, MERGED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = act(gate) * up; one program per block of rows and block of columns."""
    program, steps = tl.program_id(0), tl.cdiv(width, COLUMNS)
    row = (program // steps).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = program % steps * COLUMNS
    inside = (row < rows)[:, None]
    gate += _row_offset(row, size1, size2, gate0, gate1, gate2, MERGED)
    up += _row_offset(row, size1, size2, up0, up1, up2, MERGED)
    g, u = _load_parts(gate, up, column, width, inside, GATE_FIRST, INTERLEAVED, ROWS, COLUMNS)
    value, _ = activation(g, ACTIVATION)
    at = column + tl.arange(0, COLUMNS)[None, :]
    to = out + (row * out_row)[:, None] + at
    tl.store(to, (value * u).to(out.dtype.element_ty), mask=inside & (at < width))


@triton.jit
def _backward_kernel(
    grad, gate, up, grad_gate, grad_up,
    rows, width, size1, size2, grad0, grad1, grad2, gate0, gate1, gate2, up0, up1, up2, out_row,
    ACTIVATION: tl.constexpr, GATE_FIRST: tl.constexpr, INTERLEAVED: tl.constexpr, MERGED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_gate = grad * up * act'(gate), grad_up = grad * act(gate); programs as in the forward."""
    program, steps = tl.program_id(0), tl.cdiv(width, COLUMNS)
    row = (program // steps).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = program % steps * COLUMNS
    inside = (row < rows)[:, None]
    gate += _row_offset(row, size1, size2, gate0, gate1, gate2, MERGED)
    up += _row_offset(row, size1, size2, up0, up1, up2, MERGED)
    g, u = _load_parts(gate, up, column, width, inside, GATE_FIRST, INTERLEAVED, ROWS, COLUMNS)
    at = column + tl.arange(0, COLUMNS)[None, :]
    valid = inside & (at < width)
    grad += _row_offset(row, size1, size2, grad0, grad1, grad2, MERGED)
    d = tl.load(grad + at, mask=valid, other=0.0).to(tl.float32)
    value, slope = activation(g, ACTIVATION)
    dg, du = (d * u * slope).to(grad_gate.dtype.element_ty), (d * value).to(grad_gate.dtype.element_ty)
    to = (row * out_row)[:, None]
    if INTERLEAVED:
        if GATE_FIRST:
            both = tl.join(dg, du)
        else:
            both = tl.join(du, dg)
        pair = 2 * column + tl.arange(0, 2 * COLUMNS)[None, :]
        both = tl.reshape(both, (ROWS, 2 * COLUMNS))
        tl.store(grad_gate + to + pair, both, mask=inside & (pair < 2 * width))
    else:
        tl.store(grad_gate + to + at, dg, mask=valid)
        tl.store(grad_up + to + at, du, mask=valid)


# --- Launchers: the arguments of the ops in csrc/glu.cpp ---


def _halves(packed: Tensor, gate_first: bool, interleaved: bool) -> tuple[Tensor, Tensor]:
    """(gate, up) of a packed tensor, as views; interleaved ones are read together, from the whole."""
    if interleaved:
        return packed, packed
    first, second = packed.chunk(2, dim=-1)
    return (first, second) if gate_first else (second, first)


def _check(gate: Tensor, up: Tensor | None, activation: int) -> None:
    check(gate.dim() >= 1, "gate must have at least 1 dimension")
    check(gate.dtype in DTYPES, "gate must be float32, bfloat16 or float16")
    check(0 <= activation < len(ACTIVATIONS), "activation must be an index into ACTIVATIONS")
    check(up is not None or gate.shape[-1] % 2 == 0, "a packed gate must have an even last dimension")
    check(up is None or (up.shape == gate.shape and up.dtype == gate.dtype), "up must match gate")


def _run(kernel, inputs: list[Tensor], outputs: list[Tensor], width: int, packed: bool, flags: dict) -> None:
    """Launch on inputs that agree in all but the last dimension, and contiguous outputs of rows of one stride."""
    if not packed and all(t.is_contiguous() for t in inputs):  # one long row
        inputs, outputs = [t.view(1, -1) for t in inputs], [t.view(1, -1) for t in outputs]
        width = inputs[0].shape[1]
    inputs = [readable(t) for t in inputs]
    layout = leading(inputs)
    if layout is None:
        inputs = [t.contiguous() for t in inputs]
        layout = leading(inputs)
    sizes, strides = layout
    rows = sizes[0] * sizes[1] * sizes[2]
    columns = next(columns for least, columns in COLUMNS if width >= least)
    elements = ELEMENTS // 2 if flags["INTERLEAVED"] and len(outputs) > 1 else ELEMENTS
    tile = {"ROWS": max(elements // columns, 1), "COLUMNS": columns}
    grid = (triton.cdiv(width, columns) * triton.cdiv(rows, tile["ROWS"]),)
    with on(inputs[0].device):
        kernel[grid](
            *inputs, *outputs, rows, width, *sizes[1:], *(s for stride in strides for s in stride),
            outputs[0].stride(-2) if outputs[0].dim() > 1 else 0, MERGED=sizes[:2] == [1, 1], **flags, **tile,
        )  # fmt: skip


def glu_forward(gate: Tensor, up: Tensor | None, activation: int, gate_first: bool, interleaved: bool) -> Tensor:
    """act(gate) * up, contiguous."""
    _check(gate, up, activation)
    packed = up is None
    width = gate.shape[-1] // 2 if packed else gate.shape[-1]
    out = gate.new_empty((*gate.shape[:-1], width))
    if out.numel() == 0:
        return out
    flags = {"ACTIVATION": activation, "GATE_FIRST": gate_first, "INTERLEAVED": packed and interleaved}
    inputs = list(_halves(readable(gate), gate_first, interleaved)) if packed else [gate, up]
    _run(_forward_kernel, inputs, [out], width, packed, flags)
    return out


def glu_backward(
    grad: Tensor, gate: Tensor, up: Tensor | None, activation: int, gate_first: bool, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of gate (packed as it is) and up (shape (0,) if packed), contiguous."""
    _check(gate, up, activation)
    packed = up is None
    width = gate.shape[-1] // 2 if packed else gate.shape[-1]
    check(grad.shape == (*gate.shape[:-1], width) and grad.dtype == gate.dtype, "grad must match the output")
    grad_gate = gate.new_empty(gate.shape)
    grad_up = gate.new_empty((0,) if packed else gate.shape)
    if grad.numel() == 0:
        return grad_gate, grad_up
    flags = {"ACTIVATION": activation, "GATE_FIRST": gate_first, "INTERLEAVED": packed and interleaved}
    if packed:
        inputs = [grad, *_halves(readable(gate), gate_first, interleaved)]
        outputs = list(_halves(grad_gate, gate_first, interleaved))
    else:
        inputs, outputs = [grad, gate, up], [grad_gate, grad_up]
    _run(_backward_kernel, inputs, outputs, width, packed, flags)
    return grad_gate, grad_up
