"""Makes the tables of tiles of attention in Triton: `python -m benchmarks.tune_attention [--arch 90] [--kernel keys]`.

For each kernel, kind of call, element size, width of the heads and GPU it compiles candidates, best first by the data
that a product takes, until some pass the checks of `tests.triton_aot`: no spills, shared memory within limits, matrix
units. Of those that pass it times `--keep` on the GPU of this machine and takes the fastest; for a GPU that is not here
it takes the first. Prints `CONFIGS` of kernels/triton/_attention_configs.py and `BACKWARD_CONFIGS` of
_attention_gradient_plan.py, with the present entries where nothing else was asked for or nothing passes. The whole
takes hours on few cores; run it from the root of the sources.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from tqdm import tqdm

from pyext._primitives import AttentionProblem
from pyext.kernels import attention
from pyext.kernels._attention_autotune import SIZES, SQUARE, STAGES, WARPS, fastest, using
from pyext.kernels._attention_configs import CONFIGS, WIDTHS, Config
from pyext.kernels._attention_gradient_plan import BACKWARD_CONFIGS
from pyext.kernels._launch import ARCHITECTURES, architecture
from tests.triton_aot_attention import BACKWARD_FULL, CROWDED, gradients, problem

TABLES = {("forward", *key): table for key, table in CONFIGS.items()} | BACKWARD_CONFIGS
KERNELS = {
    "forward": ("_forward_kernel",), "queries": ("_queries_kernel",), "keys": ("_keys_kernel",),
    "sums": ("_dense_kernel", "_sum_bands_kernel"),
}  # fmt: skip
DTYPES = {2: torch.bfloat16, 4: torch.float32}
SHAPES = ((4, 16, 2048), (1, 16, 8192))  # that are timed: batch, heads, length
REGISTERS = 255  # of a thread


class Entry(NamedTuple):
    """A place in the tables."""

    kernel: str
    kind: str
    size: int  # of an element
    arch: int
    width: int

    @property
    def present(self) -> Config:
        return TABLES[self.kernel, self.kind, self.size][self.arch][WIDTHS.index(self.width)]


# --- What compiles ---


def accumulated(entry: Entry, tile: Config) -> int:
    """Numbers of fp32 that a program holds at the least: its sums and tiles of products."""
    rows, columns, width = tile.rows, tile.columns, entry.width
    return {
        "forward": rows * (width + columns),
        "queries": rows * (width + 2 * columns),
        "keys": columns * (2 * width + 2 * rows),
        "sums": 2 * rows * columns,
    }[entry.kernel]


def candidates(entry: Entry) -> list[Config]:
    """By products per number loaded; then warps of 16 rows each, or 4; then two stages. Without those whose sums cannot
    be in registers (Blackwell has other memory for them)."""
    square = entry.kernel in SQUARE
    found = [
        Config(*numbers)
        for numbers in itertools.product(SIZES, SIZES, WARPS, STAGES)
        if numbers[0] == numbers[1] or not square
    ]
    if entry.arch < 100:
        found = [c for c in found if accumulated(entry, c) <= REGISTERS * 32 * c.warps]

    def rank(c: Config) -> tuple:
        rows = c.columns if entry.kernel == "keys" else c.rows
        usual = 8 if rows >= 128 else 4
        return -c.rows * c.columns / (c.rows + c.columns), c.warps != usual, abs(c.stages - 2), c

    return sorted(found, key=rank)


def calls(entry: Entry, tile: Config) -> Iterator[tuple]:
    """What must compile with this tile, as `triton_aot.record` takes it; the backward's tables hold for all that may
    meet, too."""
    features = [BACKWARD_FULL[entry.kind]]
    if entry.kernel != "forward" and entry.kind in CROWDED:
        features.append(CROWDED[entry.kind])

    def call(features):
        p = problem(DTYPES[entry.size], features, width=entry.width)
        with using(entry.kernel, tile):
            if entry.kernel == "forward":
                attention.attention_forward(*p)
            else:
                gradients(p, torch.empty_like(p.query))

    for some in features:
        yield f"tuned {entry.kernel}", entry.width % 64 == 0, partial(call, some)


def survivors(entry: Entry, keep: int) -> list[Config]:
    """The first `keep` candidates that pass every check."""
    from tests import triton_aot  # here: it makes its process compile, where tests interpret

    found: list[Config] = []
    for tile in candidates(entry):
        kernels = [k for k in triton_aot.record(entry.arch, calls(entry, tile)) if k.name in KERNELS[entry.kernel]]
        if all(not triton_aot.compile_kernel(kernel).faults for kernel in kernels):
            found.append(tile)
        if len(found) == keep:
            break
    return found


# --- What is fastest ---


def filled(p: AttentionProblem, device: torch.device) -> AttentionProblem:
    """The same call with numbers in it: of rows of distances the near ones differ; intervals and segments are whole."""

    def fill(name: str, tensor):
        if not isinstance(tensor, torch.Tensor):
            return tensor
        new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        if tensor.is_floating_point():
            return new.normal_()
        if name == "rel_index":
            length, rows = tensor.shape[0], (p.rel_k if p.rel_q is None else p.rel_q).shape[2]
            return new.copy_((torch.arange(length) - length // 2 + rows // 2).clamp(0, rows - 1))
        new.zero_()
        if name == "intervals":
            new[..., 1] = p.key.shape[2]
        return new

    return AttentionProblem(**{name: fill(name, part) for name, part in p._asdict().items()})


def timed(entry: Entry, tiles: list[Config], device: torch.device, shapes=SHAPES) -> Config:
    """The tile with which these shapes together take the least time."""
    launches = []
    for batch, heads, length in shapes:
        sizes = {"batch": batch, "heads": heads, "kv_heads": heads, "queries": length, "keys": length}
        p = filled(problem(DTYPES[entry.size], BACKWARD_FULL[entry.kind], width=entry.width, **sizes), device)
        launch = partial(attention.attention_forward, *p)
        if entry.kernel != "forward":
            launch = partial(gradients, p, *launch())
        launches.append(launch)
    return fastest(entry.kernel, lambda: [launch() for launch in launches], tiles)


# --- The tables ---


def line(configs: list[Config]) -> str:
    return ", ".join(f"Config({', '.join(map(str, c[:4]))})" for c in configs)


def source(found: dict[Entry, tuple[Config, str]]) -> str:
    """Python for the two tables; a comment says how each line was chosen, width by width."""
    lines = []
    for name, ours in (("CONFIGS", lambda k: k == "forward"), ("BACKWARD_CONFIGS", lambda k: k != "forward")):
        keys = [key for key in TABLES if ours(key[0]) and any(entry[:3] == key for entry in found)]
        if not keys:
            continue
        lines.append(f"{name} = {{  # the entries that were asked for")
        for key in keys:
            shown = key[1:] if name == "CONFIGS" else key
            lines.append(f"    ({', '.join(repr(part).replace(chr(39), chr(34)) for part in shown)}): {{")
            for arch in ARCHITECTURES:
                entries = [Entry(*key, arch, width) for width in WIDTHS]
                chosen = [found.get(entry, (entry.present, "as it was")) for entry in entries]
                how = ", ".join(how for _, how in chosen)
                lines.append(f"        {arch}: ({line([config for config, _ in chosen])}),  # {how}")
            lines.append("    },")
        lines.append("}")
    return "\n".join(lines)


def asked_for(options) -> list[Entry]:
    return [
        Entry(*key, arch, width)
        for key, arch, width in itertools.product(TABLES, options.arch, WIDTHS)
        if key[0] in options.kernel and key[1] in options.kind and key[2] in options.size and width in options.width
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.tune_attention", description=__doc__.splitlines()[0])
    for name, choices in (
        ("arch", ARCHITECTURES), ("kernel", tuple(KERNELS)), ("kind", tuple(BACKWARD_FULL)), ("size", tuple(DTYPES)),
        ("width", WIDTHS),
    ):  # fmt: skip
        how = {"choices": choices, "default": choices, "type": type(choices[0]), "nargs": "+"}
        parser.add_argument(f"--{name}", **how)
    parser.add_argument("--keep", type=int, default=6, help="of what compiles, so many are timed")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(argv)
    entries, here = asked_for(options), None
    if torch.cuda.is_available():
        device = torch.device("cuda")
        here = architecture(device)
    keep = [options.keep if entry.arch == here else 1 for entry in entries]
    spawn = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
    with ProcessPoolExecutor(options.jobs, mp_context=spawn) as pool:
        passed = list(tqdm(pool.map(survivors, entries, keep), total=len(entries), unit="entry", desc="compiled"))
    found = {}
    for entry, tiles in zip(tqdm(entries, unit="entry", desc="timed", disable=here is None), passed, strict=True):
        if not tiles:
            found[entry] = entry.present, "nothing passes"
        elif entry.arch == here:
            found[entry] = timed(entry, tiles, device), "timed"
        else:
            found[entry] = tiles[0], "by resources"
    print(source(found))
    if by_resources := sum(how == "by resources" for _, how in found.values()):
        print(f"# {by_resources} of {len(found)} are ranked by resources only, not timed: their GPU is not here.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
