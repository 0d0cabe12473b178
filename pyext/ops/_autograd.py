"""Fake kernels and autograd of `pyext::attention_forward` and `pyext::attention_backward`.

Their schemas and kernels are in csrc/attention.cpp.
"""

import torch
from torch import Tensor

from .._primitives import AttentionProblem, acc_dtype

_FIELDS = AttentionProblem._fields
_TENSORS = _FIELDS.index("seed") + 1  # the optional tensors, dense to seed, follow query, key and value
_ARGUMENTS = len(_FIELDS)


def _like_output(tensor: Tensor, heads: int, rows: int, width: int) -> Tensor:
    """(B, H, L, D) laid out as (B, L, H, D), the layout of every output and gradient of that shape."""
    return tensor.new_empty((tensor.shape[0], rows, heads, width)).transpose(1, 2)


def _forward_fake(query, key, value, *rest):
    batch, heads, rows, _ = query.shape
    lse = query.new_empty((batch, heads, rows), dtype=torch.float64)
    return _like_output(query, heads, rows, value.shape[3]), lse


def _backward_fake(
    grad_out, grad_lse, query, key, value, out, lse, dense, diag, diag_index, mask, intervals, sinks, *rest
):
    need_dense, need_diag = rest[-2:]

    def gradient(tensor, needed):
        shape = tensor.shape if tensor is not None and needed else (0,)
        return query.new_empty(shape, dtype=acc_dtype(query.dtype))

    inputs = (_like_output(x, x.shape[1], x.shape[2], x.shape[3]) for x in (query, key, value))
    return *inputs, gradient(dense, need_dense), gradient(diag, need_diag), gradient(sinks, True)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_TENSORS], *output)
    ctx.numbers = inputs[_TENSORS:]


def _backward(ctx, grad_out, grad_lse):
    none = (None,) * _ARGUMENTS
    if grad_out is None and grad_lse is None:
        return none
    *inputs, out, lse = ctx.saved_tensors
    query, key, value, dense, *_ = inputs
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    need = dict(zip(_FIELDS, ctx.needs_input_grad, strict=True))
    grads = torch.ops.pyext.attention_backward.default(
        grad_out, grad_lse, query, key, value, out, lse, *inputs[3:], *ctx.numbers, need["dense"], need["diag"]
    )
    named = dict(zip(("query", "key", "value", "dense", "diag", "sinks"), grads, strict=True))
    if need["dense"]:
        named["dense"] = named["dense"].to(dense.dtype)
    return tuple(named[name] if need[name] and name in named else None for name in _FIELDS)


def _double_backward(ctx, *grads):
    raise RuntimeError(
        "pyext.attention: the native kernels have no second derivative (double backward); "
        "call it with impl='reference' where gradients of gradients are needed"
    )


def register() -> None:
    """Attach fakes and autograd to the ops; the native module must be loaded."""
    torch.library.register_fake("pyext::attention_forward", _forward_fake)
    torch.library.register_fake("pyext::attention_backward", _backward_fake)
    torch.library.register_autograd("pyext::attention_forward", _backward, setup_context=_setup_context)
    torch.library.register_autograd("pyext::attention_backward", _double_backward)
