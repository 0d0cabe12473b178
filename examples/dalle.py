"""Trains a DALL-E-style model of captions and image tokens twice, side by side: sparse attention by pyext and PyTorch.

    python examples/dalle.py                 a few minutes
    python examples/dalle.py --quick         one minute
    python examples/dalle.py --side 64 --layers 12 --width 768 --heads 12 --batch 8

A caption in bytes, then the tokens of an image of side x side in reading order, all predicted from what comes before.
Layers look at the image along rows, along columns, along rows, ..., the last one at a neighbourhood; all of them at the
whole caption (Ramesh et al., "Zero-shot text-to-image generation", 2021, appendix B.1 and figure 11). The loss is one
eighth of the text's and seven eighths of the image's, as there.

           a layer's mask
pyext      masks.image_rows(text, side) & masks.causal(), or _columns, or _conv: what is masked costs nothing
PyTorch    the same as a bool matrix of all pairs

The images are drawn as their captions say, a figure in each quarter: `red disc, teal frame, navy cross, red square on
blue`. Nothing is downloaded. Both models start from the same weights and see the same batches; their steps alternate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from side_by_side import Run, arguments, attending, checked, side_by_side
from torch import nn

import pyext

TEXT = 80  # bytes of a caption, padded
COLOURS = (
    "black", "white", "red", "green", "blue", "yellow", "cyan", "magenta", "grey", "brown", "orange", "pink", "purple",
    "olive", "navy", "teal",
)  # fmt: skip
FIGURES = ("square", "disc", "cross", "frame")
VOCABULARY = 256 + len(COLOURS)
KERNEL = 11  # of the last layer's neighbourhood


# --- Attention: the one difference between the two models -----------------------------------------------------------


class PyextAttention:
    name = "pyext"

    def mask(self, kind: str, side: int):
        looks = {
            "rows": lambda: pyext.masks.image_rows(TEXT, side),
            "columns": lambda: pyext.masks.image_columns(TEXT, side),
            "conv": lambda: pyext.masks.image_conv(TEXT, side, KERNEL),
        }
        return looks[kind]() & pyext.masks.causal()

    def __call__(self, query, key, value, mask):
        return pyext.attention(query, key, value, mask=mask)


class TorchAttention:
    name = "PyTorch"

    def mask(self, kind: str, side: int):
        """(L, L) bool: all of the text, and of the image what `kind` says, up to the query."""
        place = torch.arange(TEXT + side * side)
        row, column = (place - TEXT) // side, (place - TEXT) % side
        down, right = (x[:, None] - x for x in (row, column))
        reach = KERNEL // 2
        near = {
            "rows": down == 0,
            "columns": right == 0,
            "conv": (down.abs() <= reach) & (right.abs() <= reach),
        }[kind]
        return ((place < TEXT) | near) & (place <= place[:, None])

    def __call__(self, query, key, value, mask):
        return F.scaled_dot_product_attention(query, key, value, mask)


def kinds(layers: int) -> list[str]:
    """What each layer looks at."""
    return [("rows", "columns")[layer % 2] for layer in range(layers - 1)] + ["conv"]


# --- The model ------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    layers: int
    width: int
    heads: int
    side: int


class Layer(nn.Module):
    def __init__(self, config: Config, kind: str, attend):
        super().__init__()
        self.heads, self.kind, self.attend = config.heads, kind, attend
        self.qkv, self.out = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(2))

    def forward(self, x, mask):
        query, key, value = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = self.attend(query, key, value, mask)
        x = x + self.out(out.transpose(1, 2).flatten(-2))
        return x + self.feed_forward(self.norms[1](x))


class Model(nn.Module):
    """Captions and images in, loss out. Positions are learned: of the text, and of rows and columns."""

    def __init__(self, config: Config, attend):
        super().__init__()
        self.side, self.attend = config.side, attend
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.text, self.rows, self.columns = (
            nn.Parameter(torch.randn(n, config.width) * 0.02) for n in (TEXT, config.side, config.side)
        )
        self.layers = nn.ModuleList(Layer(config, kind, attend) for kind in kinds(config.layers))
        self.norm, self.head = nn.LayerNorm(config.width), nn.Linear(config.width, VOCABULARY, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=config.width**-0.5)

    def forward(self, batch: Batch):
        places = (self.rows[:, None] + self.columns).flatten(0, 1)
        x = self.embedding(batch.tokens_in_order) + torch.cat((self.text, places))
        masks = {kind: self.attend.mask(kind, self.side) for kind in {layer.kind for layer in self.layers}}
        for layer in self.layers:
            x = layer(x, masks[layer.kind])
        losses = F.cross_entropy(
            self.head(self.norm(x[:, :-1])).transpose(1, 2).float(), batch.tokens_in_order[:, 1:], reduction="none"
        )
        return losses[:, : TEXT - 1].mean() / 8 + losses[:, TEXT - 1 :].mean() * 7 / 8


# --- Data -----------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """tokens_in_order (B, TEXT + side * side): bytes of the caption, then 256 + colour for each pixel."""

    tokens_in_order: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.tokens_in_order.numel()


def drawn(figure: int, quarter: int, side: int) -> torch.Tensor:
    """(side, side) bool: where the figure of this quarter is."""
    half, reach = side / 2, side / 5
    centre = [(0.5 + part) * half - 0.5 for part in divmod(quarter, 2)]
    down, right = (torch.arange(side) - c for c in centre)
    down, right = down[:, None].abs(), right[None].abs()
    square = torch.maximum(down, right) <= reach
    return {
        "square": square,
        "disc": down**2 + right**2 <= reach**2,
        "cross": square & (torch.minimum(down, right) <= reach / 3),
        "frame": square & (torch.maximum(down, right) >= reach * 0.6),
    }[FIGURES[figure]]


def sample(side: int, generator: torch.Generator) -> torch.Tensor:
    """(TEXT + side * side,): a random caption and its image."""
    ground, *colours = torch.randint(len(COLOURS), (5,), generator=generator).tolist()
    figures = torch.randint(len(FIGURES), (4,), generator=generator).tolist()
    named = ", ".join(f"{COLOURS[c]} {FIGURES[f]}" for c, f in zip(colours, figures, strict=True))
    text = torch.tensor(list(f"{named} on {COLOURS[ground]}".encode().ljust(TEXT)))
    image = torch.full((side, side), ground)
    for quarter, (colour, figure) in enumerate(zip(colours, figures, strict=True)):
        image[drawn(figure, quarter, side)] = colour
    return torch.cat((text, 256 + image.flatten()))


def batches(side: int, batch_size: int, seed: int) -> Iterator[Batch]:
    """Endless batches, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield Batch(torch.stack([sample(side, generator) for _ in range(batch_size)]))


# --- Command line ---------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> list[Run]:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=32, help="rows and columns of an image")
    parser.set_defaults(batch=4)
    args = checked(parser, parser.parse_args(argv), ("side",))
    args.out = args.out or Path("dalle.png")
    torch.set_num_threads(args.threads)
    config = Config(args.layers, args.width, args.heads, args.side)
    torch.manual_seed(args.seed)
    model = Model(config, PyextAttention())
    streams = (batches(args.side, args.batch, args.seed + n) for n in range(2))
    title = f"DALL-E, {args.side} x {args.side} tokens"
    return side_by_side(attending(model, (PyextAttention(), TorchAttention())), *streams, title, args)


if __name__ == "__main__":
    main()
