"""Linear layers in fp32 on CPUs where torch's matrix products take a slow path.

MKL, which torch multiplies fp32 matrices with, uses its AVX2 kernels on CPUs that are not Intel's. A linear layer is a
mixture of one expert, whose kernels use AVX-512 there: 231 instead of 111 Gflop/s forward, 227 instead of 112 forward
and backward (1024 rows, 768 to 3072 features, one core of a Zen 5).
"""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ... import _native
from ... import moe as _moe
from ._feed_forward import is_plain

_LEAST_ROWS = 64  # with fewer a layer reads its weights, rather than multiplying


@functools.cache
def torch_is_slow() -> bool:
    """Whether torch multiplies fp32 matrices with fewer of the CPU's instructions than pyext does."""
    cpus = Path("/proc/cpuinfo")
    if not (_native.available() and torch.backends.mkl.is_available() and cpus.is_file()):
        return False
    return _native.module().isa().startswith("avx512") and "GenuineIntel" not in cpus.read_text()


def _is_faster(x: Tensor) -> bool:
    """Whether pyext's kernels beat torch's for this input of a linear layer."""
    return (
        x.is_cpu
        and x.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and x.shape[:-1].numel() >= _LEAST_ROWS
        and torch_is_slow()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` by whichever is faster."""
    if not _is_faster(x):
        return F.linear(x, weight, bias)
    rows = x.flatten(0, -2)
    offsets = torch.tensor([0, rows.shape[0]], dtype=torch.int32)
    out = _moe.grouped_linear(rows, weight[None], offsets, None if bias is None else bias[None])
    return out.view(*x.shape[:-1], out.shape[1])


def _linear(self, input):
    """`nn.Linear.forward`."""
    return linear(input, self.weight, self.bias)


def _conv1d(self, x):
    """`Conv1D.forward`, GPT-2's linear layer, whose weight is transposed."""
    return linear(x, self.weight.t(), self.bias)


def plain_linear(module: nn.Module, cls: type) -> dict[str, Callable] | None:
    """The methods of a linear layer."""
    if not torch_is_slow():
        return None
    if cls is Conv1D:
        return {"forward": _conv1d}
    named = cls.__name__ == "FalconLinear"  # a subclass that adds its bias afterwards
    return {"forward": _linear} if named or (cls is nn.Linear and is_plain(module)) else None
