"""Trains XLNet on permutations of a text twice, side by side: two-stream attention by pyext and by PyTorch.

    python examples/xlnet.py                 a few minutes
    python examples/xlnet.py --quick         one minute
    python examples/xlnet.py --length 2048 --layers 12 --width 768 --heads 12 --batch 8

Every text gets a random factorisation order. The content stream sees what comes no later than itself in that order, the
query stream, which starts from one learned vector and knows only its place, what comes strictly earlier; the last sixth
of the order is predicted from it (Yang et al., XLNet, 2019, sections 2.2 and 2.3). Positions are relative, as in
Transformer-XL.

             positions                                            orders
pyext        bias.transformer_xl(r, u, v)                         masks.permutation(order): no matrix
PyTorch      (q + v) r^T for all pairs, shifted, as a float mask  rank[j] <= rank[i], -inf elsewhere

The text is the source code of Python's own standard library; nothing is downloaded. Both models start from the same
weights and see the same batches; their steps alternate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from side_by_side import Run, arguments, attending, checked, corpus, pieces, side_by_side
from torch import nn

import pyext

VOCABULARY = 256
PREDICTED = 6  # one in so many


# --- Attention: the one difference between the two models -----------------------------------------------------------


class PyextAttention:
    name = "pyext"

    def __call__(self, query, key, value, r, u, v, order, strict):
        bias = pyext.bias.transformer_xl(r, u, v, first_distance=1 - key.shape[2])
        return pyext.attention(query, key, value, bias=bias, mask=pyext.masks.permutation(order, exclude_self=strict))


class TorchAttention:
    name = "PyTorch"

    def __call__(self, query, key, value, r, u, v, order, strict):
        scale = query.shape[3] ** -0.5
        score = shifted((query + v.to(query.dtype)[:, None]) @ r.to(query.dtype).permute(1, 2, 0)) * scale
        rank = order.argsort(-1)
        seen = rank[:, None, :] < rank[:, :, None] if strict else rank[:, None, :] <= rank[:, :, None]
        # Finite: the first of an order sees nothing, and would become NaN.
        mask = score.masked_fill(~seen[:, None], torch.finfo(score.dtype).min / 2)
        return F.scaled_dot_product_attention(query + u.to(query.dtype)[:, None], key, value, mask)


def shifted(score: torch.Tensor) -> torch.Tensor:
    """(B, H, L, 2L - 1) by distance, 1 - L first, to (B, H, L, L) by key: row i begins at distance -i."""
    length = score.shape[2]
    flat = F.pad(score, (0, 1)).flatten(2)[..., length - 1 : -1]
    return flat.unflatten(2, (length, 2 * length - 1))[..., :length]


# --- The model ------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    layers: int
    width: int
    heads: int
    length: int


class Layer(nn.Module):
    """Attention and feed-forward for both streams, each added and normalised after."""

    def __init__(self, config: Config, attend):
        super().__init__()
        self.heads, self.attend = config.heads, attend
        width = config.width
        self.query, self.key, self.value, self.rows, self.out = (nn.Linear(width, width, bias=False) for _ in range(5))
        self.u, self.v = (nn.Parameter(torch.zeros(config.heads, width // config.heads)) for _ in range(2))
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, content, query, positions, order):
        key, value = (self._heads(layer(content)) for layer in (self.key, self.value))
        r = self.rows(positions).unflatten(-1, (self.heads, -1))
        streams = []
        for stream, strict in ((content, False), (query, True)):
            own = self._heads(self.query(stream))
            out = self.attend(own, key, value, r, self.u, self.v, order, strict)
            out = self.norms[0](stream + self.out(out.transpose(1, 2).flatten(-2)))
            streams.append(self.norms[1](out + self.feed_forward(out)))
        return streams

    def _heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Model(nn.Module):
    """Bytes in, the loss of the predicted sixth out."""

    def __init__(self, config: Config, attend):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.unknown = nn.Parameter(torch.randn(config.width) * 0.02)  # where every query stream begins
        self.layers = nn.ModuleList(Layer(config, attend) for _ in range(config.layers))
        self.head = nn.Linear(config.width, VOCABULARY)
        self.register_buffer("positions", sinusoids(config.length, config.width))

    def forward(self, batch: Batch):
        content = self.embedding(batch.text)
        query = self.unknown.expand_as(content)
        for layer in self.layers:
            content, query = layer(content, query, self.positions, batch.order)
        targets = batch.order[:, -(batch.order.shape[1] // PREDICTED) :]
        logits = self.head(query.gather(1, targets[..., None].expand(-1, -1, query.shape[2])))
        return F.cross_entropy(logits.flatten(0, 1).float(), batch.text.gather(1, targets).flatten())


def sinusoids(length: int, width: int) -> torch.Tensor:
    """(2L - 1, width): sines and cosines of the distances 1 - L to L - 1."""
    distance = torch.arange(1 - length, length)
    angles = distance[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    return torch.cat((angles.sin(), angles.cos()), dim=1)[:, :width]


# --- Data -----------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """text (B, L), and order (B, L), the positions in factorisation order."""

    text: torch.Tensor
    order: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.text.numel()


def batches(text: torch.Tensor, config: Config, batch_size: int, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    for piece in pieces(text, config.length, batch_size, generator):
        yield Batch(piece, torch.rand(piece.shape, generator=generator).argsort(1))


# --- Command line ---------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> list[Run]:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=512, help="bytes per text")
    args = checked(parser, parser.parse_args(argv), ("length",))
    if args.length < PREDICTED:
        parser.error(f"--length must be at least {PREDICTED}, got {args.length}")
    args.out = args.out or Path("xlnet.png")
    torch.set_num_threads(args.threads)
    config = Config(args.layers, args.width, args.heads, args.length)
    torch.manual_seed(args.seed)
    model = Model(config, PyextAttention())
    streams = (batches(part, config, args.batch, args.seed + n) for n, part in enumerate(corpus()))
    title = f"XLNet, {args.length} bytes"
    return side_by_side(attending(model, (PyextAttention(), TorchAttention())), *streams, title, args)


if __name__ == "__main__":
    main()
