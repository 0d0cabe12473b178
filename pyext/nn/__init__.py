"""Modules: what models are built with."""

from .rotary import RotaryEmbedding as RotaryEmbedding
