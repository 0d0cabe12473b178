"""SantaCoder: one head of keys and values for all queries, causal."""

from __future__ import annotations

from support.systems import VOCABULARY, agree, generates_alike, padding, tiny, tokens

FAMILY = "SantaCoder"


def test_forward_gradients_generation():
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    config = GPTBigCodeConfig(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, multi_query=True, resid_pdrop=0,
        embd_pdrop=0, attn_pdrop=0, eos_token_id=None, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model, mask = tiny(GPTBigCodeForCausalLM, config), padding(left=True)
    inputs = dict(input_ids=tokens(), attention_mask=mask)
    record = agree(model, inputs, family=FAMILY, name="GPTBigCodeForCausalLM", keep=mask.bool())
    prompt = dict(input_ids=tokens(11), attention_mask=padding(11, (11, 5, 8), left=True))
    generates_alike(model, prompt, record, kinds=("dynamic", "static"))
