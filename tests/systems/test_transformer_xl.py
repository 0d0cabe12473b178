"""Transformer-XL: a memory of former segments, sinusoids of the distance, u and v; with and without memory."""

from __future__ import annotations

import pytest
import torch

from support.blocks import DecoderBlock
from support.systems import BATCH, LENGTH, block_agrees

FAMILY = "Transformer-XL"


@pytest.mark.parametrize("memory", [0, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_block(memory, dtype):
    inputs = (torch.randn(BATCH, LENGTH, 32), *([torch.randn(BATCH, memory, 32)] if memory else []))
    name = f"block of the paper, memory of {memory}"
    block_agrees(DecoderBlock("transformer_xl"), inputs, family=FAMILY, name=name, dtype=dtype)
