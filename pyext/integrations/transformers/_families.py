"""Attention layers that no registry reaches, family by family. Each function stands for the method of its docstring."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ... import bias as _bias
from ... import masks as _masks
from ...nn.deberta import DisentangledAttention
from ...nn.positions import alibi_slopes
from ...nn.xlnet import XLNetAttention
from ._attention import attend
from ._linear import linear
from ._masks import ModelMask, padding
from ._positions import rotate_halves, rotating


def _dropout(self, layer: nn.Dropout) -> float:
    return layer.p if self.training else 0.0


# --- Decoders ---


def _bloom(self, hidden_states, residual, alibi, attention_mask, layer_past=None, use_cache=False,
           output_attentions=False, **options):  # fmt: skip
    """`BloomAttention.forward`."""
    query, key, value = self._reshape(self.query_key_value(hidden_states))
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    if getattr(attention_mask, "gapless", False):
        # the bias differs from slope * position of the key by what is the same for all keys of a query
        bias = _bias.alibi(alibi_slopes(self.num_heads, hidden_states.device))
    else:
        bias = _bias.dense(alibi.view(-1, self.num_heads, 1, alibi.shape[-1]))
    dropout = _dropout(self, self.attention_dropout)
    out = attend(query, key, value, attention_mask, position_bias=bias, scale=self.inv_norm_factor, dropout_p=dropout)
    out = self.dense(out.flatten(2))
    return residual + nn.functional.dropout(out, self.hidden_dropout, self.training), None


def _falcon(self, hidden_states, alibi, attention_mask, position_ids=None, layer_past=None, use_cache=False,
            output_attentions=False, position_embeddings=None, **options):  # fmt: skip
    """`FalconAttention.forward`, whose cache holds the keys of groups of heads once."""
    batch, length, _ = hidden_states.shape
    kv_heads = self.num_kv_heads
    fused = self.query_key_value(hidden_states)
    if self.multi_query and not self.new_decoder_architecture:
        query, key, value = fused.view(batch, length, -1, self.head_dim).split([self.num_heads, 1, 1], dim=2)
    else:
        per_group = self.num_heads // kv_heads
        query, key, value = fused.view(batch, length, kv_heads, per_group + 2, self.head_dim).split(
            [per_group, 1, 1], dim=3
        )
        query, key, value = (x.flatten(2, 3) for x in (query, key, value))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    bias = None
    if alibi is None:
        cos, sin = position_embeddings
        query, key = rotate_halves(query, key, cos, sin)
    else:
        bias = _bias.dense(alibi.view(batch, self.num_heads, 1, -1) * self.inv_norm_factor)
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    # as published: dropout with ALiBi only
    dropout = 0.0 if alibi is None else _dropout(self, self.attention_dropout)
    out = attend(query, key, value, attention_mask, position_bias=bias, scale=self.inv_norm_factor, dropout_p=dropout)
    return self.dense(out.flatten(2)), None


def _gpt_j(self, query, key, value, attention_mask=None):
    """`GPTJAttention._attn`."""
    dropout = _dropout(self, self.attn_dropout)
    query, key = query.to(value.dtype), key.to(value.dtype)
    out = attend(query, key, value, attention_mask, scale=1.0 / float(self.scale_attn), dropout_p=dropout)
    return out.transpose(1, 2), None


def _gpt_neo(self, query, key, value, attention_mask=None):
    """`GPTNeoSelfAttention._attn`: no scale; local layers see a window."""
    within = _masks.window(self.config.window_size - 1 if self.attention_type == "local" else None, 0)
    dropout = _dropout(self, self.attn_dropout)
    return attend(query, key, value, attention_mask, within, scale=1.0, dropout_p=dropout).transpose(1, 2), None


def _gpt(self, q, k, v, attention_mask=None, output_attentions=False):
    """OpenAI GPT's `Attention._attn`, whose keys come transposed."""
    scale = v.shape[-1] ** -0.5 if self.scale else 1.0
    dropout = _dropout(self, self.attn_dropout)
    out = attend(q, k.transpose(2, 3), v, attention_mask, _masks.causal(), scale=scale, dropout_p=dropout)
    return [out.transpose(1, 2), *([None] if output_attentions else [])]


def _image_gpt(self, query, key, value, attention_mask=None):
    """`ImageGPTAttention._attn`, and `_upcast_and_reordered_attn`: pyext accumulates in fp32 anyway."""
    scale = value.shape[-1] ** -0.5 if self.scale_attn_weights else 1.0
    if self.scale_attn_by_inverse_layer_idx:
        scale /= self.layer_idx + 1
    within = None if self.is_cross_attention else _masks.causal()
    dropout = _dropout(self, self.attn_dropout)
    return attend(query, key, value, attention_mask, within, scale=scale, dropout_p=dropout).transpose(1, 2), None


# --- Encoders ---


def _xlm(self, input, mask, kv=None, cache=None, output_attentions=False, **options):
    """XLM's `MultiHeadAttention.forward`."""
    if kv is not None or not isinstance(mask, Tensor):
        return self._pyext_original.forward(self, input, mask, kv, cache, output_attentions)
    query, key, value = (
        layer(input).unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2)
        for layer in (self.q_lin, self.k_lin, self.v_lin)
    )
    if cache is not None:
        cache = getattr(cache, "self_attention_cache", cache)
        key, value = cache.update(key, value, self.layer_id)
    visible = padding(mask.bool()) if mask.dim() == 2 else _masks.dense(mask.bool()[:, None])
    out = attend(query, key, value, visible, dropout_p=self.dropout if self.training else 0.0)
    return (self.out_lin(out.flatten(2)), *([None] if output_attentions else []))


def _deberta_mask(self, attention_mask):
    """`DebertaEncoder.get_attention_mask`: the keys that are there, instead of a square of zeros and ones."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() > 2:
        return self._pyext_original.get_attention_mask(self, attention_mask)
    batch, length = attention_mask.shape
    visible = padding(attention_mask.bool())
    return None if visible is None else ModelMask(visible, (batch, 1, length, length))


def _deberta_positions(self, hidden_states, query_states=None, relative_pos=None):
    """`DebertaEncoder.get_rel_pos`: none are made, as `bias.disentangled` knows them."""
    return relative_pos


def _deberta_v2(self, hidden_states, attention_mask, output_attentions=False, query_states=None, relative_pos=None,
                rel_embeddings=None):  # fmt: skip
    """DeBERTa-v2's `DisentangledSelfAttention.forward`."""
    _no_positions(relative_pos)
    return DisentangledAttention.forward(self, hidden_states, attention_mask, query_states, rel_embeddings), None


def _deberta_v1(self, hidden_states, attention_mask, output_attentions=False, query_states=None, relative_pos=None,
                rel_embeddings=None):  # fmt: skip
    """DeBERTa v1's `DisentangledSelfAttention.forward`: one projection, packed head by head."""
    _no_positions(relative_pos)
    if query_states is not None:
        raise ValueError("query_states must be None: pyext replaces DeBERTa v1's self-attention only")
    heads = self.num_attention_heads
    query, key, value = self.transpose_for_scores(self.in_proj(hidden_states)).chunk(3, dim=-1)
    query = query + self.transpose_for_scores(self.q_bias[None, None, :])
    value = value + self.transpose_for_scores(self.v_bias[None, None, :])
    bias = None
    if self.relative_attention and rel_embeddings is not None:
        table = self.pos_dropout(rel_embeddings)
        rows = (
            getattr(self, name)(table).unflatten(-1, (heads, -1)).transpose(0, 1) if kind in self.pos_att_type else None
            for kind, name in (("c2p", "pos_proj"), ("p2c", "pos_q_proj"))
        )
        bias = _bias.disentangled(*rows, max_position=self.max_relative_positions)
    scale = (self.attention_head_size * (1 + len(self.pos_att_type))) ** -0.5
    dropout = _dropout(self, self.dropout)
    out = attend(query, key, value, attention_mask, position_bias=bias, scale=scale, dropout_p=dropout)
    return out.flatten(2), None


def _no_positions(relative_pos) -> None:
    if relative_pos is not None:
        raise ValueError("relative_pos must be None: pyext's DeBERTa counts positions itself (unpatch() the model)")


# --- XLNet ---


def _xlnet_model(self, input_ids=None, attention_mask=None, mems=None, perm_mask=None, target_mapping=None,
                 token_type_ids=None, input_mask=None, inputs_embeds=None, use_mems=None, **options):  # fmt: skip
    """`XLNetModel.forward`: masks and segments go to the layers as they are, not as matrices of pairs."""
    like = input_ids if input_ids is not None else inputs_embeds
    batch, length = like.shape[:2]
    memory = mems[0].shape[0] if mems is not None and mems[0] is not None else 0
    default = self.config.use_mems_train if self.training else self.config.use_mems_eval
    tokens = attention_mask if input_mask is None else 1.0 - input_mask
    keeps = bool(default if use_mems is None else use_mems)
    shape = (batch, 1, length, memory + length)
    masks = _xlnet_masks(self, tokens, perm_mask, memory, shape, keeps, like.device)
    segments = token_type_ids
    if segments is not None:
        segments = segments, torch.cat([segments.new_zeros((batch, memory)), segments], dim=1)
    try:
        for layer in self.layer:
            layer.rel_attn._pyext_call = (*masks, segments)
        return self._pyext_original.forward(
            self, input_ids, mems=mems, target_mapping=target_mapping, inputs_embeds=inputs_embeds, use_mems=use_mems,
            **options,
        )  # fmt: skip
    finally:
        for layer in self.layer:
            del layer.rel_attn._pyext_call


def _xlnet_masks(self, tokens, perm_mask, memory: int, shape, keeps: bool, device) -> tuple:
    """The masks of the content and the query stream. Every memory is visible, and to the content stream itself."""
    length = shape[2]
    causal = None
    if self.attn_type == "uni":
        causal = _masks.window(memory if self.same_length else None, 0)
    if perm_mask is None and tokens is None:
        return (causal, causal)
    there = None if tokens is None else nn.functional.pad(tokens.bool(), (memory, 0), value=True)
    if perm_mask is None and not keeps:
        # Only padding would see itself besides, and no one sees padding unless it is remembered.
        visible = padding(there)
        visible = causal if visible is None else visible if causal is None else causal & visible
        return (visible and ModelMask(visible, shape),) * 2
    hidden = perm_mask > 0 if perm_mask is not None else torch.zeros(1, length, length, dtype=torch.bool, device=device)
    query = nn.functional.pad(~hidden, (memory, 0), value=True)[:, None]
    if there is not None:
        query = query & there[:, None, None]
    if causal is not None:
        query = query & torch.ones(length, memory + length, dtype=torch.bool, device=device).tril(memory)
        if self.same_length:
            query = query & torch.ones(length, memory + length, dtype=torch.bool, device=device).triu()
    own = torch.eye(length, dtype=torch.bool, device=device)
    content = query | nn.functional.pad(own, (memory, 0))
    return _masks.dense(content), _masks.dense(query)


def _xlnet_attention(self, h, g, attn_mask_h, attn_mask_g, r, seg_mat, mems=None, target_mapping=None,
                     output_attentions=False):  # fmt: skip
    """`XLNetRelativeAttention.forward`."""
    call = getattr(self, "_pyext_call", None)
    if call is None:  # something else than its model calls it
        return self._pyext_original.forward(
            self, h, g, attn_mask_h, attn_mask_g, r, seg_mat, mems, target_mapping, output_attentions
        )
    mask_h, mask_g, segments = call
    mems = mems if mems is not None and mems.dim() > 1 else None
    seg_q, seg_k = segments or (None, None)
    out = XLNetAttention.forward(self, h, g, mask_h, mask_g, r, seg_q, seg_k, mems, target_mapping)
    return (*out, None) if output_attentions else out


# --- Which is which ---


def _borrowed(kind: type, *names: str) -> dict:
    """Methods of one of `pyext.nn`'s modules, for a module with the same parameters."""
    return {"impl": "auto", **{name: kind.__dict__[name] for name in names}}


#: (module of Transformers, class) -> the methods that replace its own.
_METHODS: dict[tuple[str, str], dict] = {
    ("bloom", "BloomAttention"): {"forward": _bloom},
    ("falcon", "FalconAttention"): {"forward": _falcon},
    ("gptj", "GPTJAttention"): {"_attn": _gpt_j},
    ("gpt_neo", "GPTNeoSelfAttention"): {"_attn": _gpt_neo},
    ("openai", "Attention"): {"_attn": _gpt},
    ("imagegpt", "ImageGPTAttention"): {"_attn": _image_gpt, "_upcast_and_reordered_attn": _image_gpt},
    ("xlm", "MultiHeadAttention"): {"forward": _xlm},
    ("deberta", "DebertaEncoder"): {"get_attention_mask": _deberta_mask, "get_rel_pos": _deberta_positions},
    ("deberta", "DisentangledSelfAttention"): {"forward": _deberta_v1},
    ("deberta_v2", "DebertaV2Encoder"): {"get_attention_mask": _deberta_mask, "get_rel_pos": _deberta_positions},
    ("deberta_v2", "DisentangledSelfAttention"): {
        "forward": _deberta_v2,
        "span": property(lambda self: self.pos_ebd_size),
        **_borrowed(DisentangledAttention, "_heads", "_bias"),
    },
    ("xlnet", "XLNetModel"): {"forward": _xlnet_model},
    ("xlnet", "XLNetRelativeAttention"): {
        "forward": _xlnet_attention,
        **_borrowed(XLNetAttention, "_heads", "_split", "_rows", "_attend"),
        "_linear": staticmethod(linear),
    },
}
#: Classes outside of the attention registry whose masks come from the mask registry all the same.
MASKED = {"bloom", "falcon", "gptj", "gpt_neo", "imagegpt"}


def family(cls: type) -> str:
    """ "t5" for classes of transformers.models.t5.modeling_t5."""
    parts = cls.__module__.split(".")
    return parts[2] if parts[:2] == ["transformers", "models"] and len(parts) > 2 else ""


def own_attention(module: nn.Module, cls: type) -> dict[str, Callable] | str | None:
    """The methods of a layer of one of these families; why it stays as it is; None for other modules."""
    methods = _METHODS.get((family(cls), cls.__name__))
    if methods is None:
        return None
    why = _unlike(module, cls)
    if why is not None:
        return why
    turned = rotating(module, cls) if cls.__name__ == "GPTJAttention" else None
    return {**methods, **turned} if isinstance(turned, dict) else methods


def _unlike(module: nn.Module, cls: type) -> str | None:
    """Why this layer is none that pyext has."""
    if cls.__name__ == "DisentangledSelfAttention":
        if getattr(module, "talking_head", False):
            return "talking heads mix the scores of all heads"
        if module.pos_att_type and not module.relative_attention:
            return "pos_att_type without relative_attention"
    if cls.__name__ == "BloomAttention" and module.pretraining_tp > 1 and module.slow_but_exact:
        return "slow_but_exact computes the output projection in slices"
    return None
