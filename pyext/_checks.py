"""Named errors: what was expected of an argument, and what came. Everything here raises `TypeError` or `ValueError`."""

import contextlib
import math
import numbers

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GPU_FLOATING = FLOATING[:3]  # what Triton and CUDA kernels take
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def shape_text(shape) -> str:
    """`(2, 8, 128, 32)`, also for symbolic sizes."""
    inner = ", ".join(str(size) for size in shape)
    return f"({inner},)" if len(shape) == 1 else f"({inner})"


def shape_error(name: str, expected: str, why: str, got: Tensor) -> ValueError:
    """`key must have shape (B, Hkv, Lk, 64) to match query, got (2, 8, 128, 32)`."""
    return ValueError(f"{name} must have shape {expected}{why and ' ' + why}, got {shape_text(got.shape)}")


def head_width(total_name: str, total: int, heads_name: str, heads: int) -> int:
    """total / heads, or ValueError where that is no integer."""
    if heads < 1 or total % heads != 0:
        raise ValueError(f"{total_name} must be a multiple of {heads_name}, got {total} and {heads}")
    return total // heads


def is_dense(value) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested


def tensor(name: str, value) -> Tensor:
    """A dense tensor, or TypeError."""
    if is_dense(value):
        return value
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
    raise TypeError(f"{name} must be a dense (strided) tensor, got {kind}")


def floating(name: str, value) -> Tensor:
    """A tensor of one of the four dtypes that attention knows, or TypeError."""
    if tensor(name, value).dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    return value


def integer(name: str, value) -> Tensor:
    """A tensor of integers, or TypeError."""
    if tensor(name, value).dtype not in INTEGER:
        raise TypeError(f"{name} must be an integer tensor, got {value.dtype}")
    return value


def boolean(name: str, value, true: str = "attend") -> Tensor:
    """A bool tensor, or TypeError, which says what True means."""
    if tensor(name, value).dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor (True = {true}), got {value.dtype}")
    return value


def same_device(name: str, value: Tensor, device: torch.device, like: str = "query") -> None:
    if value.device != device:
        raise ValueError(f"{name} must be on {device} like {like}, got {value.device}")


def same_dtype(name: str, value: Tensor, dtype: torch.dtype, like: str) -> None:
    if value.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype} to match {like}, got {value.dtype}")


def one_of(name: str, value, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    return value


def generator(value, device: torch.device, like: str = "query") -> None:
    """The argument `generator`: a source of random numbers on the kind of device where they are used, or None."""
    if value is None:
        return
    if not isinstance(value, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(value).__name__}")
    if value.device.type != device.type:
        raise ValueError(f"generator must be on {device} like {like}, got {value.device}")


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The operands of a matmul by autocast's rule: every floating dtype but float64 becomes the autocast dtype.

    The first one settles the device.
    """
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # meta knows no autocast and raises
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def without_autocast(device: torch.device):
    """A context where matmuls keep the dtype of their operands."""
    if not torch.amp.is_autocast_available(device.type):  # the meta device
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def real(name: str, value) -> float:
    """A finite Python number (never a tensor: reading one would synchronise)."""
    if isinstance(value, (float, int)) and not isinstance(value, bool):
        number = value
    elif isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value
    elif isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
    else:
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not -math.inf < number < math.inf:  # math.isfinite does not trace
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def probability(name: str, value) -> float:
    """A number in [0, 1]."""
    number = real(name, value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} must be between 0 and 1, got {number}")
    return float(number)


def flag(name: str, value) -> bool:
    if not isinstance(value, (bool, int)):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return bool(value)


def whole(name: str, value, hint: str = "") -> int:
    """A Python int; `hint` ends the message."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int{hint}, got {type(value).__name__}")
    return value


def length(name: str, value, hint: str = "") -> int:
    """A non-negative Python int; `hint` ends the message."""
    if whole(name, value, hint) < 0:
        raise ValueError(f"{name} must be a non-negative int{hint}, got {value}")
    return value


def is_eager() -> bool:
    """Whether tensors stand for themselves: no compiler, tracer or `torch.func` transform sees the call.

    What is read from a tensor and what is kept from call to call must not leak into a graph or out of a transform.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def is_readable(value: Tensor) -> bool:
    """Whether the contents can be looked at here without a device sync and without breaking a trace."""
    return is_eager() and type(value) is Tensor and value.is_cpu


def broadcastable(name: str, value: Tensor, lead: tuple, heads: int, queries: int, keys: int) -> Tensor:
    """View `value`, broadcastable to (*lead, heads, queries, keys), as (B|1, heads|1, queries|1, keys).

    The last dimension comes out with unit stride, the others broadcast without a copy (except where some of several
    leading batch dimensions are broadcast and others are not: one batch stride cannot express that).
    """
    target = (*lead, heads, queries, keys)
    missing = len(target) - value.dim()
    fits = missing >= 0
    if fits:
        for have, want in zip(value.shape, target[missing:], strict=True):
            fits = fits and (have == 1 or have == want)
    if not fits:
        raise ValueError(f"{name} must be broadcastable to {shape_text(target)}, got {shape_text(value.shape)}")
    value = value[(None,) * missing]
    if len(lead) != 1:
        batch = value.shape[: len(lead)]
        if all(size == 1 for size in batch):
            value = value.reshape(1, *value.shape[len(lead) :])
        else:
            value = value.expand(*lead, *value.shape[len(lead) :]).flatten(0, len(lead) - 1)
    if value.shape[-1] != keys:
        value = value.expand(*value.shape[:-1], keys).contiguous()
    elif value.stride(-1) != 1:
        value = value.contiguous()
    return value
