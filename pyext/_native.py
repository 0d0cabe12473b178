"""Loading the compiled module `pyext._C`, or the reason why there is none.

`import pyext` works without it: one warning names the reason, and every call runs on the reference. The environment
variable `PYEXT_ISA` (avx2, avx512, avx512_bf16, or none) picks the instruction set instead of the best one here.
"""

import functools
import importlib
import os
import platform
import warnings

import torch  # its libraries must be loaded before _C, which registers operators with them


def _load():
    """Returns (module or None, why its CPU kernels cannot run or None)."""
    try:
        module = importlib.import_module("pyext._C")
    except ModuleNotFoundError as error:
        if error.name != "pyext._C":
            return None, f"the native module pyext._C failed to load: {error}"
        if platform.machine() not in ("x86_64", "AMD64"):
            return None, f"there are no native kernels for {platform.machine()} processors yet"
        return None, "the native module pyext._C is not built"
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return None, f"the native module pyext._C failed to load: {error}"
    wanted = os.environ.get("PYEXT_ISA", "")
    if wanted == "none":
        module.set_isa(wanted)
        return module, "PYEXT_ISA=none switches the native kernels off"
    usable = list(module.available_isas())
    if not usable:
        return (
            module,
            "this CPU has none of the instruction sets pyext is compiled for (AVX2 with FMA and F16C at least)",
        )
    if wanted:
        if wanted not in usable:
            return module, f"PYEXT_ISA={wanted} is not usable on this machine (usable: {', '.join(usable)})"
        module.set_isa(wanted)
    return module, None


#: The oldest GPU the kernels are made for: sm_80, the first with bf16 matrix units and asynchronous copies.
_LEAST_CAPABILITY = (8, 0)
_module, _reason = _load()
_HAS_CUDA = _module is not None and "cuda" in _module.build_info()
if _reason is not None:
    # stacklevel 3: _native <- pyext/__init__ <- the caller's `import pyext`
    warnings.warn(f"pyext runs on its slow PyTorch reference: {_reason}", RuntimeWarning, stacklevel=3)


def available() -> bool:
    """Whether the CPU kernels can run here."""
    return _reason is None


def reason() -> str | None:
    """Why they cannot, or None if they can."""
    return _reason


def cuda_reason(tensor: torch.Tensor) -> str | None:
    """Why the CUDA kernels cannot run on this tensor, or None if they can."""
    if not _HAS_CUDA:
        return "no CUDA kernel in this build"
    if not tensor.is_cuda:
        return f"the tensors are on {tensor.device}"
    return capability_reason(tensor.device)


@functools.cache
def capability_reason(device: torch.device) -> str | None:
    """Why a GPU is too old for kernels of any kind, or None."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < _LEAST_CAPABILITY:
        return f"the GPU has compute capability {major}.{minor}, and the kernels need 8.0"
    return None


@functools.cache
def shared_memory(device: torch.device) -> int:
    """How many bytes of shared memory a GPU lets a block have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def module():
    """The module `pyext._C`, which defines the operators, or None where it is missing."""
    return _module
