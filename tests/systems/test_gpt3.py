"""GPT-3: alternating dense and locally banded attention; the strided and fixed masks of the Sparse Transformer."""

from __future__ import annotations

import pytest
import torch

import pyext
from support.systems import VOCABULARY, agree, generates_alike, mask_agrees, padding, tiny, tokens

FAMILY = "GPT-3"


def gpt_neo():
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=5, max_position_embeddings=64, eos_token_id=None, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return tiny(GPTNeoForCausalLM, config)


def test_gpt_neo():
    mask = padding()
    inputs = dict(input_ids=tokens(), attention_mask=mask)
    record = agree(gpt_neo(), inputs, family=FAMILY, name="GPTNeoForCausalLM", keep=mask.bool())
    prompt = dict(input_ids=tokens(11), attention_mask=padding(11, (11, 5, 8), left=True))
    generates_alike(gpt_neo(), prompt, record)


@pytest.mark.parametrize("stride", [4, 7])
@pytest.mark.parametrize("kind", ["strided", "fixed"])
def test_sparse_masks(kind, stride):
    length = 150  # more than one block
    i, j = torch.arange(length).view(-1, 1), torch.arange(length)
    if kind == "strided":
        sparse = (i - j < stride) | ((i - j) % stride == 0)
    else:
        sparse = (i // stride == j // stride) | (j % stride >= stride - 1)
    mask = pyext.masks.causal() & getattr(pyext.masks, kind)(stride)
    mask_agrees(mask, sparse & (j <= i), family=FAMILY, name=f"{kind} mask, stride {stride}")
