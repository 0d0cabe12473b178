"""Tiles of the attention kernels, by GPU, width of the heads, dtype and what a call has."""

from typing import NamedTuple

from .._primitives import AttentionProblem


class Config(NamedTuple):
    """The tile of a program and how it is run: ROWS queries by COLUMNS keys at a time."""

    rows: int
    columns: int
    warps: int
    stages: int
    resident: int = 4  # programs of a multiprocessor, where they walk the blocks

    def options(self) -> dict[str, int]:
        return {"ROWS": self.rows, "COLUMNS": self.columns, "num_warps": self.warps, "num_stages": self.stages}


def forward_config(problem: AttentionProblem, queries: int) -> Config:
    """For so many queries of a sequence."""
    return Config(64, 64, 4, 2)
