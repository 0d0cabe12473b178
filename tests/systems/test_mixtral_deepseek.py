"""Mixtral, DeepSeek-style: dropless experts; routing by sigmoid with a bias and groups; heads of unequal widths."""

from __future__ import annotations

import torch

from support.systems import VOCABULARY, agree, generates_alike, padding, tiny, tokens

FAMILY = "Mixtral, DeepSeek-style"
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, eos_token_id=None, pad_token_id=0,
)  # fmt: skip


def mixtral(**options):
    from transformers import MixtralConfig, MixtralForCausalLM

    return tiny(MixtralForCausalLM, MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, **options))


def deepseek():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **SIZES, num_key_value_heads=4, moe_intermediate_size=24, first_k_dense_replace=1, n_routed_experts=8,
        n_shared_experts=1, num_experts_per_tok=3, n_group=4, topk_group=2, kv_lora_rank=16, q_lora_rank=12,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12, rope_interleave=False,
    )  # fmt: skip
    return tiny(DeepseekV3ForCausalLM, config)


def test_mixtral():
    mask = padding(left=True)
    inputs = dict(input_ids=tokens(), attention_mask=mask)
    ops = ("attention", "rotary", "moe.forward")
    record = agree(mixtral(), inputs, family=FAMILY, name="MixtralForCausalLM", ops=ops, keep=mask.bool())
    prompt = dict(input_ids=tokens(11), attention_mask=padding(11, (11, 5, 8), left=True))
    generates_alike(mixtral(), prompt, record, kinds=("dynamic", "static"))


def test_sliding_window():
    inputs = dict(input_ids=tokens())
    model = mixtral(sliding_window=6)
    record = agree(model, inputs, family=FAMILY, name="MixtralForCausalLM, window", ops=("attention",))
    generates_alike(model, dict(input_ids=tokens(11)), record, kinds=("dynamic", "static"))


def test_deepseek():
    mask = padding()
    inputs = dict(input_ids=tokens(), attention_mask=mask)
    ops = ("attention", "gated_mlp", "moe.forward")
    record = agree(deepseek(), inputs, family=FAMILY, name="DeepseekV3ForCausalLM", ops=ops, keep=mask.bool())
    generates_alike(deepseek(), dict(input_ids=tokens(11)), record)


def test_experts_with_a_gate_of_their_own():
    """gpt-oss: interleaved, transposed, clamped, with biases, sinks and a window in every second layer."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=5,
    )  # fmt: skip
    model, mask = tiny(GptOssForCausalLM, config), padding()
    inputs = dict(input_ids=tokens(), attention_mask=mask)
    ops = ("attention", "moe.grouped_linear", "moe.combine")
    agree(model, inputs, family=FAMILY, name="GptOssForCausalLM", ops=ops, keep=mask.bool())


def test_sharded_experts():
    """Indices beyond the experts of this rank stand for those of other ranks and add nothing."""
    import pyext

    model = mixtral()
    experts = model.model.layers[0].mlp.experts
    x, weights = torch.randn(7, 32), torch.rand(7, 2)
    index = torch.randint(0, 6, (7, 2))
    forward = pyext.integrations.transformers.experts_forward
    got = forward(experts, x, index, weights)
    wanted = forward(experts, x, index.clamp(max=3), weights.masked_fill(index > 3, 0.0))
    torch.testing.assert_close(got, wanted)
