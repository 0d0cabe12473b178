"""Experts: feed-forward layers of their own on the rows of each expert, forward and backward.

Rows are computed by persistent grouped products (`_groups`): the first gathers tokens as it reads, so that no permuted
copy of them is made, and has the activation in its epilogue; what the second gives is summed over the choices of each
token in their order. The backward needs no output of an expert: the gradient of a choice's weight is <A', A> plus
<grad, b_down>, with A' = grad w_down and A the hidden layer, computed again in the epilogue that makes it.

Gradients of weights are summed by one program per expert and tile, over the rows of that expert in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._primitives import ACTIVATIONS, EXPERT_ACTIVATIONS
from ._gemm import BAND, Config, accumulate, accumulate_pair, choose, place
from ._groups import Schedules, bounds, locate, programs, rows_of, tokens_of
from ._launch import DTYPES, check, on, readable
from .glu import activation as act
from .moe_dispatch import sum_rows

#: (kernel, element size) -> architecture -> configurations for `choose`, by the mean number of rows of an expert.
#: "hidden" has two accumulators, "weights" sums over rows.
_FP32 = (Config(16, 32, 32, 4, 3), Config(64, 64, 16, 8, 3), Config(32, 32, 16, 4, 2))
_ODD = Config(64, 64, 32, 8, 2)
_ROWS = {
    80: (Config(16, 64, 64, 4, 4), Config(128, 64, 32, 8, 4), _ODD),
    90: (Config(16, 64, 64, 4, 4), Config(128, 64, 64, 8, 4), _ODD),
    100: (Config(16, 64, 64, 4, 4), Config(128, 64, 64, 8, 4), _ODD),
}
CONFIGS = {
    ("hidden", 2): _ROWS,
    ("rows", 2): {**_ROWS, 80: (_ROWS[80][0], Config(128, 64, 64, 8, 3), _ODD)},
    ("hidden gradient", 2): {**_ROWS, 100: (*_ROWS[100][:2], Config(64, 32, 32, 8, 2))},
    ("weights", 2): {
        80: (Config(64, 64, 32, 4, 3), Config(128, 64, 32, 8, 3), _ODD),
        90: (Config(64, 64, 32, 4, 3), Config(128, 64, 64, 8, 3), _ODD),
        100: (Config(64, 64, 32, 4, 3), Config(128, 64, 64, 8, 3), _ODD),
    },
    **{(kind, 4): dict.fromkeys((80, 90, 100), _FP32) for kind in ("hidden", "rows", "hidden gradient")},
    ("weights", 4): dict.fromkeys((80, 90, 100), (_FP32[1], *_FP32[1:])),
}
#: The tile where sums are over rows, the elements of one where they are over columns; entries of a block of choices.
BIAS_TILE, DOTS_ELEMENTS, CHOICES = {"ROWS": 16, "COLUMNS": 128}, 2048, 1024


# --- Kernels. Offsets are 64 bits wide: pointers to rows, then columns within them. ---


@triton.jit
def _hidden_kernel(
    schedule, x, w, bias, source, hidden, pre,
    tokens, experts, columns, depth, x_row, w_expert, w_row, bias_expert,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """hidden = act(x w^T + bias) (gated: times its other half) for the rows of each expert, 0 in unused rows; and pre,
    what act takes, if it is given."""
    across = tl.cdiv(columns, COLUMNS)
    tiles = tl.load(schedule).to(tl.int64) * across
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        expert, row, inside, part = locate(schedule, tile, across, ROWS, BAND)
        column = part * COLUMNS + tl.arange(0, COLUMNS)
        is_used = expert < experts
        terms = tl.where(is_used, depth, 0)
        token, known = tokens_of(source, row, inside, tokens)
        column_inside = (column < columns)[None, :]
        biased = (column < tl.where(is_used, columns, 0))[None, :]
        valid = inside[:, None] & column_inside
        a, b = x + (token * x_row)[:, None], w + expert * w_expert + (column.to(tl.int64) * w_row)[None, :]
        gate = tl.zeros((ROWS, COLUMNS), tl.float32)
        at = bias
        if bias is not None:
            at = bias + expert * bias_expert + column[None, :]
        if GATED:
            up = tl.zeros((ROWS, COLUMNS), tl.float32)
            second = b + tl.cast(columns, tl.int64) * w_row
            gate, up = accumulate_pair(gate, up, a, b, second, known[:, None], column_inside, terms, DEPTH)
            if bias is not None:
                up += tl.load(at + columns, mask=biased, other=0.0).to(tl.float32)
        else:
            up = 1.0
            gate = accumulate(gate, a, b, 1, known[:, None], column_inside, terms, DEPTH)
        if bias is not None:
            gate += tl.load(at, mask=biased, other=0.0).to(tl.float32)
        if pre is not None:
            if GATED:
                to = pre + (row * (2 * columns))[:, None] + column[None, :]
                tl.store(to + columns, up.to(pre.dtype.element_ty), mask=valid)
            else:
                to = pre + (row * columns)[:, None] + column[None, :]
            tl.store(to, gate.to(pre.dtype.element_ty), mask=valid)
        value, _ = act(gate, ACTIVATION)
        tl.store(
            hidden + (row * columns)[:, None] + column[None, :], (value * up).to(hidden.dtype.element_ty), mask=valid
        )


@triton.jit
def _rows_kernel(
    schedule, a, w, bias, out,
    experts, columns, depth, a_row, w_expert, w_row, bias_expert,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """out[n] = a[n] w[e] + bias[e], or a[n] w[e]^T + bias[e], for the rows of each expert, 0 in unused rows."""
    across = tl.cdiv(columns, COLUMNS)
    tiles = tl.load(schedule).to(tl.int64) * across
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        expert, row, inside, part = locate(schedule, tile, across, ROWS, BAND)
        column = part * COLUMNS + tl.arange(0, COLUMNS)
        is_used = expert < experts
        column_inside = (column < columns)[None, :]
        terms = tl.where(is_used, depth, 0)
        sum = tl.zeros((ROWS, COLUMNS), tl.float32)
        from_row, b = a + (row * a_row)[:, None], w + expert * w_expert
        if TRANSPOSED:
            b += (column.to(tl.int64) * w_row)[None, :]
            sum = accumulate(sum, from_row, b, 1, inside[:, None], column_inside, terms, DEPTH)
        else:
            sum = accumulate(sum, from_row, b + column[None, :], w_row, inside[:, None], column_inside, terms, DEPTH)
        if bias is not None:
            at = bias + expert * bias_expert + column[None, :]
            biased = (column < tl.where(is_used, columns, 0))[None, :]
            sum += tl.load(at, mask=biased, other=0.0).to(tl.float32)
        at = out + (row * columns)[:, None] + column[None, :]
        tl.store(at, sum.to(out.dtype.element_ty), mask=inside[:, None] & column_inside)


@triton.jit
def _through_activation(
    d, pre, weights, grad_pre, hidden, row, inside, column, columns, ACTIVATION: tl.constexpr, GATED: tl.constexpr
):
    """What `_hidden_gradient_kernel` stores for A' = d of these rows and columns; returns <A', A>. # [ROWS]"""
    valid = inside[:, None] & (column < columns)[None, :]
    width = columns
    if GATED:
        width = 2 * columns
    pair = (row * width)[:, None] + column[None, :]
    gate = tl.load(pre + pair, mask=valid, other=0.0).to(tl.float32)
    value, slope = act(gate, ACTIVATION)
    up = 1.0
    if GATED:
        up = tl.load(pre + pair + columns, mask=valid, other=0.0).to(tl.float32)
    dots = tl.sum(d * value * up, 1)
    weight = 1.0
    if weights is not None:
        weight = tl.load(weights + row, mask=inside, other=0.0)[:, None]
    d *= weight
    tl.store(grad_pre + pair, (d * up * slope).to(grad_pre.dtype.element_ty), mask=valid)
    if GATED:
        tl.store(grad_pre + pair + columns, (d * value).to(grad_pre.dtype.element_ty), mask=valid)
    if hidden is not None:
        at = hidden + (row * columns)[:, None] + column[None, :]
        tl.store(at, (value * up * weight).to(hidden.dtype.element_ty), mask=valid)
    return dots


@triton.jit
def _hidden_gradient_kernel(
    schedule, grad, w_down, pre, source, weights, grad_pre, hidden, dots,
    tokens, dots_row, columns, depth, grad_row, down_expert, down_row,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """With A' = grad w_down, A = act(pre) and the weight of each row (1 without `weights`): grad_pre = weight A' times
    the derivative of A, hidden = weight A, and <A', A> over these columns as dots[n, block of columns]."""
    across = tl.cdiv(columns, COLUMNS)
    tiles = tl.load(schedule).to(tl.int64) * across
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        expert, row, inside, part = locate(schedule, tile, across, ROWS, BAND)
        column = part * COLUMNS + tl.arange(0, COLUMNS)
        token, known = tokens_of(source, row, inside, tokens)
        d = tl.zeros((ROWS, COLUMNS), tl.float32)
        a, b = grad + (token * grad_row)[:, None], w_down + expert * down_expert + column[None, :]
        d = accumulate(d, a, b, down_row, known[:, None], (column < columns)[None, :], depth, DEPTH)
        # One half of the columns after the other: all at once does not fit into the registers.
        left, right = tl.split(tl.permute(tl.reshape(d, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        half = part * COLUMNS + tl.arange(0, COLUMNS // 2)
        products = _through_activation(
            left, pre, weights, grad_pre, hidden, row, inside, half, columns, ACTIVATION, GATED
        )  # fmt: skip
        products += _through_activation(
            right, pre, weights, grad_pre, hidden, row, inside, half + COLUMNS // 2, columns, ACTIVATION, GATED
        )
        if dots is not None:
            tl.store(dots + row * dots_row + part, products, mask=inside)


@triton.jit
def _weight_gradient_kernel(
    left, right, left_source, right_source, offsets, out,
    tokens, rows, height, columns, left_row, right_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """out[e] (height, columns) = the sum of left[n]^T right[n] over the rows n of expert e, in order; 0 without rows.

    One program per expert and tile. A source gives the row of a tensor that stands for row n.
    """
    down, across = tl.cdiv(height, ROWS), tl.cdiv(columns, COLUMNS)
    expert = tl.program_id(0) // (down * across)
    block, part = place(tl.program_id(0) % (down * across), down, across, BAND)
    i, j = block * ROWS + tl.arange(0, ROWS), part * COLUMNS + tl.arange(0, COLUMNS)
    row_inside, column_inside = (i < height)[:, None], (j < columns)[None, :]
    begin, end = bounds(offsets, expert, rows)
    sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(begin, end, DEPTH):
        n = start + tl.arange(0, DEPTH).to(tl.int64)
        from_left, left_known = tokens_of(left_source, n, n < end, tokens)
        from_right, right_known = tokens_of(right_source, n, n < end, tokens)
        at = left + (from_left * left_row)[None, :] + i[:, None]
        a = tl.load(at, mask=row_inside & left_known[None, :], other=0.0)  # [ROWS, DEPTH]
        at = right + (from_right * right_row)[:, None] + j[None, :]
        b = tl.load(at, mask=right_known[:, None] & column_inside, other=0.0)  # [DEPTH, COLUMNS]
        sum = tl.dot(a, b, sum, input_precision="ieee")
    at = out + (expert.to(tl.int64) * height + i)[:, None] * columns + j[None, :]
    tl.store(at, sum.to(out.dtype.element_ty), mask=row_inside & column_inside)


@triton.jit
def _bias_gradient_kernel(
    grad, source, weights, offsets, out, tokens, rows, columns, grad_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """out[e] = the sum of grad over the rows of expert e, weighted if there are weights; one program per expert and
    block of columns."""
    across = tl.cdiv(columns, COLUMNS)
    expert = tl.program_id(0) // across
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = bounds(offsets, expert, rows)
    sum = tl.zeros((ROWS, COLUMNS), tl.float32)  # short sums side by side: more exact than one long one
    for start in range(begin, end, ROWS):
        n = start + tl.arange(0, ROWS).to(tl.int64)
        token, known = tokens_of(source, n, n < end, tokens)
        at = grad + (token * grad_row)[:, None] + column[None, :]
        g = tl.load(at, mask=known[:, None] & (column < columns)[None, :], other=0.0).to(tl.float32)
        if weights is not None:
            g *= tl.load(weights + n, mask=known, other=0.0)[:, None]
        sum += g
    at = out + expert.to(tl.int64) * columns + column
    tl.store(at, tl.sum(sum, 0).to(out.dtype.element_ty), mask=column < columns)


@triton.jit
def _bias_dots_kernel(
    schedule, grad, bias, source, dots,
    tokens, dots_row, columns, grad_row, bias_expert, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The last of dots[n] = <grad of row n, bias of its expert>; one program per block of the schedule."""
    expert, row, inside = rows_of(schedule, tl.program_id(0).to(tl.int64), ROWS)
    token, known = tokens_of(source, row, inside, tokens)
    grad += (token * grad_row)[:, None]
    bias += expert * bias_expert
    sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        g = tl.load(grad + column, mask=known[:, None] & (column < columns), other=0.0).to(tl.float32)
        sum += g * tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(dots + row * dots_row + dots_row - 1, tl.sum(sum, 1), mask=inside)


@triton.jit
def _row_weights_kernel(weights, position, out, entries, rows, BLOCK: tl.constexpr):
    """out[position[t, k]] = weights[t, k]."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(position + entry, mask=entry < entries, other=-1).to(tl.int64)
    known = (row >= 0) & (row < rows)
    tl.store(out + row, tl.load(weights + entry, mask=known, other=0.0), mask=known)


@triton.jit
def _choice_dots_kernel(dots, position, out, entries, rows, parts, BLOCK: tl.constexpr):
    """out[t, k] = the sum of the parts of row position[t, k], in order; 0 without a row."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(position + entry, mask=entry < entries, other=-1).to(tl.int64)
    known = (row >= 0) & (row < rows)
    sum = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        sum += tl.load(dots + row * parts + part, mask=known, other=0.0)
    tl.store(out + entry, sum, mask=entry < entries)


# --- Launches ---


def _config(kind: str, rows: int, experts: int, tensors: tuple, sizes: tuple) -> Config:
    """For experts with that many rows in the mean, as nobody here knows how many each has."""
    return choose(CONFIGS[kind, tensors[0].element_size()], triton.cdiv(rows, max(experts, 1)), tensors, sizes)


def _walk(kernel, config: Config, schedules: Schedules, tensors: tuple, counts: tuple, sizes: tuple, **flags) -> None:
    """Launch a kernel whose programs walk a schedule. sizes: columns, depth and strides."""
    schedule, slots = schedules.of(config.rows)
    grid = programs(schedule.device, slots * triton.cdiv(sizes[0], config.columns))
    with on(schedule.device):
        kernel[grid](schedule, *tensors, *counts, *sizes, BAND=BAND, **flags, **config.options())


def _unit(activation: int) -> dict[str, int]:
    """Experts that are not gated have the same activations as gated ones, in the same order."""
    return {"ACTIVATION": activation % len(ACTIVATIONS), "GATED": activation < len(ACTIVATIONS)}


def _rows(schedules: Schedules, a: Tensor, w: Tensor, bias: Tensor | None, dtype: torch.dtype, forward: bool) -> Tensor:
    """a w[e]^T + bias[e] (forward), or a w[e], for the rows of each expert."""
    rows, (experts, *sides) = a.shape[0], w.shape
    columns, depth = sides if forward else sides[::-1]
    out = a.new_empty((rows, columns), dtype=dtype)
    if out.numel() > 0:
        tensors = (a, w, bias, out)
        sizes = (columns, depth, a.stride(0), *w.stride()[:2], 0 if bias is None else bias.stride(0))
        config = _config("rows", rows, experts, tensors, sizes)
        _walk(_rows_kernel, config, schedules, tensors, (experts,), sizes, TRANSPOSED=forward)
    return out


def _weight_gradient(
    left: Tensor, right: Tensor, offsets: Tensor, rows: int, left_source: Tensor | None, right_source: Tensor | None
) -> Tensor:
    """left[n]^T right[n] summed over the rows of each expert: (E, columns of left, columns of right)."""
    experts, height, columns = offsets.shape[0] - 1, left.shape[1], right.shape[1]
    out = left.new_empty((experts, height, columns))
    if out.numel() > 0:
        tensors = (left, right, left_source, right_source, offsets, out)
        sizes = (height, columns, left.stride(0), right.stride(0))
        config = _config("weights", rows, experts, tensors, sizes)
        grid = (experts * triton.cdiv(height, config.rows) * triton.cdiv(columns, config.columns),)
        tokens = left.shape[0] if right_source is None else right.shape[0]
        with on(left.device):
            _weight_gradient_kernel[grid](*tensors, tokens, rows, *sizes, BAND=BAND, **config.options())
    return out


def _bias_gradient(grad: Tensor, offsets: Tensor, rows: int, source: Tensor | None, weights: Tensor | None) -> Tensor:
    """grad summed over the rows of each expert, (E, columns), each times its weight."""
    experts, columns = offsets.shape[0] - 1, grad.shape[1]
    out = grad.new_empty((experts, columns))
    if out.numel() > 0:
        grid = (experts * triton.cdiv(columns, BIAS_TILE["COLUMNS"]),)
        with on(grad.device):
            _bias_gradient_kernel[grid](
                grad, source, weights, offsets, out, grad.shape[0], rows, columns, grad.stride(0), **BIAS_TILE
            )
    return out


def _layer_forward(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, b_gate_up: Tensor | None, b_down: Tensor | None, offsets: Tensor,
    source: Tensor | None, activation: int, save: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the experts return for each row, in a dtype, and the pre-activations, if they are to be saved."""
    x, w_gate_up, w_down, b_gate_up, b_down = (readable(t) for t in (x, w_gate_up, w_down, b_gate_up, b_down))
    rows = x.shape[0] if source is None else source.shape[0]
    (experts, wide, depth), columns = w_gate_up.shape, w_down.shape[2]
    schedules = Schedules(offsets, rows, unused=True)
    hidden = x.new_empty((rows, columns))
    pre = x.new_empty((rows, wide) if save else (0,))
    if hidden.numel() > 0:
        tensors = (x, w_gate_up, b_gate_up, source, hidden, pre if save else None)
        strides = (x.stride(0), *w_gate_up.stride()[:2], 0 if b_gate_up is None else b_gate_up.stride(0))
        config = _config("hidden", rows, experts, tensors, (columns, depth, *strides))
        counts, sizes = (x.shape[0], experts), (columns, depth, *strides)
        _walk(_hidden_kernel, config, schedules, tensors, counts, sizes, **_unit(activation))
    return _rows(schedules, hidden, w_down, b_down, dtype, forward=True), pre


def _hidden_gradient(
    grad: Tensor, w_down: Tensor, b_down: Tensor | None, pre: Tensor, schedules: Schedules, source: Tensor | None,
    weights: Tensor | None, activation: int, need_hidden: bool, need_dots: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradient of the pre-activations, the hidden layer, and the parts of the gradients of weights (N, parts)."""
    rows, (experts, depth, columns) = pre.shape[0], w_down.shape
    grad_pre = torch.empty_like(pre)
    hidden = pre.new_empty((rows, columns)) if need_hidden else None
    tensors = (grad, w_down, pre, source, weights, grad_pre, hidden)
    sizes = (columns, depth, grad.stride(0), *w_down.stride()[:2])
    config = _config("hidden gradient", rows, experts, tensors, sizes)
    dots = None
    if need_dots:
        parts = triton.cdiv(columns, config.columns) + (b_down is not None)
        dots = pre.new_empty((rows, parts), dtype=torch.float32)
    counts = (grad.shape[0], 0 if dots is None else dots.shape[1])
    if pre.numel() > 0:
        _walk(_hidden_gradient_kernel, config, schedules, (*tensors, dots), counts, sizes, **_unit(activation))
    if need_dots and b_down is not None and rows > 0:
        schedule, slots = schedules.of(config.rows)
        with on(grad.device):
            _bias_dots_kernel[(slots,)](
                schedule, grad, b_down, source, dots, *counts, depth, grad.stride(0), b_down.stride(0),
                ROWS=config.rows, COLUMNS=DOTS_ELEMENTS // config.rows,
            )  # fmt: skip
    return grad_pre, hidden, dots


def _layer_backward(
    grad: Tensor, x: Tensor, pre: Tensor, w_gate_up: Tensor, w_down: Tensor, b_down: Tensor | None, offsets: Tensor,
    source: Tensor | None, weights: Tensor | None, activation: int, needs: tuple[bool, ...], dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The gradients of each row's x (N, H) in a dtype, of weights and biases, and the parts of those of `weights`.

    needs: of x, w_gate_up, w_down, b_gate_up, b_down, and of `weights`.
    """
    grad, x, w_gate_up, w_down, b_down = (readable(t) for t in (grad, x, w_gate_up, w_down, b_down))
    need_x, need_gate_up, need_down, need_b_gate_up, need_b_down, need_weights = needs
    rows = pre.shape[0]
    grads = [x.new_empty((0,)) for _ in range(5)]
    dots = None
    if any(needs[:4]) or need_weights:
        used = Schedules(offsets, rows, unused=False)
        grad_pre, hidden, dots = _hidden_gradient(
            grad, w_down, b_down, pre.contiguous(), used, source, weights, activation, need_down, need_weights
        )
        if need_x:
            # Without a source x has a row for every one here, those that no expert uses included: gradient 0.
            every = Schedules(offsets, rows, unused=True) if source is None else used
            grads[0] = _rows(every, grad_pre, w_gate_up, None, dtype, forward=False)
        if need_gate_up:
            grads[1] = _weight_gradient(grad_pre, x, offsets, rows, None, source)
        if need_down:
            grads[2] = _weight_gradient(grad, hidden, offsets, rows, source, None)
        if need_b_gate_up:
            grads[3] = _bias_gradient(grad_pre, offsets, rows, None, None)
    if need_b_down:
        grads[4] = _bias_gradient(grad, offsets, rows, source, weights)
    return *grads, dots


# --- Launchers: the arguments of the ops in csrc/moe_experts.cpp ---


def _check_rows(name: str, x: Tensor, offsets: Tensor) -> None:
    check(x.dim() == 2, f"{name} must have 2 dimensions")
    check(x.dtype in DTYPES, f"{name} must be float32, bfloat16 or float16")
    check(
        offsets.dim() == 1 and offsets.shape[0] >= 1 and offsets.dtype == torch.int32, "offsets must be int32 (E + 1,)"
    )


def _check_weight(name: str, w: Tensor, x: Tensor, offsets: Tensor, columns: int) -> None:
    check(
        w.dim() == 3 and w.shape[0] == offsets.shape[0] - 1 and w.shape[2] == columns and w.dtype == x.dtype,
        f"{name} must have a matrix of {columns} columns for each expert, of the dtype of its input",
    )


def _check_bias(name: str, bias: Tensor | None, w: Tensor) -> None:
    check(
        bias is None or (bias.shape == w.shape[:2] and bias.dtype == w.dtype),
        f"{name} must have an element for every row of its weight, of its dtype",
    )


def _check_layer(x: Tensor, w_gate_up: Tensor, w_down: Tensor, offsets: Tensor, activation: int) -> None:
    _check_rows("x", x, offsets)
    check(0 <= activation < len(EXPERT_ACTIVATIONS), "activation must be an index into EXPERT_ACTIVATIONS")
    _check_weight("w_gate_up", w_gate_up, x, offsets, x.shape[1])
    parts = 2 if activation < len(ACTIVATIONS) else 1
    check(w_gate_up.shape[1] % parts == 0, "w_gate_up must have two rows for each hidden feature of gated experts")
    _check_weight("w_down", w_down, x, offsets, w_gate_up.shape[1] // parts)


def _check_maps(x: Tensor, weights: Tensor, source: Tensor, position: Tensor) -> None:
    check(
        position.dim() == 2 and position.shape[0] == x.shape[0] and position.dtype == torch.int32,
        "position must be int32 (T, K)",
    )
    check(weights.shape == position.shape and weights.dtype == torch.float32, "weights must be float32 (T, K)")
    check(source.dim() == 1 and source.dtype == torch.int32, "source must be int32 (N,)")


def _check_saved(grad: Tensor, pre: Tensor, x: Tensor, outputs: int, rows: int, w_gate_up: Tensor, w_down: Tensor):
    check(grad.shape == (outputs, w_down.shape[1]) and grad.dtype == x.dtype, "grad must match the output")
    check(
        pre.shape == (rows, w_gate_up.shape[1]) and pre.dtype == x.dtype, "pre must be what the forward pass has saved"
    )


def moe_grouped_linear_forward(xs: Tensor, w: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """out (N, O): xs[n] w[e]^T + bias[e] for the rows of each expert, 0 in unused rows."""
    _check_rows("xs", xs, offsets)
    _check_weight("w", w, xs, offsets, xs.shape[1])
    _check_bias("bias", bias, w)
    schedules = Schedules(offsets.contiguous(), xs.shape[0], unused=True)
    return _rows(schedules, readable(xs), readable(w), readable(bias), xs.dtype, forward=True)


def moe_grouped_linear_backward(
    grad: Tensor, xs: Tensor, w: Tensor, offsets: Tensor, need_xs: bool, need_w: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of xs, w and bias; shape (0,) for what is not needed."""
    _check_rows("xs", xs, offsets)
    _check_weight("w", w, xs, offsets, xs.shape[1])
    check(grad.shape == (xs.shape[0], w.shape[1]) and grad.dtype == xs.dtype, "grad must match the output")
    grad, xs, w, offsets, rows = readable(grad), readable(xs), readable(w), offsets.contiguous(), xs.shape[0]
    grads = [xs.new_empty((0,)) for _ in range(3)]
    if need_xs:
        grads[0] = _rows(Schedules(offsets, rows, unused=True), grad, w, None, xs.dtype, forward=False)
    if need_w:
        grads[1] = _weight_gradient(grad, xs, offsets, rows, None, None)
    if need_bias:
        grads[2] = _bias_gradient(grad, offsets, rows, None, None)
    return tuple(grads)


def moe_experts_forward(
    xs: Tensor, w_gate_up: Tensor, w_down: Tensor, b_gate_up: Tensor | None, b_down: Tensor | None, offsets: Tensor,
    activation: int, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(ys (N, J), the pre-activations (N, 2I) or (N, I), or shape (0,) unless `save`)."""
    _check_layer(xs, w_gate_up, w_down, offsets, activation)
    _check_bias("b_gate_up", b_gate_up, w_gate_up)
    _check_bias("b_down", b_down, w_down)
    return _layer_forward(
        xs, w_gate_up, w_down, b_gate_up, b_down, offsets.contiguous(), None, activation, save, xs.dtype
    )


def moe_experts_backward(
    grad: Tensor, xs: Tensor, pre: Tensor, w_gate_up: Tensor, w_down: Tensor, offsets: Tensor, activation: int,
    need_xs: bool, need_gate_up: bool, need_down: bool, need_b_gate_up: bool, need_b_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of xs, w_gate_up, w_down, b_gate_up, b_down; shape (0,) for what is not needed."""
    _check_layer(xs, w_gate_up, w_down, offsets, activation)
    _check_saved(grad, pre, xs, xs.shape[0], xs.shape[0], w_gate_up, w_down)
    needs = (need_xs, need_gate_up, need_down, need_b_gate_up, need_b_down, False)
    *grads, _ = _layer_backward(
        grad, xs, pre, w_gate_up, w_down, None, offsets.contiguous(), None, None, activation, needs, xs.dtype
    )
    return tuple(grads)


def moe_forward(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, b_gate_up: Tensor | None, b_down: Tensor | None, weights: Tensor,
    offsets: Tensor, source: Tensor, position: Tensor, activation: int, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out (T, J), the pre-activations (N, 2I) or (N, I), or shape (0,) unless `save`)."""
    _check_layer(x, w_gate_up, w_down, offsets, activation)
    _check_bias("b_gate_up", b_gate_up, w_gate_up)
    _check_bias("b_down", b_down, w_down)
    _check_maps(x, weights, source, position)
    # The rows in fp32, so that what a token gets is rounded once.
    ys, pre = _layer_forward(
        x, w_gate_up, w_down, b_gate_up, b_down, offsets.contiguous(), source.contiguous(), activation, save,
        torch.float32,
    )  # fmt: skip
    return sum_rows(ys, weights, position, x.dtype), pre


def moe_backward(
    grad: Tensor, x: Tensor, pre: Tensor, w_gate_up: Tensor, w_down: Tensor, b_down: Tensor | None, weights: Tensor,
    offsets: Tensor, source: Tensor, position: Tensor, activation: int, need_x: bool, need_gate_up: bool,
    need_down: bool, need_b_gate_up: bool, need_b_down: bool, need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, w_gate_up, w_down, b_gate_up, b_down, weights; shape (0,) for what is not needed."""
    _check_layer(x, w_gate_up, w_down, offsets, activation)
    _check_bias("b_down", b_down, w_down)
    _check_maps(x, weights, source, position)
    rows = source.shape[0]
    _check_saved(grad, pre, x, x.shape[0], rows, w_gate_up, w_down)
    weights, position = weights.contiguous(), position.contiguous()
    row_weights = weights.new_zeros((rows,))
    blocks = (triton.cdiv(position.numel(), CHOICES),)
    if position.numel() > 0 and rows > 0:
        with on(x.device):
            _row_weights_kernel[blocks](weights, position, row_weights, position.numel(), rows, BLOCK=CHOICES)
    needs = (need_x, need_gate_up, need_down, need_b_gate_up, need_b_down, need_weights)
    grad_rows, *grads, dots = _layer_backward(
        grad, x, pre, w_gate_up, w_down, b_down, offsets.contiguous(), source.contiguous(), row_weights, activation,
        needs, torch.float32,
    )  # fmt: skip
    grad_x = sum_rows(grad_rows, None, position, x.dtype) if need_x else x.new_empty((0,))
    grad_weights = weights.new_empty(position.shape if need_weights else (0,))
    if grad_weights.numel() > 0:
        with on(x.device):
            _choice_dots_kernel[blocks](
                dots, position, grad_weights, position.numel(), rows, dots.shape[1], BLOCK=CHOICES
            )
    return grad_x, *grads, grad_weights
