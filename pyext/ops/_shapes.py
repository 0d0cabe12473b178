"""SDPA's shapes: any number of leading batch dimensions, broadcasting, grouped key heads -> (B, H, L, D)."""

from typing import NamedTuple

from torch import Tensor

from .. import _checks


class Shaped(NamedTuple):
    """Query (B, Hq, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv), and how the caller counts batch and heads."""

    query: Tensor
    key: Tensor
    value: Tensor
    lead: tuple[int, ...]  # leading batch dimensions
    prefix: tuple[int, ...] | None  # dimensions before (Lq, Dv) in the output; None = (B, Hq), the op's own


def four_dims(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> Shaped:
    """Bring SDPA's shapes to four dimensions with views (copies only where one stride cannot express a broadcast).

    Query (..., Hq, Lq, D), key (..., Hkv, Lk, D), value (..., Hkv, Lk, Dv); two dimensions mean one head. Leading
    dimensions and single heads broadcast as in SDPA. With `enable_gqa` query head h reads key head h // (Hq // Hkv).
    Raises:
        ValueError naming the tensor that does not fit.
    """
    if query.dim() == 4 and key.dim() == 4 and value.dim() == 4:
        batch, heads, _, width = query.shape
        key_batch, kv_heads, keys, key_width = key.shape
        value_batch, value_heads, values, _ = value.shape
        if width == key_width and keys == values and kv_heads == value_heads and batch == key_batch == value_batch:
            grouped = kv_heads == 1 or (enable_gqa and kv_heads > 0 and heads % kv_heads == 0)
            if kv_heads == heads or (grouped and heads > 0):
                return Shaped(query, key, value, (batch,), None)
    _check_widths(query, key, value)
    if enable_gqa:
        key, value = _repeat_heads(query, key, value)
    lead = _broadcast_batch(query, key, value)
    heads = [tensor.shape[-3] if tensor.dim() > 2 else 1 for tensor in (query, key, value)]
    if not (enable_gqa and heads[1] == heads[2]):
        common = _broadcast_heads(heads, query, key, value)
        heads = [common, common, common] if max(heads[1:]) > 1 or heads[0] == 0 else [common, 1, 1]
    flat = [_flatten(tensor, lead, h) for tensor, h in zip((query, key, value), heads, strict=True)]
    has_heads = max(query.dim(), key.dim(), value.dim()) > 2
    return Shaped(*flat, lead, (*lead, heads[0]) if has_heads else ())


def _check_widths(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Everything but batch and heads."""
    for name, tensor, last in (("query", query, "Lq, D"), ("key", key, "Lk, D"), ("value", value, "Lk, Dv")):
        if tensor.dim() < 2:
            raise _checks.shape_error(name, f"(..., {last})", "with at least two dimensions", tensor)
    if key.shape[-1] != query.shape[-1]:
        raise _checks.shape_error("key", _template(key, f"Lk, {query.shape[-1]}"), "to match query", key)
    if value.shape[-2] != key.shape[-2]:
        raise _checks.shape_error("value", _template(value, f"{key.shape[-2]}, Dv"), "to match key", value)


def _template(tensor: Tensor, last: str, heads: int | str = "Hkv") -> str:
    """(B, Hkv, Lk, 64) with as many dimensions as `tensor`."""
    lead = ["B"] if tensor.dim() == 4 else ["..."] if tensor.dim() > 4 else []
    return f"({', '.join([*lead, *([str(heads)] if tensor.dim() > 2 else []), last])})"


def _repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Check grouping. Key and value of different numbers of heads (SDPA allows it) are both repeated to the query's."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 3:
            raise _checks.shape_error(name, "(..., H, L, D)", "with enable_gqa=True", tensor)
    heads = query.shape[-3]
    for name, tensor, last in (("key", key, "Lk, D"), ("value", value, "Lk, Dv")):
        kv_heads = tensor.shape[-3]
        if kv_heads != heads and (kv_heads == 0 or heads % kv_heads != 0):
            expected = _template(tensor, last)
            raise _checks.shape_error(name, expected, f"with Hkv dividing the {heads} heads of query", tensor)
    if key.shape[-3] == value.shape[-3]:
        return key, value
    return tuple(tensor.repeat_interleave(heads // tensor.shape[-3], dim=-3) for tensor in (key, value))


def _broadcast_batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    """The common leading dimensions."""
    lead = tuple(query.shape[:-3])
    for name, tensor, last in (("key", key, "Lk, D"), ("value", value, "Lk, Dv")):
        other = tuple(tensor.shape[:-3])
        dims = max(len(lead), len(other))
        pairs = list(zip((1,) * (dims - len(lead)) + lead, (1,) * (dims - len(other)) + other, strict=True))
        if not all(a == b or a == 1 or b == 1 for a, b in pairs):
            expected = f"({', '.join(map(str, lead))}, Hkv, {last})"
            raise _checks.shape_error(name, expected, "(or 1 in batch dimensions) to match query", tensor)
        lead = tuple(b if a == 1 else a for a, b in pairs)
    return lead


def _broadcast_heads(heads: list[int], query: Tensor, key: Tensor, value: Tensor) -> int:
    """The common number of heads without grouping: equal, or 1."""
    common = heads[0]
    for name, tensor, h, last in (("key", key, heads[1], "Lk, D"), ("value", value, heads[2], "Lk, Dv")):
        if h != common and h != 1 and common != 1:
            expected = _template(tensor, last, heads=common)
            hint = "" if h == 0 or common % h else " (enable_gqa=True groups query heads)"
            raise _checks.shape_error(name, expected, f"to match the {common} heads of query{hint}", tensor)
        common = h if common == 1 else common
    return common


def _flatten(tensor: Tensor, lead: tuple[int, ...], heads: int) -> Tensor:
    """(..., H|1, L, D) -> (B, heads, L, D)."""
    if tensor.dim() == 2:
        tensor = tensor[None]
    tensor = tensor.expand(*lead, heads, *tensor.shape[-2:])
    if len(lead) == 0:
        return tensor[None]
    return tensor if len(lead) == 1 else tensor.flatten(0, len(lead) - 1)


def restore(tensor: Tensor, prefix: tuple[int, ...] | None) -> Tensor:
    """(B, Hq, ...) -> (*prefix, ...), a view."""
    return tensor if prefix is None else tensor.view(*prefix, *tensor.shape[2:])
