"""Draws docs/masks.png: `python docs/draw_masks.py`. Needs matplotlib."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as pyplot
import torch

from pyext import masks

LENGTH, TEXT, SIDE = 40, 4, 6
IDS = torch.arange(LENGTH) // 9
SHOWN = {
    "causal()": masks.causal(),
    "window(6, 2)": masks.window(6, 2),
    "padding([28])": masks.padding(torch.tensor([28])),
    "documents(ids)": masks.documents(IDS),
    "documents(ids), mixed": masks.documents(IDS % 2 + torch.arange(LENGTH) // 31),
    "prefix([12])": masks.prefix(torch.tensor([12])),
    "strided(6) & causal()": masks.strided(6) & masks.causal(),
    "fixed(8, 2) & causal()": masks.fixed(8, 2) & masks.causal(),
    "padding([5]) | window(4, 4)": masks.padding(torch.tensor([5])) | masks.window(4, 4),
    "image_rows(4, 6)": masks.image_rows(TEXT, SIDE),
    "image_columns(4, 6)": masks.image_columns(TEXT, SIDE),
    "image_conv(4, 6, 3)": masks.image_conv(TEXT, SIDE, 3),
    "permutation(order)": masks.permutation(torch.randperm(LENGTH, generator=torch.Generator().manual_seed(3))),
    "causal() & documents(ids)": masks.causal() & masks.documents(IDS),
    "from_function(i * j % 5 < 2)": masks.from_function(lambda b, h, i, j: i * j % 5 < 2, LENGTH, LENGTH),
}


def main() -> None:
    figure, axes = pyplot.subplots(3, 5, figsize=(11, 7.2), layout="constrained")
    for ax, (name, mask) in zip(axes.flat, SHOWN.items(), strict=True):
        mask.plot(LENGTH, ax=ax)
        ax.set_title(name, fontsize=8)
        ax.set(xticks=[], yticks=[], xlabel="", ylabel="")
    figure.supxlabel("keys", fontsize=8)
    figure.supylabel("queries", fontsize=8)
    figure.savefig(Path(__file__).with_name("masks.png"), dpi=70)


if __name__ == "__main__":
    main()
