"""The flat problem every backend receives.

`pyext.bias` and `pyext.masks` are for people; kernels know only the primitives below. `AttentionProblem` holds
exactly the arguments of the op `pyext::attention_forward`, in its order, so that a call of the op is `op(*problem)`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

#: `left` or `right` of a window without a limit on that side: beyond any distance, and safe to negate and add to.
UNBOUNDED = 2**62
#: Queries and keys of a block of the block table.
BLOCK = 128
#: Gated units, act(gate) * up, by their activation: exact GELU, GELU by tanh, SiLU, ReLU. Ops carry the index.
ACTIVATIONS = ("geglu", "geglu_tanh", "swiglu", "reglu")


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that scores, softmax, LSE and strips are held in: fp64 for fp64 inputs, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense_in_order_of(x: Tensor) -> Tensor:
    """An empty tensor like x (B, H, L, D), dense, with x's order of batch, heads and rows in memory."""
    order = sorted(range(3), key=x.stride, reverse=True)  # stable, as the kernels'
    out = x.new_empty([*(x.shape[d] for d in order), x.shape[3]])
    return out.permute(*(order.index(d) for d in range(3)), 3)


class Sizes(NamedTuple):
    """The call that biases and masks lower against: its sizes, and for biases also its contents.

    In a packed (varlen) call `lead` is empty, `queries` and `keys` are the totals over all sequences, and
    `cu_seqlens_q` and `cu_seqlens_k` say where each sequence starts.
    """

    lead: tuple[int, ...]  # leading batch dimensions, as the caller sees them
    heads: int  # query heads
    queries: int
    keys: int
    device: torch.device
    acc: torch.dtype
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    query: Tensor | None = None  # (B, Hq, Lq, D); masks must not depend on this and what follows: they are cached by it
    key: Tensor | None = None  # (B, Hkv, Lk, D)
    scale: float = 1.0
    softcap: float = 0.0  # 0 = off

    @property
    def batch(self) -> int:
        """All leading batch dimensions as one; in a packed call the number of sequences."""
        if self.cu_seqlens_q is not None:
            return self.cu_seqlens_q.shape[0] - 1
        batch = 1
        for size in self.lead:
            batch = batch * size
        return batch

    @property
    def varlen(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def strip(self) -> int:
        """Length of a diagonal strip: one value per distance from -(Lk - 1) to Lq - 1."""
        return max(self.queries + self.keys - 1, 0)

    @property
    def distances(self) -> Tensor:
        """The distance that each position of a strip stands for, int64 (Lq + Lk - 1,)."""
        return torch.arange(self.strip, device=self.device) - (self.keys - 1)


class AttentionProblem(NamedTuple):
    """Attention with every structured bias and mask lowered.

    S = softcap(scale * q.k) + dense[b,h,i,j] + diag[h, diag_index[u]] + scale * rel_query_i . rel_q[rel_index[u]]
        + scale * k_j . rel_k[rel_index[u]] + segment[b,h,i, segment_q_i == segment_k_j],
    where u = distance + Lk - 1 and distance = j - (i + Lk - Lq);
    key j is visible to query i iff `mask`, `intervals`, `blocks` and -left <= distance <= right all allow it;
    out = dropout(softmax(S)) v, with `sinks` as one more logit per head; lse = log(sum exp(S) + exp(sink)).

    A block is `BLOCK` queries by `BLOCK` keys. Row r of blocks lists the blocks that hold a visible pair, in rising
    order: entries block_offsets[b, h, r] <= n < block_offsets[b, h, r + 1] of `block_index`, each (block of keys, row
    of `block_bits`, or -1 where all pairs are visible). Bit c % 8 of byte c // 8 in row a of a bitmap says whether
    query a of the block sees key c of it.

    With `cu_seqlens_q`/`cu_seqlens_k` B is 1, sequence n owns rows cu_seqlens_q[n]:cu_seqlens_q[n+1] and the keys
    likewise, and i, j, Lq, Lk are local to the sequence; the strip then has distance 0 at index total_k - 1.
    """

    query: Tensor  # (B, Hq, Lq, D), fp32 | bf16 | fp16 | fp64
    key: Tensor  # (B, Hkv, Lk, D), Hq % Hkv == 0
    value: Tensor  # (B, Hkv, Lk, Dv)
    dense: Tensor | None = None  # (B|1, Hq|1, Lq|1, Lk), any float dtype
    diag: Tensor | None = None  # (Hq|1, R), acc dtype
    diag_index: Tensor | None = None  # (Lq + Lk - 1,) int32 with values in [0, R); None = identity, R == Lq + Lk - 1
    rel_query: Tensor | None = None  # (B, Hq, Lq, D), query's dtype; required with rel_q
    rel_q: Tensor | None = None  # (B|1, Hq|1, R, D), query's dtype: rows that queries are multiplied with
    rel_k: Tensor | None = None  # (B|1, Hq|1, R, D), query's dtype: rows that keys are multiplied with
    rel_index: Tensor | None = None  # (Lq + Lk - 1,) int32 with values in [0, R), of rel_q and rel_k alike
    segment: Tensor | None = None  # (B, Hq, Lq, 2), acc dtype
    segment_q: Tensor | None = None  # (B|1, Lq) int32
    segment_k: Tensor | None = None  # (B|1, Lk) int32
    mask: Tensor | None = None  # (B|1, Hq|1, Lq|1, Lk) bool, True = attend
    intervals: Tensor | None = None  # (B|1, Lq, 2) int32: keys lo <= j < hi, clipped to [0, Lk]
    block_offsets: Tensor | None = None  # (B|1, Hq|1, ceil(Lq / BLOCK) + 1) int32
    block_index: Tensor | None = None  # (entries, 2) int32
    block_bits: Tensor | None = None  # (bitmaps, BLOCK, BLOCK / 8) uint8
    sinks: Tensor | None = None  # (Hq,), acc dtype
    cu_seqlens_q: Tensor | None = None  # (N + 1,) int32
    cu_seqlens_k: Tensor | None = None  # (N + 1,) int32
    seed: Tensor | None = None  # (1,) int64, required if dropout_p > 0
    left: int = UNBOUNDED
    right: int = UNBOUNDED
    scale: float = 1.0
    softcap: float = 0.0  # 0 = off
    dropout_p: float = 0.0


class RotaryProblem(NamedTuple):
    """Rotary position embedding: exactly the arguments of the op `pyext::rotary_forward`, in its order.

    Pair k of a row, k < R/2, is features (k, k + R/2), or (2k, 2k + 1) if `interleaved`. With c, s = cos, sin at the
    row's position: (x1, x2) -> (x1 c - x2 s, x2 c + x1 s), s with the other sign if `inverse`. The rest is copied.
    """

    x: Tensor  # (B, H, L, D), fp32 | bf16 | fp16 | fp64
    cos: Tensor  # (rows, R/2) or (B|1, rows, R/2), any float dtype, rows >= L without positions
    sin: Tensor  # like cos
    positions: Tensor | None = None  # (B|1, L) int64 in [0, rows); None = row i for token i
    interleaved: bool = False
    inverse: bool = False


class GluProblem(NamedTuple):
    """act(gate) * up: exactly the arguments of the op `pyext::glu_forward`, in its order.

    Without `up`, `gate` is packed: its last dimension holds both, as two halves or `interleaved` (even and odd
    features), the gate first or, without `gate_first`, second.
    """

    gate: Tensor  # (..., N), packed (..., 2N), fp32 | bf16 | fp16 | fp64
    up: Tensor | None = None  # like gate
    activation: int = 0  # index into ACTIVATIONS
    gate_first: bool = True
    interleaved: bool = False


class GatedLinearProblem(NamedTuple):
    """act(x w_gate^T + b_gate) * (x w_up^T + b_up): exactly the arguments of the op `pyext::gated_linear_forward`.

    Without `w_up`, `w_gate` is (2N, K), the rows of the gate first, and so is `b_gate` (2N,).
    """

    x: Tensor  # (M, K), fp32 | bf16 | fp16 | fp64, as all that follow
    w_gate: Tensor  # (N, K)
    w_up: Tensor | None = None  # (N, K)
    b_gate: Tensor | None = None  # (N,)
    b_up: Tensor | None = None  # (N,)
    activation: int = 0  # index into ACTIVATIONS
    save: bool = False  # return the pre-activations, which the backward needs


class GatedMLPProblem(NamedTuple):
    """gated_linear(x) w_down^T + b_down: exactly the arguments of the op `pyext::gated_mlp_forward`, in its order."""

    x: Tensor  # (M, K)
    w_gate: Tensor  # (N, K), or (2N, K) without w_up
    w_up: Tensor | None  # (N, K)
    w_down: Tensor  # (J, N)
    b_gate: Tensor | None = None
    b_up: Tensor | None = None
    b_down: Tensor | None = None  # (J,)
    activation: int = 0
    save: bool = False
