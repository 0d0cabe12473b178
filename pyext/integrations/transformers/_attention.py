"""The attention function of Transformers' registry, and what attention layers outside of it call."""

from torch import Tensor, nn

from ... import bias as _bias
from ... import masks as _masks
from ...ops.attention import attention

#: What models may pass that changes what attention computes, and that pyext does not have: pages of continuous
#: batching, chosen keys, one sink per query.
UNKNOWN = ("cache", "indices", "block_indices", "sinks")


class NoBias(_bias.Bias):
    """Stands where a model would make a bias of zeros if it got none."""

    def lower(self, sizes):
        return _bias.Lowered()


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | _masks.Mask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | _bias.Bias | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **options,
) -> tuple[Tensor, None]:
    """`pyext.attention` as Transformers' `AttentionInterface` calls it.

    Args:
        module: the layer; its `is_causal` counts where neither a mask nor `is_causal` is given.
        query: (B, Hq, Lq, D); key, value: (B, Hkv, Lk, D), (B, Hkv, Lk, Dv) with Hkv dividing Hq.
        attention_mask: what `model_mask` returned; a tensor, bool (True = attend) or float (added); or a `BlockMask`.
        dropout, scaling, softcap: as in `pyext.attention`.
        position_bias: a `pyext.bias` object, or a tensor that is added to the score.
        s_aux: (Hq,), attention sinks.
        sliding_window: how many keys a query sees, itself included, where no mask is given that would say it.
        **options: what other implementations look at.
    Returns:
        (B, Lq, Hq, Dv), and None for the attention weights, which are never made.
    Raises:
        ValueError for one of `UNKNOWN`; else as `pyext.attention`.
    """
    for name in UNKNOWN:
        if options.get(name) is not None:
            raise ValueError(f'{name} must be None with attn_implementation="pyext": choose another implementation')
    within = None
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and query.shape[2] > 1:
            # upper-left aligned: all keys beyond are those of a static cache that nothing was written to yet
            key, value = (x[:, :, : query.shape[2]] for x in (key, value))
            within = _masks.window(sliding_window and sliding_window - 1, 0)
    out = attend(
        query, key, value, attention_mask, within, position_bias,
        dropout_p=dropout, scale=scaling, softcap=softcap, sinks=s_aux,
    )  # fmt: skip
    return out, None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | _masks.Mask | None = None,
    within: _masks.Mask | None = None,
    position_bias: Tensor | _bias.Bias | None = None,
    **options,
) -> Tensor:
    """Attention by the mask that a model hands to its layers, in whatever form, and the layer's own mask.

    Args:
        query, key, value: as in `attention_forward`.
        attention_mask: as in `attention_forward`.
        within: another mask that must allow a key.
        position_bias: as in `attention_forward`.
        **options: for `pyext.attention`.
    Returns:
        (B, Lq, Hq, Dv).
    """
    biases = []
    if isinstance(position_bias, Tensor):
        biases.append(_bias.dense(position_bias))
    elif position_bias is not None and not isinstance(position_bias, NoBias):
        biases.append(position_bias)
    mask = attention_mask
    if isinstance(attention_mask, Tensor):
        mask = None
        if attention_mask.is_floating_point():
            biases.append(_bias.dense(attention_mask))
        else:
            mask = _masks.dense(attention_mask.bool())
    if within is not None:
        mask = within if mask is None else within & mask
    bias = sum(biases) if biases else None
    return attention(query, key, value, enable_gqa=True, bias=bias, mask=mask, **options).transpose(1, 2).contiguous()
