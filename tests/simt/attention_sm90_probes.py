"""Calls that look for defects of csrc/cuda/attention_sm90.cu: those of sm_80, and each of its tiles past its edges."""

from __future__ import annotations

import torch

import pyext
from support.cases import Case, case
from support.parts import (
    Context,
    Shape,
    Term,
    alibi,
    causal,
    diagonal,
    documents,
    padding,
    part,
    prefix,
    shaw,
    t5,
    transformer_xl,
    window,
)

from . import attention_probes


@part
def turns(c: Context, size: int) -> Term:
    """Of `size` queries by turns, these see the first half of the keys and those the second: blocks of keys go on with
    queries that do not follow the last ones."""
    ids_q, ids_k = torch.arange(c.shape.lq) // size % 2, (torch.arange(c.shape.lk) >= c.shape.lk // 2).long()
    allowed = ids_q.unsqueeze(-1) == ids_k
    return Term("mask", lambda _: pyext.masks.documents(ids_q, ids_k), allowed=allowed)


#: With what the backward kernels leave to sm_80, besides.
FORWARD: dict[str, Case] = {
    "four panels": case(Shape(1, 2, 1, 130, 250, 256, 192), causal()),
    "four panels, biased": case(Shape(1, 2, 1, 70, 170, 160, 256), diagonal()),
}
RELATIVE: dict[str, Case] = {
    "relative": case(Shape(2, 2, 1, 70, 131, 64, 64), transformer_xl(), window(100, 20)),
    "relative, wide": case(Shape(1, 2, 1, 140, 200, 128, 104), transformer_xl(), causal()),
    "relative, clipped": case(Shape(1, 3, 3, 140, 200, 64, 40), shaw(9, heads="h"), padding([170])),
    "relative, more queries": case(Shape(2, 1, 1, 330, 70, 80, 128), transformer_xl(), window(150, 0)),
    "relative, in turns": case(Shape(1, 2, 1, 200, 256, 64, 64), transformer_xl(heads="1"), turns(64)),
    "relative, one table": case(Shape(3, 2, 2, 65, 64, 40, 64), shaw(3), documents(batched=True, cross=True)),
    "relative, few": case(Shape(2, 2, 2, 1, 100, 64, 64), transformer_xl("few", batched=True)),
    "relative, three quarters": case(Shape(1, 2, 1, 140, 131, 96, 96), transformer_xl("xlnet"), prefix(), lse=False),
    "relative, nobody sees": case(Shape(2, 1, 1, 200, 150, 64, 64), shaw(5, heads="1"), padding(), window(3, 0)),
}
PROBES: dict[str, Case] = {
    **attention_probes.PROBES,
    **FORWARD,
    **RELATIVE,
    "three warpgroups": case(Shape(1, 3, 3, 400, 300, 64, 64), causal()),
    "many tiles": case(Shape(1, 2, 1, 70, 620, 64, 64), alibi()),
    "wide, all visible": case(Shape(1, 2, 1, 140, 400, 128, 128)),
    "wide, all visible, biased": case(Shape(1, 2, 2, 150, 380, 128, 120), t5(buckets=8, max_distance=60)),
    "wide, causal": case(Shape(1, 2, 2, 270, 310, 128, 128), causal()),
    "wide, window, biased": case(Shape(1, 2, 1, 200, 290, 104, 128), window(130, 7), diagonal()),
    "wide, documents": case(Shape(2, 1, 1, 260, 260, 128, 128), documents(batched=True), causal()),
    "one and a half panels": case(Shape(1, 2, 1, 130, 270, 96, 80), causal()),
    "one and a half panels, biased": case(Shape(1, 1, 1, 150, 300, 88, 96), alibi()),
    "prefix": case(Shape(3, 2, 2, 130, 130, 64, 64), prefix()),
    "nobody sees": case(Shape(2, 1, 1, 200, 150, 64, 64), padding(), window(3, 0)),
    "scale": case(Shape(1, 1, 1, 100, 300, 64, 64), causal(), scale=0.7, q_scale=4.0),
    "one projection's output": case(Shape(2, 2, 2, 150, 150, 64, 64), causal(), layout="packed_qkv"),
    "more queries than keys": case(Shape(1, 1, 1, 500, 40, 128, 64), causal()),
}
