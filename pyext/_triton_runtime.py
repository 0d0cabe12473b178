"""Whether Triton kernels can run on a tensor here, or the reason why not. Triton itself is imported by the kernels."""

import functools
import importlib.util
import os

import torch
from torch import Tensor

from . import _native

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
    if tensor.is_meta:
        return "the tensors are on meta"
    if interpreted():
        return _stock_interpreter() if tensor.dtype == torch.bfloat16 else None
    if not tensor.is_cuda:
        return f"the tensors are on {tensor.device} (TRITON_INTERPRET=1 would interpret the kernels there)"
    return _native.capability_reason(tensor.device)


@functools.cache
def _stock_interpreter() -> str | None:
    """Why Triton's interpreter cannot be trusted with bfloat16. The tests mend it, and mark what they mended."""
    from triton.runtime.interpreter import InterpreterBuilder

    if getattr(InterpreterBuilder, "exact_bfloat16", False):
        return None
    return "Triton's interpreter computes bfloat16 wrongly"
