"""flash-attn's `bert_padding`: padded batches to packed ones and back, for the varlen functions.

Differentiable; on any device. Leaving padding out needs its amount, so `unpad_input` reads the mask on the host.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import _checks


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input[indices] of the first dimension.

    Args:
        input: (N, ...).
        indices: (n,) integers in [0, N).
    Returns:
        (n, ...).
    Raises:
        TypeError, ValueError naming the argument.
    """
    if _checks.tensor("input", input).dim() < 1:
        raise _checks.shape_error("input", "(N, ...)", "", input)
    return input.index_select(0, _rows("indices", indices, input, "input"))


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Leave out the padding of a batch.

    Args:
        hidden_states: (B, L, ...).
        attention_mask: (B, L), bool or integers: 1 = a token, 0 = padding.
        unused_mask: (B, L) like it: 1 = keep its place too, though no token stands there yet.
    Returns:
        the rows that are kept (total, ...); indices (total,) int64, their places in the flattened (B * L); cu_seqlens
        (B + 1,) int32; max_seqlen, a Python int, the longest row of the batch; used_seqlens (B,) int32, how many of
        `attention_mask` alone each row has.
    Raises:
        TypeError, ValueError naming the argument.
    """
    if _checks.tensor("hidden_states", hidden_states).dim() < 2:
        raise _checks.shape_error("hidden_states", "(B, L, ...)", "", hidden_states)
    tokens = kept = _mask("attention_mask", attention_mask, hidden_states)
    if unused_mask is not None:
        kept = tokens | _mask("unused_mask", unused_mask, hidden_states)
    lengths = kept.sum(dim=1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    longest = int(lengths.max()) if lengths.numel() else 0
    packed = index_first_axis(hidden_states.flatten(0, 1), indices)
    offsets = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return packed, indices, offsets, longest, tokens.sum(dim=1, dtype=torch.int32)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Put packed rows back to their places in a batch; zeros elsewhere.

    Args:
        hidden_states: (total, ...).
        indices: (total,) integers, what `unpad_input` returned.
        batch, seqlen: B and L of the batch.
    Returns:
        (B, L, ...).
    Raises:
        TypeError, ValueError naming the argument.
    """
    batch, seqlen = _checks.length("batch", batch), _checks.length("seqlen", seqlen)
    if _checks.tensor("hidden_states", hidden_states).dim() < 1:
        raise _checks.shape_error("hidden_states", "(total, ...)", "", hidden_states)
    if _rows("indices", indices, hidden_states, "hidden_states").shape[0] != hidden_states.shape[0]:
        raise _checks.shape_error("indices", f"({hidden_states.shape[0]},)", "to match hidden_states", indices)
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return padded.index_copy(0, indices.long(), hidden_states).unflatten(0, (batch, seqlen))


def _rows(name: str, indices, of: Tensor, like: str) -> Tensor:
    if _checks.integer(name, indices).dim() != 1:
        raise _checks.shape_error(name, "(n,)", "", indices)
    _checks.same_device(name, indices, of.device, like)
    return indices.long()


def _mask(name: str, value, hidden_states: Tensor) -> Tensor:
    if _checks.tensor(name, value).dtype not in (torch.bool, *_checks.INTEGER):
        raise TypeError(f"{name} must be a bool or integer tensor (1 = a token), got {value.dtype}")
    if value.shape != hidden_states.shape[:2]:
        expected = _checks.shape_text(hidden_states.shape[:2])
        raise _checks.shape_error(name, expected, "to match hidden_states", value)
    _checks.same_device(name, value, hidden_states.device, "hidden_states")
    return value.bool()
