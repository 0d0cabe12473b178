"""Gated linear units, the specification: plain PyTorch on the flat problem, differentiable at any order.

glu(gate, up) = act(gate) * up, computed in fp32 (fp64 for fp64) and rounded once.

Sources:
    the units: Shazeer, "GLU variants improve Transformer" (2020), section 2: GEGLU, SwiGLU (with beta = 1), ReGLU
    GELU, exact and by tanh: Hendrycks and Gimpel, "Gaussian error linear units" (2016), section 2
    SiLU: the same, section 2 and Elfwing et al. (2017), "Sigmoid-weighted linear units", eq. 3
"""

import math

import torch
from torch import Tensor

from .._primitives import ACTIVATIONS, GluProblem, acc_dtype


def glu(problem: GluProblem) -> Tensor:
    """Forward pass of `GluProblem`: (..., N) in gate's dtype; autograd gives the derivatives of every order."""
    gate, up = _parts(problem)
    acc = acc_dtype(gate.dtype)
    return gated(gate.to(acc), up.to(acc), problem.activation).to(gate.dtype)


def gated(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    """act(gate) * up in the dtype they have."""
    return _ACTIVATIONS[ACTIVATIONS[activation]](gate) * up


def _gelu(x: Tensor) -> Tensor:
    """x Phi(x), Phi the distribution function of the standard normal."""
    return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


_ACTIVATIONS = {"geglu": _gelu, "geglu_tanh": _gelu_tanh, "swiglu": _silu, "reglu": torch.relu}


def _parts(problem: GluProblem) -> tuple[Tensor, Tensor]:
    """(gate, up), each (..., N)."""
    gate, up = problem.gate, problem.up
    if up is not None:
        return gate, up
    first, second = (gate[..., 0::2], gate[..., 1::2]) if problem.interleaved else gate.chunk(2, dim=-1)
    return (first, second) if problem.gate_first else (second, first)
