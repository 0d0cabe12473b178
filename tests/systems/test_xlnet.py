"""XLNet: relative positions in both directions, segments, memory, two streams with permutation masks."""

from __future__ import annotations

import pytest
import torch

from support.systems import BATCH, LENGTH, VOCABULARY, agree, generates_alike, padding, patched, tiny, tokens

FAMILY = "XLNet"


def xlnet(head="Model", **options):
    import transformers

    config = transformers.XLNetConfig(
        vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=48, dropout=0.0, eos_token_id=None,
        pad_token_id=0, bos_token_id=1, **options,
    )  # fmt: skip
    return tiny(getattr(transformers, f"XLNet{head}"), config)


@pytest.mark.parametrize("remembers", [False, True], ids=["no memory", "memory"])
def test_padding_and_segments(remembers):
    mask = padding(left=True)
    types = torch.randint(0, 2, (BATCH, LENGTH))
    inputs = dict(input_ids=tokens(), attention_mask=mask.float(), token_type_ids=types, use_mems=remembers)
    agree(
        xlnet(), inputs, family=FAMILY, name=f"XLNetModel, {'with' if remembers else 'without'} memory",
        keep=mask.bool(), square=remembers, buckets=False,
    )  # fmt: skip


def test_no_mask_at_all():
    agree(xlnet(), dict(input_ids=tokens(), use_mems=False), family=FAMILY, name="XLNetModel, plain", buckets=False)


def test_two_streams():
    """perm_mask and target_mapping: both streams, each with its own mask."""
    rank = torch.stack([torch.randperm(LENGTH) for _ in range(BATCH)])
    perm = (rank[:, :, None] <= rank[:, None, :]).float()
    first = rank.argmin(1)
    perm[torch.arange(BATCH), first, first] = 0.0  # else the first in order would see nothing
    target = torch.nn.functional.one_hot(torch.randint(0, LENGTH, (BATCH, 5)), LENGTH).float()
    inputs = dict(input_ids=tokens(), perm_mask=perm, target_mapping=target, token_type_ids=tokens(low=0, high=2))
    agree(
        xlnet("LMHeadModel"), inputs, family=FAMILY, name="XLNetLMHeadModel, permuted", square=True,
        buckets=False,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"attn_type": "uni"}, {"attn_type": "uni", "same_length": True}], ids=str)
def test_memory_of_the_former_segment(options):
    model = xlnet(mem_len=20, **options)
    ours = patched(model)
    first, second = tokens(), tokens()
    mems = model(first, use_mems=True).mems
    theirs, same = model(second, mems=mems, use_mems=True), ours(second, mems=ours(first, use_mems=True).mems)
    torch.testing.assert_close(same.last_hidden_state, theirs.last_hidden_state, rtol=1e-4, atol=1e-5)
    inputs = dict(input_ids=second, mems=mems, use_mems=True)
    agree_with_mems(model, inputs, options)


def agree_with_mems(model, inputs, options):
    """`mems` is a list of tensors, which the fp64 model needs in fp64."""

    class Model(torch.nn.Module):
        def __init__(self, model, mems):
            super().__init__()
            self.model = model
            self.mems = torch.nn.ParameterList([torch.nn.Parameter(m.clone()) for m in mems])

        def forward(self, **inputs):
            return self.model(**inputs, mems=list(self.mems))

    whole = Model(model, inputs.pop("mems"))
    agree(
        whole,
        inputs,
        family=FAMILY,
        name=f"XLNetModel, former segment, {options.get('attn_type', 'bi')}",
        buckets=False,
    )


def test_generation():
    model = xlnet("LMHeadModel")
    record = agree(
        model, dict(input_ids=tokens(), use_mems=False), family=FAMILY, name="XLNetLMHeadModel", buckets=False
    )
    generates_alike(model, dict(input_ids=tokens(9)), record, new_tokens=4)
