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
    registers: int | None = None  # of a thread; None: ptxas chooses

    def options(self) -> dict[str, int]:
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"ROWS": self.rows, "COLUMNS": self.columns, "num_warps": self.warps, "num_stages": self.stages} | limit


WIDTHS = (64, 128, 256)  # of the wider head, of query and value; a configuration for each
#: What a call has decides what a tile holds besides products: nothing ("plain": windows, intervals, softcap, sinks),
#: numbers of every pair ("pairs": biases, masks, dropout), or bands of relative rows ("relative"). Where more of those
#: numbers meet than CROWD, the tile has half the rows and columns.
_PAIRS = ("dense", "diag", "segment", "mask", "block_offsets")
CROWD = {"plain": 0, "pairs": 2, "relative": 1}


def with_registers(config: Config, problem: AttentionProblem) -> Config:
    """The tile with all registers that there are, for fp32 and heads over 128 (not with relative rows, which it makes
    spill): left to choose, ptxas spills a few rather than take more than half."""
    wide = max(problem.query.shape[3], problem.value.shape[3]) > 128 and problem.rel_index is None
    return config._replace(registers=255) if wide or problem.query.element_size() == 4 else config


def _pairs(problem: AttentionProblem) -> int:
    return sum(getattr(problem, name) is not None for name in _PAIRS) + (problem.dropout_p > 0)


def kind_of(problem: AttentionProblem) -> str:
    if problem.rel_index is not None:
        return "relative"
    return "pairs" if _pairs(problem) else "plain"


#: (kind, element size) -> architecture -> a configuration for each of WIDTHS. fp32 has no matrix units. For the others
#: 16 rows (Hopper: 64 of 4) are one warp's: more warps compute the same twice, but have registers where those run out.
_RELATIVE_FP32 = (Config(16, 16, 8, 2), Config(16, 16, 4, 2), Config(16, 16, 8, 1))
CONFIGS = {
    ("plain", 2): {
        80: (Config(128, 64, 8, 3), Config(128, 32, 8, 3), Config(64, 32, 8, 2)),
        90: (Config(128, 128, 8, 2), Config(128, 64, 8, 3), Config(128, 32, 8, 2)),
        100: (Config(128, 128, 8, 2), Config(128, 64, 8, 3), Config(64, 64, 8, 2)),
    },
    ("pairs", 2): {
        80: (Config(128, 32, 8, 2), Config(128, 16, 8, 1), Config(32, 32, 8, 2)),
        90: (Config(128, 64, 8, 2), Config(128, 32, 8, 2), Config(64, 32, 8, 2)),
        100: (Config(128, 32, 8, 2), Config(64, 32, 8, 2), Config(64, 32, 8, 2)),
    },
    ("relative", 2): {
        80: (Config(128, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 1)),
        90: (Config(64, 32, 4, 2), Config(64, 16, 8, 2), Config(32, 32, 8, 2)),
        100: (Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 2)),
    },
    ("plain", 4): {
        80: (Config(32, 32, 4, 2), Config(32, 32, 8, 2), Config(32, 16, 8, 2)),
        90: (Config(32, 32, 4, 2), Config(32, 16, 8, 2), Config(32, 16, 8, 2)),
        100: (Config(32, 32, 4, 2), Config(16, 16, 8, 2), Config(16, 16, 8, 2)),
    },
    ("pairs", 4): {
        80: (Config(32, 32, 4, 2), Config(32, 16, 8, 2), Config(16, 32, 8, 2)),
        90: (Config(32, 32, 4, 2), Config(32, 16, 8, 2), Config(16, 16, 8, 2)),
        100: (Config(16, 32, 8, 2), Config(32, 16, 8, 2), Config(16, 32, 8, 2)),
    },
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
    kind = kind_of(problem)
    table = CONFIGS[kind, query.element_size()]
    config = table[architecture(query.device)][sum(width > limit for limit in WIDTHS[:-1])]
    if _pairs(problem) > CROWD[kind]:
        config = config._replace(rows=max(config.rows // 2, 16), columns=max(config.columns // 2, 16))
    return config
