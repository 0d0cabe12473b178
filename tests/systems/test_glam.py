"""GLaM: the relative positions of Transformer-XL, and the two best of many gated experts in every other layer."""

from __future__ import annotations

import torch

from support.blocks import DecoderBlock
from support.systems import BATCH, LENGTH, block_agrees

FAMILY = "GLaM"


def test_layers():
    layers = torch.nn.Sequential(DecoderBlock("transformer_xl", experts=4), DecoderBlock("transformer_xl"))

    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            for layer in self.layers:
                layer.fused = self.fused
            return self.layers(x)

    block_agrees(Pair(), (torch.randn(BATCH, LENGTH, 32),), family=FAMILY, name="two layers of the paper")
