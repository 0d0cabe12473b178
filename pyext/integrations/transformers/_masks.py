"""The mask function of Transformers' registry: masks of `pyext.masks` instead of Lq x Lk tensors.

Transformers describes a mask by a function of indices (`masking_utils`), made by a handful of makers: causal, sliding
window, chunks, packed sequences. Each leaves its trace in the function's closure, which says what it was made of.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils

from ... import _checks
from ... import masks as _masks
from ..._primitives import Sizes


class ModelMask(_masks.Mask):
    """A mask for all layers of one call of a model. Lowered once; its `shape` is what a tensor in its place would have.

    `ndim` is 5: models that ask whether they got a padding mask (2, or less than 4) or a ready-made tensor (4) find
    neither. `gapless` says that the tokens of each sequence are known to stand side by side, with padding before or
    after them only.
    """

    label = "the mask of a Transformers model"
    ndim = 5

    def __init__(self, mask: _masks.Mask, shape: tuple, gapless: bool = False):
        self.mask, self.shape, self.gapless = mask, shape, gapless
        self._lowered: dict = {}

    def visible(self, b, h, i, j, sizes):
        return self.mask.visible(b, h, i, j, sizes)

    def kinds(self, sizes):
        return self.mask.kinds(sizes)

    def patterns(self, sizes):
        return self.mask.patterns(sizes)

    def contiguous(self) -> "ModelMask":
        """Itself: what `generate` asks of the masks that it makes beforehand."""
        return self

    def last_row(self, device: torch.device) -> Tensor:
        """The keys that the last query sees, bool (B, 1, 1, Lk)."""
        batch, _, queries, keys = self.shape
        sizes = Sizes((batch,), 1, queries, keys, device, torch.float32)
        b, h, i, j = (torch.arange(n, device=device) for n in (batch, 1, 1, keys))
        index = b.view(-1, 1, 1, 1), h.view(1, 1, 1, 1), i.view(1, 1, 1, 1) + (queries - 1), j.view(1, 1, 1, -1)
        return self.visible(*index, sizes).expand(batch, 1, 1, keys)

    def lower(self, sizes):
        if not _checks.is_eager():
            return self.mask.lower(sizes)
        if sizes not in self._lowered:
            self._lowered[sizes] = self.mask.lower(sizes)
        return self._lowered[sizes]


@dataclass(frozen=True, eq=False)
class Span(_masks.Mask):
    """Keys low[b, i] <= j < high[b, i]; low and high are integers (B|1, Lq|1)."""

    low: Tensor
    high: Tensor
    label = "the mask of a Transformers model"

    def visible(self, b, h, i, j, sizes):
        low, high = (x.expand(sizes.batch, sizes.queries)[b, i] for x in (self.low, self.high))
        return (j >= low) & (j < high)

    def lower(self, sizes):
        low, high = (x.expand(-1, sizes.queries) for x in torch.broadcast_tensors(self.low, self.high))
        return _masks.Lowered(intervals=torch.stack((low, high), dim=-1).clamp(0, sizes.keys).to(torch.int32))


class Rules(NamedTuple):
    """What a mask function says, as conditions that must all hold for a query and a key at positions q and k."""

    left: int | None = None  # k >= q - left
    right: int | None = None  # k <= q + right
    chunks: tuple[int, Tensor] | None = None  # (size, offset (B,)): (k - offset) // size == (q - offset) // size
    documents: Tensor | None = None  # (B, L): ids are equal

    def meet(self, other: "Rules") -> "Rules | None":
        """Both; None where they have no common form."""
        if any(a is not None and b is not None for a, b in zip(self[2:], other[2:])):
            return None
        return Rules(_least(self.left, other.left), _least(self.right, other.right), *map(_either, self[2:], other[2:]))


def _least(a: int | None, b: int | None) -> int | None:
    return _either(a, b) if a is None or b is None else min(a, b)


def _either(a, b):
    return b if a is None else a


def _of_and(mask_functions) -> Rules | None:
    rules = [read(function) for function in mask_functions]
    if any(rule is None for rule in rules):
        return None
    return functools.reduce(lambda a, b: a and a.meet(b), rules, Rules())


def _of_remapped(mask_function, position_ids) -> Rules | None:
    """Positions count from the start of each packed sequence: what depends on their difference alone stays as it is."""
    rules = read(mask_function)
    return rules if rules is not None and rules.chunks is None and rules.documents is None else None


#: What makes mask functions, with arguments to make one; and the rules of what it makes, given what it was made of.
_MAKERS: tuple[tuple[str, tuple, Callable], ...] = (
    ("and_masks", (), _of_and),
    ("sliding_window_overlay", (1,), lambda sliding_window: Rules(left=sliding_window - 1)),
    ("sliding_window_bidirectional_overlay", (1,), lambda sliding_window: Rules(sliding_window, sliding_window)),
    ("chunked_overlay", (1, None), lambda chunk_size, left_padding: Rules(chunks=(chunk_size, left_padding))),
    ("packed_sequence_mask_function", (None,), lambda packed_sequence_mask: Rules(documents=packed_sequence_mask)),
    ("remap_positions_for_packed_sequence", (None, None), _of_remapped),
)
_BY_CODE = {
    getattr(masking_utils, name)(*arguments).__code__: rules
    for name, arguments, rules in _MAKERS
    if hasattr(masking_utils, name)
}


#: Models whose layers compute with their mask before they hand it to attention.
_COMPUTE_WITH_MASKS = {"doge"}


def read(mask_function: Callable) -> Rules | None:
    """What a mask function of Transformers says; None where it is none of the known ones."""
    if mask_function is masking_utils.causal_mask_function:
        return Rules(right=0)
    if mask_function is masking_utils.bidirectional_mask_function:
        return Rules()
    if torch.compiler.is_compiling():  # closures do not trace: see `_found_by_search`
        return None
    code = getattr(mask_function, "__code__", None)
    if code not in _BY_CODE:
        return None
    made_of = {name: cell.cell_contents for name, cell in zip(code.co_freevars, mask_function.__closure__ or ())}
    return _BY_CODE[code](**made_of)


_AND = masking_utils.and_masks().__code__
#: All makers of mask functions that Transformers has. Except for blocks, which `or_masks` adds last, they allow an
#: interval of keys around each query. A release with another one might join that to them.
_KNOWN = {
    "add_offsets_to_mask_function", "bidirectional_mask_function", "blockwise_overlay", "causal_mask_function",
    "chunked_causal_mask_function", "chunked_overlay", "packed_sequence_compatibility_function",
    "packed_sequence_mask_function", "padding_mask_function", "sliding_window_bidirectional_mask_function",
    "sliding_window_bidirectional_overlay", "sliding_window_causal_mask_function", "sliding_window_overlay",
}  # fmt: skip
_ALL_KNOWN = {name for name in dir(masking_utils) if name.endswith(("_overlay", "_function"))} <= _KNOWN


def _is_around(mask_function: Callable, use_vmap: bool | None) -> bool:
    """Whether it is joined of Transformers' own; `use_vmap` tells of functions that a model brings."""
    return _ALL_KNOWN and use_vmap is False and getattr(mask_function, "__code__", None) is _AND


def _searched(mask_function, batch, queries, keys, first_query, first_key, device) -> Span:
    """What a mask function allows that cannot be read but is an interval of keys around each query. Where it begins and
    ends is found by halving: each step calls the function with one key for each query."""
    b = torch.arange(batch, device=device)[:, None]
    q = (torch.arange(queries, device=device) + first_query).expand(batch, -1)
    own = q.clamp(first_key, first_key + keys - 1)
    low, first = torch.full_like(q, first_key), own  # keys from `first` to `own` are seen, those before `low` are not
    last, high = own, torch.full_like(q, first_key + keys - 1)
    for _ in range((keys - 1).bit_length()):
        before, behind = (low + first) // 2, (last + high + 1) // 2
        seen = mask_function(b, 0, q, before)
        low, first = torch.where(seen, low, torch.minimum(before + 1, first)), torch.where(seen, before, first)
        seen = mask_function(b, 0, q, behind)
        last, high = torch.where(seen, behind, last), torch.where(seen, high, torch.maximum(behind - 1, last))
    return Span(first - first_key, last + (1 - first_key))


def model_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **options,
) -> _masks.Mask | Tensor:
    """The mask of a call, for `AttentionMaskInterface`: query i stands at q_offset + i, key j at kv_offset + j.

    Args:
        batch_size, q_length, kv_length: sizes of the call.
        q_offset, kv_offset: the positions of the first query and the first key.
        mask_function: what Transformers made of the model's configuration.
        attention_mask: (B, L) bool, True = a token, False = padding; or a mask that this function made before.
        device: of the call.
        **options: what other implementations look at.
    Returns:
        a `pyext.masks` object where mask_function is made of causality, windows, chunks and packed sequences, compiled
        or not; else a bool tensor (B, 1, Lq, Lk).
    """
    if isinstance(attention_mask, _masks.Mask):
        return attention_mask
    structured = getattr(options.get("config"), "model_type", None) not in _COMPUTE_WITH_MASKS
    rules = read(mask_function) if structured else None
    sizes = q_length, kv_length, q_offset, kv_offset, device
    if rules is not None:
        parts = [_positions(rules, *sizes)]
    elif structured and torch.compiler.is_compiling() and _is_around(mask_function, options.get("use_vmap")):
        parts = [_searched(mask_function, batch_size, *sizes)]
    else:
        options.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        return masking_utils.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device=device,
            **options,
        )  # fmt: skip
    if rules is not None and rules.documents is not None:
        parts.append(_masks.documents(rules.documents))
    gapless = rules is not None and rules.documents is None
    if attention_mask is not None:
        tokens = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        there, side_by_side = _padding(tokens[:, kv_offset : kv_offset + kv_length])
        parts.append(there)
        gapless = gapless and side_by_side
    whole = functools.reduce(lambda a, b: a & b, filter(None, parts))
    return ModelMask(whole, (batch_size, 1, q_length, kv_length), gapless)


def _positions(rules: Rules, queries, keys, first_query, first_key, device) -> _masks.Mask:
    """What causality, window and chunks allow."""
    last_at_last = isinstance(first_query, int) and first_query + queries == first_key + keys
    unbounded = rules.left is None and rules.right is None
    if rules.chunks is None and (unbounded or last_at_last and min(rules.left or 0, rules.right or 0) >= 0):
        return _masks.window(rules.left, rules.right)
    # positions of the queries, counted from the first key
    q = (torch.arange(queries, device=device) + (first_query - first_key))[None]
    low = torch.zeros_like(q) if rules.left is None else q - rules.left
    high = torch.full_like(q, keys) if rules.right is None else q + (rules.right + 1)
    if rules.chunks is not None:
        size, offset = rules.chunks
        offset = offset.to(q.device)[:, None] - first_key
        start = (q - offset).div(size, rounding_mode="floor") * size + offset
        low, high = torch.maximum(low, start), torch.minimum(high, start + size)
    return Span(low, high)


def padding(tokens: Tensor) -> _masks.Mask | None:
    """The mask of padded sequences, (B, Lk) bool with True = a token. None where there is no padding."""
    return _padding(tokens)[0]


def _padding(tokens: Tensor) -> tuple[_masks.Mask | None, bool]:
    """The mask, and whether all tokens are known to stand side by side: then they are one interval of keys.

    Where looking at them would synchronise or break a trace, and where there are gaps, a row of bools per sequence says
    which keys there are, and the interval which keys there may be.
    """
    if tokens.shape[1] == 0:
        return None, True
    first = tokens.to(torch.uint8).argmax(1)
    end = tokens.shape[1] - tokens.flip(1).to(torch.uint8).argmax(1)
    count = tokens.sum(1)
    span = Span(first[:, None], end[:, None])
    if not _checks.is_readable(tokens) or bool((end - first != count).any()):
        return span & _masks.dense(tokens[:, None, None]), False
    if bool((count == tokens.shape[1]).all()):
        return None, True
    return (span if bool(first.any()) else _masks.padding(count)), True
