"""One rotary call as data, an oracle in complex numbers, and eager PyTorch as models write it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import pytest
import torch

from . import layouts
from .backends import Backend
from .cases import on_threads
from .tolerance import assert_close_to_reference

Tensor = torch.Tensor
TABLES = ("shared", "one", "batch")  # (rows, R/2), (1, rows, R/2), (B, rows, R/2)
POSITIONS = (None, "row", "batch")


@dataclass(frozen=True)
class Case:
    """A call of pyext.rotary on (b, h, n, d) with r features rotated. table_dtype: None = x's."""

    b: int = 2
    h: int = 3
    n: int = 37
    d: int = 32
    r: int = 32
    interleaved: bool = False
    inverse: bool = False
    tables: str = "shared"
    positions: str | None = None
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    table_layout: str = "contiguous"
    table_dtype: torch.dtype | None = torch.float32

    def __str__(self) -> str:
        words = [f"{self.b}x{self.h}x{self.n}x{self.d}r{self.r}", self.tables]
        words += [name for name in ("interleaved", "inverse") if getattr(self, name)]
        words += [f"positions={self.positions}"] if self.positions else []
        words += [x for x in (self.layout, self.grad_layout, self.table_layout) if x != "contiguous"]
        return "+".join(words) + ("" if self.table_dtype == torch.float32 else f"+{self.table_dtype}")


@dataclass
class Drawn:
    case: Case
    x: Tensor
    cos: Tensor
    sin: Tensor
    positions: Tensor | None
    grad: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.cos, self.sin


def draw(case: Case, dtype: torch.dtype, seed: int, device: str = "cpu") -> Drawn:
    """Fresh inputs in poisoned storage. cos and sin are random numbers: the formula asks no more of them."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{case}|{dtype}|{seed}".encode()))

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64, device="cpu").to(device)

    rows = case.n if case.tables != "shared" and case.positions is None else case.n + 5
    table_dtype = dtype if case.table_dtype is None or dtype == torch.float64 else case.table_dtype

    def table():
        batch = case.b if case.tables == "batch" else 1
        placed = layouts.place(normal(batch, 1, rows, case.r // 2).to(table_dtype), case.table_layout)[:, 0]
        return (placed[0] if case.tables == "shared" else placed).requires_grad_()

    positions = None
    if case.positions:
        size = (case.n,) if case.positions == "row" else (case.b, case.n)
        positions = torch.randint(0, rows, size, generator=generator, device="cpu").to(device)
    shape = case.b, case.h, case.n, case.d
    x = layouts.place(normal(*shape).to(dtype), case.layout).requires_grad_()
    return Drawn(case, x, table(), table(), positions, layouts.place(normal(*shape).to(dtype), case.grad_layout))


def _rows(table: Tensor, drawn: Drawn) -> Tensor:
    """(B, 1, L, R/2): the row of each token."""
    case = drawn.case
    table = table.expand(case.b, *table.shape[-2:])
    positions = torch.arange(case.n, device=table.device) if drawn.positions is None else drawn.positions
    index = positions.expand(case.b, case.n)[..., None].expand(-1, -1, table.shape[-1])
    return table.gather(1, index)[:, None]


def oracle(drawn: Drawn, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair is a complex number, and is multiplied by cos + i sin (or its conjugate)."""
    case, half = drawn.case, drawn.case.r // 2
    turn = torch.complex(_rows(cos, drawn), _rows(sin, drawn))
    turn = turn.conj() if case.inverse else turn
    first, second = (x[..., :half], x[..., half : 2 * half])
    if case.interleaved:
        first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    turned = torch.complex(first, second) * turn
    # Not view_as_real: its gradient is a view as complex numbers, which storage at an odd offset cannot give.
    parts = turned.real, turned.imag
    parts = torch.stack(parts, -1).flatten(-2) if case.interleaved else torch.cat(parts, -1)
    return torch.cat([parts, x[..., 2 * half :]], -1)


def eager(drawn: Drawn, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate(x) * sin, PyTorch promoting the dtypes, as GPT-NeoX and GPT-J write it."""
    case, half = drawn.case, drawn.case.r // 2
    if x.dtype != torch.float64:  # as fp64 would not be what anybody compares with
        cos, sin = (t.float() if t.dtype == torch.float64 else t for t in (cos, sin))
    cos, sin = _rows(cos, drawn), _rows(sin, drawn)
    sin = -sin if case.inverse else sin
    part, rest = x[..., : 2 * half], x[..., 2 * half :]
    if case.interleaved:
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        other = torch.stack([-part[..., 1::2], part[..., 0::2]], -1).flatten(-2)
    else:
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        other = torch.cat([-part[..., half:], part[..., :half]], -1)
    return torch.cat([(part * cos + other * sin).to(x.dtype), rest], -1)


def with_gradients(function, leaves, grad: Tensor) -> dict[str, Tensor]:
    """out and the gradient of every leaf."""
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, grad.to(out.dtype), allow_unused=True)
    gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients)]
    return {"out": out.detach(), **dict(zip(("grad x", "grad cos", "grad sin"), gradients))}


def run(drawn: Drawn, impl: str, threads: int = 2) -> dict[str, Tensor]:
    """out and all gradients by pyext."""
    import pyext

    case = drawn.case
    options = dict(interleaved=case.interleaved, positions=drawn.positions, inverse=case.inverse, impl=impl)
    with on_threads(threads):
        return with_gradients(lambda *leaves: pyext.rotary(*leaves, **options), drawn.leaves, drawn.grad)


def check(case: Case, dtype: torch.dtype, backend: Backend, seed: int, threads: int = 2) -> None:
    """The tolerance rule for out and every gradient; dtypes and shapes. Or the refusal of a dtype."""
    drawn = draw(case, dtype, seed, backend.device)
    if backend.refuses(dtype):
        with pytest.raises(NotImplementedError, match=f"{backend.impl}: dtype {dtype} is not supported"):
            run(drawn, backend.impl)
        return

    def by(formula, change, grad):
        leaves = [change(x.detach()).requires_grad_() for x in drawn.leaves]
        return with_gradients(lambda *leaves: formula(drawn, *leaves), leaves, grad.contiguous())

    exact, plain = by(oracle, Tensor.double, drawn.grad), by(eager, Tensor.clone, drawn.grad)
    # The terms of the sums over heads and tokens, which may cancel; those of sin are of the same size.
    terms = by(oracle, lambda x: x.double().abs(), drawn.grad.double().abs())["grad cos"].abs()
    inputs = {"out": drawn.x, "grad x": drawn.x, "grad cos": drawn.cos, "grad sin": drawn.sin}
    for name, value in run(drawn, backend.impl, threads).items():
        assert value.dtype == inputs[name].dtype, name
        magnitude = terms if name in ("grad cos", "grad sin") and terms.numel() else None
        computed = torch.float32 if value.dtype == torch.float64 != dtype else value.dtype
        where = f"{name} of {case} in {dtype}"
        assert_close_to_reference(value, exact[name], plain[name], name=where, magnitude=magnitude, dtype=computed)
