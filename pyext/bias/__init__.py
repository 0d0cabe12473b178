"""Position biases: what is added to the attention score. Small value objects; combine them with `+`.

    out = pyext.attention(q, k, v, bias=pyext.bias.t5(table, bidirectional=True) + pyext.bias.dense(pair))

Every tensor inside a bias gets its gradient. Biases that depend on the distance only cost O(Lq + Lk) memory.
Positions: distance = j - (i + Lk - Lq), so the last query stands at the last key.

A bias lowers to the primitives of `AttentionProblem` with ordinary differentiable torch ops; `Lowered` says to which.
"""

from ._base import Bias, Lowered, Rule
from ._distance import Dense, alibi, dense, diagonal, t5, t5_bucket
from ._relative import deberta_bucket, disentangled, segment, shaw, transformer_xl

__all__ = [
    "Bias",
    "Dense",
    "Lowered",
    "Rule",
    "alibi",
    "deberta_bucket",
    "dense",
    "diagonal",
    "disentangled",
    "segment",
    "shaw",
    "t5",
    "t5_bucket",
    "transformer_xl",
]
