"""Attention written out densely from the formulas of the public contract, independent of `pyext`.

The same function serves as oracle (fp64) and as "PyTorch eager" (the dtype under test). It materialises everything:

    S = softcap(scale * q k^T) + score, masked by `allowed`;  P = softmax([S, sink]);  out = (P * keep / (1 - p)) v
    lse = log sum exp [S, sink]
"""

from __future__ import annotations

import math

import numpy as np
import torch

Tensor = torch.Tensor


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b rounded once to the dtype. fp16 GEMMs of CPU torch are slow, so they run in fp32: if anything, stricter."""
    if a.dtype == torch.float16:
        return (a.float() @ b.float()).to(a.dtype)
    return a @ b


def attention(query, key, value, *, scale=None, softcap=None, score=None, allowed=None, sinks=None, keep=None, p=0.0):
    """(out, lse) of query (B,Hq,Lq,D), key (B,Hkv,Lk,D), value (B,Hkv,Lk,Dv), all in one dtype.

    score broadcasts to (B,Hq,Lq,Lk), as does the bool `allowed`; sinks is (Hq,); keep the bool dropout mask. lse comes
    in fp64 for fp64 and fp32 otherwise, taken from scores that were rounded to the dtype.
    """
    dtype, group = query.dtype, query.shape[1] // max(key.shape[1], 1)
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    s = matmul(query, key.transpose(-1, -2)) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if score is not None:
        s = s + score.to(dtype)
    if allowed is not None:
        s = s.masked_fill(~allowed, -math.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.to(dtype).view(1, -1, 1, 1).expand(*s.shape[:3], 1)], -1)
    dead = (s == -math.inf).all(-1, keepdim=True)
    s = s.masked_fill(dead, 0.0)
    wide = s if dtype == torch.float64 else s.float()
    if s.shape[-1] == 0:
        lse = wide.new_full(s.shape[:3], -math.inf)
    else:
        lse = torch.logsumexp(wide, -1).masked_fill(dead[..., 0], -math.inf)
    probabilities = torch.softmax(s, -1).masked_fill(dead, 0.0)
    if sinks is not None:
        probabilities = probabilities[..., :-1]
    if keep is not None:
        probabilities = probabilities * keep.to(dtype) * (1.0 / (1.0 - p) if p < 1.0 else 0.0)
    return matmul(probabilities, value), lse


def distance(lq: int, lk: int) -> Tensor:
    """(Lq, Lk) int64: j - (i + Lk - Lq)."""
    i, j = torch.arange(lq).view(-1, 1), torch.arange(lk).view(1, -1)
    return j - (i + lk - lq)


def t5_bucket(relative: Tensor, bidirectional: bool, buckets: int, max_distance: int) -> Tensor:
    """The bucket of relative = key position - query position, as Hugging Face's T5 computes it (fp32 logarithm)."""
    result = torch.zeros_like(relative)
    if bidirectional:
        buckets //= 2
        result = result + (relative > 0).to(torch.long) * buckets
        relative = relative.abs()
    else:
        relative = -torch.minimum(relative, torch.zeros_like(relative))
    exact = buckets // 2
    large = exact + (torch.log(relative.float() / exact) / math.log(max_distance / exact) * (buckets - exact)).to(
        torch.long
    )
    large = torch.minimum(large, torch.full_like(large, buckets - 1))
    return result + torch.where(relative < exact, relative, large)


def deberta_bucket(relative: Tensor, buckets: int, max_position: int) -> Tensor:
    """The log bucket of relative = query position - key position, as Hugging Face's DeBERTa-v2 computes it."""
    mid = buckets // 2
    inside = (relative < mid) & (relative > -mid)
    distance = torch.where(inside, torch.tensor(mid - 1).type_as(relative), torch.abs(relative))
    whole = torch.log(torch.tensor((max_position - 1) / mid))
    log = torch.ceil(torch.log(distance / mid) / whole * (mid - 1)) + mid
    return torch.where(distance <= mid, relative.type_as(log), log * torch.sign(relative)).to(torch.long)


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 (Salmon et al. 2011) of uint32 counters (..., 4) under one key: uint32 (..., 4)."""
    mask = np.uint64(0xFFFFFFFF)
    c = [counter[..., n].astype(np.uint64) for n in range(4)]
    k0, k1 = key
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (b >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            b & mask,
            (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            a & mask,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([x.astype(np.uint32) for x in c], -1)


def dropout_keep(seed: int, p: float, batch: int, heads: int, lq: int, lk: int) -> Tensor:
    """(batch, heads, Lq, Lk) bool: word j & 3 of Philox at counter (j >> 2, i, head, batch) is >= floor(p * 2^32)."""
    quads = (lk + 3) // 4
    b, h, i, j = np.meshgrid(*(np.arange(n, dtype=np.uint32) for n in (batch, heads, lq, quads)), indexing="ij")
    words = philox(np.stack([j, i, h, b], -1), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    words = words.reshape(batch, heads, lq, quads * 4)[..., :lk]
    return torch.from_numpy(words.astype(np.int64) >= math.floor(p * 2.0**32))


def magnitudes(leaves, score, out, lse, grad_out, grad_lse, scale, softcap, allowed, keep, p):
    """Sums of the absolute values of the terms behind each result, and the part of them that comes from <dO, out>.

    Two dicts {name: fp64 tensor}, the `magnitude` and `floor` of the tolerance rule: what cancellation is judged by.
    score(leaves) is the dense bias as a differentiable function of the leaves, which are named query, key, value,
    sinks and as score calls them; the others are those of `attention`.
    """
    query, key, value, sinks = (leaves.get(name) for name in ("query", "key", "value", "sinks"))
    group = query.shape[1] // max(key.shape[1], 1)
    q = query.detach()
    k, v = (x.detach().repeat_interleave(group, 1) for x in (key, value))
    s = (q @ k.transpose(-1, -2)) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    dense = score(leaves)
    if dense is not None:
        s = s + dense.detach()
    # What queries and keys add to gradients of rows, and rows to theirs, in absolute values too.
    absolute = {name: leaf.detach().abs().requires_grad_() for name, leaf in leaves.items()}
    dense = score(absolute)
    if allowed is not None:
        s = s.masked_fill(~allowed, -math.inf)
    finite = lse.detach().masked_fill(lse == -math.inf, 0.0).unsqueeze(-1)
    weights = torch.exp(s - finite).masked_fill((lse == -math.inf).unsqueeze(-1), 0.0)
    # exp(s - lse) turns the rounding of s and lse, which grows with them, into a relative error.
    weights = weights * ((s.masked_fill(weights == 0, 0.0).abs() + finite.abs()) / 8.0).clamp(min=1.0)
    dropped = weights if keep is None else weights * keep * (1.0 / (1.0 - p) if p < 1.0 else 0.0)
    inner = (out.detach() * grad_out).abs().sum(-1, keepdim=True)
    rows = inner if grad_lse is None else inner + grad_lse.abs().unsqueeze(-1)

    def heads(x):
        return x.unflatten(1, (-1, group)).sum(2)

    def through_scores(g):
        gradients = {"grad query": scale * (g @ k.abs()), "grad key": heads(scale * (g.transpose(-1, -2) @ q.abs()))}
        if dense is not None and dense.requires_grad:
            values, g = list(absolute.values()), g.sum_to_size(dense.shape)
            found = torch.autograd.grad(dense, values, g, allow_unused=True, retain_graph=True)
            for name, t in zip(absolute, found):
                if t is not None:
                    gradients[f"grad {name}"] = gradients.get(f"grad {name}", 0) + t
        return gradients

    result = through_scores(dropped * (grad_out.abs() @ v.abs().transpose(-1, -2)) + weights * rows)
    result["lse"] = finite[..., 0].abs().clamp(min=1.0)
    result["out"] = dropped @ v.abs()
    result["grad value"] = heads(dropped.transpose(-1, -2) @ grad_out.abs())
    floors = through_scores(weights * inner)
    if sinks is not None:
        weight = torch.exp(sinks.detach().view(1, -1, 1) - lse.detach())
        result["grad sinks"] = (weight * rows[..., 0]).sum((0, 2))
        floors["grad sinks"] = (weight * inner[..., 0]).sum((0, 2))
    return tuple({name: t.abs() for name, t in found.items() if t.numel()} for found in (result, floors))
