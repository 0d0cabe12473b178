"""`attention` and `varlen_attention`: validate, lower, choose a backend, call it.

The path of a call: `_prepare` (named errors; biases and masks become primitives) -> `_dispatch.choose` -> the op
`attention_forward` of `pyext` (CPU and CUDA kernels) or `pyext_triton`, or `reference.attention`, on the same flat
problem. `_shapes` brings SDPA's shapes to four dimensions, `_autograd` holds the op's derivative and fake kernels.
"""

import functools
import math
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks, _dispatch, _native
from .. import bias as _bias
from .. import masks as _masks
from .._primitives import UNBOUNDED, AttentionProblem, Sizes, acc_dtype
from ..reference.attention import attention as _reference
from . import _autograd, _cuda_attention, _passes, _register
from . import rotary as _rotary
from ._shapes import four_dims, restore


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    bias: _bias.Bias | None = None,
    mask: _masks.Mask | None = None,
    rotary: _rotary.Rotary | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    generator: torch.Generator | None = None,
    deterministic: bool = True,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(softcap(scale * q k^T) + bias, masked) v: a drop-in for `F.scaled_dot_product_attention`.

    S[i, j] = softcap(scale * q_i . k_j) + bias[i, j], softcap(x) = c tanh(x / c); keys that are masked drop out; then
    P = exp(S - lse), lse = log(sum_j exp(S[i, j]) + exp(sink)); out = dropout(P) v.

    Args:
        query: (B, Hq, Lq, D); also (Lq, D), (Hq, Lq, D) or more leading batch dimensions. float32, bfloat16, float16
            or float64; any strides; inside autocast it is cast as SDPA casts it.
        key, value: (B, Hkv, Lk, D), (B, Hkv, Lk, Dv), of the query's dtype and device. Leading dimensions and single
            heads broadcast.
        attn_mask: bool (True = attend) or float (added to the score, differentiable), broadcastable to
            (B, Hq, Lq, Lk), or a `torch.nn.attention.bias` causal object.
        dropout_p: probability of dropping an attention weight; applied whenever it is > 0, as in SDPA.
        is_causal: query i sees keys j <= i (upper-left aligned, as in SDPA; `masks.causal()` is lower-right aligned).
        scale: factor on q.k; None = 1 / sqrt(D).
        enable_gqa: let Hq be a multiple of Hkv; query head h reads key head h // (Hq // Hkv).
        bias: `pyext.bias` object, added to the score after the softcap.
        mask: `pyext.masks` object, or a FlexAttention `BlockMask`.
        rotary: `pyext.Rotary`: query and key are rotated by their positions first (in grouped heads each key head
            once).
        softcap: c > 0, or None.
        sinks: (Hq,) float, one more logit per head in the softmax denominator; differentiable.
        return_lse: also return the LSE.
        generator: source of the dropout seed; None = the default generator of the device. Not touched without
            dropout.
        deterministic: for all backends; CPU and Triton kernels and the reference are deterministic in any case.
        impl: "auto", "reference", "cpu", "triton" or "cuda"; see `pyext.explain`.
    Returns:
        out (B, Hq, Lq, Dv) in the query's dtype; with `return_lse` also lse (B, Hq, Lq), natural log, fp32 (fp64 for
        fp64), differentiable. A query that sees no key gives out 0, lse -inf, gradient 0.
    Raises:
        TypeError, ValueError naming the argument; NotImplementedError if the forced backend refuses the call.
    Source: Vaswani et al., "Attention is all you need" (2017), eq. 1; arguments and semantics of PyTorch's SDPA.
    """
    call = _prepare(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, bias, mask, rotary, softcap, sinks
    )
    _check_options(return_lse, generator, deterministic, call.problem)
    out, lse = _run("attention", impl, call, generator)
    out = restore(out, call.prefix)
    return (out, restore(lse.to(acc_dtype(out.dtype)), call.prefix)) if return_lse else out


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    bias: _bias.Bias | None = None,
    mask: _masks.Mask | None = None,
    rotary: _rotary.Rotary | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    generator: torch.Generator | None = None,
    deterministic: bool = True,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over sequences packed along one dimension, each attending to its own keys only.

    Sequence n owns rows cu_seqlens_q[n]:cu_seqlens_q[n + 1] of q and cu_seqlens_k[n]:cu_seqlens_k[n + 1] of k and v.
    Positions,
    windows and distances are those of the sequence: distance = j - (i + Lk_n - Lq_n) with local i and j.

    Args:
        q, k, v: (total_q, Hq, D), (total_k, Hkv, D), (total_k, Hkv, Dv).
        cu_seqlens_q, cu_seqlens_k: (N + 1,) integers from 0 to the total, not decreasing.
        max_seqlen_q, max_seqlen_k: accepted for flash-attn's callers; nothing depends on them.
        is_causal: lower-right aligned within each sequence, as in flash-attn (not upper-left as in `attention`).
        bias: alibi, t5, transformer_xl, shaw, disentangled (without a batch), their sums, or a diagonal with values
            (H, total_q + total_k - 1), distance 0 at index total_k - 1.
        mask: causal, window, prefix (one length per sequence) and their intersections.
        The others as in `attention`.
    Returns:
        out (total_q, Hq, Dv); with `return_lse` also lse (Hq, total_q), fp32 (fp64 for fp64).
    Raises:
        as `attention`; ValueError for biases and masks that need one common score matrix (dense, segment, padding,
        documents).
    Source: the interface of flash-attn 2 (Dao, 2023).
    """
    call = _prepare_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, is_causal, scale, enable_gqa, bias, mask, rotary, softcap, sinks,
    )  # fmt: skip
    _check_options(return_lse, generator, deterministic, call.problem)
    out, lse = _run("varlen_attention", impl, call, generator)
    out = out[0].transpose(0, 1)
    return (out, lse[0].to(acc_dtype(out.dtype))) if return_lse else out


class _Call(NamedTuple):
    """A call, validated and lowered."""

    problem: AttentionProblem
    prefix: tuple[int, ...] | None = None  # what the output has before (Lq, Dv), see `_shapes`
    rotation: _rotary.Rotation | None = None  # of query and key
    reordered: _passes.Reordered | None = None  # the mask, which the problem then lacks, as several runs of the op

    @property
    def asked(self) -> AttentionProblem:
        """What backends are asked for: the problem, with the table of blocks that one of the runs has."""
        tables = [] if self.reordered is None else self.reordered.tables()
        return self.problem if not tables else self.problem._replace(**tables[0]._asdict())


def _run(op: str, impl: str, call: _Call, generator) -> tuple[Tensor, Tensor]:
    """Choose the backend and call it: out (B, Hq, Lq, Dv) and lse (B, Hq, Lq), which kernels give in fp64."""
    problem, rotation = call.problem, call.rotation
    asked = call.asked
    backend = _dispatch.choose(op, impl, asked if rotation is None else (*asked, *rotation.query, *rotation.key))
    # The CPU kernels rotate what they read themselves, unless the keys are to be gathered in another order.
    if rotation is not None and (backend != "cpu" or call.reordered is not None):
        problem, rotation = rotation.apply(problem, backend), None
    if call.reordered is not None:
        if backend != "reference":
            return _passes.attend(problem, call.reordered.passes, backend)
        problem = call.reordered.masked(problem)
    if problem.dropout_p > 0:
        seed = torch.randint(0, 2**63 - 1, (1,), device=problem.query.device, generator=generator)
        problem = problem._replace(seed=seed)
    if backend == "cuda" and problem.cu_seqlens_q is not None:
        problem = _cuda_attention.unpacked(problem)
    return attend(problem, backend, rotation)


def attend(problem: AttentionProblem, backend: str, rotation: _rotary.Rotation | None = None) -> tuple[Tensor, Tensor]:
    """out and lse of the flat problem, by a backend that was chosen before. `rotation` is for the CPU kernels only."""
    if backend == "reference":
        return _reference(problem)
    if rotation is not None:
        return _register.call(backend, "attention_rotated_forward", (*problem, *rotation.arguments()))
    return _register.call(backend, "attention_forward", problem)


def _prepare(
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, bias, mask, rotary, softcap, sinks
) -> _Call:
    """Validate and lower a call of `attention`."""
    query, key, value = _inputs(("query", "key", "value"), query, key, value)
    query, key, value, lead, prefix = four_dims(query, key, value, _checks.flag("enable_gqa", enable_gqa))
    right, reordered = UNBOUNDED, None
    if _checks.flag("is_causal", is_causal):
        if attn_mask is not None:
            raise ValueError(
                "attn_mask must be None with is_causal=True (to combine them pass mask=pyext.masks.causal())"
            )
        right = query.shape[2] - key.shape[2]
    scale, softcap = _factors(scale, softcap, query.shape[3])
    if attn_mask is None and bias is None and mask is None and sinks is None:
        lowered = {"right": right}
    else:
        device, acc = query.device, acc_dtype(query.dtype)
        sizes = Sizes(lead, query.shape[1], query.shape[2], key.shape[2], device, acc)
        if _is_causal_bias(attn_mask):
            right, attn_mask = _causal_right(attn_mask, sizes), None
        bias, mask = _absorb_attn_mask(attn_mask, bias, _as_mask(mask))
        if mask is not None and bias is None and dropout_p == 0:
            reordered = _passes.reordered(mask, sizes, right)
        lowered = _lower(bias, None if reordered else mask, sinks, right, sizes, (query, key, scale, softcap))
    rotation = _rotation(rotary, ("query", "key"), query, key, lowered)
    problem = _problem(query, key, value, lowered, None, None, scale, softcap, dropout_p)
    return _Call(problem, prefix, rotation, reordered)


def _prepare_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    dropout_p, is_causal, scale, enable_gqa, bias, mask, rotary, softcap, sinks,
) -> _Call:  # fmt: skip
    """The same for a call of `varlen_attention`."""
    q, k, v = _inputs(("q", "k", "v"), q, k, v)
    _check_packed(q, k, v, _checks.flag("enable_gqa", enable_gqa))
    cu_q = _offsets("cu_seqlens_q", cu_seqlens_q, q)
    cu_k = _offsets("cu_seqlens_k", cu_seqlens_k, k)
    if cu_q.shape != cu_k.shape:
        expected = _checks.shape_text(cu_q.shape)
        raise _checks.shape_error("cu_seqlens_k", expected, "to match cu_seqlens_q", cu_k)
    for name, value in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if value is not None:
            _checks.length(name, value)
    query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
    right = 0 if _checks.flag("is_causal", is_causal) else UNBOUNDED
    scale, softcap = _factors(scale, softcap, q.shape[2])
    sizes = Sizes((), q.shape[1], q.shape[0], k.shape[0], q.device, acc_dtype(q.dtype), cu_q, cu_k)
    lowered = _lower(bias, _as_mask(mask), sinks, right, sizes, (query, key, scale, softcap))
    rotation = _rotation(rotary, ("q", "k"), query, key, lowered, cu_q, cu_k)
    return _Call(_problem(query, key, value, lowered, cu_q, cu_k, scale, softcap, dropout_p), rotation=rotation)


def _rotation(rotary, names, query, key, lowered: dict, *offsets) -> _rotary.Rotation | None:
    """What rotates query and key. Biases of content and distance would have to say which of the two they mean."""
    if rotary is not None and lowered.get("rel_index") is not None:
        raise ValueError(
            "rotary must be None beside bias.transformer_xl, bias.shaw and bias.disentangled, which read query and key "
            "themselves; to have them read the rotated ones pass pyext.rotary's results as query and key"
        )
    return _rotary.lower(rotary, names, query, key, *offsets)


def _factors(scale, softcap, width: int) -> tuple[float, float]:
    """`scale` and `softcap` of the flat problem."""
    if scale is None:
        scale = 1.0 / math.sqrt(width) if width else 1.0
    else:
        scale = float(_checks.real("scale", scale))
    if softcap is None:
        softcap = 0.0
    elif _checks.real("softcap", softcap) <= 0:
        raise ValueError(f"softcap must be positive (or None), got {softcap}")
    return scale, float(softcap)


def _problem(query, key, value, lowered, cu_q, cu_k, scale, softcap, dropout_p) -> AttentionProblem:
    """Put the flat problem together; a bias may have replaced the query."""
    if dropout_p != 0.0:
        dropout_p = _checks.probability("dropout_p", dropout_p)
    return AttentionProblem(
        lowered.pop("query", query), key, value, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, scale=scale, softcap=softcap,
        dropout_p=float(dropout_p), **lowered,
    )  # fmt: skip


def _inputs(names: tuple[str, str, str], query, key, value) -> tuple[Tensor, Tensor, Tensor]:
    """Three dense tensors of one floating dtype on one device, after autocast."""
    if not (_checks.is_dense(query) and _checks.is_dense(key) and _checks.is_dense(value)):
        for name, tensor in zip(names, (query, key, value), strict=True):
            _checks.tensor(name, tensor)
    query, key, value = _checks.autocast(query, key, value)
    device, dtype = query.device, query.dtype
    if dtype not in _checks.FLOATING:
        _checks.floating(names[0], query)
    if key.dtype != dtype or value.dtype != dtype:
        name, tensor = (names[1], key) if key.dtype != dtype else (names[2], value)
        raise TypeError(f"{name} must have dtype {dtype} to match {names[0]}, got {tensor.dtype}")
    if key.device != device or value.device != device:
        name, tensor = (names[1], key) if key.device != device else (names[2], value)
        raise ValueError(f"{name} must be on {device} like {names[0]}, got {tensor.device}")
    return query, key, value


def _absorb_attn_mask(attn_mask, bias, mask):
    """SDPA's attn_mask as one more bias (float) or mask (bool)."""
    if attn_mask is None:
        return bias, mask
    if _checks.tensor("attn_mask", attn_mask).dtype == torch.bool:
        extra = _masks.Dense(attn_mask, "attn_mask")
        return bias, extra if mask is None else mask & extra
    if attn_mask.dtype not in _checks.FLOATING:
        raise TypeError(f"attn_mask must be a bool or float tensor, got {attn_mask.dtype}")
    extra = _bias.Dense(attn_mask, "attn_mask")
    return extra if bias is None else _instance("bias", bias, _bias.Bias) + extra, mask


def _causal_right(causal, sizes: Sizes) -> int:
    """The window that a `torch.nn.attention.bias` object stands for, as the largest distance."""
    made = (causal.seq_len_q, causal.seq_len_kv)
    if made != (sizes.queries, sizes.keys):
        raise ValueError(f"attn_mask must be made for (Lq, Lk) = {(sizes.queries, sizes.keys)}, got {made}")
    return 0 if causal.variant.name == "LOWER_RIGHT" else sizes.queries - sizes.keys


def _is_causal_bias(value) -> bool:
    """Whether value is a `torch.nn.attention.bias.CausalBias`, whose slow module is imported wherever one exists."""
    module = None if type(value) is Tensor else sys.modules.get("torch.nn.attention.bias")
    return module is not None and isinstance(value, module.CausalBias)


def _as_mask(value) -> _masks.Mask | None:
    """The argument `mask`; a FlexAttention BlockMask becomes one of ours."""
    mask = None if value is None else _masks.as_mask(value)
    return mask if value is None else _instance("mask", value if mask is None else mask, _masks.Mask)


def _instance(name: str, value, kind: type):
    if not isinstance(value, kind):
        where = f"pyext.{'masks' if kind is _masks.Mask else 'bias'}"
        hint = " (wrap a tensor in its dense(), or pass it as attn_mask)" if isinstance(value, Tensor) else ""
        raise TypeError(f"{name} must be a {where} object{hint}, got {type(value).__name__}")
    return value


def _lower(bias, mask, sinks, right, sizes: Sizes, contents: tuple) -> dict:
    """The fields of the flat problem that come from biases, masks and sinks."""
    biases = {}
    if bias is not None:
        whole = Sizes(*sizes[: -len(contents)], *contents)
        biases = _instance("bias", bias, _bias.Bias).lower(whole).fields(whole)
    visible = _masks.Lowered() if mask is None else mask.lower(sizes)
    if sinks is not None:
        _checks.floating("sinks", sinks)
        if sinks.dim() != 1 or sinks.shape[0] != sizes.heads:
            raise _checks.shape_error("sinks", f"({sizes.heads},)", "to match query", sinks)
        _checks.same_device("sinks", sinks, sizes.device)
        sinks = sinks.to(sizes.acc)
    return {**biases, **visible._asdict(), "sinks": sinks, "right": min(right, visible.right)}


def _check_options(return_lse, generator, deterministic, problem: AttentionProblem) -> None:
    """The arguments that are no part of the mathematics."""
    _checks.flag("return_lse", return_lse)
    _checks.flag("deterministic", deterministic)
    _checks.generator(generator, problem.query.device)


def _check_packed(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> None:
    """The shapes of `varlen_attention`."""
    for name, tensor, expected in (
        ("q", q, "(total_q, Hq, D)"),
        ("k", k, "(total_k, Hkv, D)"),
        ("v", v, "(total_k, Hkv, Dv)"),
    ):
        if tensor.dim() != 3:
            raise _checks.shape_error(name, expected, "", tensor)
    heads, kv_heads = q.shape[1], k.shape[1]
    if k.shape[2] != q.shape[2]:
        raise _checks.shape_error("k", f"(total_k, Hkv, {q.shape[2]})", "to match q", k)
    if v.shape[0] != k.shape[0] or v.shape[1] != kv_heads:
        raise _checks.shape_error("v", f"({k.shape[0]}, {kv_heads}, Dv)", "to match k", v)
    if kv_heads != heads:
        if kv_heads == 0 or heads % kv_heads != 0:
            raise _checks.shape_error("k", "(total_k, Hkv, D)", f"with Hkv dividing the {heads} heads of q", k)
        if not enable_gqa and kv_heads != 1:
            raise _checks.shape_error(
                "k", f"(total_k, {heads}, D)", "to match q (enable_gqa=True groups query heads)", k
            )


def _offsets(name: str, value, packed: Tensor) -> Tensor:
    """cu_seqlens as contiguous int32 (N + 1,); its contents are checked where that needs no device sync."""
    if _checks.integer(name, value).dim() != 1 or value.shape[0] < 1:
        raise _checks.shape_error(name, "(N + 1,)", "", value)
    if value.device != packed.device:
        raise ValueError(f"{name} must be on {packed.device} like q, got {value.device}")
    if _checks.is_readable(value):
        offsets = value.tolist()
        if offsets[0] != 0 or offsets[-1] != packed.shape[0] or offsets != sorted(offsets):
            shown = offsets if len(offsets) <= 8 else [*offsets[:4], "...", *offsets[-3:]]
            raise ValueError(f"{name} must rise from 0 to {packed.shape[0]}, the number of packed rows, got {shown}")
    return value.to(torch.int32).contiguous()


def _explain(prepare, return_lse, generator, deterministic, **call):
    """What `_dispatch.explain` asks of an op: all of a call but running it."""
    problem = prepare(**call).asked
    _check_options(return_lse, generator, deterministic, problem)
    return problem


def _triton_limits(problem: tuple) -> str | None:
    """Why the Triton kernels do not take this problem, or None."""
    query, _, value, *_ = problem
    width = max(query.shape[3], value.shape[3])
    return f"the head dimension is {width}, more than 256" if width > 256 else None


for _function, _lowering in ((attention, _prepare), (varlen_attention, _prepare_varlen)):
    _dispatch.register(
        _function,
        functools.partial(_explain, _lowering),
        ("cpu", "triton", "cuda"),
        limits={"cuda": _cuda_attention.limits, "triton": _triton_limits},
    )
if _native.module() is not None:
    _autograd.register()
