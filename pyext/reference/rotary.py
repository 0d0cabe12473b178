"""Rotary position embedding, the specification: plain PyTorch on the flat problem, differentiable at any order.

(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) for each pair of features: a rotation by an angle in proportion to the
position, so that q_i . k_j depends on i - j only.

Sources:
    the rotation: Su et al., "RoFormer: enhanced transformer with rotary position embedding" (2021), eq. 15 and 34
    neighbours as pairs (interleaved), the first features only: GPT-J's code (Wang and Komatsuzaki, 2021)
    feature k with k + R/2 (half), the first features only: GPT-NeoX-20B (Black et al., 2022), section 2.1 and code
"""

import torch
from torch import Tensor

from .._primitives import RotaryProblem, acc_dtype


def rotary(problem: RotaryProblem) -> Tensor:
    """Forward pass of `RotaryProblem`: (B, H, L, D) in x's dtype; autograd gives the derivatives of every order."""
    x = problem.x
    cos, sin = (_rows(table, problem) for table in (problem.cos, problem.sin))
    if problem.inverse:
        sin = -sin
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].to(cos.dtype), x[..., 2 * half :]
    if problem.interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if problem.interleaved else torch.cat(pair, dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def _rows(table: Tensor, problem: RotaryProblem) -> Tensor:
    """The row of each token, (B|1, 1, L, R/2) in the accumulation dtype."""
    table = table.to(acc_dtype(problem.x.dtype))
    if table.dim() == 2:
        table = table[None]
    if problem.positions is None:
        rows = table[:, : problem.x.shape[2]]
    elif table.shape[0] == 1:
        rows = table[0][problem.positions]
    else:
        batch = torch.arange(table.shape[0], device=table.device)[:, None]
        rows = table[batch, problem.positions]
    return rows[:, None]
