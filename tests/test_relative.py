"""Relative rows and segments (Transformer-XL, XLNet, Shaw, DeBERTa) against dense formulas, with all gradients."""

from __future__ import annotations

import pytest
import torch

from support.cases import DTYPES, case, check
from support.parts import (
    Shape,
    alibi,
    causal,
    dense,
    diagonal,
    disentangled,
    documents,
    padding,
    segment,
    shaw,
    t5,
    transformer_xl,
    window,
)

SELF = Shape(2, 4, 4, 37, 37, 12, 12)
LONGER = Shape(2, 4, 4, 19, 71, 12, 20)
SHORTER = Shape(2, 4, 4, 71, 19, 12, 12)
GROUPED = Shape(2, 6, 2, 23, 41, 9, 7)
MULTI_QUERY = Shape(1, 4, 1, 33, 33, 16, 16)

TRANSFORMER_XL = [
    case(SELF, transformer_xl()),
    case(LONGER, transformer_xl("past"), causal()),
    case(LONGER, transformer_xl("past")),
    case(SHORTER, transformer_xl("xlnet")),
    case(LONGER, transformer_xl("few")),
    case(SELF, transformer_xl(u=False), causal()),
    case(SELF, transformer_xl(v=False)),
    case(GROUPED, transformer_xl("few", u=False, v=False)),
    case(GROUPED, transformer_xl("xlnet"), padding()),
    case(MULTI_QUERY, transformer_xl(), softcap=2.0),
    case(GROUPED, transformer_xl("past"), softcap=1.0, sinks=True),
    case(GROUPED, transformer_xl(heads="1"), scale=0.2),
    case(SELF, transformer_xl(dtype=torch.float32)),
    case(SELF, transformer_xl("xlnet", batched=True)),
    case(LONGER, transformer_xl(), dropout=0.3),
    case(Shape(1, 2, 2, 140, 260, 8, 8), transformer_xl("past"), causal()),
]
SHAW = [
    case(SELF, shaw()),
    case(LONGER, shaw(3, "h"), causal()),
    case(SHORTER, shaw(1, "1")),
    case(GROUPED, shaw(0)),
    case(GROUPED, shaw(100, dtype=torch.float32), window(9, 5), softcap=3.0),
]
DISENTANGLED = [
    case(SELF, disentangled()),
    case(SELF, disentangled("c2p")),
    case(SELF, disentangled("p2c"), padding()),
    case(LONGER, disentangled(max_position=80)),
    case(SHORTER, disentangled(buckets=8, max_position=40), sinks=True),
    case(GROUPED, disentangled(buckets=6, max_position=20, scale=0.11)),
    case(GROUPED, disentangled("p2c", heads="1"), causal()),
    case(SELF, disentangled(buckets=5, max_position=30, batched=True), scale=0.16),
    case(SELF, disentangled(dtype=torch.float32), dropout=0.2),
    case(MULTI_QUERY, disentangled(buckets=8, max_position=64), softcap=4.0),
]
SEGMENT = [
    case(SELF, segment()),
    case(LONGER, segment("1hq", batched=False), causal()),
    case(GROUPED, segment("b1q", count=4), padding()),
    case(SHORTER, segment("111", dtype=torch.float32), softcap=2.0),
    case(SELF, transformer_xl("xlnet"), segment(), documents()),
]
SUMS = [
    case(SELF, transformer_xl(), disentangled("p2c")),
    case(GROUPED, transformer_xl("few"), shaw(4, "h"), t5()),
    case(GROUPED, transformer_xl(), transformer_xl("xlnet"), alibi()),
    case(SELF, transformer_xl("few", batched=True), transformer_xl()),
    case(SELF, shaw(), shaw(heads="h")),
    case(LONGER, shaw(), disentangled(buckets=8, max_position=30), diagonal()),
    case(LONGER, disentangled(), disentangled(heads="1")),
    case(GROUPED, transformer_xl("past"), transformer_xl("past", v=False), softcap=2.0),
    case(SELF, segment(), segment("1hq", count=3), dense("b11k")),
]
ALL = TRANSFORMER_XL + SHAW + DISENTANGLED + SEGMENT + SUMS


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("which", ALL, ids=str)
def test_against_oracle(which, dtype, backend, session_seed):
    check(which, dtype, backend, session_seed)


def test_case_ids_are_unique():
    names = [str(which) for which in ALL]
    assert len(set(names)) == len(names)
