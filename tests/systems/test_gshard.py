"""GShard: the two best experts, the second kept by chance, each with a capacity per group."""

from __future__ import annotations

import torch

import pyext
from support.blocks import GShardLayer
from support.systems import BATCH, LENGTH, agree, block_agrees, padding, tiny, tokens

FAMILY = "GShard"


def test_layer():
    block_agrees(GShardLayer(), (torch.randn(BATCH, LENGTH, 32),), family=FAMILY, name="layer of the paper")


def test_nllb():
    """All of NLLB but its router."""
    from transformers import NllbMoeConfig, NllbMoeModel

    config = NllbMoeConfig(
        vocab_size=61, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_experts=4, expert_capacity=64,
        encoder_sparse_step=2, decoder_sparse_step=2, dropout=0.0, attention_dropout=0.0, moe_token_dropout=0.0,
    )  # fmt: skip
    model, mask = tiny(NllbMoeModel, config), padding()
    inputs = dict(input_ids=tokens(), attention_mask=mask, decoder_input_ids=tokens(19))
    agree(model, inputs, family=FAMILY, name="NllbMoeModel")
    report = pyext.integrations.transformers.patch(model)
    assert ("mixture of experts", "NllbMoeExperts") in report.replaced
