"""Gated linear layers: act(x w_gate^T + b_gate) * (x w_up^T + b_up) as one GEMM with two accumulators and the
activation in its epilogue; and the backward, whose first GEMM has the backward of the activation in its epilogue.

The products that give the gradients of weights, and others that need nothing fused, are torch's (cuBLAS on a GPU).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._primitives import ACTIVATIONS
from ._gemm import BAND, Config, accumulate, accumulate_pair, choose, place
from ._launch import DTYPES, check, on, readable
from .glu import activation, glu_backward

#: (kernel, element size) -> architecture -> configurations for `choose`. The forward has two accumulators. fp32
#: has no matrix units: its products are exact.
_FP32 = (Config(16, 32, 32, 4, 3), Config(64, 64, 16, 8, 3), Config(32, 32, 16, 4, 2))
CONFIGS = {
    ("forward", 2): {
        80: (Config(16, 64, 64, 4, 4), Config(128, 64, 32, 8, 4), Config(64, 64, 32, 8, 2)),
        90: (Config(16, 64, 128, 4, 4), Config(128, 64, 64, 8, 4), Config(64, 64, 32, 8, 2)),
        100: (Config(16, 64, 128, 4, 4), Config(128, 64, 64, 8, 4), Config(64, 64, 32, 8, 2)),
    },
    ("backward", 2): {
        80: (Config(16, 64, 64, 4, 4), Config(64, 128, 32, 8, 4), Config(64, 64, 32, 8, 2)),
        90: (Config(16, 64, 64, 4, 4), Config(128, 64, 64, 8, 4), Config(64, 64, 32, 8, 2)),
        100: (Config(16, 64, 64, 4, 4), Config(128, 64, 64, 8, 4), Config(64, 64, 32, 8, 2)),
    },
    ("forward", 4): dict.fromkeys((80, 90, 100), _FP32),
    ("backward", 4): dict.fromkeys((80, 90, 100), _FP32),
}


# --- Kernels. Offsets are 64 bits wide: pointers to rows, then columns within them. ---


@triton.jit
def _place(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BAND: tl.constexpr):
    """The rows and columns of this program."""
    down, across = place(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS), BAND)
    return down.to(tl.int64) * ROWS + tl.arange(0, ROWS), across * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _forward_kernel(
    x, w_gate, w_up, b_gate, b_up, out, pre,
    rows, columns, depth, x_row, gate_row, up_row,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """out = act(x w_gate^T + b_gate) * (x w_up^T + b_up), and pre both sums side by side, if it is given."""
    row, column = _place(rows, columns, ROWS, COLUMNS, BAND)
    row_inside, column_inside = (row < rows)[:, None], (column < columns)[None, :]
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    x += (row * x_row)[:, None]
    w_gate += (column.to(tl.int64) * gate_row)[None, :]
    w_up += (column.to(tl.int64) * up_row)[None, :]
    gate, up = accumulate_pair(gate, up, x, w_gate, w_up, row_inside, column_inside, depth, DEPTH)
    if b_gate is not None:
        gate += tl.load(b_gate + column[None, :], mask=column_inside, other=0.0).to(tl.float32)
    if b_up is not None:
        up += tl.load(b_up + column[None, :], mask=column_inside, other=0.0).to(tl.float32)
    valid = row_inside & column_inside
    if pre is not None:
        at = pre + (row * (2 * columns))[:, None] + column[None, :]
        tl.store(at, gate.to(pre.dtype.element_ty), mask=valid)
        tl.store(at + columns, up.to(pre.dtype.element_ty), mask=valid)
    value, _ = activation(gate, ACTIVATION)
    at = out + (row * columns)[:, None] + column[None, :]
    tl.store(at, (value * up).to(out.dtype.element_ty), mask=valid)


@triton.jit
def _hidden_gradient_kernel(
    grad, w_down, pre, grad_pre, hidden,
    rows, columns, depth, grad_row, down_row,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """With d = grad w_down, the gradient of hidden = act(gate) * up: grad_pre = (d up act'(gate), d act(gate)) side by
    side, and hidden itself, if it is given."""
    row, column = _place(rows, columns, ROWS, COLUMNS, BAND)
    row_inside, column_inside = (row < rows)[:, None], (column < columns)[None, :]
    d = tl.zeros((ROWS, COLUMNS), tl.float32)
    grad += (row * grad_row)[:, None]
    d = accumulate(d, grad, w_down + column[None, :], down_row, row_inside, column_inside, depth, DEPTH)
    valid = row_inside & column_inside
    from_pair = pre + (row * (2 * columns))[:, None] + column[None, :]
    to_pair = grad_pre + (row * (2 * columns))[:, None] + column[None, :]
    gate = tl.load(from_pair, mask=valid, other=0.0).to(tl.float32)
    value, slope = activation(gate, ACTIVATION)
    tl.store(to_pair + columns, (d * value).to(grad_pre.dtype.element_ty), mask=valid)
    up = tl.load(from_pair + columns, mask=valid, other=0.0).to(tl.float32)
    tl.store(to_pair, (d * up * slope).to(grad_pre.dtype.element_ty), mask=valid)
    if hidden is not None:
        at = hidden + (row * columns)[:, None] + column[None, :]
        tl.store(at, (value * up).to(hidden.dtype.element_ty), mask=valid)


@triton.jit
def _input_gradient_kernel(
    grad_pre, w_gate, w_up, grad_x,
    rows, columns, depth, gate_row, up_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """grad_x = grad_pre[:, :depth] w_gate + grad_pre[:, depth:] w_up, both summed before the rounding."""
    row, column = _place(rows, columns, ROWS, COLUMNS, BAND)
    row_inside, column_inside = (row < rows)[:, None], (column < columns)[None, :]
    sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    a = grad_pre + (row * (2 * depth))[:, None]
    sum = accumulate(sum, a, w_gate + column[None, :], gate_row, row_inside, column_inside, depth, DEPTH)
    sum = accumulate(sum, a + depth, w_up + column[None, :], up_row, row_inside, column_inside, depth, DEPTH)
    at = grad_x + (row * columns)[:, None] + column[None, :]
    tl.store(at, sum.to(grad_x.dtype.element_ty), mask=row_inside & column_inside)


# --- Launchers: the arguments of the ops in csrc/gated_linear.cpp ---


def _launch(kernel, kind: str, tensors: tuple, rows: int, columns: int, depth: int, strides: tuple, **flags) -> None:
    first = tensors[0]
    config = choose(CONFIGS[kind, first.element_size()], rows, tensors, (columns, depth, *strides))
    grid = (triton.cdiv(rows, config.rows) * triton.cdiv(columns, config.columns),)
    with on(first.device):
        kernel[grid](*tensors, rows, columns, depth, *strides, BAND=BAND, **flags, **config.options())


def _parts(w_gate: Tensor, w_up: Tensor | None, b_gate: Tensor | None, b_up: Tensor | None) -> tuple:
    """Weights and biases of gate and up, of which a packed tensor holds both."""
    if w_up is None:
        w_gate, w_up = w_gate.chunk(2)
        b_gate, b_up = (None, None) if b_gate is None else b_gate.chunk(2)
    return w_gate, w_up, b_gate, b_up


def _check(x: Tensor, w_gate: Tensor, w_up: Tensor | None, activation: int) -> None:
    check(x.dim() == w_gate.dim() == 2, "x, the weights and grad must have 2 dimensions")
    check(x.dtype in DTYPES, "x must be float32, bfloat16 or float16")
    check(0 <= activation < len(ACTIVATIONS), "activation must be an index into ACTIVATIONS")
    check(
        w_gate.shape[1] == x.shape[1] and w_gate.dtype == x.dtype and (w_up is not None or w_gate.shape[0] % 2 == 0),
        "w_gate must be (N, K) of x's dtype, or (2N, K) without w_up",
    )
    check(w_up is None or (w_up.shape == w_gate.shape and w_up.dtype == x.dtype), "w_up must match w_gate")


def _check_bias(bias: Tensor | None, weight: Tensor) -> None:
    check(
        bias is None or (bias.shape == weight.shape[:1] and bias.dtype == weight.dtype),
        "a bias must have an element of x's dtype for every row of its weight",
    )


def gated_linear_forward(
    x: Tensor, w_gate: Tensor, w_up: Tensor | None, b_gate: Tensor | None, b_up: Tensor | None, activation: int,
    save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out (M, N), the pre-activations (M, 2N), or shape (0,) unless `save`)."""
    _check(x, w_gate, w_up, activation)
    check(w_up is not None or b_up is None, "b_up must be None without w_up")
    _check_bias(b_gate, w_gate)
    _check_bias(b_up, w_gate)
    x, b_gate, b_up = readable(x), readable(b_gate), readable(b_up)
    gate, up, gate_bias, up_bias = _parts(readable(w_gate), readable(w_up), b_gate, b_up)
    (rows, depth), columns = x.shape, gate.shape[0]
    out = x.new_empty((rows, columns))
    pre = x.new_empty((rows, 2 * columns) if save else (0,))
    if out.numel() > 0:
        tensors = (x, gate, up, gate_bias, up_bias, out, pre if save else None)
        strides = (x.stride(0), gate.stride(0), up.stride(0))
        _launch(_forward_kernel, "forward", tensors, rows, columns, depth, strides, ACTIVATION=activation)
    return out, pre


def gated_linear_backward(
    grad: Tensor, x: Tensor, pre: Tensor, w_gate: Tensor, w_up: Tensor | None, activation: int, need_x: bool,
    need_w: bool, need_b: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, w_gate, w_up, b_gate, b_up; shape (0,) for what is not needed or not there."""
    _check(x, w_gate, w_up, activation)
    columns = w_gate.shape[0] // (2 if w_up is None else 1)
    check(grad.shape == (x.shape[0], columns) and grad.dtype == x.dtype, "grad must match the output")
    _check_pre(pre, x, columns)
    grad_pre, _ = glu_backward(grad, pre, None, activation, True, False)
    return _gradients(grad_pre, x, w_gate, w_up, need_x, need_w, need_b)


def _check_pre(pre: Tensor, x: Tensor, columns: int) -> None:
    check(pre.shape == (x.shape[0], 2 * columns) and pre.dtype == x.dtype, "pre must be (M, 2N) of x's dtype")


def _gradients(
    grad_pre: Tensor, x: Tensor, w_gate: Tensor, w_up: Tensor | None, need_x: bool, need_w: bool, need_b: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, w_gate, w_up, b_gate, b_up, from that of the pre-activations."""
    parts = (grad_pre,) if w_up is None else grad_pre.chunk(2, dim=1)
    grads = [x.new_empty((0,)) for _ in range(5)]
    if need_x:
        grads[0] = grad_pre @ w_gate if w_up is None else _input_gradient(grad_pre, w_gate, w_up)
    for n, part in enumerate(parts):
        if need_w:
            grads[1 + n] = part.T @ x
        if need_b:
            grads[3 + n] = part.sum(0, dtype=torch.float32).to(x.dtype)
    return tuple(grads)


def _input_gradient(grad_pre: Tensor, w_gate: Tensor, w_up: Tensor) -> Tensor:
    rows, (depth, columns) = grad_pre.shape[0], w_gate.shape
    grad_x = grad_pre.new_empty((rows, columns))
    if grad_x.numel() > 0:
        w_gate, w_up = readable(w_gate), readable(w_up)
        tensors, strides = (grad_pre, w_gate, w_up, grad_x), (w_gate.stride(0), w_up.stride(0))
        _launch(_input_gradient_kernel, "backward", tensors, rows, columns, depth, strides)
    return grad_x


def gated_mlp_forward(
    x: Tensor, w_gate: Tensor, w_up: Tensor | None, w_down: Tensor, b_gate: Tensor | None, b_up: Tensor | None,
    b_down: Tensor | None, activation: int, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out (M, J), the pre-activations (M, 2N), or shape (0,) unless `save`)."""
    hidden, pre = gated_linear_forward(x, w_gate, w_up, b_gate, b_up, activation, save)
    _check_down(w_down, x, hidden.shape[1])
    _check_bias(b_down, w_down)
    return torch.nn.functional.linear(hidden, w_down, b_down), pre


def _check_down(w_down: Tensor, x: Tensor, columns: int) -> None:
    check(
        w_down.dim() == 2 and w_down.shape[1] == columns and w_down.dtype == x.dtype,
        "w_down must be (J, N) of x's dtype",
    )


def gated_mlp_backward(
    grad: Tensor, x: Tensor, pre: Tensor, w_gate: Tensor, w_up: Tensor | None, w_down: Tensor, activation: int,
    need_x: bool, need_w: bool, need_b: bool, need_down: bool, need_b_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, w_gate, w_up, w_down, b_gate, b_up, b_down; shape (0,) for what is not needed or there."""
    _check(x, w_gate, w_up, activation)
    rows, columns = x.shape[0], w_gate.shape[0] // (2 if w_up is None else 1)
    _check_down(w_down, x, columns)
    check(grad.shape == (rows, w_down.shape[0]) and grad.dtype == x.dtype, "grad must match the output")
    _check_pre(pre, x, columns)
    grad = readable(grad)
    grad_pre, hidden = torch.empty_like(pre), x.new_empty((rows, columns)) if need_down else None
    if pre.numel() > 0 and (need_x or need_w or need_b or need_down):
        down = readable(w_down)
        tensors, strides = (grad, down, pre, grad_pre, hidden), (grad.stride(0), down.stride(0))
        _launch(
            _hidden_gradient_kernel, "backward", tensors, rows, columns, grad.shape[1], strides, ACTIVATION=activation
        )
    grad_x, *others = _gradients(grad_pre, x, w_gate, w_up, need_x, need_w, need_b)
    grad_down = grad.T @ hidden if need_down else x.new_empty((0,))
    grad_b_down = grad.sum(0, dtype=torch.float32).to(x.dtype) if need_b_down else x.new_empty((0,))
    return grad_x, *others[:2], grad_down, *others[2:], grad_b_down
