"""Loading the compiled module `pyext._C`, or the reason why there is none.

`import pyext` works without it: one warning names the reason, and every call runs on the reference. The environment
variable `PYEXT_ISA` (avx2, avx512, avx512_bf16, or none) picks the instruction set instead of the best one here.
"""

import importlib
import os
import platform
import warnings

import torch  # noqa: F401  (its libraries must be loaded before _C, which registers operators with them)


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


_module, _reason = _load()
if _reason is not None:
    # stacklevel 3: _native <- pyext/__init__ <- the caller's `import pyext`
    warnings.warn(f"pyext runs on its slow PyTorch reference: {_reason}", RuntimeWarning, stacklevel=3)


def available() -> bool:
    """Whether the CPU kernels can run here."""
    return _reason is None


def reason() -> str | None:
    """Why they cannot, or None if they can."""
    return _reason


def has_cuda() -> bool:
    """Whether the module was built with CUDA kernels."""
    return _module is not None and bool(_module.build_info().get("cuda"))


def module():
    """The module `pyext._C`, which defines the operators, or None where it is missing."""
    return _module
