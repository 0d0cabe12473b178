"""Modules: what models are built with."""

from .deberta import DisentangledAttention as DisentangledAttention
from .gated_mlp import GatedMLP as GatedMLP
from .moe import MoE as MoE
from .multihead import MultiheadAttention as MultiheadAttention
from .positions import ALiBi as ALiBi
from .positions import T5Bias as T5Bias
from .rotary import RotaryEmbedding as RotaryEmbedding
from .transformer_xl import TransformerXLAttention as TransformerXLAttention
from .xlnet import XLNetAttention as XLNetAttention
