"""Position schemes inside of layers that the attention registry reaches: rotary embeddings and T5's tables."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ... import bias as _bias
from ...ops.rotary import rotary
from ._attention import NoBias
from ._swap import rebind, same_code

# --- Rotary embeddings ---


def rotate_halves(q, k, cos, sin, unsqueeze_dim=1):
    """`apply_rotary_pos_emb` of LLaMA and GPT-NeoX: the two halves of cos and sin (B, L, R) are equal."""
    half = cos.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    if unsqueeze_dim == 1:
        return rotary(q, cos, sin), rotary(k, cos, sin)
    return tuple(rotary(x.transpose(1, 2), cos, sin).transpose(1, 2) for x in (q, k))


def _rotate_pairs(tensor, sin, cos):
    """`apply_rotary_pos_emb` of GPT-J: tensor (B, L, H, R), sin and cos (B, L, R / 2)."""
    return rotary(tensor.transpose(1, 2), cos, sin, interleaved=True).transpose(1, 2)


_NAME = "apply_rotary_pos_emb"
#: Whose functions of that name are known: (module of Transformers, function it calls, ours).
_ROTATIONS = (
    ("llama", "rotate_half", rotate_halves),
    ("gpt_neox", "rotate_half", rotate_halves),
    ("gptj", "rotate_every_two", _rotate_pairs),
)


def rotating(module: nn.Module, cls: type) -> dict[str, Callable] | str | None:
    """The methods of an attention layer that rotates query and key by a function of its module."""
    forward = cls.__dict__.get("forward")
    if _NAME not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return None
    own = forward.__globals__
    for family, inner, ours in _ROTATIONS:
        published = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        if same_code(own[_NAME], getattr(published, _NAME)) and same_code(own.get(inner), getattr(published, inner)):
            return {"forward": _rebound(forward, ours)}
    return f"its {_NAME} is none of those known"


def _rebound(forward: Callable, ours: Callable, _made: dict = {}) -> Callable:  # noqa: B006
    """One function for all layers of a class, so that they share one class."""
    return _made.setdefault((forward, ours), rebind(forward, **{_NAME: ours}))


# --- T5's tables ---


@dataclass(frozen=True, eq=False)
class Table(_bias.Bias):
    """`bias.t5` where query i stands at first_query + i and key j at j: the last key need not be the last query's."""

    table: Tensor
    bidirectional: bool
    max_distance: int
    first_query: int | Tensor

    def lower(self, sizes):
        bias = _bias.t5(self.table, self.bidirectional, self.max_distance)
        shift = sizes.keys - sizes.queries - self.first_query  # what every distance is less than the layer's own
        if isinstance(shift, int) and shift == 0:
            return bias.lower(sizes)
        row = _bias.t5_bucket(sizes.distances + shift, self.table.shape[0], self.bidirectional, self.max_distance)
        return bias.lower(sizes)._replace(diag_index=row.to(torch.int32))


def _has_table(self) -> bool:
    """Whether the layer makes a bias itself: with pyext always, be it the one that does nothing."""
    return self.__dict__["has_relative_attention_bias"] or self.config._attn_implementation == "pyext"


_HAS_TABLE = property(_has_table)


def _compute_bias(self, query_length, key_length, device=None, past_seen_tokens=0):
    """The table as a bias. All layers of T5 pass on the same one, and its gradient is the sum of theirs."""
    if self.config._attn_implementation != "pyext":
        return self._pyext_original.compute_bias(self, query_length, key_length, device, past_seen_tokens)
    if not self.__dict__["has_relative_attention_bias"]:
        return NoBias()
    embedding = self.relative_attention_bias
    if type(embedding) is not nn.Embedding:  # with an adapter
        return self._pyext_original.compute_bias(self, query_length, key_length, device, past_seen_tokens)
    return Table(embedding.weight, not self.is_decoder, self.relative_attention_max_distance, past_seen_tokens)


def t5_tables(module: nn.Module, cls: type) -> dict[str, Callable | property] | str | None:
    """The methods of T5's attention and its relatives'."""
    published = (
        importlib.import_module("transformers.models.t5.modeling_t5").T5Attention,
        importlib.import_module("transformers.models.umt5.modeling_umt5").UMT5Attention,
    )
    if not hasattr(cls, "compute_bias") or "has_relative_attention_bias" not in module.__dict__:
        return None
    if not any(same_code(cls.compute_bias, theirs.compute_bias) for theirs in published):
        return "its compute_bias is none of those known"
    if not hasattr(module, "config"):
        return "its attention asks no registry in this release of Transformers"
    return {"has_relative_attention_bias": _HAS_TABLE, "compute_bias": _compute_bias}
