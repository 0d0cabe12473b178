"""What processes of `torch.distributed` tell one another: vectors gathered, rows exchanged, differentiably.

Everything travels as bytes: a backend need not know the dtype.
"""

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def eager(function: Callable) -> Callable:
    """The function outside of the graphs of `torch.compile`: what processes tell one another settles shapes."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        # Not as a decorator: that imports the compiler, which takes longer than the rest of torch.
        return (torch.compiler.disable(function) if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return call


def place(group: "dist.ProcessGroup | None") -> tuple[int, int]:
    """(processes of the group, the number of this one)."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group must be a process group (call torch.distributed.init_process_group first), got none")
    return dist.get_world_size(group), dist.get_rank(group)


def gathered(group: "dist.ProcessGroup | None", value: Tensor) -> Tensor:
    """(processes, *shape): the tensors of all processes, of one shape and dtype."""
    out = value.new_empty((place(group)[0], *value.shape))
    if value.numel():
        dist.all_gather([_bytes(part) for part in out], _bytes(value), group=group)
    return out


def gathered_parts(group: "dist.ProcessGroup | None", value: Tensor, sizes: list[int]) -> Tensor:
    """The tensors of all processes one after the other; process p has sizes[p] rows, all other sizes are the same."""
    padded = value.new_zeros((max(sizes), *value.shape[1:]))
    padded[: value.shape[0]] = value
    return torch.cat([part[:size] for part, size in zip(gathered(group, padded), sizes, strict=True)])


def exchanged(
    group: "dist.ProcessGroup | None", tensors: tuple[Tensor, ...], sent: list[int], received: list[int], record: bool
) -> tuple[Tensor, ...]:
    """Of each tensor the first sent[0] rows go to process 0, the next to 1, and so on; those that come lie likewise.

    Args:
        tensors: (sum(sent), any) each.
        record: have autograd record this, though no tensor may need a gradient here. It must be the same on all
            processes: the derivative is an exchange too, and waits for each of them.
    Returns:
        (sum(received), any) each.
    """
    anchor = tensors[0].new_empty(0).requires_grad_() if record else None
    return _Exchange.apply(group, sent, received, anchor, *tensors)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, sent: list[int], received: list[int], anchor: Tensor | None, *tensors: Tensor):
        ctx.way_back = group, received, sent
        outs = []
        for rows in tensors:
            outs.append(rows.new_empty((sum(received), rows.shape[1])))
            row = rows.shape[1] * rows.element_size()
            sizes = ([count * row for count in counts] for counts in (received, sent))
            dist.all_to_all_single(_bytes(outs[-1]), _bytes(rows), *sizes, group=group)
        return tuple(outs)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        group, sent, received = ctx.way_back
        # Linear, so that the second derivative is an exchange again, recorded where gradients of gradients are wanted.
        return None, None, None, None, *exchanged(group, grads, sent, received, torch.is_grad_enabled())


class GatheredParts(torch.autograd.Function):
    """`gathered_parts`; the gradient is this process' part of that of the result, which all processes have alike."""

    @staticmethod
    def forward(ctx, group, value: Tensor, sizes: list[int]) -> Tensor:
        first = sum(sizes[: place(group)[1]])
        ctx.own = slice(first, first + value.shape[0])
        return gathered_parts(group, value, sizes)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, grad[ctx.own], None


class ScaledGradient(torch.autograd.Function):
    """The value as it is; its gradient times a factor."""

    @staticmethod
    def forward(ctx, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.factor, None


def _bytes(value: Tensor) -> Tensor:
    return value.contiguous().view(-1).view(torch.uint8)
