"""flash-attn 2's functions with its arguments and meanings, on pyext's kernels: on the CPU too, and in every dtype.

    from pyext.flash_attn_interface import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

Tensors are (B, L, H, D), packed ones (total, H, D). The arguments that several functions share:

    dropout_p: probability of dropping an attention weight.
    softmax_scale: factor on q.k; None = 1 / sqrt(D).
    causal: lower-right aligned: the last query sees the last key.
    window_size: (left, right), both inclusive: query i sees the keys from i + Lk - Lq - left to i + Lk - Lq + right; a
        negative number is no limit, and `causal` makes right 0.
    softcap: scores become softcap * tanh(scores / softcap); 0.0 = off.
    alibi_slopes: (H,) or (B, H): -slope * |i + Lk - Lq - j| is added to the score.
    deterministic: accepted for the backends to which it makes a difference.
    return_attn_probs: return (out, lse, None) instead of out. lse (B, H, Lq), for packed tensors (H, total_q), is fp32
        and natural; flash-attn's third value, a matrix it has for its own tests, is not made.
    impl: the backend, as everywhere in pyext (flash-attn has no such argument).

Beyond flash-attn: a query that sees no key has lse -inf (there +inf); alibi_slopes and lse are differentiable; slopes
of (B, H) run one sequence after the other.

Source: Dao, "FlashAttention-2" (2023), and the docstrings of flash-attn 2.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import _checks, _dispatch, bert_padding
from . import bias as _bias
from . import masks as _masks
from ._kvcache import Cache, Span, cache_of, gather_pages, lengths_before, starts_of
from .bert_padding import index_first_axis, pad_input, unpad_input
from .ops.attention import _inputs, _offsets, attention, varlen_attention
from .ops.rotary import check_tables, rotary

__all__ = [
    "bert_padding", "flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func", "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache", "index_first_axis", "pad_input", "unpad_input",
]  # fmt: skip


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, None]:
    """softmax(q k^T) v, see the top of this module.

    Args:
        q: (B, Lq, Hq, D); k, v: (B, Lk, Hkv, D) with Hkv dividing Hq. The others as at the top of this module.
    Returns:
        out (B, Lq, Hq, D); with `return_attn_probs` (out, lse, None).
    Raises:
        TypeError, ValueError naming the argument; NotImplementedError if the forced backend refuses the call.
    """
    q, k, v = _inputs(("q", "k", "v"), q, k, v)
    _check_heads(q, k, v, ("q", "k", "v"), "B, L")
    options = _options(softmax_scale, causal, window_size, softcap, impl, dropout_p, deterministic)
    out, lse = _padded(q, k, v, _slopes(alibi_slopes, q, q.shape[0]), options)
    return _result(out, lse, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn_func` of qkv (B, L, 3, H, D)."""
    q, k, v = _unpacked("qkv", qkv, 3, "(B, L, 3, H, D)")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        impl=impl,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn_func` of q and kv (B, Lk, 2, Hkv, D)."""
    k, v = _unpacked("kv", kv, 2, "(B, Lk, 2, Hkv, D)")
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        impl=impl,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn_func` of sequences packed along one dimension, each attending to its own keys.

    Args:
        q: (total_q, Hq, D); k, v: (total_k, Hkv, D).
        cu_seqlens_q, cu_seqlens_k: (N + 1,) integers from 0 to the totals: where the sequences begin and end.
        max_seqlen_q, max_seqlen_k: ints; nothing depends on them.
        block_table: (N, pages) integers, or None. With it k and v are (num_pages, page_size, Hkv, D), and key j of
            sequence n is k[block_table[n, j // page_size], j % page_size]; the keys are gathered, for which their
            number is read on the host.
    Returns:
        out (total_q, Hq, D); with `return_attn_probs` (out, lse, None).
    Raises:
        TypeError, ValueError naming the argument; NotImplementedError if the forced backend refuses the call.
    """
    q, k, v = _inputs(("q", "k", "v"), q, k, v)
    if block_table is not None:
        k, v = gather_pages(k, v, block_table, cu_seqlens_k)
    _check_heads(q, k, v, ("q", "k", "v"), "total")
    _checks.length("max_seqlen_q", max_seqlen_q)
    _checks.length("max_seqlen_k", max_seqlen_k)
    options = _options(softmax_scale, causal, window_size, softcap, impl, dropout_p, deterministic)
    cu_q, cu_k = _offsets("cu_seqlens_q", cu_seqlens_q, q), _offsets("cu_seqlens_k", cu_seqlens_k, k)
    if cu_q.shape != cu_k.shape:
        expected = _checks.shape_text(cu_q.shape)
        raise _checks.shape_error("cu_seqlens_k", expected, "to match cu_seqlens_q", cu_k)
    slopes = _slopes(alibi_slopes, q, cu_q.shape[0] - 1)
    if slopes is None or slopes.dim() == 1:
        out, lse = varlen_attention(q, k, v, cu_q, cu_k, bias=_alibi(slopes), **options)
        return _result(out, lse, return_attn_probs)
    lengths_q, lengths_k = cu_q.diff().tolist(), cu_k.diff().tolist()
    sequences = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    outs, lses = _one_by_one(sequences, slopes, options)
    return _result(torch.cat(outs, 1)[0], torch.cat(lses, 2)[0], return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn_varlen_func` of qkv (total, 3, H, D)."""
    q, k, v = _unpacked("qkv", qkv, 3, "(total, 3, H, D)")
    _offsets("cu_seqlens", cu_seqlens, q)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, _checks.length("max_seqlen", max_seqlen), max_seqlen, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs, impl=impl,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn_varlen_func` of q and kv (total_k, 2, Hkv, D)."""
    k, v = _unpacked("kv", kv, 2, "(total_k, 2, Hkv, D)")
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs, impl=impl,
    )  # fmt: skip


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Append k and v to a cache, in place, and attend from q to all of the cache that is in use. Without gradients.

    Sequence b then has Lk = cache_seqlens[b] + L_new keys; the last query stands at the last of them.

    Args:
        q: (B, Lq, Hq, D).
        k_cache, v_cache: (B_cache, capacity, Hkv, D); with `block_table` (num_pages, page_size, Hkv, D). Nothing is
            assumed of what they hold beyond the keys in use, NaN included.
        k, v: (B, L_new, Hkv, D) of the cache's dtype, written to the positions from cache_seqlens[b] on; or None.
        rotary_cos, rotary_sin: (L_max, R/2); rotate k, by its positions in the cache, before it is written, and q: by
            cache_seqlens[b] + i where `causal` or a window gives its queries an order, else all by cache_seqlens[b].
        cache_seqlens: (B,) integers or one int: how many positions are in use before the call; None = all. It is not
            changed.
        cache_batch_idx: (B,) integers, the row of the cache that each sequence uses; None = 0 to B - 1.
        cache_leftpad: (B,) integers: the keys in use begin at this position.
        block_table: (B, pages) integers: position j of sequence b is row block_table[b, j // page_size] of the cache,
            column j % page_size. Not with `cache_batch_idx`.
        rotary_interleaved: pairs of features (2k, 2k + 1), else (k, k + R/2).
        num_splits: accepted; the kernels split over keys by themselves.
        return_softmax_lse: return (out, lse) with lse (B, Hq, Lq).
        The others as at the top of this module.
    Returns:
        out (B, Lq, Hq, D), or (out, lse).
    Raises:
        TypeError, ValueError naming the argument; NotImplementedError if the forced backend refuses the call.
    """
    _check_cache_inputs(q, k_cache, v_cache, k, v)
    _checks.length("num_splits", num_splits)
    options = _options(softmax_scale, causal, window_size, softcap, impl)
    cache = cache_of(q, k_cache, v_cache, cache_batch_idx, block_table)
    new = 0 if k is None else k.shape[1]
    before = lengths_before(cache, q, cache_seqlens, None if k is None else new)
    slopes = _slopes(alibi_slopes, q, q.shape[0])
    starts = None if cache_leftpad is None else starts_of(cache_leftpad, before + new)
    q, k = _rotated(q, k, rotary_cos, rotary_sin, before, options["mask"] is not None, rotary_interleaved)
    if k is not None:
        cache.append(before, k, v)
    if starts is None and not isinstance(cache_seqlens, Tensor):
        length = cache.capacity if cache_seqlens is None else cache_seqlens + new
        out, lse = _padded(q, *cache.read(length), slopes, options)
    else:
        starts = torch.zeros_like(before) if starts is None else starts
        attend = _by_rows if slopes is not None or _checks.is_readable(before) else _masked
        out, lse = attend(q, cache, starts, before + new, slopes, options)
    return (out, lse) if _checks.flag("return_softmax_lse", return_softmax_lse) else out


# --- Arguments ---


def _options(scale, causal, window_size, softcap, impl, dropout_p=0.0, deterministic=False) -> dict[str, Any]:
    """The keyword arguments for `attention` and `varlen_attention`."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"window_size must be a pair of ints (left, right), got {window_size!r}")
    left, right = (_checks.whole(f"window_size[{n}]", size) for n, size in enumerate(window_size))
    if _checks.flag("causal", causal):
        right = 0
    if _checks.real("softcap", softcap) < 0:
        raise ValueError(f"softcap must be positive, or 0.0 for none, got {softcap}")
    if scale is not None:
        _checks.real("softmax_scale", scale)
    _dispatch.check_impl(impl)
    unlimited = left < 0 and right < 0
    return dict(
        mask=None if unlimited else _masks.window(None if left < 0 else left, None if right < 0 else right),
        dropout_p=dropout_p,
        scale=scale,
        softcap=softcap or None,
        deterministic=deterministic,
        enable_gqa=True,
        return_lse=True,
        impl=impl,
    )


def _check_heads(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str], lead: str, rows: str = "") -> None:
    """The shapes (*lead, H, D). Keys and values have lengths and heads of their own, and rows if `rows` names them."""
    for name, tensor in zip(names, (q, k, v), strict=True):
        if tensor.dim() != lead.count(",") + 3:
            raise _checks.shape_error(name, f"({lead}, H, D)", "", tensor)
    heads, groups, batch = q.shape[-2], k.shape[-2], q.shape[:-3]
    grouped = groups > 0 and heads % groups == 0
    if not grouped or k.shape[-1] != q.shape[-1] or not (rows or k.shape[:-3] == batch):
        expected = ", ".join([rows] if rows else [*map(str, batch), "Lk"])
        why = f"to match {names[0]}, with Hkv dividing its {heads} heads"
        raise _checks.shape_error(names[1], f"({expected}, Hkv, {q.shape[-1]})", why, k)
    if v.shape[:-1] != k.shape[:-1]:
        expected = ", ".join(map(str, k.shape[:-1]))
        raise _checks.shape_error(names[2], f"({expected}, D)", f"to match {names[1]}", v)


def _unpacked(name: str, packed, parts: int, shape: str) -> tuple[Tensor, ...]:
    """q, k, v or k, v, stacked in the dimension before the heads."""
    dims = shape.count(",") + 1
    if _checks.floating(name, packed).dim() != dims or packed.shape[-3] != parts:
        raise _checks.shape_error(name, shape, "", packed)
    return packed.unbind(-3)


def _slopes(slopes, q: Tensor, batch: int) -> Tensor | None:
    """alibi_slopes as (H,), where all sequences have the same ones or there are none, else (B, H)."""
    if slopes is None:
        return None
    heads = q.shape[-2]
    if _checks.floating("alibi_slopes", slopes).shape not in ((heads,), (batch, heads)):
        raise _checks.shape_error("alibi_slopes", f"({heads},) or ({batch}, {heads})", "to match q", slopes)
    _checks.same_device("alibi_slopes", slopes, q.device, "q")
    return slopes.sum(0) if slopes.dim() == 2 and batch < 2 else slopes


def _alibi(slopes: Tensor | None) -> _bias.Bias | None:
    return None if slopes is None else _bias.alibi(slopes, symmetric=True)


def _result(out: Tensor, lse: Tensor, return_attn_probs: bool):
    return (out, lse, None) if _checks.flag("return_attn_probs", return_attn_probs) else out


# --- Calls of the op ---


def _padded(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, options: dict) -> tuple[Tensor, Tensor]:
    """out (B, Lq, Hq, Dv) and lse (B, Hq, Lq) of (B, L, H, D)."""
    if slopes is not None and slopes.dim() == 2:
        outs, lses = _one_by_one(zip(q, k, v, strict=True), slopes, options)
        return torch.cat(outs), torch.cat(lses)
    out, lse = attention(*(x.transpose(1, 2) for x in (q, k, v)), bias=_alibi(slopes), **options)
    return out.transpose(1, 2), lse


def _one_by_one(sequences: Iterable, slopes: Iterable, options: dict) -> tuple[list[Tensor], list[Tensor]]:
    """out (1, Lq, Hq, Dv) and lse (1, Hq, Lq) of each (q, k, v) of (L, H, D), with slopes of its own."""
    results = [_padded(q[None], k[None], v[None], own, options) for (q, k, v), own in zip(sequences, slopes)]
    return [out for out, _ in results], [lse for _, lse in results]


# --- The cache ---


def _check_cache_inputs(q, k_cache, v_cache, k, v) -> None:
    """Dtypes, devices and shapes of the tensors, as far as no table says more."""
    _checks.floating("q", q)
    if (k is None) != (v is None):
        raise ValueError(f"k and v must be given together, got {'v' if k is None else 'k'} alone")
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)):
        if tensor is not None:
            _checks.same_dtype(name, _checks.tensor(name, tensor), q.dtype, "q")
            _checks.same_device(name, tensor, q.device, "q")
    _check_heads(q, k_cache, v_cache, ("q", "k_cache", "v_cache"), "B, L", "rows, capacity")
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if new is not None:
            length = k.shape[1] if k.dim() == 4 else "L_new"
            expected = (q.shape[0], length, *cache.shape[2:])
            if new.shape != expected:
                raise _checks.shape_error(name, _checks.shape_text(expected), f"to match q and {name}_cache", new)


def _rotated(q, k, cos, sin, before: Tensor, ordered: bool, interleaved) -> tuple[Tensor, Tensor | None]:
    """q and k (B, L, H, D), rotated by their positions."""
    interleaved = _checks.flag("rotary_interleaved", interleaved)
    if cos is None and sin is None:
        return q, k
    if cos is None or sin is None:
        raise ValueError(f"rotary_cos and rotary_sin must be given together, got {'sin' if cos is None else 'cos'}")
    if k is None:
        raise ValueError("k and v must be given with rotary_cos: what the cache holds is rotated already, got None")
    check_tables(cos, sin, "rotary_")
    if 2 * cos.shape[-1] > q.shape[-1] or cos.dim() != 2:
        raise _checks.shape_error("rotary_cos", f"(L_max, R/2) with R/2 <= {q.shape[-1] // 2}", "", cos)

    def turned(x, step):
        positions = before[:, None] + step * torch.arange(x.shape[1], device=x.device)
        return rotary(x.transpose(1, 2), cos, sin, interleaved=interleaved, positions=positions).transpose(1, 2)

    return turned(q, int(ordered)), turned(k, 1)


def _by_rows(q: Tensor, cache: Cache, starts: Tensor, ends: Tensor, slopes, options) -> tuple[Tensor, Tensor]:
    """One sequence after the other, each with its keys and no others; reads the lengths on the host."""
    sequences = []
    for row, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        sequences.append((q[row], *(x[0, start:] for x in cache.read(end, row))))
    if not sequences:
        return _padded(q, *cache.read(0), slopes, options)
    per_row = [None] * len(sequences) if slopes is None else slopes.expand(len(sequences), -1)
    outs, lses = _one_by_one(sequences, per_row, options)
    return torch.cat(outs), torch.cat(lses)


def _masked(q: Tensor, cache: Cache, starts: Tensor, ends: Tensor, slopes: None, options) -> tuple[Tensor, Tensor]:
    """All sequences at once, with intervals of keys, where reading the lengths would break a graph or synchronise."""
    place = torch.arange(cache.capacity, device=q.device)
    unused = (place < starts[:, None]) | (place >= ends[:, None])
    # Weights of 0 would not keep a NaN out of the sum.
    keys, values = (x.masked_fill(unused[..., None, None], 0) for x in cache.read(cache.capacity))
    return _padded(q, keys, values, slopes, {**options, "mask": Span(starts, ends, options["mask"])})
