"""GPT, GPT-2, InstructGPT: causal attention with a KV cache."""

from __future__ import annotations

from support.systems import VOCABULARY, agree, generates_alike, padding, tiny, tokens

FAMILY = "GPT, GPT-2, InstructGPT"
SIZES = dict(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0)


def gpt2(**options):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(**SIZES, attn_pdrop=0, eos_token_id=None, bos_token_id=1, pad_token_id=0, **options)
    return tiny(GPT2LMHeadModel, config)


def test_gpt():
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    mask = padding()
    inputs = dict(input_ids=tokens(), attention_mask=mask)
    model = tiny(OpenAIGPTLMHeadModel, OpenAIGPTConfig(**SIZES, attn_pdrop=0))
    agree(model, inputs, family=FAMILY, name="OpenAIGPTLMHeadModel", keep=mask.bool())


def test_gpt2():
    mask = padding(left=True)
    inputs = dict(input_ids=tokens(), attention_mask=mask)
    record = agree(gpt2(), inputs, family=FAMILY, name="GPT2LMHeadModel", keep=mask.bool())
    prompt = dict(input_ids=tokens(11), attention_mask=padding(11, (11, 5, 8), left=True))
    generates_alike(gpt2(), prompt, record, kinds=("dynamic", "static"))


def test_gpt2_with_scales_by_layer():
    model = gpt2(scale_attn_by_inverse_layer_idx=True)
    agree(model, dict(input_ids=tokens()), family=FAMILY, name="GPT2LMHeadModel, scaled by layer")
