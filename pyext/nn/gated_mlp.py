"""`GatedMLP`: the gated feed-forward layer of LLaMA, Gemma, T5 v1.1 and their relatives as a module."""

import torch
from torch import Tensor, nn

from .. import _checks
from .._primitives import ACTIVATIONS
from ..ops.gated_linear import gated_mlp


class GatedMLP(nn.Module):
    """down_proj(act(gate_proj(x)) * up_proj(x)), computed by `pyext.gated_mlp`.

    Args:
        hidden_size: features of x and of the result.
        intermediate_size: features between the projections.
        activation: "swiglu" (LLaMA, Mistral, PaLM), "geglu" or "geglu_tanh" (T5 v1.1, Gemma), "reglu".
        bias: whether the projections have biases.
        device, dtype: of the parameters; None = torch's defaults.
    Attributes:
        gate_proj, up_proj, down_proj: `nn.Linear`, named and initialised as in Transformers' `LlamaMLP`, whose
            state_dict fits.
    Raises:
        TypeError, ValueError naming the argument.
    Source: Shazeer, "GLU variants improve Transformer" (2020), eq. 6; Touvron et al., "LLaMA" (2023), section 2.2.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
        self.hidden_size = _checks.length("hidden_size", hidden_size)
        self.intermediate_size = _checks.length("intermediate_size", intermediate_size)
        self.activation = activation
        options = dict(bias=_checks.flag("bias", bias), device=device, dtype=dtype)
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, **options)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, **options)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, **options)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden_size) -> (..., hidden_size) in its dtype."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        return gated_mlp(
            x, gate.weight, up.weight, down.weight, gate.bias, up.bias, down.bias, activation=self.activation
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
