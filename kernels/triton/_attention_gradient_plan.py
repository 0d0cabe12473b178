"""What the launchers of attention's backward share: tiles by GPU, width of the heads, dtype and what a call has."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .._primitives import AttentionProblem
from ._attention_autotune import chosen
from ._attention_configs import WIDTHS, Config, kind_of, with_registers
from ._attention_plan import padded
from ._launch import ARCHITECTURES, architecture


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


#: (kernel, kind of call, element size) -> architecture -> a configuration for each of `WIDTHS`. "queries": dQ; "keys":
#: dK and dV; "sums": what adds tiles up, as many queries as keys.
BACKWARD_CONFIGS: dict[tuple[str, str, int], dict[int, tuple[Config, ...]]] = {
    ("queries", "plain", 2): {
        80: (Config(128, 64, 8, 2), Config(64, 32, 4, 2), Config(64, 32, 8, 2)),
        90: (Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(32, 32, 8, 1)),
        100: (Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(64, 32, 8, 2)),
    },
    ("queries", "strip", 2): {
        80: (Config(32, 32, 8, 1), Config(64, 32, 4, 2), Config(32, 32, 8, 1)),
        90: (Config(128, 64, 8, 2), Config(64, 32, 4, 2), Config(32, 32, 8, 1)),
        100: (Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(16, 32, 8, 1)),
    },
    ("queries", "pairs", 2): {
        80: (Config(32, 32, 4, 1), Config(32, 32, 4, 1), Config(32, 32, 8, 1)),
        90: (Config(64, 32, 4, 1), Config(32, 32, 4, 1), Config(16, 32, 8, 1)),
        100: (Config(64, 32, 4, 1), Config(32, 32, 4, 1), Config(16, 32, 8, 1)),
    },
    ("queries", "relative", 2): {
        80: (Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(16, 16, 8, 1)),
        90: (Config(16, 32, 8, 1), Config(32, 32, 8, 1), Config(16, 16, 8, 1)),
        100: (Config(64, 32, 4, 1), Config(32, 32, 8, 1), Config(16, 16, 8, 1)),
    },
    ("keys", "plain", 2): {
        80: (Config(64, 128, 8, 2), Config(32, 64, 4, 2), Config(32, 64, 8, 2)),
        90: (Config(64, 128, 8, 2), Config(32, 128, 8, 2), Config(32, 32, 8, 1)),
        100: (Config(64, 128, 8, 2), Config(32, 128, 8, 2), Config(32, 64, 8, 2)),
    },
    ("keys", "strip", 2): {
        80: (Config(32, 64, 4, 2), Config(32, 64, 8, 1), Config(32, 32, 8, 1)),
        90: (Config(32, 64, 4, 2), Config(16, 64, 8, 1), Config(32, 32, 8, 1)),
        100: (Config(64, 128, 8, 2), Config(32, 128, 8, 2), Config(16, 64, 8, 1)),
    },
    ("keys", "pairs", 2): {
        80: (Config(16, 64, 8, 1), Config(16, 32, 8, 1), Config(16, 16, 8, 1)),
        90: (Config(16, 64, 8, 1), Config(16, 32, 8, 1), Config(16, 32, 8, 1)),
        100: (Config(16, 64, 8, 1), Config(16, 32, 8, 1), Config(16, 32, 8, 1)),
    },
    ("keys", "relative", 2): {
        80: (Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(16, 16, 8, 1)),
        90: (Config(16, 32, 8, 1), Config(32, 32, 8, 1), Config(16, 16, 8, 1)),
        100: (Config(32, 64, 8, 1), Config(32, 32, 8, 1), Config(16, 16, 8, 1)),
    },
    ("sums", "strip", 2): {
        80: (Config(32, 32, 4, 1), Config(32, 32, 8, 1), Config(16, 16, 8, 1)),
        90: (Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 8, 1)),
        100: (Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 8, 1)),
    },
    ("sums", "pairs", 2): {
        80: (Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(16, 16, 4, 1)),
        90: (Config(64, 64, 4, 1), Config(64, 64, 8, 1), Config(16, 16, 8, 1)),
        100: (Config(64, 64, 4, 1), Config(64, 64, 4, 1), Config(16, 16, 8, 1)),
    },
    ("sums", "relative", 2): {
        80: (Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(16, 16, 4, 1)),
        90: (Config(16, 16, 4, 1), Config(32, 32, 8, 1), Config(16, 16, 4, 1)),
        100: (Config(32, 32, 4, 1), Config(32, 32, 8, 1), Config(16, 16, 4, 1)),
    },
    ("queries", "plain", 4): dict.fromkeys(
        ARCHITECTURES, (Config(32, 32, 8, 1), Config(16, 32, 8, 1), Config(16, 16, 8, 1))
    ),
    ("queries", "strip", 4): dict.fromkeys(
        ARCHITECTURES, (Config(16, 16, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1))
    ),
    ("queries", "pairs", 4): dict.fromkeys(
        ARCHITECTURES, (Config(16, 16, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1))
    ),
    ("queries", "relative", 4): dict.fromkeys(
        ARCHITECTURES, (Config(16, 16, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1))
    ),
    ("keys", "plain", 4): dict.fromkeys(
        ARCHITECTURES, (Config(32, 32, 4, 2), Config(32, 32, 8, 2), Config(16, 32, 8, 1))
    ),
    ("keys", "strip", 4): dict.fromkeys(
        ARCHITECTURES, (Config(16, 32, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1))
    ),
    ("keys", "pairs", 4): dict.fromkeys(
        ARCHITECTURES, (Config(16, 32, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1))
    ),
    ("keys", "relative", 4): dict.fromkeys(
        ARCHITECTURES, (Config(16, 16, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1))
    ),
    ("sums", "strip", 4): dict.fromkeys(
        ARCHITECTURES, (Config(16, 16, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1))
    ),
    ("sums", "pairs", 4): dict.fromkeys(
        ARCHITECTURES, (Config(16, 16, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1))
    ),
    ("sums", "relative", 4): dict.fromkeys(
        ARCHITECTURES, (Config(16, 16, 8, 1), Config(16, 16, 8, 1), Config(16, 16, 8, 1))
    ),
}
#: Of the interpreter: a tile takes it milliseconds whatever its size, and registers do not matter.
INTERPRETED = {"queries": Config(64, 64, 4, 2), "keys": Config(32, 64, 4, 2), "sums": Config(64, 64, 4, 2)}


def _kind(problem: AttentionProblem) -> str:
    """As for the forward; but a strip alone, without anything else for each pair, is a kind of its own: "strip"."""
    kind, more = kind_of(problem), (problem.dense, problem.segment, problem.mask, problem.block_offsets)
    alone = problem.dropout_p == 0 and not problem.softcap and all(tensor is None for tensor in more)
    crowded = problem.cu_seqlens_q is not None and problem.intervals is not None
    return "strip" if kind == "pairs" and alone and not crowded else kind


def tile_of(kernel: str, problem: AttentionProblem) -> Config:
    query = problem.query
    if query.device.type == "cpu":
        return chosen(kernel, INTERPRETED[kernel])
    width = max(padded(query.shape[3]), padded(problem.value.shape[3]))
    kind, column = _kind(problem), sum(width > limit for limit in WIDTHS[:-1])
    odd = query.shape[3] % 16 > 0 or problem.value.shape[3] % 16 > 0
    if odd and kind != "relative":  # rows are read one element at a time, which takes registers
        kind = "pairs"
    config = BACKWARD_CONFIGS[kernel, kind, query.element_size()][architecture(query.device)][column]
    return with_registers(chosen(kernel, config._replace(warps=8) if odd else config), problem)


def widths(problem: AttentionProblem) -> dict[str, int]:
    width, value_width = problem.query.shape[3], problem.value.shape[3]
    return {
        "WIDTH": width, "PADDED": padded(width), "VALUE_WIDTH": value_width, "VALUE_PADDED": padded(value_width),
    }  # fmt: skip


def scratch_of(problem: AttentionProblem, tile: Config, programs: int) -> tuple[Tensor | None, int]:
    """Memory for the tiles that programs read skewed, and how many distances a tile's band is wide."""
    if problem.rel_index is None:
        return None, 0
    band = triton.next_power_of_2(tile.rows + tile.columns)
    size = programs * max(tile.rows, tile.columns) * band
    return problem.query.new_empty((size,), dtype=torch.float32), band
