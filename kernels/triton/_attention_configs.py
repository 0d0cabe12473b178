"""Tiles of the attention kernels, by GPU, width of the heads, dtype and what a call has."""

from typing import NamedTuple

from .._primitives import AttentionProblem
from ._attention_plan import padded
from ._launch import architecture


class Config(NamedTuple):
    """The tile of a program and how it is run: ROWS queries by COLUMNS keys at a time."""

    rows: int
    columns: int
    warps: int
    stages: int
    resident: int = 2  # programs of a multiprocessor, where a fixed number of them walks the blocks

    def options(self) -> dict[str, int]:
        return {"ROWS": self.rows, "COLUMNS": self.columns, "num_warps": self.warps, "num_stages": self.stages}


WIDTHS = (64, 128, 256)  # of the wider head, of query and value; a configuration for each
#: What a call has decides what a tile holds besides products: nothing ("plain": windows, intervals, softcap, sinks),
#: numbers of every pair ("pairs": biases, masks, dropout), or bands of relative rows ("relative").
_PAIRS = ("dense", "diag", "segment", "mask", "block_offsets")


def kind_of(problem: AttentionProblem) -> str:
    if problem.rel_index is not None:
        return "relative"
    pairs = problem.dropout_p > 0 or any(getattr(problem, name) is not None for name in _PAIRS)
    return "pairs" if pairs else "plain"


#: (kind, element size) -> architecture -> a configuration for each of WIDTHS. fp32 has no matrix units.
_PLAIN_FP32 = (Config(32, 32, 4, 2), Config(32, 16, 8, 2), Config(32, 16, 8, 2))
_PAIRS_FP32 = (Config(32, 16, 8, 2), Config(32, 16, 8, 2), Config(16, 32, 8, 2))
_RELATIVE_FP32 = (Config(16, 16, 8, 2), Config(16, 16, 8, 2), Config(16, 16, 8, 2))
CONFIGS = {
    ("plain", 2): {
        80: (Config(128, 64, 8, 3), Config(128, 32, 8, 3), Config(64, 32, 8, 2)),
        90: (Config(128, 128, 8, 2), Config(128, 64, 8, 3), Config(64, 32, 8, 2)),
        100: (Config(128, 128, 8, 2), Config(128, 64, 8, 3), Config(64, 64, 8, 2)),
    },
    ("pairs", 2): {
        80: (Config(64, 64, 8, 2), Config(64, 64, 8, 2), Config(32, 32, 8, 2)),
        90: (Config(128, 64, 8, 2), Config(128, 32, 8, 2), Config(64, 32, 8, 2)),
        100: (Config(128, 64, 8, 2), Config(128, 32, 8, 2), Config(64, 32, 8, 2)),
    },
    ("relative", 2): {
        80: (Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 1)),
        90: (Config(64, 64, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 2)),
        100: (Config(64, 64, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 2)),
    },
    ("plain", 4): dict.fromkeys((80, 90, 100), _PLAIN_FP32),
    ("pairs", 4): dict.fromkeys((80, 90, 100), _PAIRS_FP32),
    ("relative", 4): dict.fromkeys((80, 90, 100), _RELATIVE_FP32),
}
#: The same for at most FEW rows of queries, whose calls are bound by reading the keys; `rows` is then what they need.
FEW = 64


INTERPRETED = Config(64, 64, 4, 1)  # by the interpreter, whose time goes by the number of tiles


def forward_config(problem: AttentionProblem) -> Config:
    """The tile of the forward."""
    query = problem.query
    if query.device.type == "cpu":
        return INTERPRETED
    width = max(padded(query.shape[3]), padded(problem.value.shape[3]))
    table = CONFIGS[kind_of(problem), query.element_size()]
    return table[architecture(query.device)][sum(width > limit for limit in WIDTHS[:-1])]
