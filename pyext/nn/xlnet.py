"""`XLNetAttention`: two-stream attention with relative positions, segments and memory."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _checks
from .. import bias as _bias
from .. import masks as _masks
from .._primitives import acc_dtype
from ..ops.attention import attention
from .positions import sinusoids


class XLNetAttention(nn.Module):
    """LayerNorm(h + Attention([memory, h])) for the content stream h and, reading the same keys, the query stream g.

    score = ((q_i + r_w_bias).k_j + (q_i + r_r_bias).r[i - j] + (q_i + r_s_bias).seg_embed[segments differ]) / sqrt(d)

    Parameters have the names and shapes of Transformers' `XLNetRelativeAttention`, so state_dicts load both ways.
    Sequences come first: (L, B, d_model).

    Args:
        d_model, n_head, d_head: width of the model, heads, width of a head (d_model / n_head if None).
        dropout: of attention weights and output, in training mode only.
        layer_norm_eps: of the normalisation.
        initializer_range: standard deviation of the initial weights.
        impl: backend of the attention.
        device, dtype: of the parameters.
    Source: Yang et al., XLNet (NeurIPS 2019), sections 2.3 to 2.5 and appendix A.2.
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        d_head: int | None = None,
        dropout: float = 0.0,
        layer_norm_eps: float = 1e-12,
        initializer_range: float = 0.02,
        impl: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        if d_head is None:
            d_head = _checks.head_width("d_model", d_model, "n_head", n_head)
        self.d_model, self.n_head, self.d_head, self.impl = d_model, n_head, d_head, impl
        where = {"device": device, "dtype": dtype}
        for name in ("q", "k", "v", "o", "r"):
            setattr(self, name, nn.Parameter(torch.empty(d_model, n_head, d_head, **where)))
        for name in ("r_r_bias", "r_s_bias", "r_w_bias"):
            setattr(self, name, nn.Parameter(torch.empty(n_head, d_head, **where)))
        self.seg_embed = nn.Parameter(torch.empty(2, n_head, d_head, **where))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=initializer_range)
        self.layer_norm = nn.LayerNorm(d_model, eps=layer_norm_eps, **where)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        h: Tensor,
        g: Tensor | None = None,
        attn_mask_h: Tensor | _masks.Mask | None = None,
        attn_mask_g: Tensor | _masks.Mask | None = None,
        r: Tensor | None = None,
        seg_q: Tensor | None = None,
        seg_k: Tensor | None = None,
        mems: Tensor | None = None,
        target_mapping: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from both streams to the memory and the content stream.

        Args:
            h: (L, B, d_model), the content stream.
            g: (L, B, d_model), the query stream; with target_mapping (T, B, d_model); or None.
            attn_mask_h, attn_mask_g: `pyext.masks` objects (`masks.permutation` for a factorisation order); or as in
                the published code, nonzero = hidden, (L, M + L, B or 1, 1). None = everything is visible.
            r: (M + 2 L, B or 1, d_model) or (M + 2 L, d_model), embeddings of the relative positions M + L, ...,
                1 - L; None = sinusoids.
            seg_q: (B, L) integers, the segment of each position, or None for no segments.
            seg_k: (B, M + L), the same for keys; None = segment 0 for the memory, then seg_q.
            mems: (M, B, d_model), hidden states of former segments, or None.
            target_mapping: (T, L, B), one-hot: which position each row of g predicts. None = its own.
        Returns:
            h and g after attention, residual and normalisation, of their shapes. A query that sees no key attends to
            nothing (the published code lets it see all keys alike).
        """
        states = h if mems is None else torch.cat([mems, h])
        key, value = (self._heads(states, weight) for weight in (self.k, self.v))
        rows = self._rows(r, states.shape[0], h)
        if seg_q is not None and seg_k is None:
            memory = seg_q.new_zeros((seg_q.shape[0], states.shape[0] - h.shape[0]))
            seg_k = torch.cat([memory, seg_q], dim=1)
        content = self._heads(h, self.q)
        out_h = self._attend(h, content, key, value, rows, attn_mask_h, seg_q, seg_k, None)
        if g is None:
            return out_h, None
        query = self._heads(g, self.q)
        if target_mapping is not None:
            target_mapping = target_mapping.to(query.dtype)
            query = torch.einsum("bnmd,mlb->bnld", query, target_mapping)
        return out_h, self._attend(g, query, key, value, rows, attn_mask_g, seg_q, seg_k, target_mapping)

    def _heads(self, states: Tensor, weight: Tensor) -> Tensor:
        """(L, B, d_model) -> (B, H, L, D), a view of the projection."""
        return self._split(states, weight).permute(1, 2, 0, 3)

    def _split(self, states: Tensor, weight: Tensor) -> Tensor:
        """(..., d_model) -> (..., H, D)."""
        return self._linear(states, weight.flatten(1).t()).unflatten(-1, (self.n_head, self.d_head))

    @staticmethod
    def _linear(x: Tensor, weight: Tensor) -> Tensor:
        """x weight^T, which a model that was patched may have computed by something else than torch."""
        return F.linear(x, weight)

    def _rows(self, r: Tensor | None, keys: int, h: Tensor) -> Tensor:
        """Projected embeddings of the positions keys, keys - 1, ...: (P, H, D), or (B, P, H, D) where they differ."""
        if r is None:
            r = sinusoids(torch.arange(keys, -h.shape[0], -1, device=h.device), self.d_model, h.dtype)
        if r.dim() == 2:
            r = r[:, None]
        elif r.stride(1) == 0:  # one embedding, expanded over the batch
            r = r[:, :1]
        rows = self._split(r.to(self.r.dtype), self.r)
        return rows[:, 0] if rows.shape[1] == 1 else rows.transpose(0, 1)

    def _attend(self, residual, query, key, value, rows, attn_mask, seg_q, seg_k, target_mapping) -> Tensor:
        scale = 1.0 / math.sqrt(self.d_head)
        bias = _bias.transformer_xl(rows, self.r_w_bias, self.r_r_bias, first_distance=-key.shape[2])
        if seg_q is not None:
            # entry 0 of the embedding stands for equal segments, entry 1 of the bias does
            embed = self.seg_embed.flip(0).permute(1, 2, 0).to(query.dtype)  # (H, D, 2)
            scores = (query + self.r_s_bias.to(query.dtype)[:, None]) @ embed
            bias = bias + _bias.segment(scores.to(acc_dtype(scores.dtype)) * scale, seg_q, seg_k)
        attended = attention(
            query,
            key,
            value,
            dropout_p=self.dropout.p if self.training else 0.0,
            scale=scale,
            bias=bias,
            mask=_mask(attn_mask),
            impl=self.impl,
        )
        if target_mapping is not None:
            attended = torch.einsum("bnld,mlb->bnmd", attended, target_mapping)
        out = self._linear(attended.permute(2, 0, 1, 3).flatten(2), self.o.flatten(1))
        return self.layer_norm(self.dropout(out) + residual)


def _mask(attn_mask) -> _masks.Mask | None:
    """The published code's mask (Lq, Lk, B, H), nonzero = hidden, as a mask object."""
    if attn_mask is None or isinstance(attn_mask, _masks.Mask):
        return attn_mask
    return _masks.dense(~attn_mask.to(torch.bool).permute(2, 3, 0, 1))
