"""Encoder and decoder with cross attention: BART, and Marian for the Transformer of 2017."""

from __future__ import annotations

import pytest

from support.systems import VOCABULARY, agree, generates_alike, padding, tiny, tokens

FAMILIES = {"Bart": "BART", "Marian": "Transformer (2017)"}
SIZES = dict(
    vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, dropout=0.0,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
)  # fmt: skip


def model(name):
    import transformers

    config = getattr(transformers, f"{name}Config")(**SIZES)
    head = "ForConditionalGeneration" if name == "Bart" else "MTModel"
    return tiny(getattr(transformers, f"{name}{head}"), config)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_forward_gradients_generation(name):
    net, kept = model(name), padding(19, (19, 7, 12))
    inputs = dict(
        input_ids=tokens(), attention_mask=padding(), decoder_input_ids=tokens(19), decoder_attention_mask=kept
    )
    record = agree(net, inputs, family=FAMILIES[name], name=type(net).__name__, keep=kept.bool())
    prompt = dict(input_ids=tokens(13), attention_mask=padding(13, (13, 6, 9)))
    generates_alike(net, prompt, record, kinds=("dynamic", "static", "beams"))
