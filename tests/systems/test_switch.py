"""Switch Transformer: one expert per token with a capacity per sequence, T5's bias."""

from __future__ import annotations

import torch

from support.systems import VOCABULARY, agree, generates_alike, padding, tiny, tokens

FAMILY = "Switch Transformer"
OPS = ("attention", "moe.route", "moe.forward")


def switch(capacity):
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    config = SwitchTransformersConfig(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
        num_experts=4, expert_capacity=capacity, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return tiny(SwitchTransformersForConditionalGeneration, config)


def test_forward_gradients_generation():
    """Capacity 5 drops tokens. Padding stands behind what counts, so that it takes no token's slot."""
    inputs = dict(input_ids=tokens(), attention_mask=padding(), decoder_input_ids=tokens(19))
    model = switch(5)
    record = agree(model, inputs, family=FAMILY, name="SwitchTransformersForConditionalGeneration", ops=OPS)
    prompt = dict(input_ids=tokens(13), attention_mask=padding(13, (13, 6, 9)))
    generates_alike(model, prompt, record, kinds=("dynamic",))


def test_router_losses_are_recorded():
    from support.systems import patched

    model = switch(64)
    inputs = dict(input_ids=tokens(), decoder_input_ids=tokens(19), output_router_logits=True)
    theirs, ours = model(**inputs), patched(model)(**inputs)
    for name in ("encoder_router_logits", "decoder_router_logits"):
        for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
