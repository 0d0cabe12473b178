"""Dispatch and combine, the specification: plain PyTorch on the flat problems, differentiable at any order.

dispatch gathers the rows of each expert, combine sums what comes back per token. Both in fp32 (fp64 for fp64), rounded
once.

Source: Shazeer et al., "Outrageously large neural networks" (2017), eq. 1 and section 3.
"""

import torch
from torch import Tensor

from .._primitives import CombineProblem, DispatchProblem, MoEProblem, acc_dtype


def dispatch(problem: DispatchProblem) -> Tensor:
    """Forward pass of `DispatchProblem`: (N, H) in x's dtype."""
    # In fp32, so that a token's gradient, a sum over its rows, is rounded once.
    return rows(padded(problem.x), problem.source).to(problem.x.dtype)


def combine(problem: CombineProblem) -> Tensor:
    """Forward pass of `CombineProblem`: (T, J) in the dtype of ys."""
    return combined(problem.ys, problem).to(problem.ys.dtype)


def padded(x: Tensor) -> Tensor:
    """x in the accumulation dtype, with a row of zeros at the end."""
    x = x.to(acc_dtype(x.dtype))
    return torch.cat([x, x.new_zeros(1, x.shape[1])])


def rows(padded: Tensor, index: Tensor) -> Tensor:
    """The rows of that index; -1 finds the zeros.

    Not padded[index], whose gradient on the CPU adds up in the order in which threads come by.
    """
    return padded.index_select(0, index.to(torch.int64) % padded.shape[0])


def combined(ys: Tensor, problem: CombineProblem | MoEProblem) -> Tensor:
    """sum_k weights[:, k] ys[position[:, k]], added in the order of k; in the accumulation dtype."""
    ys, position = padded(ys), problem.position
    out = ys.new_zeros(position.shape[0], ys.shape[1])
    for column in range(position.shape[1]):
        part = rows(ys, position[:, column])
        out = out + (part if problem.weights is None else problem.weights[:, column, None].to(ys.dtype) * part)
    return out
