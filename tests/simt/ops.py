"""The operators of torch.ops.pyext by the kernels of csrc/cuda, run on the emulator with CPU tensors.

Each function below has the signature of an operator, and does for the emulator what csrc/<op>.cpp does for a GPU:
views, fresh results, problem, launcher. `instead_of_cpu` puts them in the place of the CPU kernels, so that whatever
calls an op (a test of the public function, autograd, opcheck) runs the CUDA source.
"""

from __future__ import annotations

import contextlib
import ctypes
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from pyext.ops import glu, rotary

from . import attention_ops, moe_ops
from .build import Kernel
from .problems import DTYPES, GluProblem, RotaryProblem, Strided, view
from .runtime import Machine, machine

Tensor = torch.Tensor
STEMS = (
    *("rotary", "glu", "moe_route", "moe_dispatch"),
    *("attention_sm80", "attention_sm80_backward", "attention_sm80_relative"),
    *("attention_sm80_relative_backward", "attention_sm80_relative_both_backward"),
)
SOURCES = {name: Kernel(f"csrc/cuda/{name}.cu") for name in STEMS}
#: In place of those for sm_80, for what csrc/cuda/attention_sm90*.cu take.
HOPPER = {
    name: Kernel(f"csrc/cuda/{name}.cu")
    for name in ("attention_sm90", "attention_sm90_backward", "attention_sm90_relative_backward")
}


@contextlib.contextmanager
def instead_of_cpu(sources: dict[str, Kernel] = SOURCES, **run) -> Iterator[None]:
    """Within it, the CPU's operators are the CUDA kernels of `sources` on a machine with the options `run`."""
    library = torch.library.Library("pyext", "IMPL")
    warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
    try:
        for name, (stem, *operator) in OPERATORS.items():
            if stem in sources or any(other in sources for other in VARIANTS.get(name, {}).values()):
                library.impl(name.removesuffix("_sm90"), _operator(*operator, name, stem, sources, run), "CPU")
        yield
    finally:
        library._destroy()


@dataclass
class Launch:
    """What an operator below starts its kernels by."""

    gpu: Machine
    operator: str
    stem: str
    sources: dict[str, Kernel]

    @property
    def launcher(self) -> str:
        return f"pyext_cuda_{self.operator}"

    def of(self, operator: str) -> Launch:
        """What starts another of the kernels that an operator has, by what they take."""
        return Launch(self.gpu, operator, VARIANTS[self.operator][operator], self.sources)

    def __call__(self, problem, results: dict[str, Tensor], **inputs: Tensor | None) -> None:
        self.gpu.memory(**{name: tensor for name, tensor in inputs.items() if tensor is not None})
        self.gpu.memory(writable=True, **results)
        self.gpu.call(self.function(self.launcher), ctypes.byref(problem), None)

    def function(self, name: str):
        return getattr(self.gpu.load(self.sources[self.stem]), name)

    def workspace(self, problem, name: str) -> Tensor:
        """Scratch memory for the problem, of the size that this function of the library says."""
        bytes_of = self.function(name)
        bytes_of.restype = ctypes.c_int64
        memory = torch.empty(bytes_of(ctypes.byref(problem)), dtype=torch.uint8)
        problem.workspace = memory.data_ptr()
        return memory


def _operator(first: str, function: Callable, name: str, stem: str, sources: dict, run: dict) -> Callable:
    def operator(*arguments):
        given = next(x for x in arguments if isinstance(x, Tensor))
        if given.dtype == torch.float64:  # as the operators say it; csrc/cuda has no kernels for it
            raise RuntimeError(f"{first} must be float32, bfloat16 or float16")
        with machine(**run) as gpu:
            return function(Launch(gpu, name, stem, sources), *arguments)

    return operator


def _readable(tensor: Tensor) -> Tensor:
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _fresh(like: Tensor) -> Tensor:
    """A tensor of that shape and those strides, in memory of its own that ends where it ends."""
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)


# --- rotary ---


def _rotary_problem(x: Tensor, half: int, interleaved: bool, inverse: bool, positions: Tensor | None) -> RotaryProblem:
    p = RotaryProblem(dtype=DTYPES.index(x.dtype), x=view(x), half=half, interleaved=interleaved, inverse=inverse)
    p.batch, p.heads, p.length, p.head_dim = x.shape
    if positions is not None:
        p.positions, p.positions_batch = positions.data_ptr(), 0 if positions.shape[0] == 1 else p.length
    return p


def _table(tensor: Tensor) -> Strided:
    batch = 0 if tensor.dim() == 2 or tensor.shape[0] == 1 else tensor.stride(0)
    return Strided(tensor.data_ptr(), batch, 0, tensor.stride(-2))


def _rotary_forward(launch, x, cos, sin, positions, interleaved, inverse):
    out = _fresh(rotary._forward_fake(x, cos, sin, positions, interleaved, inverse))
    x, cos, sin = map(_readable, (x, cos, sin))
    positions = None if positions is None else positions.contiguous()
    p = _rotary_problem(x, cos.shape[-1], interleaved, inverse, positions)
    p.out, p.cos, p.sin = view(out), _table(cos), _table(sin)
    p.table_rows, p.table_dtype = cos.shape[-2], DTYPES.index(cos.dtype)
    launch(p, dict(out=out), x=x, cos=cos, sin=sin, positions=positions)
    return out


def _rotary_backward(launch, grad, x, positions, table_batch, table_rows, half, interleaved, inverse):
    x, grad = _readable(x), _readable(grad)
    positions = None if positions is None else positions.contiguous()
    p = _rotary_problem(x, half, interleaved, inverse, positions)
    p.grad, p.table_batch, p.table_rows = view(grad), table_batch, table_rows
    tokens = {}
    if positions is not None:
        values, order = (positions.flatten()[None] if table_batch == 1 else positions).sort(stable=True)
        p.sorted, p.order, tokens = values.data_ptr(), order.data_ptr(), dict(sorted=values, order=order)
    cos, sin = (torch.empty(table_batch, table_rows, half) for _ in range(2))
    p.grad_cos, p.grad_sin = cos.data_ptr(), sin.data_ptr()
    launch(p, dict(grad_cos=cos, grad_sin=sin), x=x, grad=grad, positions=positions, **tokens)
    return cos, sin


# --- glu ---


def _inputs(*tensors: Tensor | None) -> list[Tensor]:
    """As the kernels can read them; more dimensions than they know are made ones that can be merged."""
    given = [t for t in tensors if t is not None]
    return [_readable(t) if t.dim() <= 4 else t.contiguous() for t in given]


def _in_four_dimensions(tensors: list[Tensor]) -> list[Tensor]:
    """(batch, heads, rows, width) each; the leading dimensions as one where all can be viewed so."""
    with contextlib.suppress(RuntimeError):
        return [t.view(1, 1, -1, t.shape[-1]) if t.numel() else t.reshape(1, 1, 0, t.shape[-1]) for t in tensors]
    return [t[(None,) * (4 - t.dim())] for t in tensors]


def _glu_problem(inputs: list[Tensor], results: list[Tensor], packed, activation, gate_first, interleaved):
    """inputs: gate, up unless packed, grad in a backward; results: out, or the gradients of gate and up alike."""
    backward = len(inputs) == (2 if packed else 3)
    gate, *others = _in_four_dimensions([*inputs, *results])
    width = gate.shape[-1] // 2 if packed else gate.shape[-1]
    p = GluProblem(dtype=DTYPES.index(gate.dtype), activation=activation, width=width)
    p.interleaved, p.up_first = packed and interleaved, packed and not gate_first
    p.batch, p.heads, p.rows = gate.shape[:3]
    halves = (0, 0) if interleaved else (0, width) if gate_first else (width, 0)
    p.gate, p.up = (view(gate, at) for at in halves) if packed else (view(gate), view(others.pop(0)))
    if not backward:
        p.out = view(others.pop())
        return p
    p.grad, grad_gate = view(others.pop(0)), others.pop(0)
    p.grad_gate, p.grad_up = (view(grad_gate, at) for at in halves) if packed else (view(grad_gate), view(others.pop()))
    return p


def _glu_forward(launch, gate, up, activation, gate_first, interleaved):
    out = _fresh(glu._forward_fake(gate, up, activation, gate_first, interleaved))
    inputs = _inputs(gate, up)
    p = _glu_problem(inputs, [out], up is None, activation, gate_first, interleaved)
    launch(p, dict(out=out), **dict(zip(("gate", "up"), inputs)))
    return out


def _glu_backward(launch, grad, gate, up, activation, gate_first, interleaved):
    grad_gate, grad_up = map(_fresh, glu._backward_fake(grad, gate, up, activation, gate_first, interleaved))
    inputs = _inputs(gate, up, grad)
    results = [grad_gate] if up is None else [grad_gate, grad_up]
    p = _glu_problem(inputs, results, up is None, activation, gate_first, interleaved)
    names = ("gate", "grad") if up is None else ("gate", "up", "grad")
    launch(p, dict(zip(("grad_gate", "grad_up"), results)), **dict(zip(names, inputs)))
    return grad_gate, grad_up


#: name: (source, first tensor, function).
OPERATORS = {
    "rotary_forward": ("rotary", "x", _rotary_forward),
    "rotary_backward": ("rotary", "x", _rotary_backward),
    "glu_forward": ("glu", "gate", _glu_forward),
    "glu_backward": ("glu", "gate", _glu_backward),
    "moe_route_forward": ("moe_route", "logits", moe_ops.route_forward),
    "moe_route_backward": ("moe_route", "logits", moe_ops.route_backward),
    "moe_dispatch_forward": ("moe_dispatch", "x", moe_ops.dispatch_forward),
    "moe_combine_forward": ("moe_dispatch", "ys", moe_ops.combine_forward),
    "moe_combine_backward": ("moe_dispatch", "ys", moe_ops.combine_backward),
    "attention_forward": ("attention_sm80", "query", attention_ops.forward),
    "attention_forward_sm90": ("attention_sm90", "query", attention_ops.forward),
    "attention_backward_sm90": ("attention_sm90_backward", "query", attention_ops.backward),
    "attention_backward": ("attention_sm80_backward", "query", attention_ops.backward),
}
#: name: {launcher: source} of those that an operator has besides.
VARIANTS = {
    "attention_forward": {"attention_relative_forward": "attention_sm80_relative"},
    "attention_backward": {
        f"attention_relative{both}_backward": f"attention_sm80_relative{both}_backward" for both in ("", "_both")
    },
    "attention_backward_sm90": {"attention_relative_backward_sm90": "attention_sm90_relative_backward"},
}
