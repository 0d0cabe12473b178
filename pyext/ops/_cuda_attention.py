"""Which calls the CUDA kernels of attention take (csrc/cuda/attention_*.cu), and packed calls as one of theirs."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native
from .._primitives import UNBOUNDED, AttentionProblem
from . import _register


class Tiles(NamedTuple):
    """Bytes of shared memory that a block takes of the kernels for rows of up to so many features."""

    forward: int
    relative: int | None = None  # the forward with relative rows of queries; None: there is no such kernel
    relative_both: int | None = None  # the same with relative rows of keys
    backward: int | None = None
    strip_gradient: int | None = None  # the backward that also adds up the gradient of a diagonal bias
    relative_backward: int | None = None  # with relative rows of queries
    relative_both_backward: int | None = None  # the same with relative rows of keys


#: By the features that a row is filled up to. What an A100 lets a block have, 166,912 bytes, is enough for all.
TILES = {
    64: Tiles(39_244, 80_704, 138_976, 67_896, 68_920, 140_080, 109_312),
    96: Tiles(82_508, 66_368, 161_472, 128_568, 130_616, 166_832, 146_624),
    128: Tiles(72_012, 80_704, 153_248, 161_336, 163_384, 166_832, 146_624),
    256: Tiles(137_612),
}
#: Fields of the problem that the kernels do not know, as a refusal calls them.
_UNKNOWN = {
    "dense": "a dense bias",
    "mask": "a dense mask",
    "block_offsets": "a mask of several ranges of keys per query",
    "sinks": "sinks",
    "softcap": "a softcap",
    "dropout_p": "dropout",
}


def limits(problem: tuple) -> str | None:
    """Why the kernels do not take this problem, or None."""
    p = AttentionProblem(*problem[: len(AttentionProblem._fields)])
    if p.query.dtype == torch.float32:
        return "dtype torch.float32 is not supported: its kernels multiply bfloat16 and float16"
    for name, what in _UNKNOWN.items():
        if isinstance(getattr(p, name), Tensor) or name in ("softcap", "dropout_p") and getattr(p, name):
            return f"its kernels do not know {what}"
    if p.rel_k is not None and p.rel_q is None:
        return "its kernels do not know a bias of relative rows of keys alone"
    if p.segment is not None and p.rel_q is None:
        return "its kernels do not know a segment bias without one of relative rows"
    if p.cu_seqlens_q is not None and (p.diag is not None or p.rel_q is not None):
        return "its kernels do not know a bias over packed sequences"
    gradient = _register.is_recorded(problem)
    return _limit_of_sizes(p, gradient)


def _limit_of_sizes(p: AttentionProblem, gradient: bool) -> str | None:
    """What the sizes of a problem have against it."""
    (batch, heads, queries, head_dim), (keys, value_dim) = p.query.shape, p.value.shape[2:]
    for name, width in (("head dimension", head_dim), ("head dimension of value", value_dim)):
        if width % 8 or width == 0:
            return f"the {name} is {width}, no positive multiple of 8"
    width, most = max(head_dim, value_dim), 128 if gradient or p.rel_q is not None else 256
    if width > most:
        beside = " with a gradient" if gradient else " with relative rows" if p.rel_q is not None else ""
        return f"the head dimension is {width}, more than {most}{beside}"
    if batch * heads * max(queries, keys) >= 2**31:
        return "there are 2^31 rows or more"
    return None if not p.query.is_cuda else _limit_of_memory(p, width, gradient)


def _limit_of_memory(p: AttentionProblem, width: int, gradient: bool) -> str | None:
    """What a GPU with less shared memory than an A100 has against a problem."""
    tiles = next(tiles for features, tiles in TILES.items() if width <= features)
    need = [tiles.forward if p.rel_q is None else tiles.relative if p.rel_k is None else tiles.relative_both]
    if gradient and p.rel_q is not None:
        need.append(tiles.relative_backward if p.rel_k is None else tiles.relative_both_backward)
    elif gradient:
        need.append(tiles.backward if p.diag is None or not p.diag.requires_grad else tiles.strip_gradient)
    need = max(need)
    has = _native.shared_memory(p.query.device)
    return None if need <= has else f"a block of the GPU has {has} bytes of shared memory, and its kernels need {need}"


def unpacked(problem: AttentionProblem) -> AttentionProblem:
    """A problem of packed sequences as one of ranges of keys: each query's are those that its window allows of its
    sequence, and its interval, if it has one. Without a bias nothing else depends on positions."""
    starts_q, starts_k = problem.cu_seqlens_q, problem.cu_seqlens_k
    problem = problem._replace(cu_seqlens_q=None, cu_seqlens_k=None)
    if starts_q.shape[0] == 1:  # no sequences, so no rows
        return problem
    row = torch.arange(problem.query.shape[2], device=starts_q.device)
    ends = starts_q[1:].contiguous()
    n = torch.searchsorted(ends, row, right=True).clamp(max=ends.shape[0] - 1)
    first, past = starts_k[n], starts_k[n + 1]
    aligned = row - ends[n] + past  # the key at distance 0
    low, high = first, past
    if problem.left < UNBOUNDED:
        low = torch.maximum(low, aligned - problem.left)
    if problem.right < UNBOUNDED:
        high = torch.minimum(high, aligned + problem.right + 1)
    if problem.intervals is not None:
        low = torch.maximum(low, first + problem.intervals[0, :, 0])
        high = torch.minimum(high, first + problem.intervals[0, :, 1])
    total = problem.key.shape[2]
    intervals = torch.stack((low.clamp(0, total), high.clamp(0, total)), dim=-1).to(torch.int32)[None]
    return problem._replace(intervals=intervals, left=UNBOUNDED, right=UNBOUNDED)
