"""GLIDE, Latent/Stable Diffusion, Imagen: image tokens attend to themselves and to a text; GEGLU, value first."""

from __future__ import annotations

import pytest
import torch

from support.blocks import ImageBlock
from support.systems import BATCH, block_agrees

FAMILY = "GLIDE, Latent/Stable Diffusion, Imagen"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_block(dtype):
    inputs = (torch.randn(BATCH, 9 * 9, 32), torch.randn(BATCH, 17, 24))
    block_agrees(ImageBlock(), inputs, family=FAMILY, name="block of the paper", dtype=dtype)
