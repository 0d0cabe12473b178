"""Chinchilla, Sparrow: the relative positions of Transformer-XL behind RMSNorm."""

from __future__ import annotations

import torch

from support.blocks import DecoderBlock
from support.systems import BATCH, LENGTH, block_agrees

FAMILY = "Chinchilla, Sparrow"


def test_block():
    block = DecoderBlock("transformer_xl", rms=True)
    block_agrees(block, (torch.randn(BATCH, LENGTH, 32),), family=FAMILY, name="block of the paper")
