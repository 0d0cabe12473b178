"""What the launchers of attention's backward share: tiles by GPU, width of the heads, dtype and what a call has."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._primitives import AttentionProblem
from ._attention_configs import Config
from ._attention_plan import padded


class Rows(NamedTuple):
    """A tensor (B, H, L, D) for kernels: the pointer and the strides of batch, head and row."""

    at: object
    b: object
    h: object
    l: object  # noqa: E741

    @staticmethod
    def of(tensor: Tensor) -> "Rows":
        return Rows(tensor, *tensor.stride()[:3])


class Listing(NamedTuple):
    """The block table by blocks of keys, for each batch row and head that has one of its own."""

    index: object  # (T, entries, 2) int32: block of queries, rising; bitmap or -1
    index_b: object  # strides of batch and head
    index_h: object
    offsets: object  # (T, blocks of keys + 1) int32: where each begins in `index`
    offsets_b: object
    offsets_h: object


def queries_tile(problem: AttentionProblem) -> Config:
    """Of the kernel of dQ."""
    return Config(64, 64, 4, 2)


def keys_tile(problem: AttentionProblem) -> Config:
    """Of the kernel of dK and dV."""
    return Config(64, 64, 4, 2)


def sums_tile(problem: AttentionProblem) -> Config:
    """Of the kernels that add tiles up; as many queries as keys."""
    return Config(64, 64, 4, 2)


def widths(problem: AttentionProblem) -> dict[str, int]:
    width, value_width = problem.query.shape[3], problem.value.shape[3]
    return {
        "WIDTH": width, "PADDED": padded(width), "VALUE_WIDTH": value_width, "VALUE_PADDED": padded(value_width),
    }  # fmt: skip


def scratch_of(problem: AttentionProblem, tile: Config, programs: int) -> tuple[Tensor | None, int]:
    """Memory for the tiles that programs read skewed, and how many distances a tile's band is wide."""
    if problem.rel_index is None:
        return None, 0
    band = tile.rows + tile.columns
    size = programs * max(tile.rows, tile.columns) * band
    return problem.query.new_empty((size,), dtype=torch.float32), band
