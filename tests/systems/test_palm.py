"""PaLM: rotary embeddings, one head of keys and values, SwiGLU beside the attention; Falcon, which has most of it."""

from __future__ import annotations

import pytest
import torch

from support.blocks import DecoderBlock
from support.systems import BATCH, LENGTH, VOCABULARY, agree, block_agrees, generates_alike, padding, tiny, tokens

FAMILY = "PaLM"
FALCONS = {
    "multi-query": {},
    "groups": dict(new_decoder_architecture=True, num_kv_heads=2),
    "ALiBi": dict(alibi=True, multi_query=False),
}


def test_block():
    block = DecoderBlock("rotary", kv_heads=1, activation="silu", parallel=True)
    block_agrees(block, (torch.randn(BATCH, LENGTH, 32),), family=FAMILY, name="block of the paper")


@pytest.mark.parametrize("kind", list(FALCONS))
def test_falcon(kind):
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, eos_token_id=None,
        bos_token_id=1, pad_token_id=0, **FALCONS[kind],
    )  # fmt: skip
    model, mask = tiny(FalconForCausalLM, config), padding(left=True)
    inputs = dict(input_ids=tokens(), attention_mask=mask)
    ops = ("attention",) if kind == "ALiBi" else ("attention", "rotary")
    record = agree(model, inputs, family=FAMILY, name=f"FalconForCausalLM, {kind}", ops=ops, keep=mask.bool())
    prompt = dict(input_ids=tokens(11), attention_mask=padding(11, (11, 5, 8), left=True))
    generates_alike(model, prompt, record)
