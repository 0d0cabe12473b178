"""LaMDA: T5's table in a decoder, a gated GELU."""

from __future__ import annotations

import pytest
import torch

from support.blocks import DecoderBlock
from support.systems import BATCH, LENGTH, block_agrees

FAMILY = "LaMDA"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_block(dtype):
    inputs = (torch.randn(BATCH, LENGTH, 32),)
    block_agrees(DecoderBlock("t5"), inputs, family=FAMILY, name="block of the paper", dtype=dtype)
