"""`TransformerXLAttention`: attention over the current segment and a memory, with relative positions."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .. import bias as _bias
from .. import masks as _masks
from ..ops.attention import attention
from .positions import sinusoids


class TransformerXLAttention(nn.Module):
    """LayerNorm(w + Attention([memory, w])) with score (q_i + r_w_bias).k_j + (q_i + r_r_bias).r[i - j], over sqrt(d).

    Parameters have the names and shapes of Transformers' `RelPartialLearnableMultiHeadAttn`, so state_dicts load both
    ways. Sequences come first: (L, B, d_model).

    Args:
        n_head, d_model, d_head: heads, width of the model, width of a head.
        dropout: of the output; dropatt: of the attention weights. Both in training mode only.
        pre_lnorm: normalise what is projected instead of the sum.
        r_r_bias, r_w_bias: (n_head, d_head) parameters that several layers share; both, or neither.
        layer_norm_epsilon: of the normalisation.
        normalize: False leaves out normalisation and residual: the module then returns the projected attention alone.
        impl: backend of the attention.
        device, dtype: of the parameters.
    Source: Dai et al., Transformer-XL (ACL 2019), section 3.
    """

    def __init__(
        self,
        n_head: int,
        d_model: int,
        d_head: int,
        dropout: float = 0.0,
        dropatt: float = 0.0,
        pre_lnorm: bool = False,
        r_r_bias: nn.Parameter | None = None,
        r_w_bias: nn.Parameter | None = None,
        layer_norm_epsilon: float = 1e-5,
        normalize: bool = True,
        impl: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        if (r_r_bias is None) != (r_w_bias is None):
            raise ValueError("r_r_bias and r_w_bias must both be given, or neither")
        self.n_head, self.d_model, self.d_head = n_head, d_model, d_head
        self.dropatt, self.pre_lnorm, self.normalize, self.impl = dropatt, pre_lnorm, normalize, impl
        where = {"device": device, "dtype": dtype}
        self.qkv_net = nn.Linear(d_model, 3 * n_head * d_head, bias=False, **where)
        self.drop = nn.Dropout(dropout)
        self.o_net = nn.Linear(n_head * d_head, d_model, bias=False, **where)
        if normalize:
            self.layer_norm = nn.LayerNorm(d_model, eps=layer_norm_epsilon, **where)
        if r_r_bias is None:
            r_r_bias, r_w_bias = (
                nn.Parameter(nn.init.normal_(torch.empty(n_head, d_head, **where), std=0.02)) for _ in range(2)
            )
        self.r_r_bias, self.r_w_bias = r_r_bias, r_w_bias
        self.r_net = nn.Linear(d_model, n_head * d_head, bias=False, **where)

    def forward(
        self,
        w: Tensor,
        r: Tensor | None = None,
        attn_mask: Tensor | _masks.Mask | None = None,
        mems: Tensor | None = None,
    ) -> Tensor:
        """Attend from the segment to the memory and itself.

        Args:
            w: (L, B, d_model).
            r: (Lr, d_model) or (Lr, 1, d_model), embeddings of the relative positions M + L - 1, M + L - 2, ..., as
                the published model makes them (M + L of them) or further, to negative ones; None = sinusoids.
            attn_mask: a `pyext.masks` object; or as in the published code, nonzero = hidden, (L, M + L, B or 1) or
                (M + L, B). None = causal.
            mems: (M, B, d_model), hidden states of former segments (see `memory`), or None.
        Returns:
            (L, B, d_model). A query that sees no key attends to nothing.
        """
        length, batch, _ = w.shape
        mems = w[:0] if mems is None else mems
        keys = mems.shape[0] + length
        if r is None:
            last = -1 if attn_mask is None else -length  # of a causal mask no query sees a negative position
            r = sinusoids(torch.arange(keys - 1, last, -1, device=w.device), self.d_model, w.dtype)
        states = torch.cat([mems, w]) if mems.shape[0] else w
        if self.normalize and self.pre_lnorm:
            states = self.layer_norm(states)
        width = self.n_head * self.d_head
        query = linear(states[keys - length :], self.qkv_net.weight[:width])
        key, value = linear(states, self.qkv_net.weight[width:]).chunk(2, dim=-1)
        # (L, B, H * D) -> (B, H, L, D), views that the kernels read in place
        query, key, value = (
            x.unflatten(-1, (self.n_head, self.d_head)).permute(1, 2, 0, 3) for x in (query, key, value)
        )
        rows = self.r_net(r).reshape(r.shape[0], self.n_head, self.d_head)
        attended = attention(
            query,
            key,
            value,
            dropout_p=self.dropatt if self.training else 0.0,
            scale=1.0 / math.sqrt(self.d_head),
            bias=_bias.transformer_xl(rows, self.r_w_bias, self.r_r_bias),
            mask=_mask(attn_mask),
            impl=self.impl,
        )
        out = self.drop(self.o_net(attended.permute(2, 0, 1, 3).flatten(2)))
        if not self.normalize:
            return out
        return w + out if self.pre_lnorm else self.layer_norm(w + out)

    @staticmethod
    def memory(w: Tensor, mems: Tensor | None, length: int) -> Tensor:
        """The memory for the next segment: the last `length` hidden states of this one and of its memory, detached."""
        states = w if mems is None else torch.cat([mems, w])
        return states[max(states.shape[0] - length, 0) :].detach()


def _mask(attn_mask) -> _masks.Mask:
    """The published code's mask, nonzero = hidden, as a mask object."""
    if attn_mask is None:
        return _masks.causal()
    if isinstance(attn_mask, _masks.Mask):
        return attn_mask
    hidden = attn_mask.to(torch.bool)
    hidden = hidden.t()[:, None, None] if hidden.dim() == 2 else hidden.permute(2, 0, 1)[:, None]
    return _masks.dense(~hidden)
