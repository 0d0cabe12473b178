"""T5, mT5, Flan-T5, umT5: bucketed bias, one table for all layers, scale 1, gated GELU."""

from __future__ import annotations

import pytest
import torch

from support.systems import VOCABULARY, agree, generates_alike, padding, tiny, tokens

FAMILY = "T5, mT5, Flan-T5, umT5"
SIZES = dict(
    vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
    relative_attention_num_buckets=8, relative_attention_max_distance=20, decoder_start_token_id=0, pad_token_id=0,
    eos_token_id=None,
)  # fmt: skip
GATED = ("attention", "gated_mlp")


def t5(name="T5", head="ForConditionalGeneration", feed_forward="gated-gelu", **options):
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options}, feed_forward_proj=feed_forward)
    return tiny(getattr(transformers, f"{name}{head}"), config)


def inputs():
    return dict(
        input_ids=tokens(), attention_mask=padding(), decoder_input_ids=tokens(19),
        decoder_attention_mask=padding(19, (19, 7, 12)),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["T5", "MT5", "UMT5"])
def test_models(name):
    given = inputs()
    keep = given["decoder_attention_mask"].bool()
    agree(t5(name), given, family=FAMILY, name=f"{name}ForConditionalGeneration", ops=GATED, keep=keep)


def test_relu():
    agree(t5(feed_forward="relu"), inputs(), family=FAMILY, name="T5ForConditionalGeneration, ReLU")


def test_encoder_alone():
    mask = padding(left=True)
    given = dict(input_ids=tokens(), attention_mask=mask)
    agree(t5(head="EncoderModel"), given, family=FAMILY, name="T5EncoderModel", ops=GATED, keep=mask.bool())


def test_bf16():
    agree(t5(), inputs(), family=FAMILY, name="T5ForConditionalGeneration", ops=GATED, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["T5", "UMT5"])
def test_generation(name):
    model = t5(name)
    record = agree(model, inputs(), family=FAMILY, name=f"{name}ForConditionalGeneration, generating", ops=GATED)
    prompt = dict(input_ids=tokens(13), attention_mask=padding(13, (13, 6, 9)))
    kinds = ("dynamic", "static", "none", "beams") if name == "T5" else ("dynamic",)
    generates_alike(model, prompt, record, kinds=kinds)


def test_gradient_checkpointing():
    model = t5()
    model.gradient_checkpointing_enable()
    given = dict(inputs(), use_cache=False)
    agree(model, given, family=FAMILY, name="T5ForConditionalGeneration, checkpointed", ops=GATED, train=True)
