"""One attention call as data: draw its inputs, run it through pyext, the oracle and eager, compare everything."""

from __future__ import annotations

import functools
import math
import operator
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from . import layouts, oracle
from .parts import Context, Part, Shape, Term
from .tolerance import assert_close_to_reference

Tensor = torch.Tensor
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" and so on, for the names of tests."""
    return str(dtype)[6:]


@dataclass(frozen=True)
class Case:
    """parts: biases and masks. sinks: None or "learned". lse: whether a gradient flows into the log-sum-exp.

    layout: of query, key, value (one name, or three); grad_layout: of the incoming gradient. q_scale multiplies the
    queries (large scores).
    """

    shape: Shape = Shape()
    parts: tuple[Part, ...] = ()
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    lse: bool = True
    layout: str | tuple[str, str, str] = "contiguous"
    grad_layout: str = "contiguous"
    dropout: float = 0.0
    q_scale: float = 1.0

    def __str__(self) -> str:
        words = [str(self.shape)] + [p.label for p in self.parts]
        for name in ("scale", "softcap", "sinks", "dropout"):
            value = getattr(self, name)
            words += [f"{name}={value}"] if value else []
        if self.layout != "contiguous":
            words.append(self.layout if isinstance(self.layout, str) else ",".join(self.layout))
        words += [self.grad_layout] if self.grad_layout != "contiguous" else []
        return "+".join(words)


def case(shape: Shape | None = None, *parts: Part, **options) -> Case:
    """case(Shape(...), causal(), t5(), softcap=5.0): what the lists of cases are made of."""
    return Case(shape or Shape(), parts, **options)


@contextmanager
def on_threads(count: int):
    """Tests run on one thread, where small tensors are fastest; this is for the calls under test."""
    former = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(former)


@dataclass
class Drawn:
    """The inputs of a case: leaves (query, key, value, tables, sinks) and everything needed to run it."""

    case: Case
    dtype: torch.dtype
    leaves: dict[str, Tensor]
    terms: list[Term]
    grad_out: Tensor
    grad_lse: Tensor | None
    dropout_seed: int

    def allowed(self) -> Tensor | None:
        masks = [term.allowed for term in self.terms if term.allowed is not None]
        return functools.reduce(operator.and_, masks) if masks else None

    def generator(self) -> torch.Generator:
        return torch.Generator(torch.get_default_device()).manual_seed(self.dropout_seed)


def draw(case: Case, dtype: torch.dtype, seed: int) -> Drawn:
    """Fresh inputs. The seed is mixed with the case, so that cases of one session differ."""
    mixed = zlib.crc32(f"{case}|{dtype}|{seed}".encode())
    s = case.shape
    scale = 1.0 / math.sqrt(s.d) if case.scale is None else case.scale
    context = Context(s, dtype, torch.Generator().manual_seed(mixed), scale)
    kinds = (case.layout,) * 3 if isinstance(case.layout, str) else case.layout
    sizes = ((s.b, s.hq, s.lq, s.d), (s.b, s.hkv, s.lk, s.d), (s.b, s.hkv, s.lk, s.dv))
    leaves = {}
    for name, size, kind in zip(("query", "key", "value"), sizes, kinds):
        values = context.normal(*size) * (case.q_scale if name == "query" else 1.0)
        leaves[name] = layouts.place(values, kind).requires_grad_()
    terms = [make(context) for make in case.parts]
    for number, term in enumerate(terms):
        term.rename = {key: f"{key}{number}" for key in term.leaves}
        leaves.update({term.rename[key]: leaf for key, leaf in term.leaves.items()})
    if case.sinks:
        leaves["sinks"] = context.normal(s.hq, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        leaves["sinks"].requires_grad_()
    grad_out = layouts.place(context.normal(s.b, s.hq, s.lq, s.dv), case.grad_layout)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grad_lse = context.normal(s.b, s.hq, s.lq, dtype=wide) if case.lse else None
    return Drawn(case, dtype, leaves, terms, grad_out, grad_lse, mixed)


def arguments(drawn: Drawn) -> dict:
    """The keyword arguments of pyext.attention besides query, key, value."""
    kwargs = {}
    for term in drawn.terms:
        value = term.build({key: drawn.leaves[new] for key, new in term.rename.items()})
        if term.keyword not in kwargs:
            kwargs[term.keyword] = value
        elif term.keyword == "bias":
            kwargs["bias"] = kwargs["bias"] + value
        else:
            assert term.keyword == "mask", f"a call takes one {term.keyword}"
            kwargs["mask"] = kwargs["mask"] & value  # a BlockMask may be either
    case = drawn.case
    kwargs.update({name: getattr(case, name) for name in ("scale", "softcap") if getattr(case, name) is not None})
    if case.sinks:
        kwargs["sinks"] = drawn.leaves["sinks"]
    if case.shape.hq != case.shape.hkv:
        kwargs["enable_gqa"] = True
    if case.dropout:
        kwargs.update(dropout_p=case.dropout, generator=drawn.generator())
    return kwargs


def run(drawn: Drawn, impl: str, threads: int = 2) -> dict[str, Tensor]:
    """out, lse and the gradient of every leaf, by pyext on that many threads."""
    import pyext

    q, k, v = (drawn.leaves[name] for name in ("query", "key", "value"))
    with on_threads(threads):
        out, lse = pyext.attention(q, k, v, return_lse=True, impl=impl, **arguments(drawn))
        return _with_gradients(drawn, drawn.leaves, out, lse)


def function_of_leaves(drawn, impl, lse=True):
    """(f, inputs): f(*leaves) -> (out, lse with dead rows at 0), rebuilding biases from the leaves it is given."""
    import pyext

    names = list(drawn.leaves)

    def call(*values):
        drawn.leaves.update(zip(names, values))
        q, k, v = values[:3]
        out, lse_ = pyext.attention(q, k, v, return_lse=True, impl=impl, **arguments(drawn))
        return (out, lse_.masked_fill(lse_ == -torch.inf, 0.0)) if lse else out

    return call, tuple(drawn.leaves[name] for name in names)


def run_dense(drawn: Drawn, dtype: torch.dtype, keep: Tensor | None = None) -> dict[str, Tensor]:
    """The same by the naive formula in `dtype`: the oracle if that is fp64, eager if it is the dtype of the case.

    The oracle also returns, under "magnitude" and "floor", the yardsticks of `tolerance` for what cancels.
    """
    case = drawn.case
    leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in drawn.leaves.items()}

    def score(leaves):
        total = None
        for term in drawn.terms:
            if term.score is not None:
                own = {key: leaves[new] for key, new in term.rename.items()}
                value = term.score({**own, "query": leaves["query"], "key": leaves["key"]})
                total = value if total is None else total + value
        return total

    allowed = drawn.allowed()
    options = dict(scale=case.scale, softcap=case.softcap, allowed=allowed, keep=keep, p=case.dropout)
    q, k, v = leaves["query"], leaves["key"], leaves["value"]
    out, lse = oracle.attention(q, k, v, score=score(leaves), sinks=leaves.get("sinks"), **options)
    result = _with_gradients(drawn, leaves, out, lse)
    if dtype == torch.float64 and out.numel():
        options["scale"] = 1.0 / math.sqrt(case.shape.d) if case.scale is None else case.scale
        upstream = drawn.grad_out.double(), None if drawn.grad_lse is None else drawn.grad_lse.double()
        result["magnitude"], result["floor"] = oracle.magnitudes(leaves, score, out, lse, *upstream, **options)
    return result


def _with_gradients(drawn: Drawn, leaves: dict[str, Tensor], out: Tensor, lse: Tensor) -> dict[str, Tensor]:
    outputs, cotangents = [out], [drawn.grad_out.to(out.dtype)]
    if drawn.grad_lse is not None and lse.requires_grad:  # without keys the oracle's lse is a constant
        outputs.append(lse)
        cotangents.append(drawn.grad_lse.to(lse.dtype))
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    result = {"out": out.detach(), "lse": lse.detach()}
    for (name, leaf), gradient in zip(leaves.items(), gradients):
        result[f"grad {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return result


def expected(case: Case, dtype: torch.dtype, seed: int) -> tuple[Drawn, dict, dict]:
    """Inputs, oracle and eager results of a case; cached because every backend is compared with the same numbers."""
    return _expected(case, dtype, seed, torch.get_default_device())


@functools.lru_cache(maxsize=8)
def _expected(case: Case, dtype: torch.dtype, seed: int, device: torch.device) -> tuple[Drawn, dict, dict]:
    drawn = draw(case, dtype, seed)
    keep = None
    if case.dropout:
        keep = probe_dropout(drawn)
    reference = run_dense(drawn, torch.float64, keep)
    eager = reference if dtype == torch.float64 else run_dense(drawn, dtype, keep)
    return drawn, reference, eager


def probe_dropout(drawn: Drawn, impl: str = "reference") -> Tensor:
    """The keep mask of a call, seen from outside: uniform attention over an identity as values shows P itself."""
    import pyext

    s, p = drawn.case.shape, drawn.case.dropout
    q, k = torch.zeros(s.b, s.hq, s.lq, 1), torch.zeros(s.b, s.hq, s.lk, 1)
    v = torch.eye(s.lk).expand(s.b, s.hq, s.lk, s.lk)
    return pyext.attention(q, k, v, dropout_p=p, generator=drawn.generator(), impl=impl) != 0


def compare(drawn: Drawn, got: dict, reference: dict, eager: dict) -> None:
    """The tolerance rule for out, lse and every gradient, plus dtype and shape of each."""
    magnitude, floor = reference.get("magnitude", {}), reference.get("floor", {})
    for name, value in got.items():
        if name == "lse":
            wanted = torch.float64 if drawn.dtype == torch.float64 else torch.float32
        else:
            wanted = drawn.dtype if name == "out" else drawn.leaves[name[5:]].dtype
        assert value.dtype == wanted, f"{name}: dtype {value.dtype}, expected {wanted}"
        assert_close_to_reference(
            value,
            reference[name],
            eager[name],
            name=f"{name} of {drawn.case} in {drawn.dtype}",
            magnitude=magnitude.get(name),
            floor=floor[name] * torch.finfo(drawn.dtype).eps if name in floor else None,
            independent=drawn.case.shape.b * drawn.case.shape.hq * drawn.case.shape.lq,
            # computed in one, held in the other
            dtype=max(value.dtype, drawn.dtype, key=lambda kind: torch.finfo(kind).eps),
        )


def check(case: Case, dtype: torch.dtype, backend, seed: int) -> None:
    """Draw, run, compare."""
    drawn, reference, eager = expected(case, dtype, seed)
    compare(drawn, run(drawn, backend.impl), reference, eager)


def resized(case: Case, **changes) -> Case:
    """The case with another shape."""
    return replace(case, shape=replace(case.shape, **changes))
