"""Attention, the specification: explicit scores in plain PyTorch on the flat problem, differentiable at any order.

S = softcap(scale * q.k) + dense + diag + relative rows + segments; masks; softmax with a sink; dropout; P v.

Sources:
    scaled dot product: Vaswani et al., "Attention is all you need" (2017), eq. 1
    biases of the distance only: Raffel et al., T5 (2020), section 2.1; Press et al., ALiBi (2022), section 3
    queries times rows of the distance: Dai et al., Transformer-XL (2019), section 3.3; Shaw et al. (2018), eq. 5
    keys times rows of the distance: He et al., DeBERTa (2021), eq. 4
    a score for equal and for different segments: Yang et al., XLNet (2019), section 2.5
    soft capping, c tanh(x / c): Gemma 2 report (2024), section 2
    a learned logit per head in the denominator: gpt-oss model card (2025), after Xiao et al., "Efficient streaming
        language models with attention sinks" (2024)
    query heads sharing key heads: Ainslie et al., GQA (2023)
    dropout of attention weights: as in Vaswani et al.'s code; the mask is that of `reference.dropout`
"""

import torch
from torch import Tensor

from .._checks import without_autocast
from .._primitives import BLOCK, AttentionProblem, acc_dtype
from .dropout import keep_mask


def attention(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Forward pass of `AttentionProblem`; autograd gives the derivatives of every order.

    Returns:
        out (B, Hq, Lq, Dv) in the query's dtype, lse (B, Hq, Lq) in fp32 (fp64 for fp64): the natural log of the
        softmax denominator. A query that sees no key gives out 0, lse -inf (its sink, if there are sinks) and
        gradient 0.
    """
    compute = _attention if problem.cu_seqlens_q is None else _packed
    with without_autocast(problem.query.device):  # which would take the matmuls back to half precision
        return compute(problem)


def distances(problem: AttentionProblem) -> Tensor:
    """distance = j - (i + Lk - Lq), (Lq, Lk) int64: the last query stands at the last key."""
    queries, keys = problem.query.shape[2], problem.key.shape[2]
    i = torch.arange(queries, device=problem.query.device)[:, None]
    j = torch.arange(keys, device=problem.query.device)[None, :]
    return j - (i + keys - queries)


def visibility(problem: AttentionProblem) -> Tensor:
    """Which keys each query may attend to, as bool (B|1, Hq|1, Lq, Lk)."""
    distance = distances(problem)
    visible = ((distance >= -problem.left) & (distance <= problem.right))[None, None]
    if problem.intervals is not None:
        low, high = problem.intervals[:, None, :, None, :].unbind(-1)  # (B|1, 1, Lq, 1)
        j = torch.arange(problem.key.shape[2], device=distance.device)
        visible = visible & (j >= low) & (j < high)
    if problem.block_offsets is not None:
        visible = visible & block_visibility(problem)
    if problem.mask is not None:
        visible = visible & problem.mask
    return visible


def block_visibility(problem: AttentionProblem) -> Tensor:
    """The block table as bool (B|1, Hq|1, Lq, Lk): every block is looked up, then the blocks are laid side by side."""
    offsets, index, bits = problem.block_offsets, problem.block_index, problem.block_bits
    queries, keys = problem.query.shape[2], problem.key.shape[2]
    entry = torch.arange(index.shape[0], device=bits.device)
    of_row = (entry >= offsets[..., :-1, None]) & (entry < offsets[..., 1:, None])  # (B|1, Hq|1, rows, entries)
    columns = torch.arange((keys + BLOCK - 1) // BLOCK, device=bits.device)
    of_column = index[:, 0, None] == columns  # (entries, columns)
    # Bit c % 8 of byte c // 8 is key c. Two more patterns, for full blocks and for blocks that are not listed.
    bit = torch.arange(8, dtype=torch.uint8, device=bits.device)
    pattern = (((bits[..., None] >> bit) & 1) == 1).flatten(-2)
    pattern = torch.cat([pattern, pattern.new_ones(1, BLOCK, BLOCK), pattern.new_zeros(1, BLOCK, BLOCK)])
    full, absent = bits.shape[0], bits.shape[0] + 1
    row = torch.where(index[:, 1] < 0, full, index[:, 1]).to(torch.int64)
    listed = of_row.to(torch.int64) @ (of_column * (row[:, None] + 1))  # one entry at most per block: row + 1, or 0
    block = pattern[torch.where(listed > 0, listed - 1, absent)]  # (B|1, Hq|1, rows, columns, BLOCK, BLOCK)
    return block.transpose(-3, -2).flatten(-4, -3).flatten(-2)[..., :queries, :keys]


def scores(problem: AttentionProblem) -> Tensor:
    """S before masking, (B, Hq, Lq, Lk) in the accumulation dtype."""
    acc = acc_dtype(problem.query.dtype)
    query, key = problem.query.to(acc), _repeat(problem.key.to(acc), problem)
    score = query @ key.transpose(-1, -2) * problem.scale
    if problem.softcap:
        score = problem.softcap * torch.tanh(score / problem.softcap)
    if problem.dense is not None:
        score = score + problem.dense.to(acc)
    if problem.diag is not None:
        position = distances(problem) + problem.key.shape[2] - 1
        if problem.diag_index is not None:
            position = problem.diag_index.to(torch.int64)[position]
        score = score + problem.diag[:, position]
    if problem.rel_index is not None:
        score = score + problem.scale * _relative(problem, key)
    if problem.segment is not None:
        same = problem.segment_q[:, None, :, None] == problem.segment_k[:, None, None, :]
        different_score, same_score = problem.segment.unbind(-1)
        score = score + torch.where(same, same_score[..., None], different_score[..., None])
    return score


def _relative(problem: AttentionProblem, key: Tensor) -> Tensor:
    """rel_query_i . rel_q[row(i, j)] + key_j . rel_k[row(i, j)], (B, Hq, Lq, Lk); `key` has a head per query head."""
    row = problem.rel_index.to(torch.int64)[distances(problem) + problem.key.shape[2] - 1]
    shape = (*problem.query.shape[:2], -1, -1)
    total = key.new_zeros(())
    if problem.rel_q is not None:
        product = problem.rel_query.to(key.dtype) @ problem.rel_q.to(key.dtype).transpose(-1, -2)  # (B, Hq, Lq, R)
        total = total + product.gather(-1, row.expand(shape))
    if problem.rel_k is not None:
        product = key @ problem.rel_k.to(key.dtype).transpose(-1, -2)  # (B, Hq, Lk, R)
        total = total + product.gather(-1, row.t().expand(shape)).transpose(-1, -2)
    return total


def _repeat(tensor: Tensor, problem: AttentionProblem) -> Tensor:
    """(B, Hkv, L, D) -> (B, Hq, L, D): query head h reads key head h // (Hq // Hkv)."""
    heads, kv_heads = problem.query.shape[1], tensor.shape[1]
    return tensor if heads == kv_heads else tensor.repeat_interleave(heads // kv_heads, dim=1)


def _attention(problem: AttentionProblem, first_batch: int = 0) -> tuple[Tensor, Tensor]:
    score = scores(problem).masked_fill(~visibility(problem), -torch.inf)
    # The sink is one more column; without sinks its logit is -inf, which also keeps the maximum over no keys defined.
    column = score.new_full((), -torch.inf) if problem.sinks is None else problem.sinks[:, None, None]
    score = torch.cat([score, column.expand(*score.shape[:-1], 1)], dim=-1)
    # The maximum cancels exactly, so it takes no part in differentiation; 0 stands in where a row sees nothing.
    maximum = score.detach().amax(dim=-1, keepdim=True)
    maximum = maximum.masked_fill(maximum == -torch.inf, 0.0)
    weight = torch.exp(score - maximum)
    total = weight.sum(dim=-1, keepdim=True)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)  # before the division and the log: their derivatives at 0 would be NaN
    lse = (maximum + torch.log(total)).masked_fill(nothing, -torch.inf)[..., 0]
    probability = weight[..., :-1] / total
    if problem.dropout_p > 0:
        keep = keep_mask(problem.seed, problem.dropout_p, tuple(probability.shape), first_batch)
        survivors = 1.0 / (1.0 - problem.dropout_p) if problem.dropout_p < 1 else 0.0
        probability = probability * keep * survivors
    out = probability @ _repeat(problem.value.to(probability.dtype), problem)
    return out.to(problem.query.dtype), lse


def _packed(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """One sequence after the other, each as a problem of its own. Reads the offsets on the host."""
    rows, cols = problem.cu_seqlens_q.tolist(), problem.cu_seqlens_k.tolist()
    outs, lses = [], []
    for n in range(len(rows) - 1):
        q, k = slice(rows[n], rows[n + 1]), slice(cols[n], cols[n + 1])
        part = problem._replace(
            query=problem.query[:, :, q],
            key=problem.key[:, :, k],
            value=problem.value[:, :, k],
            rel_query=None if problem.rel_query is None else problem.rel_query[:, :, q],
            intervals=None if problem.intervals is None else problem.intervals[:, q],
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            **_local_strips(problem, rows[n + 1] - rows[n], cols[n + 1] - cols[n]),
        )
        out, lse = _attention(part, first_batch=n)
        outs.append(out)
        lses.append(lse)
    if not outs:  # no sequences, so no rows either
        return _attention(problem._replace(cu_seqlens_q=None, cu_seqlens_k=None))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _local_strips(problem: AttentionProblem, queries: int, keys: int) -> dict:
    """The part of each strip (distance 0 at total_k - 1) that a sequence of these lengths uses (its own at Lk - 1)."""
    first = problem.key.shape[2] - keys
    part = slice(first, first + max(queries + keys - 1, 0))
    strips = {"rel_index": None if problem.rel_index is None else problem.rel_index[part]}
    if problem.diag_index is not None:
        strips["diag_index"] = problem.diag_index[part]
    elif problem.diag is not None:
        strips["diag"] = problem.diag[:, part]
    return strips
