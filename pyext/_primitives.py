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
#: Experts of a mixture: gated ones, then with the same activations in the same order those that are not gated.
EXPERT_ACTIVATIONS = (*ACTIVATIONS, "gelu", "gelu_tanh", "silu", "relu")
#: How a mixture of experts routes tokens. The op carries the index.
POLICIES = ("softmax_topk", "topk_softmax", "switch", "gshard", "sigmoid", "expert_choice")


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


class Routing(NamedTuple):
    """Which experts compute each token, and with what weights: tensors all, of sizes that do not depend on contents.

    T tokens, E experts, K columns of choices (E for "expert_choice"), N rows: T * K, or fewer where a capacity bounds
    them. Rows are sorted by expert, then by token: offsets[e] <= n < offsets[e + 1] are those of expert e, and those
    from offsets[E] on are unused.
    """

    expert_index: Tensor  # (T, K) int32, -1 = dropped, masked or not chosen
    weights: Tensor  # (T, K) fp32 (fp64 for fp64 logits), 0 where expert_index is -1
    offsets: Tensor  # (E + 1,) int32, the first row of each expert, and the number of used rows
    source: Tensor  # (N,) int32, the token of each row, -1 in unused rows
    position: Tensor  # (T, K) int32, the row of each choice, -1 where expert_index is -1
    balance_loss: Tensor  # (), the policy's, without its coefficient
    z_loss: Tensor  # (), mean over tokens of logsumexp(logits)^2
    dropped: Tensor  # () int32: choices of unmasked tokens without a row; for "expert_choice" tokens that none chose


class RouteProblem(NamedTuple):
    """Routing by one policy: exactly the arguments of the op `moe_route_forward`, in its order.

    The op returns the eight fields of `Routing`, then `choice` (T, K) int32, the experts chosen before any drop (but -1
    for masked tokens), and `load` (G, E), the choices that the balance loss counts; its derivative needs them:

    moe_route_backward(Tensor? grad_weights, Tensor? grad_balance, Tensor? grad_z, Tensor logits, Tensor? token_mask,
        Tensor expert_index, Tensor choice, Tensor load, int policy, bool renormalize) -> Tensor grad_logits

    Jitter is a factor on the logits that the caller applies; random numbers come as tensors. So all backends decide
    alike.
    """

    logits: Tensor  # (G, S, E), fp32 | bf16 | fp16 | fp64
    token_mask: Tensor | None = None  # (G, S) bool, False = padding, which neither routes nor counts
    expert_bias: Tensor | None = None  # (E,), acc dtype: added to the scores where experts are chosen, not to weights
    uniform: Tensor | None = None  # (G, S) fp32 in [0, 1): "gshard" keeps the second choice where it is below 2 g2
    policy: int = 0  # index into POLICIES
    top_k: int = 1
    capacity: int = -1  # slots of each expert in each group, or -1 for no limit
    renormalize: bool = False  # the weights of a token's choices, before any drop, sum to 1
    batch_priority: bool = False  # tokens claim slots in the order of their largest score, not in their own
    groups: int = 1  # of experts; a token chooses within the best `top_groups`
    top_groups: int = 1


class DispatchProblem(NamedTuple):
    """xs[n] = x[source[n]], 0 in unused rows: exactly the arguments of the op `moe_dispatch_forward`.

    Its derivative is `moe_combine_forward(grad, None, position)`, a sum in the order of choices without atomics; hence
    position.
    """

    x: Tensor  # (T, H), fp32 | bf16 | fp16 | fp64
    source: Tensor  # (N,) int32
    position: Tensor  # (T, K) int32


class CombineProblem(NamedTuple):
    """out[t] = sum_k weights[t, k] ys[position[t, k]]: exactly the arguments of the op `moe_combine_forward`.

    moe_combine_backward(Tensor grad, Tensor ys, Tensor? weights, Tensor position, bool need_ys, bool need_weights)
        -> (Tensor dys, Tensor dweights)
    with n = position[t, k]: dys[n] = weights[t, k] grad[t], 0 in unused rows, and dweights[t, k] = <grad[t], ys[n]>
    """

    ys: Tensor  # (N, J), fp32 | bf16 | fp16 | fp64
    weights: Tensor | None  # (T, K), acc dtype; None = 1
    position: Tensor  # (T, K) int32


class GroupedLinearProblem(NamedTuple):
    """out[n] = xs[n] w[e]^T + bias[e] for the rows n of expert e, 0 in unused rows: `moe_grouped_linear_forward`.

    moe_grouped_linear_backward(Tensor grad, Tensor xs, Tensor w, Tensor offsets, bool need_xs, bool need_w,
        bool need_bias) -> (Tensor dxs, Tensor dw, Tensor dbias)   (shape (0,) for what is not needed)
    """

    xs: Tensor  # (N, I), fp32 | bf16 | fp16 | fp64, as w and bias
    w: Tensor  # (E, O, I)
    bias: Tensor | None  # (E, O)
    offsets: Tensor  # (E + 1,) int32


class ExpertsProblem(NamedTuple):
    """ys[n] = act(xs[n] w_gate_up[e]^T + b_gate_up[e]) w_down[e]^T + b_down[e]: the op `moe_experts_forward`.

    It returns (ys, pre); pre (N, 2I), gate columns first, or (N, I) for experts that are not gated, holds the
    pre-activations, and has shape (0,) without `save`.

    moe_experts_backward(Tensor grad, Tensor xs, Tensor pre, Tensor w_gate_up, Tensor w_down, Tensor offsets,
        int activation, bool need_xs, bool need_gate_up, bool need_down, bool need_b_gate_up, bool need_b_down)
        -> (dxs, dw_gate_up, dw_down, db_gate_up, db_down)   (shape (0,) for what is not needed)
    """

    xs: Tensor  # (N, H), fp32 | bf16 | fp16 | fp64, as weights and biases
    w_gate_up: Tensor  # (E, 2I, H), the rows of the gate first; (E, I, H) for experts that are not gated
    w_down: Tensor  # (E, J, I)
    b_gate_up: Tensor | None  # (E, 2I) or (E, I)
    b_down: Tensor | None  # (E, J)
    offsets: Tensor  # (E + 1,) int32
    activation: int  # index into EXPERT_ACTIVATIONS
    save: bool = False


class MoEProblem(NamedTuple):
    """combine(experts(dispatch(x))) without permuted copies: exactly the arguments of the op `moe_forward`.

    It returns (out, pre) with pre as in `ExpertsProblem`. Autograd keeps x, pre and the routing, but no output of an
    expert: with A = act(pre) computed again and A' = grad[source] w_down[e], the gradient of a weight is
    <A', A> + <grad[t], b_down[e]>, and that of pre starts from weights[t, k] A'.

    moe_backward(Tensor grad, Tensor x, Tensor pre, Tensor w_gate_up, Tensor w_down, Tensor? b_down, Tensor weights,
        Tensor offsets, Tensor source, Tensor position, int activation, bool need_x, bool need_gate_up, bool need_down,
        bool need_b_gate_up, bool need_b_down, bool need_weights)
        -> (dx, dw_gate_up, dw_down, db_gate_up, db_down, dweights)   (shape (0,) for what is not needed)
    """

    x: Tensor  # (T, H), fp32 | bf16 | fp16 | fp64, as experts' weights and biases
    w_gate_up: Tensor
    w_down: Tensor
    b_gate_up: Tensor | None
    b_down: Tensor | None
    weights: Tensor  # (T, K), acc dtype
    offsets: Tensor
    source: Tensor
    position: Tensor
    activation: int
    save: bool = False
