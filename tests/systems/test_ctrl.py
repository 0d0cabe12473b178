"""CTRL: causal attention behind control codes."""

from __future__ import annotations

from support.systems import VOCABULARY, agree, generates_alike, padding, tiny, tokens

FAMILY = "CTRL"


def test_forward_gradients_generation():
    from transformers import CTRLConfig, CTRLLMHeadModel

    config = CTRLConfig(
        vocab_size=VOCABULARY, n_embd=32, dff=48, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model, mask = tiny(CTRLLMHeadModel, config), padding()
    inputs = dict(input_ids=tokens(), attention_mask=mask)
    record = agree(model, inputs, family=FAMILY, name="CTRLLMHeadModel", keep=mask.bool())
    prompt = dict(input_ids=tokens(11), attention_mask=padding(11, (11, 5, 8), left=True))
    generates_alike(model, prompt, record)
