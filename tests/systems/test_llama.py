"""LLaMA, Alpaca, Koala: rotary embeddings (llama3 and YaRN scaling), grouped heads, SwiGLU."""

from __future__ import annotations

import pytest
import torch

from support.systems import VOCABULARY, agree, generates_alike, padding, tiny, tokens

FAMILY = "LLaMA, Alpaca, Koala"
OPS = ("attention", "rotary", "gated_mlp")
SCALING = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip


def llama(scaling="default"):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rope_parameters=SCALING[scaling], eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return tiny(LlamaForCausalLM, config)


@pytest.mark.parametrize("scaling", list(SCALING))
def test_forward_and_gradients(scaling):
    mask = padding()
    inputs, name = dict(input_ids=tokens(), attention_mask=mask), f"LlamaForCausalLM, {scaling}"
    agree(llama(scaling), inputs, family=FAMILY, name=name, ops=OPS, keep=mask.bool())


def test_packed_sequences():
    """Positions that start again: each sequence by itself, as a mask of documents."""
    positions = torch.cat([torch.arange(n) for n in (9, 15, 13)]).expand(3, -1)
    inputs = dict(input_ids=tokens(), position_ids=positions)
    agree(llama(), inputs, family=FAMILY, name="LlamaForCausalLM, packed", ops=OPS)


def test_bf16():
    mask = padding(left=True)
    inputs = dict(input_ids=tokens(), attention_mask=mask)
    agree(llama(), inputs, family=FAMILY, name="LlamaForCausalLM", ops=OPS, keep=mask.bool(), dtype=torch.bfloat16)


def test_generation():
    model, mask = llama(), padding(13, (13, 9, 4), left=True)
    record = agree(model, dict(input_ids=tokens()), family=FAMILY, name="LlamaForCausalLM, no padding", ops=OPS)
    kinds = ("dynamic", "static", "none", "beams")
    generates_alike(model, dict(input_ids=tokens(13), attention_mask=mask), record, kinds=kinds)
