"""`MultiheadAttention`: a drop-in for `torch.nn.MultiheadAttention` on `pyext.attention`."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, pad

from .. import _checks
from .. import bias as _bias
from .. import masks as _masks
from .._primitives import acc_dtype
from ..ops.attention import attention


class MultiheadAttention(nn.MultiheadAttention):
    """Concat(head_1, ..., head_H) W_o with head_h = attention(q W_h^Q, k W_h^K, v W_h^V).

    Constructor, parameters, initial values, state_dict and call are those of `torch.nn.MultiheadAttention`, with these
    differences: a query that sees no key attends to nothing (there: NaN); `is_causal` needs no attn_mask beside it;
    nested tensors are refused. Without need_weights no (L, S) matrix of weights is made.

    Args:
        impl: backend of the attention; the others as in `torch.nn.MultiheadAttention`.
    Source: Vaswani et al., "Attention is all you need" (2017), section 3.2.2.
    """

    def __init__(self, *args, impl: str = "auto", **kwargs):
        super().__init__(*args, **kwargs)
        self.impl = impl

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `torch.nn.MultiheadAttention.forward`.

        Args:
            query: (L, N, E), (N, L, E) with batch_first, or (L, E); key, value: likewise of length S.
            key_padding_mask: (N, S) or (S,); bool, True = ignore, or float, added to the scores.
            need_weights: also return the weights, (N, L, S) or (N, H, L, S); in training those after dropout.
            attn_mask: (L, S) or (N * H, L, S); bool, True = hidden, or float, added to the scores.
            average_attn_weights: average the returned weights over heads.
            is_causal: query i sees keys j <= i; says that attn_mask, if given, is that very mask.
        Raises:
            TypeError, ValueError naming the argument.
        """
        batched = query.dim() == 3
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if _checks.tensor(name, tensor).dim() != (3 if batched else 2):
                expected = "(L, E) or with a batch dimension" if name == "query" else f"{query.dim()} dimensions"
                raise _checks.shape_error(name, expected, "" if name == "query" else "to match query", tensor)
        if not batched:
            query, key, value = (x[None] for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        q, k, v = (self._heads(x, batched) for x in self._project(query, key, value))
        extra = (self.bias_k is not None) + bool(self.add_zero_attn)
        if is_causal and attn_mask is not None and not extra:
            attn_mask = None  # it is the causal one, which needs no matrix
        elif is_causal and attn_mask is None and extra:
            attn_mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        terms = self._masks(q, k, key_padding_mask, attn_mask, extra)
        k, v = self._extra_keys(k, v)
        weigh = self._weigh if need_weights else self._fused
        out, weights = weigh(q, k, v, terms, is_causal and attn_mask is None)
        out = out.transpose(1, 2).flatten(2)  # (N, L, E)
        if batched and not self.batch_first:
            out = out.transpose(0, 1)
        out = linear(out, self.out_proj.weight, self.out_proj.bias)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            out, weights = out[0], None if weights is None else weights[0]
        return out, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Input projections; one product where inputs are the same tensor."""
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self.in_proj_weight is None:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        elif query is key and key is value:
            return linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            weights = self.in_proj_weight.chunk(3)
        return tuple(linear(*given) for given in zip((query, key, value), weights, biases, strict=True))

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        """A projection as (N, H, L, D), a view."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        return x.transpose(1, 2) if self.batch_first or not batched else x.permute(1, 2, 0, 3)

    def _extra_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the learned key and value, and the key and value of zeros."""
        size = (k.shape[0], self.num_heads, 1, self.head_dim)
        if self.bias_k is not None:
            rows = (row.to(k.dtype).view(1, *size[1:]).expand(size) for row in (self.bias_k, self.bias_v))
            k, v = (torch.cat(pair, dim=2) for pair in zip((k, v), rows, strict=True))
        if self.add_zero_attn:
            k, v = (pad(x, (0, 0, 0, 1)) for x in (k, v))
        return k, v

    def _masks(self, q: Tensor, k: Tensor, key_padding_mask, attn_mask, extra: int) -> list[Tensor]:
        """Both masks, broadcastable to (N, H, L, S + extra): bool, True = attend, or float. Appended keys are seen."""
        batch, heads, queries, keys = *q.shape[:3], k.shape[2]
        for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
            if mask is not None and _checks.tensor(name, mask).dtype not in (torch.bool, *_checks.FLOATING):
                raise TypeError(f"{name} must be a bool or float tensor, got {mask.dtype}")
        terms = []
        if attn_mask is not None:
            shapes = {2: (queries, keys), 3: (batch * heads, queries, keys)}
            if attn_mask.shape != shapes.get(attn_mask.dim()):
                expected = f"{shapes[2]} or {shapes[3]}"
                raise _checks.shape_error("attn_mask", expected, "to match query and key", attn_mask)
            terms.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, heads)))
        if key_padding_mask is not None:
            if key_padding_mask.shape != (batch, keys):
                raise _checks.shape_error("key_padding_mask", f"{(batch, keys)}", "to match key", key_padding_mask)
            terms.append(key_padding_mask[:, None, None])
        terms = [~term if term.dtype == torch.bool else term for term in terms]
        return [pad(term, (0, extra), value=term.dtype == torch.bool) if extra else term for term in terms]

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, terms: list[Tensor], is_causal: bool) -> tuple[Tensor, None]:
        bias = mask = None
        for term in terms:
            if term.dtype == torch.bool:
                mask = _masks.dense(term) if mask is None else mask & _masks.dense(term)
            else:
                bias = _bias.dense(term) if bias is None else bias + _bias.dense(term)
        p = self.dropout if self.training else 0.0
        out = attention(q, k, v, dropout_p=p, is_causal=is_causal, bias=bias, mask=mask, impl=self.impl)
        return out, None

    def _weigh(self, q: Tensor, k: Tensor, v: Tensor, terms: list[Tensor], is_causal: bool) -> tuple[Tensor, Tensor]:
        """The same by the formula, which shows the weights."""
        acc = acc_dtype(q.dtype)
        score = (q @ k.transpose(-1, -2)).to(acc) * (1.0 / math.sqrt(self.head_dim))
        if is_causal:
            terms = [*terms, torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).tril()]
        for term in terms:
            score = score.masked_fill(~term, -math.inf) if term.dtype == torch.bool else score + term.to(acc)
        nothing = (score == -math.inf).all(dim=-1, keepdim=True)  # before the softmax, whose derivative would be NaN
        weights = torch.softmax(score.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing, 0.0).to(v.dtype)
        if self.training and self.dropout > 0.0:
            weights = dropout(weights, self.dropout)
        return weights @ v, weights
