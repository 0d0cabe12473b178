"""Gated feed-forward layers, the specification: plain PyTorch on the flat problems, differentiable at any order.

gated_linear(x) = act(x w_gate^T + b_gate) * (x w_up^T + b_up); gated_mlp(x) = gated_linear(x) w_down^T + b_down. All in
fp32 (fp64 for fp64), rounded once.

Source: Shazeer, "GLU variants improve Transformer" (2020), eq. 5 and 6; biases as in section 2.
"""

from torch import Tensor

from .._checks import without_autocast
from .._primitives import GatedLinearProblem, GatedMLPProblem, acc_dtype
from .glu import gated


def gated_linear(problem: GatedLinearProblem) -> Tensor:
    """Forward pass of `GatedLinearProblem`: (M, N) in x's dtype."""
    with without_autocast(problem.x.device):
        return _hidden(problem).to(problem.x.dtype)


def gated_mlp(problem: GatedMLPProblem) -> Tensor:
    """Forward pass of `GatedMLPProblem`: (M, J) in x's dtype."""
    with without_autocast(problem.x.device):
        return _linear(_hidden(problem), problem.w_down, problem.b_down).to(problem.x.dtype)


def _hidden(problem: GatedLinearProblem | GatedMLPProblem) -> Tensor:
    """(M, N) in the accumulation dtype."""
    x = problem.x.to(acc_dtype(problem.x.dtype))
    if problem.w_up is None:
        gate, up = _linear(x, problem.w_gate, problem.b_gate).chunk(2, dim=-1)
    else:
        gate = _linear(x, problem.w_gate, problem.b_gate)
        up = _linear(x, problem.w_up, problem.b_up)
    return gated(gate, up, problem.activation)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias in the dtype of x."""
    out = x @ weight.to(x.dtype).T
    return out if bias is None else out + bias.to(x.dtype)
