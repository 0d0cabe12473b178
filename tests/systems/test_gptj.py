"""GPT-J: interleaved partial rotary embeddings, attention and feed-forward in parallel."""

from __future__ import annotations

from support.systems import VOCABULARY, agree, generates_alike, padding, tiny, tokens

FAMILY = "GPT-J"


def test_forward_gradients_generation():
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64, resid_pdrop=0,
        embd_pdrop=0, attn_pdrop=0, eos_token_id=None, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model, mask = tiny(GPTJForCausalLM, config), padding(left=True)
    inputs = dict(input_ids=tokens(), attention_mask=mask)
    record = agree(model, inputs, family=FAMILY, name="GPTJForCausalLM", ops=("attention", "rotary"), keep=mask.bool())
    prompt = dict(input_ids=tokens(11), attention_mask=padding(11, (11, 5, 8), left=True))
    generates_alike(model, prompt, record)
