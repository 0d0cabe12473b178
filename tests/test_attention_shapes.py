"""Head dimensions, lengths, empties and memory layouts: sizes that divide no tile, in both directions."""

from __future__ import annotations

import pytest
import torch

from support import layouts
from support.cases import DTYPES, case, check, draw, dtype_name, run
from support.parts import (
    Shape,
    alibi,
    causal,
    dense,
    dense_mask,
    diagonal,
    documents,
    is_causal,
    padding,
    strided,
    t5,
    union,
    window,
)

HALF_AND_SINGLE = (torch.float32, torch.bfloat16)

HEAD_DIMS = [
    case(Shape(1, 2, 2, 49, 70, d, dv), t5() if n % 2 else causal())
    for n, (d, dv) in enumerate(
        [(1, 1), (3, 3), (8, 8), (16, 16), (31, 33), (40, 40), (64, 64), (72, 72), (80, 80), (96, 96), (100, 100)]
        + [(128, 128), (192, 192), (256, 256), (320, 320), (513, 513)]
        + [(64, 128), (128, 64), (192, 128), (1, 65), (65, 1), (16, 257), (576, 512)]
    )
]
LENGTHS = [
    case(Shape(1, 2, 2, lq, lk, 40, 40), *parts)
    for lq, lk in [(1, 1), (1, 7), (7, 1), (7, 7), (2, 300), (9, 15), (15, 17), (16, 16), (17, 31), (33, 64), (63, 65)]
    + [(64, 64), (65, 63), (129, 257), (128, 256), (257, 129), (300, 33), (33, 300), (513, 520)]
    for parts in ((), (causal(), alibi()))
]
BATCH_HEADS = [
    case(Shape(1, 1, 1, 70, 90, 16, 16), t5()),
    case(Shape(7, 1, 1, 20, 33, 16, 16), padding()),
    case(Shape(1, 17, 17, 20, 33, 16, 16), diagonal()),
    case(Shape(3, 12, 4, 20, 33, 16, 16), causal()),
    case(Shape(2, 8, 1, 20, 33, 16, 16), dense("bhqk")),
    case(Shape(64, 2, 2, 3, 5, 8, 8)),
]
LAYOUTS = [case(Shape(2, 4, 4, 37, 53, 24, 24), causal(), layout=kind) for kind in layouts.VARIED]
LAYOUTS += [case(Shape(2, 6, 2, 37, 53, 40, 24), t5(), layout=kind, grad_layout="blhd") for kind in layouts.VARIED]
LAYOUTS += [
    case(Shape(2, 4, 4, 37, 53, 24, 24), layout=("blhd", "expanded_heads", "columns"), grad_layout="expanded_rows"),
    case(Shape(2, 4, 4, 37, 53, 24, 24), layout=("columns", "blhd", "expanded_batch"), grad_layout="columns"),
    case(Shape(2, 4, 4, 37, 53, 24, 24), layout=("expanded_rows", "contiguous", "blhd")),
    case(Shape(2, 4, 4, 37, 53, 24, 24), layout=("packed_qkv",) * 3, grad_layout="every_second"),
    case(Shape(2, 4, 4, 37, 53, 24, 24), layout=("unaligned",) * 3, grad_layout="expanded_heads"),
    case(Shape(2, 4, 4, 37, 53, 24, 24), window(9, 9), layout="lbhd", grad_layout="expanded_batch"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("which", HEAD_DIMS, ids=str)
def test_head_dimensions(which, dtype, backend, session_seed):
    check(which, dtype, backend, session_seed)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=dtype_name)
@pytest.mark.parametrize("which", LENGTHS + BATCH_HEADS, ids=str)
def test_lengths(which, dtype, backend, session_seed):
    check(which, dtype, backend, session_seed)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=dtype_name)
@pytest.mark.parametrize("which", LAYOUTS, ids=str)
def test_layouts(which, dtype, backend, session_seed):
    check(which, dtype, backend, session_seed)


@pytest.mark.parametrize("kind", layouts.KINDS)
def test_layout_changes_no_bit(kind, cpu, seed):
    """The same numbers give the same bits from any layout, whatever lies between them in memory."""
    drawn = draw(case(Shape(2, 4, 4, 37, 53, 24, 24), causal(), layout=kind), torch.float32, seed)
    got = run(drawn, cpu.impl)
    for name in ("query", "key", "value"):
        drawn.leaves[name] = drawn.leaves[name].detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    again = run(drawn, cpu.impl)
    for name, value in got.items():
        assert torch.equal(value, again[name]), name


EMPTY = [
    Shape(0, 4, 2, 5, 7, 16, 16),
    Shape(2, 4, 2, 0, 7, 16, 16),
    Shape(2, 4, 2, 5, 0, 16, 16),
    Shape(2, 4, 2, 0, 0, 16, 16),
    Shape(0, 4, 2, 0, 0, 16, 8),
    Shape(2, 4, 2, 5, 7, 16, 0),
    Shape(2, 0, 0, 5, 7, 16, 16),
]
EMPTY_PARTS = {
    "plain": (),
    "is_causal": (is_causal(),),
    "causal": (causal(),),
    "padding": (padding(),),
    "t5": (t5(),),
    "alibi": (alibi(),),
    "dense": (dense("1hqk"),),
    "mask": (dense_mask("bhqk"),),
    "blocks": (union(documents(batched=True, cross=True), strided(3)),),
}


@pytest.mark.parametrize("parts", EMPTY_PARTS.values(), ids=EMPTY_PARTS.keys())
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(shape, parts, backend, seed):
    """Correct shapes, zeros where a sum is empty, lse -inf without keys, no NaN."""
    drawn = draw(case(shape, *parts), torch.float32, seed)
    got = run(drawn, backend.impl)
    assert got["out"].shape == (shape.b, shape.hq, shape.lq, shape.dv)
    assert got["lse"].shape == (shape.b, shape.hq, shape.lq)
    if shape.lk == 0:
        assert (got["out"] == 0).all()
        assert (got["lse"] == -torch.inf).all()
    for name, leaf in drawn.leaves.items():
        gradient = got[f"grad {name}"]
        assert gradient.shape == leaf.shape, name
        if shape.dv:
            assert (gradient == 0).all(), name  # nothing flows through an empty sum
        assert not gradient.isnan().any(), name


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=dtype_name)
@pytest.mark.parametrize("lk", [0, 3])
def test_sinks_without_visible_keys(lk, dtype, backend, session_seed):
    """A row that sees only its sink: output 0, lse = the sink, and only the sink receives lse's gradient."""
    shape = Shape(2, 4, 2, 5, lk, 16, 16)
    parts = (padding([0, 0]),) if lk else ()
    drawn = draw(case(shape, *parts, sinks=True), dtype, session_seed)
    got = run(drawn, backend.impl)
    assert (got["out"] == 0).all()
    torch.testing.assert_close(got["lse"], drawn.leaves["sinks"].detach().view(1, -1, 1).expand(2, 4, 5))
    for name in ("query", "key", "value"):
        assert (got[f"grad {name}"] == 0).all(), name
    torch.testing.assert_close(got["grad sinks"], drawn.grad_lse.sum((0, 2)))
