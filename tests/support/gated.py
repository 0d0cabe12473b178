"""Calls of the gated units and layers as data, PyTorch's own functions as oracle and as eager, and the comparison."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from . import layouts
from .backends import Backend
from .cases import on_threads
from .tolerance import assert_close_to_reference, decisive

Tensor = torch.Tensor
ACTIVATIONS = {
    "geglu": F.gelu,
    "geglu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "swiglu": F.silu,
    "reglu": F.relu,
}
#: How gate and up reach the function: two tensors, or one that holds both.
FORMS = ("separate", "halves", "halves_up_first", "interleaved", "interleaved_up_first")


@dataclass(frozen=True)
class Unit:
    """A call of pyext.geglu, swiglu or reglu on (*shape[:3], shape[3]) features of out."""

    activation: str = "geglu"
    form: str = "separate"
    shape: tuple[int, int, int, int] = (2, 3, 5, 37)
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    scale: float = 2.0

    def __str__(self) -> str:
        words = [self.activation, self.form, "x".join(map(str, self.shape))]
        return "+".join(words + [x for x in (self.layout, self.grad_layout) if x != "contiguous"])

    @property
    def options(self) -> dict:
        options = {"approximate": "tanh"} if self.activation == "geglu_tanh" else {}
        if self.form != "separate":
            options.update(gate_first=not self.form.endswith("up_first"), interleaved="interleaved" in self.form)
        return options

    def split(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """(gate, up) of the packed tensor."""
        if "interleaved" in self.form:
            first, second = packed[..., 0::2], packed[..., 1::2]
        else:
            first, second = packed.chunk(2, -1)
        return (second, first) if self.form.endswith("up_first") else (first, second)

    def call(self, impl: str, *leaves: Tensor) -> Tensor:
        import pyext

        function = getattr(pyext, self.activation.removesuffix("_tanh"))
        return function(*leaves, impl=impl, **self.options)

    def formula(self, *leaves: Tensor) -> Tensor:
        gate, up = leaves if self.form == "separate" else self.split(*leaves)
        return ACTIVATIONS[self.activation](gate) * up


@dataclass(frozen=True)
class Layer:
    """A call of pyext.gated_linear (j = None) or gated_mlp on x (m, k) with n hidden features."""

    m: int = 9
    k: int = 33
    n: int = 31
    j: int | None = None
    activation: str = "swiglu"
    packed: bool = False
    bias: bool = True
    layout: str = "contiguous"  # of x and the weights, as rows of (1, 1, rows, features)

    def __str__(self) -> str:
        words = [f"{self.m}x{self.k}-{self.n}" + ("" if self.j is None else f"-{self.j}"), self.activation]
        words += [name for name in ("packed", "bias") if getattr(self, name)]
        return "+".join(words + ([self.layout] if self.layout != "contiguous" else []))

    @property
    def names(self) -> list[str]:
        names = ["x", "w_gate"] + ([] if self.packed else ["w_up"]) + ([] if self.j is None else ["w_down"])
        if self.bias:
            names += ["b_gate"] + ([] if self.packed else ["b_up"]) + ([] if self.j is None else ["b_down"])
        return names

    def shape_of(self, name: str) -> tuple[int, ...]:
        both = 2 * self.n if self.packed else self.n
        return {
            "x": (self.m, self.k), "w_gate": (both, self.k), "w_up": (self.n, self.k), "w_down": (self.j, self.n),
            "b_gate": (both,), "b_up": (self.n,), "b_down": (self.j,),
        }[name]  # fmt: skip

    def call(self, impl: str, *leaves: Tensor) -> Tensor:
        import pyext

        named = {"w_up": None, **dict(zip(self.names, leaves, strict=True))}
        function = pyext.gated_linear if self.j is None else pyext.gated_mlp
        return function(**named, activation=self.activation, impl=impl)

    def formula(self, *leaves: Tensor) -> Tensor:
        return self._formula(ACTIVATIONS[self.activation], *leaves)

    def terms(self, *leaves: Tensor) -> Tensor:
        """With absolute values inside: the size of what the sums add up (|act(x)| <= |x|)."""
        return self._formula(lambda x: x, *leaves)

    def _formula(self, act, *leaves: Tensor) -> Tensor:
        named = dict(zip(self.names, leaves, strict=True))
        x, w_gate, b_gate = named["x"], named["w_gate"], named.get("b_gate")
        if self.packed:
            gate, up = F.linear(x, w_gate, b_gate).chunk(2, -1)
        else:
            gate, up = F.linear(x, w_gate, b_gate), F.linear(x, named["w_up"], named.get("b_up"))
        hidden = act(gate) * up
        return hidden if self.j is None else F.linear(hidden, named["w_down"], named.get("b_down"))


@dataclass
class Drawn:
    leaves: list[Tensor]
    names: list[str]
    grad: Tensor


def draw(case: Unit | Layer, dtype: torch.dtype, seed: int, device: str = "cpu") -> Drawn:
    """Fresh inputs, in poisoned storage."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{case}|{dtype}|{seed}".encode()))

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64, device="cpu").to(device)

    def placed(values, layout):
        return layouts.place(values.to(dtype), layout)

    if isinstance(case, Unit):
        *lead, width = case.shape
        names = ["gate", "up"] if case.form == "separate" else ["gate"]
        width_in = width if case.form == "separate" else 2 * width
        leaves = [placed(case.scale * normal(*lead, width_in), case.layout).requires_grad_() for _ in names]
        return Drawn(leaves, names, placed(normal(*lead, width), case.grad_layout))
    leaves = []
    for name in case.names:
        shape = case.shape_of(name)
        values = normal(*shape) / (max(shape[1], 1) ** 0.5 if name.startswith("w_") else 1)
        if len(shape) == 2:
            leaves.append(placed(values[None, None], case.layout)[0, 0].requires_grad_())
        else:
            leaves.append(values.to(dtype).requires_grad_())
    return Drawn(leaves, case.names, normal(case.m, case.n if case.j is None else case.j).to(dtype))


def with_gradients(function, leaves, names, grad: Tensor) -> dict[str, Tensor]:
    """out and the gradient of every leaf."""
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, grad.to(out.dtype))
    return {"out": out.detach(), **{f"grad {name}": g for name, g in zip(names, gradients, strict=True)}}


def run(case: Unit | Layer, drawn: Drawn, impl: str, threads: int = 2) -> dict[str, Tensor]:
    with on_threads(threads):
        return with_gradients(lambda *leaves: case.call(impl, *leaves), drawn.leaves, drawn.names, drawn.grad)


def check(case: Unit | Layer, dtype: torch.dtype, backend: Backend, seed: int, threads: int = 2) -> None:
    """The tolerance rule for out and every gradient; dtypes and shapes. Or the refusal of a dtype."""
    drawn = draw(case, dtype, seed, backend.device)
    if backend.refuses(dtype):
        with pytest.raises(NotImplementedError, match=f"{backend.impl}: dtype {dtype} is not supported"):
            run(case, drawn, backend.impl)
        return

    def by(formula, change, grad):
        leaves = [change(x.detach()).requires_grad_() for x in drawn.leaves]
        return with_gradients(formula, leaves, drawn.names, grad.contiguous())

    exact, plain = by(case.formula, Tensor.double, drawn.grad), by(case.formula, Tensor.clone, drawn.grad)
    magnitude, independent = {}, None
    if isinstance(case, Layer):
        # All that is computed passes through the pre-activations, which are rounded.
        independent = (1 if case.layout == "expanded_rows" or case.k == 0 else case.m) * case.n
        magnitude = by(case.terms, lambda x: x.double().abs(), drawn.grad.double().abs())
    inputs = dict(zip((f"grad {name}" for name in drawn.names), drawn.leaves, strict=True))
    for name, value in run(case, drawn, backend.impl, threads).items():
        like = inputs.get(name, drawn.grad)
        assert (value.dtype, value.shape) == (like.dtype, like.shape), name
        terms = magnitude.get(name) if value.numel() else None
        # With a handful of values eager's error may be next to nothing by luck.
        few = terms is not None and min(independent, value.numel()) < 64
        floor = terms * torch.finfo(dtype).eps if few else None
        where = f"{name} of {case} in {dtype}"
        count = decisive(exact[name])
        if independent is not None:
            count = min(count, independent)
        assert_close_to_reference(
            value, exact[name], plain[name], name=where, magnitude=terms, floor=floor, independent=count
        )
