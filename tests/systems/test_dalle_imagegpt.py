"""DALL-E, ImageGPT: row, column and convolutional masks over text and image tokens; ImageGPT as published."""

from __future__ import annotations

import pytest
import torch

import pyext
from support.systems import agree, mask_agrees, tiny, tokens

FAMILY = "DALL·E, ImageGPT"
TEXT, SIDE, KERNEL = 11, 12, 5


@pytest.mark.parametrize("kind", ["rows", "columns", "conv"])
def test_masks(kind):
    length = TEXT + SIDE * SIDE
    i, j = torch.arange(length).view(-1, 1), torch.arange(length)
    row_i, row_j, column_i, column_j = (
        x // SIDE if n < 2 else x % SIDE for n, x in enumerate((i - TEXT, j - TEXT) * 2)
    )
    near = {
        "rows": row_i == row_j,
        "columns": column_i == column_j,
        "conv": ((row_i - row_j).abs() <= KERNEL // 2) & ((column_i - column_j).abs() <= KERNEL // 2),
    }[kind]
    visible = (j <= i) & ((j < TEXT) | (near & (i >= TEXT)))
    extra = (KERNEL,) if kind == "conv" else ()
    mask = pyext.masks.causal() & getattr(pyext.masks, f"image_{kind}")(TEXT, SIDE, *extra)
    mask_agrees(mask, visible, family=FAMILY, name=f"{kind} of {SIDE} x {SIDE} tokens")


def test_image_gpt():
    from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

    config = ImageGPTConfig(
        vocab_size=62, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = tiny(ImageGPTForCausalImageModeling, config)
    agree(model, dict(input_ids=tokens()), family=FAMILY, name="ImageGPTForCausalImageModeling")
