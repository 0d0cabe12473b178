"""Every feature of attention, forward and backward, in every dtype, on every backend, against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch

from support.cases import DTYPES, Case, case, check
from support.parts import (
    Shape,
    alibi,
    bool_attn_mask,
    causal,
    dense,
    dense_mask,
    diagonal,
    documents,
    either,
    float_attn_mask,
    frozen_attn_mask,
    is_causal,
    padding,
    prefix,
    t5,
    torch_causal,
    window,
)

SELF = Shape(2, 4, 4, 77, 77, 24, 24)
LONGER = Shape(2, 4, 4, 45, 131, 24, 24)  # more keys than queries: distances start at the lower right
SHORTER = Shape(2, 4, 4, 131, 45, 24, 24)  # more queries than keys: with causal() the first rows see nothing
GROUPED = Shape(2, 6, 2, 45, 131, 24, 40)
MULTI_QUERY = Shape(2, 4, 1, 77, 77, 24, 24)

MASKS = [
    case(SELF),
    case(LONGER),
    case(SHORTER),
    case(SELF, is_causal()),
    case(LONGER, is_causal()),
    case(SHORTER, is_causal()),
    case(SELF, causal()),
    case(LONGER, causal()),
    case(SHORTER, causal()),
    case(LONGER, torch_causal("upper_left")),
    case(LONGER, torch_causal("lower_right")),
    case(SHORTER, torch_causal("upper_left")),
    case(SHORTER, torch_causal("lower_right")),
    case(SELF, window(5, 9)),
    case(SELF, window(0, 0)),
    case(LONGER, window(11, 0)),
    case(LONGER, window(None, 3)),
    case(SHORTER, window(20, None)),
    case(SHORTER, window(None, None)),
    case(SELF, window(70, 70), causal()),
    case(LONGER, padding()),
    case(SELF, padding(queries="random")),
    case(SELF, padding([0, 77], [40, 0])),
    case(LONGER, padding([1, 130])),
    case(LONGER, padding(), causal()),
    case(SELF, documents()),
    case(SELF, documents(batched=True), causal()),
    case(LONGER, documents(cross=True)),
    case(SHORTER, documents(batched=True, cross=True, count=9)),
    case(SELF, documents(mixed=True)),
    case(LONGER, documents(batched=True, cross=True, mixed=True), causal()),
    case(SELF, either(13)),
    case(LONGER, either(7), padding()),
    case(SELF, prefix()),
    case(LONGER, prefix([0, 131])),
    case(SHORTER, prefix(), padding()),
    case(LONGER, dense_mask("bhqk"), causal(), padding()),
    case(SELF, dense_mask("b11k"), window(30, 30)),
    case(SELF, dense_mask("bhqk", density=0.05)),
    case(LONGER, bool_attn_mask("1h1k")),
]
BROADCASTS = (
    "bhqk",
    "b1qk",
    "1hqk",
    "11qk",
    "bh1k",
    "b11k",
    "1h1k",
    "111k",
    "bhq1",
    "11q1",
    "b111",
    "1111",
    "hqk",
    "qk",
    "1k",
)
DENSE = [case(SELF, bool_attn_mask(which)) for which in BROADCASTS]
DENSE += [case(LONGER, dense_mask(which)) for which in ("bhqk", "b11k", "1hqk", "qk")]
DENSE += [case(LONGER, float_attn_mask(which)) for which in BROADCASTS]
DENSE += [case(GROUPED, dense(which)) for which in ("bhqk", "1hqk", "b1qk", "11qk", "bh1k", "1111")]
DENSE += [
    case(SELF, dense("bhqk", holes=True)),
    case(SELF, dense("1hqk", holes=True), causal()),
    case(LONGER, dense("b1qk"), padding()),
    case(LONGER, float_attn_mask("bhqk", "columns")),
    case(LONGER, float_attn_mask("bhqk", "padded_rows")),
    case(LONGER, float_attn_mask("bhqk", "expanded_heads")),
    case(LONGER, float_attn_mask("bhqk", "expanded_rows")),
    case(SELF, dense("1hqk", "blhd", torch.float32)),
    case(SELF, frozen_attn_mask(float("-inf"))),
    case(SELF, frozen_attn_mask(float("-inf"), "b11k", 0.5)),
    case(SELF, frozen_attn_mask("min", "11qk", 0.5)),
]
BIASES = [
    case(SELF, diagonal()),
    case(LONGER, diagonal()),
    case(SHORTER, diagonal(), causal()),
    case(GROUPED, diagonal("1")),
    case(LONGER, diagonal(dtype=torch.float32), padding()),
    case(SELF, alibi(), causal()),
    case(LONGER, alibi(), causal()),
    case(SHORTER, alibi()),
    case(SELF, alibi(symmetric=True)),
    case(LONGER, alibi(symmetric=True), padding()),
    case(LONGER, alibi(learned=False), causal()),
    case(LONGER, alibi(dtype=torch.float32), causal()),
    case(SELF, t5()),
    case(LONGER, t5()),
    case(SHORTER, t5(), padding()),
    case(SELF, t5(bidirectional=False), causal()),
    case(LONGER, t5(bidirectional=False), causal()),
    case(SHORTER, t5(bidirectional=False)),
    case(LONGER, t5(buckets=8, max_distance=20)),
    case(SELF, t5(dtype=torch.float32), documents()),
    case(GROUPED, t5(), causal()),
    case(SELF, t5(), alibi(), dense("11qk")),
    case(LONGER, t5(), diagonal(), padding()),
    case(LONGER, dense("b1qk"), dense("1h1k"), alibi(symmetric=True), causal()),
    case(LONGER, float_attn_mask("b11k"), t5(), causal()),
    case(LONGER, bool_attn_mask("b11k"), alibi(), window(40, 2)),
    case(Shape(1, 2, 2, 300, 300, 16, 16), t5()),
    case(Shape(1, 2, 2, 257, 300, 16, 16), t5(bidirectional=False, max_distance=64), causal()),
    case(Shape(1, 2, 2, 300, 257, 16, 16), alibi(symmetric=True)),
]
SCORES = [
    case(SELF, softcap=2.0),
    case(LONGER, causal(), t5(), softcap=0.7),
    case(SELF, scale=0.05),
    case(SELF, causal(), scale=-0.3),
    case(LONGER, scale=1.0, softcap=5.0),
    case(SELF, sinks=True),
    case(SHORTER, causal(), sinks=True),
    case(GROUPED, window(9, 0), sinks=True, softcap=3.0),
    case(LONGER, t5(), padding([0, 99]), sinks=True),
    case(GROUPED),
    case(GROUPED, causal(), alibi()),
    case(GROUPED, dense_mask("bhqk"), diagonal()),
    case(MULTI_QUERY, causal()),
    case(MULTI_QUERY, float_attn_mask("bhqk")),
    case(SELF, lse=False),
    case(LONGER, causal(), t5(), lse=False),
    case(GROUPED, alibi(), lse=False, sinks=True),
]
DROPOUT = [
    case(SELF, dropout=0.1),
    case(LONGER, causal(), dropout=0.5),
    case(GROUPED, t5(), padding(), dropout=0.3),
    case(SELF, dense("bhqk"), sinks=True, softcap=4.0, dropout=0.9),
    case(SELF, dropout=1.0),
]
ALL = MASKS + DENSE + BIASES + SCORES + DROPOUT


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("which", ALL, ids=str)
def test_against_oracle(which: Case, dtype, backend, session_seed):
    check(which, dtype, backend, session_seed)


def test_case_ids_are_unique():
    names = [str(c) + str(c.lse) for c in ALL]
    assert len(set(names)) == len(names)
