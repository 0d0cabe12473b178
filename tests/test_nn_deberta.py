"""pyext.nn.DisentangledAttention against the attention of Transformers' DeBERTa v1, v2 and v3."""

from __future__ import annotations

import pytest
import torch

import pyext
from pyext.nn.deberta import convert_v1

HIDDEN, HEADS, BATCH, LENGTH = 24, 3, 2, 37
TERMS = (["c2p", "p2c"], ["c2p"], ["p2c"], [])
KINDS = {
    "v3": dict(position_buckets=8, max_relative_positions=40, share_att_key=True),
    "v2, own projections": dict(position_buckets=6, max_relative_positions=-1, share_att_key=False),
    "clipped": dict(position_buckets=-1, max_relative_positions=12, share_att_key=False),
    "far": dict(position_buckets=-1, max_relative_positions=60, share_att_key=True),
}


def seeded(module):
    """Weights large enough for positions to matter."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module.eval()


def v2(kind, terms):
    from transformers import DebertaV2Config
    from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

    config = DebertaV2Config(
        hidden_size=HIDDEN, num_attention_heads=HEADS, pos_att_type=terms, relative_attention=True,
        max_position_embeddings=50, **KINDS[kind],
    )  # fmt: skip
    return seeded(DisentangledSelfAttention(config))


def v1(terms):
    from transformers import DebertaConfig
    from transformers.models.deberta.modeling_deberta import DisentangledSelfAttention

    config = DebertaConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, pos_att_type=terms, relative_attention=True,
        max_relative_positions=20,
    )  # fmt: skip
    return seeded(DisentangledSelfAttention(config))


def ours_like(theirs, impl, **options):
    return pyext.nn.DisentangledAttention(
        HIDDEN,
        HEADS,
        pos_att_type=theirs.pos_att_type,
        position_buckets=getattr(theirs, "position_buckets", -1),
        max_relative_positions=theirs.max_relative_positions,
        share_att_key=getattr(theirs, "share_att_key", False),
        impl=impl,
        **options,
    )


def compare(ours, theirs, dtype, rows, names, relative_pos=None, padded=True):
    """Outputs and the gradients of inputs and parameters (named the same, or as `names` maps them)."""
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    x = torch.randn(BATCH, LENGTH, HIDDEN, dtype=dtype, requires_grad=True)
    table = torch.randn(rows, HIDDEN, dtype=dtype, requires_grad=True)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[1, 30:] = not padded
    both = mask[:, None, None, :] & mask[:, None, :, None]
    wanted = theirs(x, both, relative_pos=relative_pos, rel_embeddings=table)[0]
    got = ours(x, mask, rel_embeddings=table)
    # the published scale is an fp32 square root, in fp64 too
    tolerance = dict(rtol=1e-6, atol=1e-6) if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[mask], wanted[mask], **tolerance)  # padded queries mean nothing
    weight = torch.randn_like(got) * mask[..., None]
    leaves = {name: p for name, p in ours.named_parameters() if name in names}
    peers = [dict(theirs.named_parameters())[name] for name in leaves]
    gradients = torch.autograd.grad(got, [x, table, *leaves.values()], weight, allow_unused=True)
    expected = torch.autograd.grad(wanted, [x, table, *peers], weight, allow_unused=True)
    for name, a, b in zip(["x", "table", *leaves], gradients, expected):
        if b is None:
            assert a is None or (a.abs() < 1e-4).all(), name
        else:
            torch.testing.assert_close(a, b, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("terms", TERMS, ids="+".join)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_v2(kind, terms, dtype, backend):
    theirs = v2(kind, terms)
    ours = ours_like(theirs, backend.impl)
    ours.load_state_dict(theirs.state_dict())  # strict: the same names and shapes
    theirs.load_state_dict(ours.state_dict())
    rows = 2 * theirs.pos_ebd_size + 5  # what lies beyond 2 * span is not read
    compare(ours.eval(), theirs, dtype, rows, dict(theirs.named_parameters()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("terms", TERMS, ids="+".join)
def test_equals_v1(terms, dtype, backend):
    from transformers.models.deberta.modeling_deberta import build_relative_position

    theirs = v1(terms)
    ours = ours_like(theirs, backend.impl)
    ours.load_state_dict(convert_v1(theirs.state_dict(), HEADS))
    relative_pos = build_relative_position(torch.zeros(LENGTH, 1), torch.zeros(LENGTH, 1))
    compare(ours.eval(), theirs, dtype, 40, (), relative_pos)


def test_other_queries_and_masks():
    """More keys than queries: the last query stands at the last key. Masks as objects, rows and matrices."""
    module = seeded(
        pyext.nn.DisentangledAttention(HIDDEN, HEADS, position_buckets=4, max_relative_positions=20)
    ).double()
    x, table = torch.randn(BATCH, 11, HIDDEN).double(), torch.randn(8, HIDDEN).double()
    whole = module(x, rel_embeddings=table)
    torch.testing.assert_close(module(x, query_states=x[:, 7:], rel_embeddings=table), whole[:, 7:])
    lengths = torch.tensor([11, 6])
    rows = torch.arange(11) < lengths[:, None]
    wanted = module(x, pyext.masks.padding(lengths), rel_embeddings=table)
    for mask in (rows, rows.long(), rows[:, None, None].expand(-1, HEADS, 11, -1)):
        torch.testing.assert_close(module(x, mask, rel_embeddings=table), wanted)


def test_dropout_only_in_training():
    options = dict(attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.5, max_relative_positions=4)
    module = pyext.nn.DisentangledAttention(HIDDEN, HEADS, **options)
    x, table = torch.randn(1, 9, HIDDEN), torch.randn(8, HIDDEN)
    module.train()
    assert not torch.equal(module(x, rel_embeddings=table), module(x, rel_embeddings=table))
    module.eval()
    assert torch.equal(module(x, rel_embeddings=table), module(x, rel_embeddings=table))


def test_refuses():
    make = pyext.nn.DisentangledAttention
    with pytest.raises(ValueError, match="hidden_size must be a multiple of num_attention_heads, got 24 and 5"):
        make(24, 5)
    with pytest.raises(ValueError, match="pos_att_type must be made of 'c2p' and 'p2c', got 'p2p'"):
        make(24, 3, pos_att_type=["c2p", "p2p"])
    for table in (None, torch.zeros(7, 24)):
        with pytest.raises(ValueError, match=r"rel_embeddings must have at least 8 rows, 2 \* span, got"):
            make(24, 3, max_relative_positions=4)(torch.zeros(1, 5, 24), rel_embeddings=table)
    with pytest.raises(ValueError, match="talking heads"):
        convert_v1({"head_logits_proj.weight": torch.zeros(1)}, 3)
