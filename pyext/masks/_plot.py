"""Pictures of masks. Matplotlib is imported only here, where somebody asks for one."""

import torch

from .. import _checks
from .._primitives import Sizes
from ._base import Mask, materialize


def draw(mask: Mask, Lq: int, Lk: int, batch: int, head: int, ax):
    """See `Mask.plot`."""
    for name, value in (("Lq", Lq), ("Lk", Lk), ("batch", batch), ("head", head)):
        _checks.length(f"plot {name}", value)
    try:
        import matplotlib.pyplot as pyplot
    except ImportError as error:
        raise ImportError("Mask.plot needs matplotlib: pip install matplotlib") from error
    device = next((x.device for x in vars(mask).values() if isinstance(x, torch.Tensor)), torch.device("cpu"))
    sizes = Sizes((batch + 1,), head + 1, Lq, Lk, device, torch.float32)
    shown = materialize(mask, sizes).expand(batch + 1, head + 1, Lq, Lk)[batch, head]
    if ax is None:
        ax = pyplot.figure().add_subplot()
    ax.imshow(shown.cpu().tolist(), cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest", aspect="equal")
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    return ax
