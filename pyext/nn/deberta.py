"""`DisentangledAttention`: DeBERTa's attention, in which content meets position."""

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from .. import _checks
from .. import bias as _bias
from .. import masks as _masks
from ..ops.attention import attention


class DisentangledAttention(nn.Module):
    """softmax((q_i.k_j + q_i.pos_key[i - j] + k_j.pos_query[i - j]) / sqrt(D (1 + number of terms))) v.

    Parameters have the names and shapes of Transformers' DeBERTa-v2 `DisentangledSelfAttention`, so state_dicts load
    both ways; `convert_v1` brings those of DeBERTa v1 into this form.

    Args:
        hidden_size, num_attention_heads: width of the model, heads.
        attention_head_size: width of a head; None = hidden_size / num_attention_heads.
        pos_att_type: which of "c2p" and "p2c" there are.
        position_buckets: log buckets on each side of distance 0 (v2, v3: 256); <= 0 = one row per distance (v1).
        max_relative_positions: the furthest distance with a row or bucket of its own (v1, v2, v3: 512).
        share_att_key: positions go through query_proj and key_proj (v2, v3) instead of projections of their own (v1).
        attention_probs_dropout_prob, hidden_dropout_prob: dropout of the weights, and of rel_embeddings; in training.
        impl: backend of the attention.
        device, dtype: of the parameters.
    Raises:
        ValueError naming the argument.
    Source: He et al., DeBERTa (ICLR 2021), section 3.1, and DeBERTaV3 (ICLR 2023).
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        attention_head_size: int | None = None,
        pos_att_type: Collection[str] = ("c2p", "p2c"),
        position_buckets: int = -1,
        max_relative_positions: int = 512,
        share_att_key: bool = False,
        attention_probs_dropout_prob: float = 0.0,
        hidden_dropout_prob: float = 0.0,
        impl: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        if attention_head_size is None:
            attention_head_size = _checks.head_width(
                "hidden_size", hidden_size, "num_attention_heads", num_attention_heads
            )
        unknown = sorted(set(pos_att_type) - {"c2p", "p2c"})
        if unknown:
            raise ValueError(f"pos_att_type must be made of 'c2p' and 'p2c', got {unknown[0]!r}")
        self.num_attention_heads, self.attention_head_size = num_attention_heads, attention_head_size
        self.pos_att_type, self.share_att_key, self.impl = tuple(pos_att_type), share_att_key, impl
        self.position_buckets, self.max_relative_positions = position_buckets, max_relative_positions
        self.span = position_buckets if position_buckets > 0 else max_relative_positions
        names = ["query_proj", "key_proj", "value_proj"]
        if not share_att_key:
            names += ["pos_key_proj"] if "c2p" in pos_att_type else []
            names += ["pos_query_proj"] if "p2c" in pos_att_type else []
        width = num_attention_heads * attention_head_size
        for name in names:
            setattr(self, name, nn.Linear(hidden_size, width, device=device, dtype=dtype))
        self.pos_dropout = nn.Dropout(hidden_dropout_prob)
        self.dropout = nn.Dropout(attention_probs_dropout_prob)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | _masks.Mask | None = None,
        query_states: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> Tensor:
        """Attend from query_states to hidden_states.

        Args:
            hidden_states: (B, Lk, hidden_size).
            attention_mask: a `pyext.masks` object; or nonzero = attend, (B, Lk) or broadcastable to (B, H, Lq, Lk).
            query_states: (B, Lq, hidden_size); None = hidden_states.
            rel_embeddings: (at least 2 * span, hidden_size), the table that all layers share, row p standing for
                bucket p - span of query position minus key position; needed unless pos_att_type is empty.
        Returns:
            (B, Lq, heads * width of a head). A query that sees no key gives 0 (the published code: the mean of values).
        """
        query = self._heads(self.query_proj(hidden_states if query_states is None else query_states))
        key, value = self._heads(self.key_proj(hidden_states)), self._heads(self.value_proj(hidden_states))
        scale = 1.0 / math.sqrt(self.attention_head_size * (1 + len(self.pos_att_type)))
        attended = attention(
            query,
            key,
            value,
            dropout_p=self.dropout.p if self.training else 0.0,
            scale=scale,
            bias=self._bias(rel_embeddings) if self.pos_att_type else None,
            mask=_mask(attention_mask),
            impl=self.impl,
        )
        return attended.transpose(1, 2).flatten(2)

    def _heads(self, states: Tensor) -> Tensor:
        """(..., L, H * D) -> (..., H, L, D)."""
        return states.unflatten(-1, (self.num_attention_heads, self.attention_head_size)).transpose(-2, -3)

    def _bias(self, rel_embeddings: Tensor | None) -> _bias.Bias:
        rows = 2 * self.span
        if rel_embeddings is None or rel_embeddings.shape[0] < rows:
            got = "None" if rel_embeddings is None else tuple(rel_embeddings.shape)
            raise ValueError(f"rel_embeddings must have at least {rows} rows, 2 * span, got {got}")
        table = self.pos_dropout(rel_embeddings[:rows])
        to_key = self.key_proj if self.share_att_key else getattr(self, "pos_key_proj", None)
        to_query = self.query_proj if self.share_att_key else getattr(self, "pos_query_proj", None)
        return _bias.disentangled(
            self._heads(to_key(table)) if "c2p" in self.pos_att_type else None,
            self._heads(to_query(table)) if "p2c" in self.pos_att_type else None,
            buckets=self.position_buckets,
            max_position=self.max_relative_positions,
        )


def _mask(attention_mask) -> _masks.Mask | None:
    if attention_mask is None or isinstance(attention_mask, _masks.Mask):
        return attention_mask
    visible = attention_mask.to(torch.bool)
    return _masks.dense(visible[:, None, None] if visible.dim() == 2 else visible)


def convert_v1(state_dict: Mapping[str, Tensor], num_attention_heads: int) -> dict[str, Tensor]:
    """The state_dict of Transformers' DeBERTa v1 `DisentangledSelfAttention` as one of `DisentangledAttention`.

    v1 packs the projections of query, key and value head by head, and has no bias on keys and pos_key: those are zero
    here (freeze them to train the same model). Its talking heads have no counterpart.
    """
    unknown = sorted(name for name in state_dict if name.startswith(("head_logits_proj", "head_weights_proj")))
    if unknown:
        raise ValueError(f"state_dict must have no talking heads, got {unknown[0]}")
    packed = state_dict["in_proj.weight"].unflatten(0, (num_attention_heads, 3, -1))
    weights = {name: packed[:, n].flatten(0, 1) for n, name in enumerate(("query_proj", "key_proj", "value_proj"))}
    zero = torch.zeros_like(state_dict["q_bias"])
    biases = {"query_proj": state_dict["q_bias"], "key_proj": zero, "value_proj": state_dict["v_bias"]}
    if "pos_proj.weight" in state_dict:
        weights["pos_key_proj"], biases["pos_key_proj"] = state_dict["pos_proj.weight"], zero.clone()
    if "pos_q_proj.weight" in state_dict:
        weights["pos_query_proj"] = state_dict["pos_q_proj.weight"]
        biases["pos_query_proj"] = state_dict["pos_q_proj.bias"]
    converted = {f"{name}.weight": weight for name, weight in weights.items()}
    converted.update({f"{name}.bias": bias for name, bias in biases.items()})
    return converted
