"""BERT and its relatives: bidirectional attention, padding, token types, packed sequences."""

from __future__ import annotations

import pytest
import torch

from support.systems import BATCH, LENGTH, VOCABULARY, agree, padding, tiny, tokens

FAMILY = "BERT, RoBERTa, XLM, XLM-R, LaBSE, ALBERT, DistilBERT, ELECTRA"
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=64,
)  # fmt: skip
MODELS = {
    "Bert": SIZES,
    "Roberta": dict(SIZES, type_vocab_size=2),
    "XLMRoberta": dict(SIZES, type_vocab_size=2),
    "Albert": dict(SIZES, embedding_size=16, classifier_dropout_prob=0, hidden_dropout_prob=0),
    "DistilBert": dict(vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64),
    "Electra": dict(SIZES, embedding_size=16),
    "XLM": dict(vocab_size=VOCABULARY, emb_dim=32, n_layers=2, n_heads=4, n_langs=1, max_position_embeddings=64),
}


def model(name):
    import transformers

    return tiny(getattr(transformers, f"{name}Model"), getattr(transformers, f"{name}Config")(**MODELS[name]))


@pytest.mark.parametrize("name", list(MODELS))
def test_models(name):
    mask = padding()
    inputs = dict(input_ids=tokens(), attention_mask=mask)
    if name != "DistilBert":
        inputs["token_type_ids"] = torch.randint(0, 2, (BATCH, LENGTH))
    agree(model(name), inputs, family=FAMILY, name=f"{name}Model", keep=mask.bool())


def test_gaps_in_the_padding_mask():
    """Tokens need not stand side by side: then the keys are a row of bools per sequence."""
    mask = (torch.rand(BATCH, LENGTH) < 0.6).long()
    mask[:, 5] = 1
    inputs = dict(input_ids=tokens(), attention_mask=mask)
    agree(model("Bert"), inputs, family=FAMILY, name="BertModel, gaps", keep=mask.bool())


def test_packed_sequences():
    """Three sequences in a row equal the three alone: a ready-made mask of documents."""
    lengths = [9, 15, 13]
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    hidden = (ids[:, None] != ids)[None, None]
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    inputs = dict(input_ids=tokens(batch=1), attention_mask=mask, position_ids=positions)
    agree(model("Bert"), inputs, family=FAMILY, name="BertModel, packed", square=True)


def test_bf16():
    mask = padding()
    inputs = dict(input_ids=tokens(), attention_mask=mask)
    agree(model("Bert"), inputs, family=FAMILY, name="BertModel", keep=mask.bool(), dtype=torch.bfloat16)
