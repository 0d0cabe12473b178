"""Masks: which keys a query may attend to. Small value objects; combine them with `&` and `|`.

    out = pyext.attention(q, k, v, mask=pyext.masks.causal() & pyext.masks.padding(lengths))

Positions: distance = j - (i + Lk - Lq), so the last query stands at the last key. A query that sees no key gives
output 0, LSE -inf and gradient 0.

Each mask has a predicate `visible` (its specification) and a lowering to the primitives of `AttentionProblem`: a
closed form -left <= distance <= right, one interval of keys per query, a block table (a list of the 128 x 128 blocks
that hold a visible pair, with bitmaps of the partial ones), or, as `dense` asks for, a bool tensor. `&` keeps all of
them side by side, and kernels skip the blocks outside of any. Block tables are made once and kept; `Mask.build` makes
one beforehand. Some masks also split into parts that are ranges once positions are sorted (`_parts`).
"""

from ._base import Lowered, Mask, as_mask
from ._functions import from_function
from ._intervals import Dense, causal, dense, documents, padding, prefix, window
from ._sparse import fixed, image_columns, image_conv, image_rows, permutation, strided

__all__ = [
    "Dense",
    "Lowered",
    "Mask",
    "as_mask",
    "causal",
    "dense",
    "documents",
    "fixed",
    "from_function",
    "image_columns",
    "image_conv",
    "image_rows",
    "padding",
    "permutation",
    "prefix",
    "strided",
    "window",
]
