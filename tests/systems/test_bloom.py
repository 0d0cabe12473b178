"""BLOOM: ALiBi, as slopes where tokens stand side by side, else as one row of values per sequence and head."""

from __future__ import annotations

import pytest
import torch

from support.systems import BATCH, LENGTH, VOCABULARY, agree, generates_alike, padding, tiny, tokens

FAMILY = "BLOOM"


def bloom(heads=4):
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(
        vocab_size=VOCABULARY, hidden_size=8 * heads, n_layer=2, n_head=heads, eos_token_id=None, bos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    return tiny(BloomForCausalLM, config)


@pytest.mark.parametrize("side", ["left", "right", "none", "gaps"])
def test_padding(side):
    mask = padding(left=side == "left") if side != "none" else torch.ones(BATCH, LENGTH, dtype=torch.long)
    if side == "gaps":
        mask = (torch.rand(BATCH, LENGTH) < 0.6).long()
        mask[:, 0] = 1
    inputs = dict(input_ids=tokens(), attention_mask=mask)
    agree(bloom(), inputs, family=FAMILY, name=f"BloomForCausalLM, padding {side}", keep=mask.bool())


def test_heads_that_are_no_power_of_two():
    agree(bloom(6), dict(input_ids=tokens()), family=FAMILY, name="BloomForCausalLM, 6 heads")


def test_bf16():
    inputs = dict(input_ids=tokens())
    agree(bloom(), inputs, family=FAMILY, name="BloomForCausalLM", dtype=torch.bfloat16)


def test_generation():
    model = bloom()
    record = agree(model, dict(input_ids=tokens()), family=FAMILY, name="BloomForCausalLM, generating")
    prompt = dict(input_ids=tokens(11), attention_mask=padding(11, (11, 5, 8), left=True))
    generates_alike(model, prompt, record, kinds=("dynamic", "none", "beams"))
