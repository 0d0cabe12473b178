"""DeBERTa v1, v2, v3: content to position and back, log buckets, shared or separate projections."""

from __future__ import annotations

import pytest
import torch

from support.systems import VOCABULARY, agree, padding, tiny, tokens

FAMILY = "DeBERTa v1, v2/v3"
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=64, relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0,
)  # fmt: skip
KINDS = {
    "v3": dict(position_buckets=8, share_att_key=True, norm_rel_ebd="layer_norm"),
    "v2": dict(position_buckets=8, share_att_key=False, norm_rel_ebd="layer_norm", conv_kernel_size=3),
    "v2, clipped": dict(position_buckets=-1, max_relative_positions=12),
    "v2, c2p": dict(position_buckets=8, pos_att_type=["c2p"]),
    "v2, no positions": dict(relative_attention=False, pos_att_type=[]),
}


def v2(kind):
    from transformers import DebertaV2Config, DebertaV2Model

    return tiny(DebertaV2Model, DebertaV2Config(**{**SIZES, **KINDS[kind]}))


def v1(**options):
    from transformers import DebertaConfig, DebertaModel

    return tiny(DebertaModel, DebertaConfig(**{**SIZES, **options}))


@pytest.mark.parametrize("kind", list(KINDS))
def test_v2(kind):
    mask = padding()
    inputs = dict(input_ids=tokens(), attention_mask=mask)
    agree(v2(kind), inputs, family=FAMILY, name=f"DebertaV2Model, {kind}", keep=mask.bool())


@pytest.mark.parametrize("terms", [["c2p", "p2c"], ["c2p"], ["p2c"]], ids="+".join)
def test_v1(terms):
    mask = padding()
    inputs = dict(input_ids=tokens(), attention_mask=mask)
    model = v1(pos_att_type=terms, max_relative_positions=20)
    agree(model, inputs, family=FAMILY, name=f"DebertaModel, {'+'.join(terms)}", keep=mask.bool())


def test_v1_without_padding():
    agree(v1(), dict(input_ids=tokens()), family=FAMILY, name="DebertaModel, no padding")


def test_bf16():
    mask = padding()
    inputs = dict(input_ids=tokens(), attention_mask=mask)
    agree(v2("v3"), inputs, family=FAMILY, name="DebertaV2Model, v3", keep=mask.bool(), dtype=torch.bfloat16)


def test_what_it_refuses():
    import pyext

    model = v1(talking_head=True)
    report = pyext.integrations.transformers.patch(model)
    assert any("talking heads" in why for _, _, why in report.left)
