"""Fake kernels and autograd of `pyext::attention_forward` and `pyext::attention_backward`.

Their schemas and kernels are in csrc/attention.cpp, the Triton launchers in kernels/triton.
"""

import torch
from torch import Tensor

from .._primitives import AttentionProblem, acc_dtype
from . import _register

_FIELDS = AttentionProblem._fields
TENSORS = _FIELDS.index("seed") + 1  # the tensors come first: query, key, value, then optional ones
_ARGUMENTS = len(_FIELDS)
# What `attention_backward` returns, which of it only on demand, and what has the dtype and layout of the outputs (the
# others come in the accumulation dtype).
GRADIENTS = ("query", "key", "value", "dense", "diag", "rel_query", "rel_q", "rel_k", "segment", "sinks")
OPTIONAL_GRADIENTS = ("dense", "diag", "rel_q", "rel_k", "segment")
_LIKE_QUERY = ("query", "key", "value", "rel_query")


def _like_output(tensor: Tensor, heads: int, rows: int, width: int) -> Tensor:
    """(B, H, L, D) laid out as (B, L, H, D), the layout of every output and gradient of that shape."""
    return tensor.new_empty((tensor.shape[0], rows, heads, width)).transpose(1, 2)


def _forward_fake(query, key, value, *rest):
    batch, heads, rows, _ = query.shape
    lse = query.new_empty((batch, heads, rows), dtype=torch.float64)
    return _like_output(query, heads, rows, value.shape[3]), lse


def _backward_fake(grad_out, grad_lse, query, key, value, out, lse, *rest):
    problem = AttentionProblem(query, key, value, *rest[: _ARGUMENTS - 3])
    need = dict(zip(OPTIONAL_GRADIENTS, rest[_ARGUMENTS - 3 :], strict=True))

    def gradient(name):
        tensor = getattr(problem, name)
        shape = (0,) if tensor is None or not need.get(name, True) else tensor.shape
        if name in _LIKE_QUERY and len(shape) == 4:
            return _like_output(tensor, *shape[1:])
        return query.new_empty(shape, dtype=acc_dtype(query.dtype))

    return tuple(map(gradient, GRADIENTS))


class _Attention(torch.autograd.Function):
    """`attention_forward` with its gradient; saves the inputs, out and lse."""

    @staticmethod
    def forward(ctx, sibling, run, *inputs):
        output = run(*inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:TENSORS], *output)
        ctx.sibling, ctx.numbers = sibling, inputs[TENSORS:]
        return output

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        if grad_out is None and grad_lse is None:
            return (None,) * (2 + _ARGUMENTS)
        *inputs, out, lse = ctx.saved_tensors
        query, key, value, *optional = inputs
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        need = dict(zip(_FIELDS, ctx.needs_input_grad[2:], strict=True))
        grads = ctx.sibling("attention_backward")(
            grad_out, grad_lse, query, key, value, out, lse, *optional, *ctx.numbers,
            *(need[name] for name in OPTIONAL_GRADIENTS),
        )  # fmt: skip
        named = dict(zip(GRADIENTS, grads, strict=True))
        dtypes = {name: tensor.dtype for name, tensor in zip(_FIELDS, inputs, strict=False) if tensor is not None}
        found = (named[name].to(dtypes[name]) if need[name] and name in named else None for name in _FIELDS)
        return None, None, *found


def _rotated(sibling, run, *inputs):
    """`attention_rotated_forward`: without a gradient its own kernel, else two ops that know their derivatives."""
    if not _register.is_recorded(inputs):
        return run(*inputs)
    query, key, *rest = inputs[:_ARGUMENTS]
    *tables, interleaved = inputs[_ARGUMENTS:]
    rotate = sibling("rotary_forward")
    query, key = (rotate(x, *t, interleaved, False) for x, t in ((query, tables[:3]), (key, tables[3:])))
    return sibling("attention_forward")(query, key, *rest)


def register() -> None:
    """Attach fakes and autograd to the ops; the native module must be loaded."""
    _register.register("attention_forward", _forward_fake, _Attention.apply, launchers="attention")
    _register.register("attention_rotated_forward", _forward_fake, _rotated)
    no_second = _register.once_differentiable("attention")
    _register.register("attention_backward", _backward_fake, no_second, launchers="attention_backward")
