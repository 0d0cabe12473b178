"""GPT-NeoX, Dolly-2: rotary embeddings on a part of each head, attention and feed-forward in parallel."""

from __future__ import annotations

from support.systems import VOCABULARY, agree, generates_alike, padding, tiny, tokens

FAMILY = "GPT-NeoX, Dolly-2"


def test_forward_gradients_generation():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, rotary_pct=0.5, use_parallel_residual=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model, mask = tiny(GPTNeoXForCausalLM, config), padding(left=True)
    inputs = dict(input_ids=tokens(), attention_mask=mask)
    record = agree(
        model, inputs, family=FAMILY, name="GPTNeoXForCausalLM", ops=("attention", "rotary"), keep=mask.bool()
    )
    prompt = dict(input_ids=tokens(11), attention_mask=padding(11, (11, 5, 8), left=True))
    generates_alike(model, prompt, record, kinds=("dynamic", "static"))
