"""The memory cases: 16384 tokens with T5's or DeBERTa's positions, forward and backward, in a process of its own.

The bias alone, materialised in bf16, would be 4 GiB. `python -m benchmarks.long_context t5 16384 0 1` prints one JSON
line: the peak of resident memory above what was resident once the inputs were there (outputs and gradients included).
With `t5_sdpa` in place of `t5` it is that of SDPA, which materialises the bias.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

import pyext

from .harness import Measured, check
from .peers import t5_buckets

LENGTH, HEADS, DIM = 16384, 8, 64
CHECKED_LENGTH = 1024


def resident(field: str) -> float:
    """MiB of this process: VmRSS (now) or VmHWM (peak)."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # no procfs: the peak stands in for both


def reset_peak() -> None:
    """Linux: forget the peak so far, so that importing torch or compiling does not hide ours."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # not permitted here: the peak can only read too low, if something before was larger than the case


def t5(generator: torch.Generator) -> tuple[list[torch.Tensor], pyext.bias.Bias]:
    """What is learned, and the bias."""
    table = torch.randn(32, HEADS, generator=generator).requires_grad_()
    return [table], pyext.bias.t5(table, bidirectional=True, max_distance=128)


def deberta(generator: torch.Generator) -> tuple[list[torch.Tensor], pyext.bias.Bias]:
    shape, dtype = (HEADS, 512, DIM), torch.bfloat16
    rows = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(2)]
    return rows, pyext.bias.disentangled(*rows, buckets=256, max_position=512, scale=DIM**-0.5)


BIASES = {"t5": t5, "deberta": deberta}


def sdpa_with_t5(query, key, value, learned, length: int) -> torch.Tensor:
    mask = learned[0].to(query.dtype)[t5_buckets(length, 32, 128)].permute(2, 0, 1)[None]
    return scaled_dot_product_attention(query, key, value, mask)


def step(kind: str, length: int, seed: int) -> tuple[float, float]:
    """(seconds, MiB above the inputs) of one forward + backward."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, HEADS, length, DIM)
    # Made in bf16 at once: an fp32 copy, freed, could stay in malloc's heap and be counted as ours or hide it.
    query, key, value, grad_out = (torch.randn(shape, generator=generator, dtype=torch.bfloat16) for _ in range(4))
    learned, bias = BIASES[kind.removesuffix("_sdpa")](generator)
    wanted = [*(t.requires_grad_() for t in (query, key, value)), *learned]
    reset_peak()
    before = resident("VmRSS")
    start = time.perf_counter()
    if kind.endswith("_sdpa"):
        out = sdpa_with_t5(query, key, value, learned, length)
    else:
        out = pyext.attention(query, key, value, bias=bias)
    torch.autograd.grad(out, wanted, grad_out)
    seconds = time.perf_counter() - start
    return seconds, resident("VmHWM") - before


def main(kind: str, length: int, seed: int, threads: int) -> None:
    torch.set_num_threads(threads)
    step(kind, min(256, length), seed)  # libraries, thread pools
    seconds, mib = step(kind, length, seed)
    print(json.dumps({"seconds": seconds, "peak_mib": mib}))


def run(
    seed: int, kind: str = "t5", length: int = LENGTH, threads: int = 1, peer: bool = False
) -> tuple[Measured, dict]:
    """The case's `run`: checks the same call at 1024 tokens, then measures in a fresh process; `peer`: SDPA, too."""
    from . import attention_cases, relative_cases  # they list this module's cases

    shape, way = (1, HEADS, CHECKED_LENGTH, DIM), "forward+backward"
    if kind == "t5":
        work = attention_cases.work_of(way, attention_cases.t5(shape[1], shape[2]), shape, "bf16", seed, sdpa=False)
    else:
        work = relative_cases.deberta_work(way, "bf16", seed, shape)
    error = check(work)
    mine = _in_a_process(kind, length, seed, threads)
    seconds, extra = {"pyext": mine["seconds"]}, {"peak_mib": mine["peak_mib"]}
    if peer:
        theirs = _in_a_process(f"{kind}_sdpa", length, seed, threads)
        seconds["SDPA"], extra["peak_mib of SDPA"] = theirs["seconds"], theirs["peak_mib"]
    flops = {"t5": 14, "deberta": 30}[kind] * HEADS * length * length * DIM
    return Measured(seconds, flops=flops, extra=extra), error


def _in_a_process(kind: str, length: int, seed: int, threads: int) -> dict:
    """What `main` prints."""
    command = [sys.executable, "-m", "benchmarks.long_context", kind, str(length), str(seed), str(threads)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
