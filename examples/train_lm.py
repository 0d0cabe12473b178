"""Trains a byte-level language model twice, side by side: attention by pyext and by PyTorch.

    python examples/train_lm.py --arch t5            a few minutes; t5, bloom, gpt2 or bert
    python examples/train_lm.py --arch bloom --quick the one-minute version
    python examples/train_lm.py --arch t5 --dtype bf16 --threads 2

The text is the source code of Python's own standard library, as installed; nothing is downloaded. Both models start
from the same weights and see the same batches; their steps alternate, so that their times can be compared. Printed at
the end: tokens per second of both, the ratio, and how far apart the two loss curves ever were. One picture shows both
curves.

arch   model                                             attention, pyext                  attention, PyTorch today
t5     encoder-decoder, RMSNorm, GeGLU, scale 1.0,        bias.t5(table), masks.causal()    table[bucket] materialised,
       one relative table per stack for all its layers                                     -inf above the diagonal
bloom  causal decoder with ALiBi                          bias.alibi(slopes), causal        slopes * distance, -inf
gpt2   causal decoder with learned positions              is_causal=True                    is_causal=True
bert   bidirectional masked LM, padded batches            masks.padding(lengths)            bool mask (B, 1, 1, L)

The models are the published ones in their attention, positions and feed-forward; all of them normalise before each
sub-layer and none uses dropout. T5 learns to continue a text (the prefix-LM task of Raffel et al., 2020): the encoder
reads L bytes, the decoder predicts the L bytes that follow.

How closely the curves stay together, over 40 steps at length 256 (losses fall from 6.6 to 2.9 nats per byte): in fp32
within 5e-7 for bloom, gpt2 and bert, within 1e-5 for t5, whose unscaled scores amplify rounding; under bf16 autocast
within 3e-3, t5 within 3e-2. Longer runs drift further apart, training being chaotic; each run prints its own figures.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import pyext

PAD, MASK, VOCABULARY = 256, 257, 258  # bytes are 0..255
IGNORE = -100  # target of a position that is not predicted
BUCKETS, MAX_DISTANCE = 32, 128  # of T5's relative positions


# --- Attention: the one difference between the two models -----------------------------------------------------------


class PyextAttention:
    """Positions and masks are small objects; nothing of size L x L is ever made."""

    name = "pyext"

    def t5(self, table, length, causal):
        bias = pyext.bias.t5(table, bidirectional=not causal, max_distance=MAX_DISTANCE)
        return {"bias": bias, "mask": pyext.masks.causal() if causal else None}

    def alibi(self, slopes, length):
        return {"bias": pyext.bias.alibi(slopes), "mask": pyext.masks.causal()}

    def padding(self, lengths, length):
        return {"mask": pyext.masks.padding(lengths)}

    def __call__(self, query, key, value, **how):
        return pyext.attention(query, key, value, **how)


class TorchAttention:
    """What one writes today: the bias and the mask as an (L, L) tensor, made once per step for all the layers."""

    name = "PyTorch"

    def t5(self, table, length, causal):
        distance = distances(length, table.device)
        bias = table[t5_bucket(distance, not causal)].permute(2, 0, 1)[None]
        return {"attn_mask": bias.masked_fill(distance > 0, -math.inf) if causal else bias}

    def alibi(self, slopes, length):
        distance = distances(length, slopes.device)
        return {"attn_mask": (slopes[:, None, None] * distance).masked_fill(distance > 0, -math.inf)[None]}

    def padding(self, lengths, length):
        return {"attn_mask": (torch.arange(length, device=lengths.device) < lengths[:, None])[:, None, None, :]}

    def __call__(self, query, key, value, **how):
        return F.scaled_dot_product_attention(query, key, value, **how)


def distances(length, device):
    """(L, L): key position minus query position."""
    position = torch.arange(length, device=device)
    return position[None, :] - position[:, None]


def t5_bucket(distance, bidirectional):
    """T5's bucket of each distance: exact when near, logarithmic up to MAX_DISTANCE, one bucket beyond."""
    buckets, offset = BUCKETS, 0
    if bidirectional:
        buckets //= 2
        offset = (distance > 0) * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    far = exact + (
        torch.log(distance.clamp(min=1).float() / exact) / math.log(MAX_DISTANCE / exact) * (buckets - exact)
    ).long().clamp(max=buckets - 1 - exact)
    return offset + torch.where(distance < exact, distance, far)


def alibi_slopes(heads):
    """Press et al. (2022): a geometric sequence 2^(-8/n), 2^(-16/n), ... for n heads, n the next power of two below."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return torch.tensor(slopes)


# --- The models -----------------------------------------------------------------------------------------------------


@dataclass
class Config:
    arch: str
    layers: int
    width: int
    heads: int
    length: int


class Attention(nn.Module):
    """Multi-head attention of `x` to `memory` (itself unless given). T5 leaves the scores unscaled."""

    def __init__(self, config, attend):
        super().__init__()
        self.heads, self.attend = config.heads, attend
        t5 = config.arch == "t5"
        self.scale = 1.0 if t5 else None
        self.query, self.key, self.value, self.out = (
            nn.Linear(config.width, config.width, bias=not t5) for _ in range(4)
        )
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.normal_(layer.weight, std=config.width**-0.5)
        if t5:  # as T5 does: the scale lives in the initial weights
            nn.init.normal_(self.query.weight, std=config.width**-0.5 * (config.width // config.heads) ** -0.5)

    def forward(self, x, how, memory=None):
        memory = x if memory is None else memory
        query, key, value = (
            layer(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, source in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        out = self.attend(query, key, value, scale=self.scale, **how)
        return self.out(out.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """GELU, or the gated GELU of T5 1.1."""

    def __init__(self, config):
        super().__init__()
        self.gated = config.arch == "t5"
        hidden = config.width * 8 // 3 if self.gated else config.width * 4
        self.up = nn.Linear(config.width, 2 * hidden if self.gated else hidden, bias=not self.gated)
        self.down = nn.Linear(hidden, config.width, bias=not self.gated)

    def forward(self, x):
        if not self.gated:
            return self.down(F.gelu(self.up(x)))
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.gelu(gate, approximate="tanh") * up)


def norm(config):
    return nn.RMSNorm(config.width, eps=1e-6) if config.arch == "t5" else nn.LayerNorm(config.width)


class Block(nn.Module):
    """Self-attention, cross-attention in a T5 decoder, feed-forward; each normalised before and added after."""

    def __init__(self, config, attend, cross=False):
        super().__init__()
        self.attention, self.feed_forward = Attention(config, attend), FeedForward(config)
        self.norms = nn.ModuleList(norm(config) for _ in range(3 if cross else 2))
        self.cross = Attention(config, attend) if cross else None

    def forward(self, x, how, memory=None):
        x = x + self.attention(self.norms[0](x), how)
        if self.cross is not None:
            x = x + self.cross(self.norms[2](x), {}, memory)
        return x + self.feed_forward(self.norms[1](x))


class Stack(nn.Module):
    """Layers that share one set of positions."""

    def __init__(self, config, attend, cross=False, causal=True):
        super().__init__()
        self.config, self.attend, self.causal = config, attend, causal
        self.blocks = nn.ModuleList(Block(config, attend, cross) for _ in range(config.layers))
        self.norm = norm(config)
        if config.arch == "t5":
            self.table = nn.Parameter(torch.randn(BUCKETS, config.heads) * config.width**-0.5)
        elif config.arch == "bloom":
            self.register_buffer("slopes", alibi_slopes(config.heads))
        else:
            self.positions = nn.Parameter(torch.randn(config.length, config.width) * 0.02)

    def forward(self, x, lengths=None, memory=None):
        length = x.shape[1]
        if self.config.arch == "t5":
            how = self.attend.t5(self.table, length, self.causal)
        elif self.config.arch == "bloom":
            how = self.attend.alibi(self.slopes, length)
        else:
            x = x + self.positions[:length]
            how = {"is_causal": True} if self.causal else self.attend.padding(lengths, length)
        for block in self.blocks:
            x = block(x, how, memory)
        return self.norm(x)


class Model(nn.Module):
    """Bytes in, loss out. T5 has an encoder for the bytes before; the others are one stack."""

    def __init__(self, config, attend):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        nn.init.normal_(self.embedding.weight, std=1.0 if config.arch == "t5" else 0.02)
        t5 = config.arch == "t5"
        self.encoder = Stack(config, attend, causal=False) if t5 else None
        self.stack = Stack(config, attend, cross=t5, causal=config.arch != "bert")
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        nn.init.normal_(self.head.weight, std=config.width**-0.5)

    def forward(self, batch):
        memory = None if self.encoder is None else self.encoder(self.embedding(batch.before))
        hidden = self.stack(self.embedding(batch.inputs), batch.lengths, memory)
        logits = self.head(hidden).flatten(0, 1).float()
        return F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORE)


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


@dataclass
class Batch:
    """inputs, targets (B, L); before (B, L), what T5's encoder reads; lengths (B,), BERT's bytes before the padding."""

    inputs: torch.Tensor
    targets: torch.Tensor
    before: torch.Tensor | None = None
    lengths: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Positions that carry text, padding not counted."""
        here = self.inputs.numel() if self.lengths is None else int(self.lengths.sum())
        return here + (0 if self.before is None else self.before.numel())


def batches(text: torch.Tensor, config: Config, batch_size: int, seed: int) -> Iterator[Batch]:
    """Endless random pieces of the text, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    length = config.length
    span = 2 * length if config.arch == "t5" else length + 1
    if len(text) <= span:
        raise ValueError(f"--length must leave room in {len(text)} bytes of text, got {length}")
    while True:
        start = torch.randint(len(text) - span, (batch_size, 1), generator=generator)
        piece = text[start + torch.arange(span)]
        if config.arch == "bert":
            yield masked(piece[:, :length], generator)
        else:
            before = piece[:, :length] if config.arch == "t5" else None
            yield Batch(piece[:, -length - 1 : -1], piece[:, -length:], before)


def masked(piece: torch.Tensor, generator: torch.Generator) -> Batch:
    """BERT's task: of 15 % of the bytes, 80 % are hidden, 10 % replaced, 10 % left; texts of L/4 to L bytes, padded."""
    size, length = piece.shape
    lengths = torch.randint(length // 4, length + 1, (size,), generator=generator)
    lengths[0] = length
    real = torch.arange(length) < lengths[:, None]
    chosen = (torch.rand(piece.shape, generator=generator) < 0.15) & real
    chosen[:, 0] = True  # a batch without a single target would have no loss
    fate = torch.rand(piece.shape, generator=generator)
    noise = torch.randint(256, piece.shape, generator=generator)
    inputs = torch.where(chosen & (fate < 0.8), MASK, torch.where(chosen & (fate >= 0.9), noise, piece))
    return Batch(inputs.where(real, PAD), piece.where(chosen, IGNORE), lengths=lengths)


# --- Training -------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One of the two models with its optimiser and what it has measured so far."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)  # tokens per second, step by step
    validation: float = math.nan

    @property
    def speed(self) -> float:
        """Median tokens per second; the first two steps (allocation, compilation) do not count."""
        return statistics.median(self.rates[2:] or self.rates)


def make_runs(config: Config, learning_rate: float, seed: int, compiled: bool) -> list[Run]:
    torch.manual_seed(seed)
    first = Model(config, PyextAttention())
    runs = []
    for attend in (PyextAttention(), TorchAttention()):
        model = copy.deepcopy(first)
        for module in model.modules():
            if hasattr(module, "attend"):
                module.attend = attend
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
        runs.append(Run(attend.name, torch.compile(model) if compiled else model, optimizer))
    return runs


def step(run: Run, batch: Batch, learning_rate: float, dtype: torch.dtype) -> None:
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


def train(runs: list[Run], stream: Iterator[Batch], steps: int, learning_rate: float, dtype: torch.dtype) -> None:
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


def validate(runs: list[Run], stream: Iterator[Batch], dtype: torch.dtype, count: int = 4) -> None:
    held_out = [next(stream) for _ in range(count)]
    for run in runs:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            run.validation = statistics.mean(run.model(batch).item() for batch in held_out)


# --- The report -----------------------------------------------------------------------------------------------------


def apart(runs: list[Run]) -> tuple[float, float]:
    """(largest, mean) difference of the two loss curves, in nats per byte."""
    gaps = [abs(a - b) for a, b in zip(runs[0].losses, runs[1].losses, strict=True)]
    return max(gaps), statistics.mean(gaps)


def report(runs: list[Run], args: argparse.Namespace) -> None:
    largest, mean = apart(runs)
    for run in runs:
        print(
            f"{run.name:8s} {run.speed:10,.0f} tokens/s   loss {run.losses[0]:.4f} -> {run.losses[-1]:.4f}, "
            f"validation {run.validation:.4f} nats/byte"
        )
    print(f"pyext trains {runs[0].speed / runs[1].speed:.2f} times as fast as PyTorch ({args.arch}, {args.dtype}).")
    print(f"Loss curves: {largest:.1e} apart at most, {mean:.1e} on average, over {args.steps} steps.")
    print(f"Picture: {args.out}")


def draw(runs: list[Run], args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, height_ratios=(3, 1))
    styles = {"color": "#1f6f8b", "linewidth": 3.5, "alpha": 0.6}, {"color": "black", "linewidth": 1}
    for run, style in zip(runs, styles, strict=True):
        top.plot(run.losses, label=f"{run.name}: {run.speed:,.0f} tokens/s", **style)
    top.set_ylabel("loss, nats per byte")
    top.set_title(
        f"{args.arch}, {args.dtype}: {args.layers} layers of width {args.width}, length {args.length}, "
        f"{args.threads} thread(s)",
        fontsize=10,
    )
    top.legend(frameon=False)
    gaps = [max(abs(a - b), 1e-9) for a, b in zip(runs[0].losses, runs[1].losses, strict=True)]
    bottom.semilogy(gaps, color="grey", linewidth=1)
    bottom.set_ylabel("|difference|")
    bottom.set_xlabel("step")
    figure.tight_layout()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)
    plt.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=("t5", "bloom", "gpt2", "bert"), default="t5")
    parser.add_argument("--quick", action="store_true", help="fewer steps: about a minute")
    parser.add_argument("--steps", type=int, help="optimiser steps (default 120, quick 24)")
    parser.add_argument("--batch", type=int, default=2, help="texts per step")
    parser.add_argument("--length", type=int, default=1024, help="bytes per text")
    parser.add_argument("--layers", type=int, help="layers per stack (default 4; quick, or T5's two stacks: 2)")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast, weights in fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the picture (default train_lm_<arch>.png)")
    parser.add_argument("--compile", action="store_true", help="torch.compile both models")
    args = parser.parse_args(argv)
    args.steps = args.steps or (24 if args.quick else 120)
    args.layers = args.layers or (2 if args.quick or args.arch == "t5" else 4)
    args.out = args.out or Path(f"train_lm_{args.arch}.png")
    for name in ("steps", "batch", "length", "layers", "width", "heads", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.width % args.heads:
        parser.error(f"--width must be a multiple of --heads, got {args.width} and {args.heads}")
    return args


def main(argv: list[str] | None = None) -> list[Run]:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    config = Config(args.arch, args.layers, args.width, args.heads, args.length)
    text, held_out = corpus()
    runs = make_runs(config, args.learning_rate, args.seed, args.compile)
    parameters = sum(p.numel() for p in runs[0].model.parameters())
    size, threads = f"{len(text) / 1e6:.1f} MB of text", f"{args.threads} thread(s)"
    print(f"{args.arch}: {parameters / 1e6:.1f} M parameters, {size}, {threads}")
    train(runs, batches(text, config, args.batch, args.seed), args.steps, args.learning_rate, dtype)
    validate(runs, batches(held_out, config, args.batch, args.seed + 1), dtype)
    draw(runs, args)
    report(runs, args)
    return runs


if __name__ == "__main__":
    main()
