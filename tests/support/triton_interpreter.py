"""Triton's interpreter, made exact and suspicious: `install()` changes it for the whole process.

Triton runs kernels on CPU tensors, one program after the other in numpy, when TRITON_INTERPRET=1 is set before it is
imported. As it comes, that proves little: bfloat16 is computed on bit patterns, conversions to it truncate, any address
may be read or written, and programs run in order, so that one may lean on what an earlier one stored. Installed, the
interpreter

* computes bfloat16 in fp32 and rounds to nearest even after every operation, `tl.dot` in fp32 on exact operands; a dot
  of fp32 in TF32 precision rounds its operands to TF32, as the hardware does; and its sums are in an order that the
  size of the tile does not change (numpy's do), so that kernels with different tiles find the same score;
* fills the lanes that a load masks off, and gives no `other` for, with NaN (the largest integer): on a GPU they hold
  anything;
* refuses every access outside the tensors passed to the launch (masked-off lanes touch nothing);
* refuses a race: an element that one program stores and another touches in the same launch, unless both by atomics;
  and one store that writes different values to one element;
* runs the programs of a launch in a random order, see `shuffle_programs`.

What is never written needs no check here: the tests fill fresh tensors with NaN. Works with Triton 3.6 to 3.9.
"""

from __future__ import annotations

import random

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

BF16 = tl.bfloat16
Handle, Builder, Executor = interpreter.TensorHandle, interpreter.InterpreterBuilder, interpreter.GridExecutor
DEPTH = 16  # products that a matrix unit adds up before it adds to its accumulator
FLOATS = {tl.float16, BF16, tl.float32, tl.float64}


class MemoryFault(RuntimeError):
    """An access outside the tensors of the launch, or a race."""


# --- bfloat16: bit patterns in uint16 for Triton, fp32 values for numpy ---


def _is_bf16(handle) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar == BF16


def _widen(handle) -> np.ndarray:
    """The values of a handle, those of bfloat16 as fp32."""
    if not _is_bf16(handle):
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32).reshape(handle.data.shape)


def _round(values: np.ndarray, dropped: int) -> np.ndarray:
    """Bits of fp32 values rounded to nearest even, `dropped` bits of the mantissa less (those are zero); NaN stays."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits, unit = values.view(np.uint32), np.uint32(1 << dropped)
    rounded = bits + (unit // 2 - 1 + ((bits >> np.uint32(dropped)) & np.uint32(1)))
    rounded = np.where(np.isfinite(values), rounded, bits | np.isnan(values) * np.uint32(1 << 22))
    return rounded.astype(np.uint32) & ~(unit - np.uint32(1))


def _bf16(values) -> Handle:
    """A handle of bfloat16 from values of any type."""
    values = np.asarray(values)
    return Handle((_round(values, 16) >> 16).astype(np.uint16).reshape(values.shape), BF16)


def _as_fp32(handle: Handle) -> Handle:
    return Handle(_widen(handle), tl.float32) if _is_bf16(handle) else handle


def _result(values: np.ndarray) -> Handle:
    """What an operation on bfloat16 returns: bfloat16, or the truth values of a comparison."""
    return Handle(values, tl.int1) if values.dtype == np.bool_ else _bf16(values)


def _binary_op(stock, self, lhs, rhs, op):
    if not (_is_bf16(lhs) or _is_bf16(rhs)):
        return stock(self, lhs, rhs, op)
    return _result(op(_widen(lhs), _widen(rhs)))


def _unary_op(stock, self, arg, op):
    return _result(op(_widen(arg))) if _is_bf16(arg) else stock(self, arg, op)


def _ternary_op(stock, self, lhs, rhs, other, op):
    if op is np.where or not _is_bf16(other):  # a choice moves bits
        return stock(self, lhs, rhs, other, op)
    return _result(op(_widen(lhs), _widen(rhs), _widen(other)))


def _get_bf16(stock, self, value):
    return _bf16([value])  # Triton 3.6 has no such constants


def _cast_impl(stock, self, src, dst_type):
    wanted = dst_type.scalar
    if wanted == BF16:
        return src if _is_bf16(src) else _bf16(src.data)
    return stock(self, _as_fp32(src), dst_type)


def _create_fp_to_fp(stock, self, src, dst_type, rounding_mode):
    nearest = rounding_mode in (None, interpreter._ir.ROUNDING_MODE.RTNE)
    if nearest and {src.dtype.scalar, dst_type.scalar} <= FLOATS:
        return self.cast_impl(src, dst_type)
    return stock(self, src, dst_type, rounding_mode)


def _create_fma(stock, self, x, y, z):
    if not _is_bf16(z):
        return stock(self, x, y, z)
    return _bf16(_widen(x).astype(np.float64) * _widen(y) + _widen(z))


def _create_dot(stock, self, a, b, d, input_precision, max_num_imprecise_acc):
    a, b = _as_fp32(a), _as_fp32(b)
    if input_precision == interpreter._ir.INPUT_PRECISION.TF32:
        a, b = (
            Handle(_round(x.data, 13).view(np.float32).reshape(x.data.shape), tl.float32)
            if x.data.dtype == np.float32
            else x
            for x in (a, b)
        )
    if not a.data.dtype.kind == b.data.dtype.kind == "f" or d.data.dtype != np.float32:
        return stock(self, a, b, d, input_precision, max_num_imprecise_acc)
    left, right, total = a.data.astype(np.float64), b.data.astype(np.float64), d.data
    for k in range(0, left.shape[-1], DEPTH):
        total = (total + left[..., k : k + DEPTH] @ right[..., k : k + DEPTH, :]).astype(np.float32)
    return Handle(total, d.dtype.scalar)


def _create_erf(stock, self, arg):
    """numpy has no erf, and the interpreter's own calls math.erf on every element."""
    return Handle(torch.erf(torch.from_numpy(np.ascontiguousarray(arg.data))).numpy(), arg.dtype.scalar)


def _apply_impl(stock, self, inputs):
    """Reductions and scans of bfloat16, in fp32."""
    narrow = [_is_bf16(x.handle) for x in inputs]
    wide = tuple(_retyped(x, _as_fp32(x.handle)) if flag else x for x, flag in zip(inputs, narrow))
    results = stock(self, wide)
    results = results if isinstance(results, (tuple, list)) else (results,)
    return tuple(_retyped(x, _bf16(x.handle.data)) if any(narrow) and x.dtype == tl.float32 else x for x in results)


def _retyped(tensor, handle: Handle):
    scalar = handle.dtype.scalar
    kind = tl.block_type(scalar, list(tensor.shape)) if tensor.type.is_block() else scalar
    return tl.core.tensor(handle, kind)


# --- Memory ---

NOBODY, SEVERAL = -1, -2
PAGE = 1 << 12
#: What clashes with an access: the earlier accesses of other programs to the same element.
CLASHES = {"load": ("store", "atomic"), "store": ("load", "store", "atomic"), "atomic": ("load", "store")}


class _Storage:
    """Which program has touched each element of a storage in this launch. Pages come into being when touched."""

    def __init__(self, address: int, unit: int):
        self.address, self.unit = address, unit
        self.pages: dict[tuple[str, int], np.ndarray] = {}

    def touch(self, kind: str, addresses: np.ndarray, size: int, program: int) -> str | None:
        """Note an access; returns the kind of the access of another program that it clashes with."""
        first = (addresses - np.uint64(self.address)).astype(np.int64) // self.unit
        clash = None
        for step in range(max(1, size // self.unit)):
            numbers, places = np.divmod(first + step, PAGE)
            for number in np.unique(numbers):
                clash = self._touch(kind, int(number), places[numbers == number], program) or clash
        return clash

    def _touch(self, kind: str, number: int, places: np.ndarray, program: int) -> str | None:
        for other in CLASHES[kind]:
            page = self.pages.get((other, number))
            if page is not None and ((page[places] != NOBODY) & (page[places] != program)).any():
                return other
        page = self.pages.get((kind, number))
        if page is None:
            page = self.pages[kind, number] = np.full(PAGE, NOBODY, np.int64)
        former = page[places]
        page[places] = np.where((former == NOBODY) | (former == program), program, SEVERAL)
        return None


class _Launch:
    """The tensors that a launch may touch, and who has touched what."""

    def __init__(self, tensors: list[torch.Tensor]):
        self.extents, self.storages = [], {}
        for tensor in tensors:
            if tensor.numel() == 0:
                continue
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
            start, unit = tensor.data_ptr(), tensor.element_size()
            key = tensor.untyped_storage().data_ptr()
            storage = self.storages.setdefault(key, _Storage(key, unit))
            storage.unit = min(storage.unit, unit)
            self.extents.append((start, start + (last + 1) * unit, storage))

    def check(self, kind: str, pointers: Handle, mask) -> None:
        """Raise MemoryFault unless all lanes of the mask are inside the tensors and race with no other program."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, np.shape(mask)))
        addresses = addresses[np.broadcast_to(mask, addresses.shape)].ravel()
        grid, dims = interpreter.interpreter_builder.grid_idx, interpreter.interpreter_builder.grid_dim
        for start, end, storage in self.extents:
            inside = (addresses >= start) & (addresses + np.uint64(size) <= end)
            if not inside.any():
                continue
            program = (grid[0] * dims[1] + grid[1]) * dims[2] + grid[2]
            other = storage.touch(kind, addresses[inside], size, program)
            if other is not None:
                raise MemoryFault(f"race: {kind} by program {grid} of what another program touched by {other}")
            addresses = addresses[~inside]
            if addresses.size == 0:
                return
        if addresses.size:
            raise MemoryFault(f"{kind} by program {grid} out of bounds: {addresses.size} lanes outside every tensor")


_launch = _Launch([])


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    if isinstance(value, torch.Tensor):
        return [value]
    base = getattr(value, "base", None)  # of a tensor descriptor
    return [] if base is None else _tensors(base)


def _init_args_hst(stock, self, args_dev, kwargs):
    global _launch
    _patched.clear()
    args, kwargs = stock(self, args_dev, kwargs)
    _launch = _Launch(_tensors([args, list(kwargs.values())]))
    return args, kwargs


def _restore_args_dev(stock, self, args_dev, args_hst, kwargs, kwargs_hst):
    """Copy results back to the device, where there is one: CPU storages are used as they are."""
    if any(tensor.device.type != "cpu" for tensor in _tensors([args_dev, list(kwargs.values())])):
        stock(self, args_dev, args_hst, kwargs, kwargs_hst)


def _create_masked_load(stock, self, pointers, mask, other, *rest, **options):
    _launch.check("load", pointers, mask.data)
    if other is None:
        other = Handle(_garbage(pointers), pointers.get_element_ty())
    return stock(self, pointers, mask, other, *rest, **options)


def _garbage(pointers: Handle) -> np.ndarray:
    """What masked-off lanes hold."""
    kind = pointers.get_element_ty()
    dtype = interpreter._get_np_dtype(kind)
    if kind == BF16:
        value = 0x7FC0
    elif dtype.kind == "f":
        value = np.nan
    else:
        value = True if dtype == np.bool_ else np.iinfo(dtype).max
    return np.full(pointers.data.shape, value, dtype)


def _create_masked_store(stock, self, pointers, value, mask, *rest, **options):
    _launch.check("store", pointers, mask.data)
    result = stock(self, pointers, value, mask, *rest, **options)
    dtype = interpreter._get_np_dtype(pointers.get_element_ty())
    shape = np.broadcast_shapes(pointers.data.shape, np.shape(mask.data))
    lanes, wanted = np.broadcast_to(mask.data, shape), np.broadcast_to(value.data, shape)
    addresses = np.ascontiguousarray(np.broadcast_to(pointers.data, shape))
    fallback = np.zeros(shape, dtype)
    found = interpreter._interpreter.load(addresses, np.ascontiguousarray(lanes), fallback, dtype)
    if found[lanes].tobytes() != wanted[lanes].astype(dtype).tobytes():
        raise MemoryFault(
            f"race: store by program {interpreter.interpreter_builder.grid_idx} of different values to one element"
        )
    return result


def _create_atomic_rmw(stock, self, op, pointers, value, mask, *rest):
    _launch.check("atomic", pointers, mask.data)
    return stock(self, op, pointers, value, mask, *rest)


def _create_atomic_cas(stock, self, pointers, *rest):
    _launch.check("atomic", pointers, np.True_)
    return stock(self, pointers, *rest)


# --- Programs ---

_order = random.Random(0)


def shuffle_programs(seed: int) -> None:
    """The order of the programs of the launches to come."""
    _order.seed(seed)


def _set_grid_dim(stock, self, *dims):
    stock(self, *dims)
    self.order = list(np.ndindex(*dims))
    _order.shuffle(self.order)


def _set_grid_idx(stock, self, x, y, z):
    _, ny, nz = self.grid_dim
    stock(self, *self.order[(x * ny + y) * nz + z])


_languages: dict[object, frozenset[int]] = {}  # function -> the modules of Triton's language that it sees
_patched: set[int] = set()  # those that the launch has replaced the functions of


def _patch_lang(stock, fn):
    """Once per launch: the interpreter does it at every call of a device function, which takes it half of its time."""
    if fn not in _languages:
        seen = {id(value) for value in fn.__globals__.values()}
        _languages[fn] = frozenset(seen & {id(tl), id(tl.core)})
    if _languages[fn] <= _patched:
        return interpreter._LangPatchScope()
    _patched.update(_languages[fn])
    return stock(fn)


def _patch_lang_tensor(stock, tensor, scope):
    """Scalars as bounds of a Python range: numpy refuses what Triton 3.6 does with them."""
    stock(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


# --- Speed: every operation makes its type and its tensor anew, which takes the interpreter much of its time ---

_types: dict[tuple, dict] = {}  # element type and shape -> the attributes of such a type
_forms: dict[str, dict] = {}  # the name of a type -> the attributes of its tensors
_numpy: dict[str, np.dtype] = {}  # the name of a type -> that of its values


def _block_type(stock, self, element_ty, shape):
    key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
    if key not in _types:
        stock(self, element_ty, shape)
        _types[key] = vars(self).copy()
    vars(self).update(_types[key])


def _tensor(stock, self, handle, type):
    if type.name not in _forms:
        stock(self, None, type)
        _forms[type.name] = vars(self).copy()
    vars(self).update(_forms[type.name], handle=handle, type=type)


def _get_np_dtype(stock, tt_dtype):
    if tt_dtype.name not in _numpy:
        _numpy[tt_dtype.name] = stock(tt_dtype)
    return _numpy[tt_dtype.name]


# --- Installation ---

CHANGES = {
    Builder: (
        _get_bf16, _binary_op, _unary_op, _ternary_op, _cast_impl, _create_fp_to_fp, _create_fma, _create_dot,
        _create_erf, _create_masked_load, _create_masked_store, _create_atomic_rmw, _create_atomic_cas, _set_grid_dim,
        _set_grid_idx,
    ),
    interpreter.ReduceOps: (_apply_impl,),
    interpreter.ScanOps: (_apply_impl,),
    Executor: (_init_args_hst, _restore_args_dev),
    interpreter: (_patch_lang, _patch_lang_tensor, _get_np_dtype),
}  # fmt: skip


def _around(function, stock):
    return lambda *args, **kwargs: function(stock, *args, **kwargs)


def install() -> None:
    """Change Triton's interpreter, once per process."""
    if getattr(Builder, "exact_bfloat16", False):
        return
    for owner, functions in CHANGES.items():
        for function in functions:
            name = function.__name__ if hasattr(owner, function.__name__) else function.__name__[1:]
            setattr(owner, name, _around(function, getattr(owner, name, None)))
    for kind, function in ((tl.core.block_type, _block_type), (tl.core.tensor, _tensor)):
        kind.__init__ = _around(function, kind.__init__)
    Builder.exact_bfloat16 = True  # pyext refuses bfloat16 without it
