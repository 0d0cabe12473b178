"""Whether Triton kernels can run on a tensor here, or the reason why not. Triton itself is imported by the kernels."""

import functools
import importlib.util
import os

import torch
from torch import Tensor

from . import _native

#: The oldest GPU the kernels are made for: sm_80, the first with bf16 matrix units and asynchronous copies.
_LEAST_CAPABILITY = (8, 0)
_INSTALLED = importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton interprets its kernels in Python, on tensors of any device, instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "on", "true", "yes", "y")


def reason(tensor: Tensor) -> str | None:
    """Why the kernels cannot run on this tensor, or None if they can."""
    if not _INSTALLED:
        return "triton is not installed"
    if _native.module() is None:
        return f"its operators are defined by the native module, and {_native.reason()}"
    if interpreted():
        return _stock_interpreter() if tensor.dtype == torch.bfloat16 else None
    if not tensor.is_cuda:
        return f"the tensors are on {tensor.device} (TRITON_INTERPRET=1 would interpret the kernels there)"
    major, minor = _capability(tensor.device)
    if (major, minor) < _LEAST_CAPABILITY:
        return f"the GPU has compute capability {major}.{minor}, and the kernels need 8.0"
    return None


@functools.cache
def _stock_interpreter() -> str | None:
    """Why Triton's interpreter cannot be trusted with bfloat16. The tests mend it, and mark what they mended."""
    from triton.runtime.interpreter import InterpreterBuilder

    if getattr(InterpreterBuilder, "exact_bfloat16", False):
        return None
    return "Triton's interpreter computes bfloat16 wrongly"


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
