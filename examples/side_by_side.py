"""What the examples share: a text, the training of two models in turns, the report and the picture.

An example makes a model twice, of the same weights: one whose attention is an object, `attend`, is copied with another
`attend`, one of Transformers is copied and patched. Both see the same batches, and their steps alternate, so that their
times can be compared. A batch has `tokens`, the number of positions that count for the speed; a model takes a batch and
returns its loss.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# --- Data -----------------------------------------------------------------------------------------------------------


def corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """(train, validation): the bytes of the standard library's sources, without its tests; each 20th file validates.

    Files are taken in the order of their paths, so that every run on one Python reads the same text.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    files = sorted(path.as_posix() for path in paths if not skipped & set(path.parts))
    if not files:
        raise FileNotFoundError(f"no Python sources under {root}: is the standard library installed as a zip file?")
    parts = [[], []]
    for i, name in enumerate(files):
        parts[i % 20 == 19].append((root / name).read_bytes())
    return tuple(torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8).long() for part in parts)


def pieces(text: torch.Tensor, span: int, count: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless random pieces (count, span) of the text."""
    if len(text) <= span:
        raise ValueError(f"--length must leave room in {len(text)} bytes of text, got pieces of {span}")
    while True:
        start = torch.randint(len(text) - span, (count, 1), generator=generator)
        yield text[start + torch.arange(span)]


# --- Training -------------------------------------------------------------------------------------------------------


@dataclass
class Curve:
    """What a training has measured so far."""

    name: str
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)  # tokens per second, step by step
    validation: float = math.nan

    @property
    def speed(self) -> float:
        """Median tokens per second; the first two steps (allocation, compilation) do not count."""
        return statistics.median(self.rates[2:] or self.rates)


@dataclass(kw_only=True)
class Run(Curve):
    """One of the two models with its optimiser."""

    model: nn.Module
    optimizer: torch.optim.Optimizer


def attending(model: nn.Module, attends: Sequence) -> dict[str, nn.Module]:
    """A copy of the model for each way to attend: modules that have an `attend` get it."""
    twins = {}
    for attend in attends:
        twins[attend.name] = copy.deepcopy(model)
        for module in twins[attend.name].modules():
            if hasattr(module, "attend"):
                module.attend = attend
    return twins


def published_and_patched(model: nn.Module) -> dict[str, nn.Module]:
    """A model that holds one of Transformers: a patched copy, and itself."""
    from pyext.integrations.transformers import patch

    ours = copy.deepcopy(model)
    print(patch(ours))
    return {"pyext": ours, "Transformers": model}


def make_runs(models: Mapping[str, nn.Module], learning_rate: float, compiled: bool) -> list[Run]:
    runs = []
    for name, model in models.items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
        runs.append(Run(name, model=torch.compile(model) if compiled else model, optimizer=optimizer))
    return runs


def step(run: Run, batch, learning_rate: float, dtype: torch.dtype) -> None:
    start = time.perf_counter()
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = run.model(batch)
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.losses.append(loss.item())
    run.rates.append(batch.tokens / (time.perf_counter() - start))


def train(runs: list[Run], stream: Iterator, steps: int, learning_rate: float, dtype: torch.dtype) -> None:
    """Alternating steps; the order within a step alternates too, so that neither always finds the other's caches."""
    warm_up = max(1, steps // 10)
    with tqdm(total=steps, unit="step", disable=None) as bar:
        for i in range(steps):
            rate = learning_rate * min((i + 1) / warm_up, 1.0) * (1 - 0.9 * i / steps)
            batch = next(stream)
            for run in runs if i % 2 == 0 else reversed(runs):
                step(run, batch, rate, dtype)
            texts = (f"{run.name} {run.losses[-1]:.3f} {run.speed:,.0f} tok/s" for run in runs)
            bar.set_postfix_str(" | ".join(texts))
            bar.update()


def validate(runs: list[Run], stream: Iterator, dtype: torch.dtype, count: int = 4) -> None:
    held_out = [next(stream) for _ in range(count)]
    for run in runs:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            run.validation = statistics.mean(run.model(batch).item() for batch in held_out)


# --- The report -----------------------------------------------------------------------------------------------------


def apart(runs: Sequence[Curve]) -> tuple[float, float]:
    """(largest, mean) difference of the two loss curves, in nats."""
    gaps = [abs(a - b) for a, b in zip(runs[0].losses, runs[1].losses, strict=True)]
    return max(gaps), statistics.mean(gaps)


def report(runs: Sequence[Curve], title: str, args: argparse.Namespace) -> None:
    largest, mean = apart(runs)
    for run in runs:
        print(
            f"{run.name:12s} {run.speed:10,.0f} tokens/s   loss {run.losses[0]:.4f} -> {run.losses[-1]:.4f}, "
            f"validation {run.validation:.4f} nats per token"
        )
    print(f"pyext trains {runs[0].speed / runs[1].speed:.2f} times as fast as {runs[1].name} ({title}, {args.dtype}).")
    print(f"Loss curves: {largest:.1e} apart at most, {mean:.1e} on average, over {args.steps} steps.")
    print(f"Picture: {args.out}")


def draw(runs: Sequence[Curve], title: str, out: Path) -> None:
    """Both loss curves, and how far apart they are."""
    plt = pyplot()
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, height_ratios=(3, 1))
    styles = {"color": "#1f6f8b", "linewidth": 3.5, "alpha": 0.6}, {"color": "black", "linewidth": 1}
    for run, style in zip(runs, styles, strict=True):
        top.plot(run.losses, label=f"{run.name}: {run.speed:,.0f} tokens/s", **style)
    top.set_ylabel("loss, nats per token")
    top.set_title(title, fontsize=10)
    top.legend(frameon=False)
    gaps = [max(abs(a - b), 1e-9) for a, b in zip(runs[0].losses, runs[1].losses, strict=True)]
    bottom.semilogy(gaps, color="grey", linewidth=1)
    bottom.set_ylabel("|difference|")
    bottom.set_xlabel("step")
    save(figure, out)


def sizes(title: str, args: argparse.Namespace) -> str:
    """The title of a picture."""
    return f"{title}, {args.dtype}: {args.layers} layers of width {args.width}, {args.threads} thread(s)"


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def save(figure, out: Path) -> None:
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    pyplot().close(figure)


# --- Command line ---------------------------------------------------------------------------------------------------


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that all examples have; what is None here depends on the others, see `checked`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer steps: about a minute")
    parser.add_argument("--steps", type=int, help="optimiser steps (default 120, quick 24)")
    parser.add_argument("--batch", type=int, default=2, help="rows per step")
    parser.add_argument("--layers", type=int, help="layers per stack (default 4, quick 2)")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16: autocast, weights in fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the picture")
    parser.add_argument("--compile", action="store_true", help="torch.compile both models")
    return parser


def checked(parser: argparse.ArgumentParser, args: argparse.Namespace, sizes: Sequence[str]) -> argparse.Namespace:
    """The parsed options with their defaults; these `sizes` besides the common ones must be positive."""
    args.steps = (24 if args.quick else 120) if args.steps is None else args.steps
    args.layers = (2 if args.quick else 4) if args.layers is None else args.layers
    for name in ("steps", "batch", *sizes, "layers", "width", "heads", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.width % args.heads:
        parser.error(f"--width must be a multiple of --heads, got {args.width} and {args.heads}")
    return args


def side_by_side(
    models: Mapping[str, nn.Module], stream: Iterator, held_out: Iterator, title: str, args: argparse.Namespace
) -> list[Run]:
    """Train, validate, report and draw two models, the first of them pyext's."""
    dtype = DTYPES[args.dtype]
    runs = make_runs(models, args.learning_rate, args.compile)
    announce(title, runs[0].model, args)
    train(runs, stream, args.steps, args.learning_rate, dtype)
    validate(runs, held_out, dtype)
    draw(runs, sizes(title, args), args.out)
    report(runs, title, args)
    return runs


def announce(title: str, model: nn.Module, args: argparse.Namespace) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{title}: {parameters / 1e6:.1f} M parameters, {args.threads} thread(s)")
