"""The experts of a mixture, the specification: plain PyTorch on the flat problems, differentiable at any order.

Experts run a feed-forward layer of their own, each on its rows. In fp32 (fp64 for fp64), each public step rounded once.

Sources:
    gated experts: as in Mixtral (Jiang et al., 2024), section 2.1; the units are those of `reference.glu`
    experts that are not gated: Fedus et al., "Switch Transformers" (2021), section 2.1
"""

import itertools

import torch
from torch import Tensor

from .. import _checks
from .._primitives import (
    ACTIVATIONS,
    ExpertsProblem,
    GroupedLinearProblem,
    MoEProblem,
    acc_dtype,
)
from .glu import gated
from .moe_dispatch import combined, padded, rows


def grouped_linear(problem: GroupedLinearProblem) -> Tensor:
    """Forward pass of `GroupedLinearProblem`: (N, O) in the dtype of xs."""
    xs = problem.xs.to(acc_dtype(problem.xs.dtype))
    with _checks.without_autocast(xs.device):
        return _grouped(xs, problem.w, problem.bias, problem.offsets).to(problem.xs.dtype)


def experts(problem: ExpertsProblem) -> Tensor:
    """Forward pass of `ExpertsProblem`: ys (N, J) in the dtype of xs."""
    with _checks.without_autocast(problem.xs.device):
        return _experts(problem.xs.to(acc_dtype(problem.xs.dtype)), problem).to(problem.xs.dtype)


def forward(problem: MoEProblem) -> Tensor:
    """Forward pass of `MoEProblem`: out (T, J) in x's dtype."""
    with _checks.without_autocast(problem.x.device):
        xs = rows(padded(problem.x), problem.source)
        return combined(_experts(xs, problem), problem).to(problem.x.dtype)


def _experts(xs: Tensor, problem: ExpertsProblem | MoEProblem) -> Tensor:
    pre = _grouped(xs, problem.w_gate_up, problem.b_gate_up, problem.offsets)
    unit = problem.activation % len(ACTIVATIONS)
    if problem.activation < len(ACTIVATIONS):
        hidden = gated(*pre.chunk(2, dim=-1), unit)
    else:
        hidden = gated(pre, pre.new_ones(()), unit)  # act(pre) * 1
    return _grouped(hidden, problem.w_down, problem.b_down, problem.offsets)


def _grouped(xs: Tensor, w: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """xs[n] w[e]^T + bias[e] for the rows of each expert, 0 in unused rows; in the dtype of xs."""
    weights = w.to(xs.dtype).unbind(0)
    biases = [None] * len(weights) if bias is None else bias.to(xs.dtype).unbind(0)
    unused = xs.new_zeros(xs.shape[0], w.shape[1])
    if _checks.is_readable(offsets):
        bounds = offsets.tolist()
        parts = zip(itertools.pairwise(bounds), weights, biases, strict=True)
        outs = [_linear(xs[begin:end], weight, shift) for (begin, end), weight, shift in parts]
        return torch.cat([*outs, unused[bounds[-1] :]])
    # Where reading the offsets would break a graph or wait for a device, all rows go through every expert.
    row = torch.arange(xs.shape[0], device=xs.device)[:, None]
    xs = torch.where(row < offsets[-1], xs, 0.0)
    out = unused
    for expert, (weight, shift) in enumerate(zip(weights, biases, strict=True)):
        inside = (row >= offsets[expert]) & (row < offsets[expert + 1])
        out = torch.where(inside, _linear(xs, weight, shift), out)
    return out


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = x @ weight.T
    return out if bias is None else out + bias
