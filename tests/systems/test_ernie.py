"""ERNIE (Tsinghua): tokens and entities attend separately, a layer fuses them."""

from __future__ import annotations

import torch

from support.blocks import ErnieBlock
from support.systems import BATCH, LENGTH, PADDED, block_agrees

FAMILY = "ERNIE (Tsinghua)"


def test_block():
    there = torch.rand(BATCH, LENGTH) < 0.3
    there[:, 0] = True
    inputs = (torch.randn(BATCH, LENGTH, 32), torch.randn(BATCH, LENGTH, 32), torch.tensor(PADDED), there)
    block_agrees(ErnieBlock(), inputs, family=FAMILY, name="block of the paper")
