"""Attention with structured position biases and masks for PyTorch, fast on the CPU, forward and backward.

    import pyext
    out = pyext.attention(q, k, v, bias=pyext.bias.t5(table, bidirectional=True), mask=pyext.masks.padding(lengths))

`python -m pyext` shows which backends this installation has, and checks them.
"""

from . import _native as _native  # first: its warning points at whoever imports this package
from . import bias, distributed, flash_attn_interface, integrations, masks, moe, nn
from ._dispatch import explain
from .ops.attention import attention, varlen_attention
from .ops.gated_linear import gated_linear, gated_mlp
from .ops.glu import geglu, reglu, swiglu
from .ops.rotary import Rotary, rotary

__version__ = "0.1.0"
__all__ = [
    "Rotary", "__version__", "attention", "bias", "distributed", "explain", "flash_attn_interface", "gated_linear",
    "gated_mlp", "geglu", "integrations", "masks", "moe", "nn", "reglu", "rotary", "swiglu", "varlen_attention",
]  # fmt: skip
