"""Calls that look for defects of csrc/cuda/attention_sm80*.cu: small, and each past one more corner of a tile."""

from __future__ import annotations

import torch

from support.backends import Backend
from support.cases import Case, case
from support.cases import check as check_case
from support.parts import (
    Shape,
    alibi,
    causal,
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

PROBES: dict[str, Case] = {
    "plain": case(Shape(2, 2, 2, 70, 70, 64, 64)),
    "causal": case(Shape(1, 4, 2, 150, 203, 64, 64), causal()),
    "narrow": case(Shape(1, 2, 1, 65, 130, 40, 24), window(40, 3)),
    "padding": case(Shape(2, 1, 1, 131, 200, 64, 48), padding([200, 61]), layout="padded_rows"),
    "documents": case(Shape(2, 2, 2, 140, 140, 64, 64), documents(batched=True), causal()),
    "diagonal": case(Shape(2, 1, 1, 140, 77, 64, 64), diagonal()),
    "one strip": case(Shape(1, 2, 1, 40, 50, 64, 64), diagonal("1")),
    "buckets": case(Shape(1, 3, 3, 70, 300, 64, 64), t5(buckets=8, max_distance=60), causal()),
    "slopes": case(Shape(1, 4, 2, 129, 129, 64, 64), alibi(), causal(), lse=False),
    "one query": case(Shape(2, 2, 2, 1, 100, 64, 64), diagonal()),
    "many queries": case(Shape(1, 2, 1, 300, 60, 64, 64), diagonal(), window(100, 20)),
}

#: With relative rows, whose backward has kernels of its own.
RELATIVE = {
    "relative": case(Shape(2, 2, 1, 70, 131, 64, 64), transformer_xl(), window(100, 20)),
    "both": case(Shape(1, 2, 1, 50, 75, 64, 64), disentangled(buckets=8, max_position=30), causal()),
    "grouped": case(Shape(1, 4, 2, 60, 50, 64, 64), transformer_xl("past"), window(9, 2)),
    "clipped": case(Shape(1, 2, 2, 40, 75, 64, 40), shaw(9, heads="h"), alibi()),
    "shared": case(
        Shape(3, 2, 2, 33, 40, 64, 64), disentangled(heads="1"), diagonal("1"), documents(batched=True, cross=True)
    ),
    "again": case(Shape(1, 2, 1, 150, 90, 64, 64), shaw(9), documents(cross=True, rolled=True, count=3)),
    "both, grouped": case(Shape(1, 4, 2, 60, 50, 64, 64), disentangled(max_position=20), window(9, 2)),
    "both, segments": case(Shape(2, 2, 2, 50, 75, 64, 64), disentangled(heads="1"), segment(), diagonal()),
    "segments": case(Shape(2, 2, 2, 50, 75, 64, 64), transformer_xl("xlnet", heads="1"), segment(), diagonal()),
}
OF_BOTH = {name: probe for name, probe in RELATIVE.items() if name.startswith(("both", "shared"))}
OF_QUERIES = {name: probe for name, probe in RELATIVE.items() if name not in OF_BOTH}
FORWARD = {**PROBES, **RELATIVE}


def check(name: str, dtype: torch.dtype, seed: int) -> None:
    """Result, LSE and every gradient against the oracle."""
    check_case(FORWARD[name], dtype, Backend("cpu"), seed)
