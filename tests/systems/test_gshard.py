"""GShard: the two best experts, the second kept by chance, each with a capacity per group."""

from __future__ import annotations

import pytest
import torch

import pyext
from support.blocks import GShardLayer
from support.systems import BATCH, LENGTH, agree, block_agrees, padding, tiny, tokens

FAMILY = "GShard"


def test_layer():
    block_agrees(GShardLayer(), (torch.randn(BATCH, LENGTH, 32),), family=FAMILY, name="layer of the paper")


@pytest.mark.parametrize("capacity", [64, 24], ids=["all kept", "some dropped"])
def test_nllb(capacity):
    from transformers import NllbMoeConfig, NllbMoeModel

    config = NllbMoeConfig(
        vocab_size=61, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_experts=4, expert_capacity=capacity,
        encoder_sparse_step=2, decoder_sparse_step=2, dropout=0.0, attention_dropout=0.0, moe_token_dropout=0.0,
    )  # fmt: skip
    if capacity < 64:
        config.moe_eval_capacity_token_fraction = -1.0
    model, mask = tiny(NllbMoeModel, config), padding()
    inputs = dict(input_ids=tokens(), attention_mask=mask, decoder_input_ids=tokens(19))
    agree(model, inputs, family=FAMILY, name="NllbMoeModel", ops=("attention", "moe.route", "moe.forward"))
    report = pyext.integrations.transformers.patch(model)
    for part in ("NllbMoeExperts", "NllbMoeTop2Router"):
        assert ("mixture of experts", part) in report.replaced
