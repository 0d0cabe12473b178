"""The flat problem every backend receives.

`pyext.bias` and `pyext.masks` are for people; kernels know only the primitives below. `AttentionProblem` holds
exactly the arguments of the op `pyext::attention_forward`, in its order, so that a call of the op is `op(*problem)`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

#: `left` or `right` of a window without a limit on that side: beyond any distance, and safe to negate and add to.
UNBOUNDED = 2**62


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that scores, softmax, LSE and strips are held in: fp64 for fp64 inputs, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Sizes(NamedTuple):
    """The sizes of one call, which biases and masks lower against.

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


class AttentionProblem(NamedTuple):
    """Attention with every structured bias and mask lowered.

    S = softcap(scale * q.k) + dense[b,h,i,j] + diag[h, diag_index[distance + Lk - 1]], distance = j - (i + Lk - Lq);
    key j is visible to query i iff `mask`, `intervals` and -left <= distance <= right all allow it;
    out = dropout(softmax(S)) v, with `sinks` as one more logit per head; lse = log(sum exp(S) + exp(sink)).

    With `cu_seqlens_q`/`cu_seqlens_k` B is 1, sequence n owns rows cu_seqlens_q[n]:cu_seqlens_q[n+1] and the keys
    likewise, and i, j, Lq, Lk are local to the sequence; the strip then has distance 0 at index total_k - 1.
    """

    query: Tensor  # (B, Hq, Lq, D), fp32 | bf16 | fp16 | fp64
    key: Tensor  # (B, Hkv, Lk, D), Hq % Hkv == 0
    value: Tensor  # (B, Hkv, Lk, Dv)
    dense: Tensor | None = None  # (B|1, Hq|1, Lq|1, Lk), any float dtype
    diag: Tensor | None = None  # (Hq|1, R), acc dtype
    diag_index: Tensor | None = None  # (Lq + Lk - 1,) int32 with values in [0, R); None = identity, R == Lq + Lk - 1
    mask: Tensor | None = None  # (B|1, Hq|1, Lq|1, Lk) bool, True = attend
    intervals: Tensor | None = None  # (B|1, Lq, 2) int32: keys lo <= j < hi, clipped to [0, Lk]
    sinks: Tensor | None = None  # (Hq,), acc dtype
    cu_seqlens_q: Tensor | None = None  # (N + 1,) int32
    cu_seqlens_k: Tensor | None = None  # (N + 1,) int32
    seed: Tensor | None = None  # (1,) int64, required if dropout_p > 0
    left: int = UNBOUNDED
    right: int = UNBOUNDED
    scale: float = 1.0
    softcap: float = 0.0  # 0 = off
    dropout_p: float = 0.0
