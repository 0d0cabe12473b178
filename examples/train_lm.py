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
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from side_by_side import Run, arguments, attending, checked, corpus, pieces, side_by_side
from torch import nn

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
    """Endless batches from random pieces of the text, the same ones for the same seed."""
    length = config.length
    generator = torch.Generator().manual_seed(seed)
    for piece in pieces(text, 2 * length if config.arch == "t5" else length + 1, batch_size, generator):
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


# --- Command line ---------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=("t5", "bloom", "gpt2", "bert"), default="t5")
    parser.add_argument("--length", type=int, default=1024, help="bytes per text")
    args = parser.parse_args(argv)
    if args.layers is None and args.arch == "t5":
        args.layers = 2  # it has two stacks
    checked(parser, args, ("length",))
    args.out = args.out or Path(f"train_lm_{args.arch}.png")
    return args


def main(argv: list[str] | None = None) -> list[Run]:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    config = Config(args.arch, args.layers, args.width, args.heads, args.length)
    torch.manual_seed(args.seed)
    model = Model(config, PyextAttention())
    streams = (batches(part, config, args.batch, args.seed + n) for n, part in enumerate(corpus()))
    models = attending(model, (PyextAttention(), TorchAttention()))
    return side_by_side(models, *streams, f"{args.arch}, {args.length} bytes", args)


if __name__ == "__main__":
    main()
