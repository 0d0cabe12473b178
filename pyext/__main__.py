"""`python -m pyext`: what this installation has, and whether it computes what its references say.

Every op runs forward and backward through every usable instruction set and dtype, and is compared with the fp64
reference. The limit, 4 max|error of PyTorch eager in that dtype| + 4 max|rounding|, is twice that of the test-suite:
one draw of random numbers on an unknown machine must not raise a false alarm. Exit code 0 if all checks hold, else 1.
"""

import functools
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

import pyext

from . import _dispatch, _native
from ._primitives import AttentionProblem
from .reference.attention import distances, visibility

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
OFFSETS_Q, OFFSETS_K = [0, 29, 29, 81], [0, 40, 47, 115]


@dataclass(frozen=True, eq=False)
class Case:
    """One call. `leaves` are the shapes of the tensors that get gradients, query, key and value first."""

    name: str
    leaves: dict[str, tuple[int, ...]]
    options: Callable[[dict[str, Tensor]], dict]  # the other arguments of the call
    packed: bool = False


def _shapes(heads: int, kv_heads: int, queries: int, keys: int, **others: tuple[int, ...]) -> dict:
    kv = (2, kv_heads, keys)
    return {"query": (2, heads, queries, 40), "key": (*kv, 40), "value": (*kv, 24), **others}


CASES = (
    Case("causal", _shapes(3, 3, 131, 131), lambda t: {"is_causal": True}),
    Case(
        "T5",
        _shapes(3, 3, 67, 301, table=(32, 3)),
        lambda t: {"bias": pyext.bias.t5(t["table"], bidirectional=True), "scale": 0.25},
    ),
    Case(
        "ALiBi",
        _shapes(4, 2, 131, 131, slopes=(4,)),
        lambda t: {"bias": pyext.bias.alibi(t["slopes"]), "mask": pyext.masks.causal(), "enable_gqa": True},
    ),
    Case("padding", _shapes(2, 2, 70, 133), lambda t: {"mask": pyext.masks.padding(torch.tensor([133, 51]))}),
    Case(
        "RoPE",
        _shapes(4, 2, 67, 67, cos=(67, 20), sin=(67, 20)),
        lambda t: {"rotary": pyext.Rotary(t["cos"], t["sin"]), "is_causal": True, "enable_gqa": True},
    ),
    Case(
        "GPT-J",
        _shapes(3, 3, 67, 67, cos=(67, 9), sin=(67, 9)),
        lambda t: {"rotary": pyext.Rotary(t["cos"], t["sin"], interleaved=True)},
    ),
    Case("decode", _shapes(8, 2, 1, 1025), lambda t: {"enable_gqa": True}),
    Case(
        "packed",
        {"query": (81, 4, 40), "key": (115, 4, 40), "value": (115, 4, 24), "slopes": (4,)},
        lambda t: {
            "bias": pyext.bias.alibi(t["slopes"]),
            "cu_seqlens_q": torch.tensor(OFFSETS_Q),
            "cu_seqlens_k": torch.tensor(OFFSETS_K),
        },
        packed=True,
    ),
)


@dataclass(frozen=True, eq=False)
class Layer:
    """One call of a feed-forward layer: run(leaves, impl), by a backend, or by plain PyTorch for impl="eager"."""

    name: str
    leaves: dict[str, tuple[int, ...]]
    run: Callable[[dict[str, Tensor], str], Tensor]


def _gated(name: str, rows: int, eager: Callable[[Tensor], Tensor]) -> Layer:
    def run(leaves: dict[str, Tensor], impl: str) -> Tensor:
        if impl != "eager":
            return pyext.gated_mlp(**leaves, activation=name.split()[0].lower(), impl=impl)
        x, w_gate, w_up, w_down, b_gate, b_up, b_down = leaves.values()
        return linear(eager(linear(x, w_gate, b_gate)) * linear(x, w_up, b_up), w_down, b_down)

    leaves = {
        "x": (rows, 40), "w_gate": (70, 40), "w_up": (70, 40), "w_down": (33, 70), "b_gate": (70,), "b_up": (70,),
        "b_down": (33,),
    }  # fmt: skip
    return Layer(name, leaves, run)


def _mixture(leaves: dict[str, Tensor], impl: str) -> Tensor:
    """Mixtral's: the two best of five experts, with weights that sum to 1."""
    x, logits, w_gate_up, w_down = leaves.values()
    if impl != "eager":
        routing = pyext.moe.route(logits, 2, renormalize=True, impl=impl)
        return pyext.moe.forward(x, routing, w_gate_up, w_down, impl=impl)
    best = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :2]
    weights = torch.softmax(logits.gather(1, best), dim=-1)
    gate, up = torch.einsum("th,erh->ter", x, w_gate_up).chunk(2, dim=-1)
    ys = torch.einsum("tei,eji->tej", silu(gate) * up, w_down)
    return (weights[..., None] * ys.gather(1, best[..., None].expand(-1, -1, ys.shape[-1]))).sum(dim=1)


CASES += (
    _gated("SwiGLU", 67, silu),
    _gated("SwiGLU 1", 1, silu),
    _gated("GEGLU", 67, gelu),
    Layer("Mixtral", {"x": (67, 40), "logits": (67, 5), "w_gate_up": (5, 60, 40), "w_down": (5, 33, 30)}, _mixture),
)


def _eager(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """The flat problem in plain PyTorch in the dtype of the inputs: the accuracy one has without this package."""
    group = problem.query.shape[1] // problem.key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (problem.key, problem.value))
    score = problem.query @ key.transpose(-1, -2) * problem.scale
    if problem.diag is not None:
        position = distances(problem) + problem.key.shape[2] - 1
        position = position if problem.diag_index is None else problem.diag_index.to(torch.int64)[position]
        score = score + problem.diag.to(score.dtype)[:, position]
    score = score.masked_fill(~visibility(problem), -torch.inf)
    return torch.softmax(score, dim=-1) @ value, torch.logsumexp(score, dim=-1)


def _attend(case: Case, leaves: dict[str, Tensor], impl: str) -> tuple[Tensor, Tensor]:
    """(out, lse) of the case by a backend, or by plain PyTorch for impl="eager"."""
    options, qkv = case.options(leaves), [leaves[name] for name in ("query", "key", "value")]
    if impl != "eager":
        op = pyext.varlen_attention if case.packed else pyext.attention
        return op(*qkv, return_lse=True, impl=impl, **options)
    rotary = options.pop("rotary", None)
    if rotary is not None:
        turn = functools.partial(pyext.rotary, interleaved=rotary.interleaved, impl="reference")
        qkv[:2] = [turn(x, rotary.cos, rotary.sin) for x in qkv[:2]]
    if not case.packed:
        return _eager(_dispatch.lower(pyext.attention, *qkv, **options))
    del options["cu_seqlens_q"], options["cu_seqlens_k"]
    parts = []
    for n in range(len(OFFSETS_Q) - 1):
        rows, cols = slice(OFFSETS_Q[n], OFFSETS_Q[n + 1]), slice(OFFSETS_K[n], OFFSETS_K[n + 1])
        q, k, v = (x[part].transpose(0, 1)[None] for x, part in zip(qkv, (rows, cols, cols), strict=True))
        parts.append(_eager(_dispatch.lower(pyext.attention, q, k, v, **options)))
    return torch.cat([out[0].transpose(0, 1) for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=-1)


def _results(case: Case | Layer, leaves: dict[str, Tensor], impl: str) -> list[Tensor]:
    """out, lse (of attention) and the gradient of every leaf, for one fixed weighted sum of out and lse."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    results = (case.run(leaves, impl),) if isinstance(case, Layer) else _attend(case, leaves, impl)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(r.shape, generator=generator, dtype=torch.float64) for r in results]
    # rounded to bf16 so that they are the same numbers in every dtype
    weights = [w.to(torch.bfloat16).to(r.dtype) for w, r in zip(weights, results, strict=True)]
    return [*results, *torch.autograd.grad(results, list(leaves.values()), weights)]


def _share_of_limit(got: Tensor, exact: Tensor, eager: Tensor) -> tuple[float, float]:
    """(max error, max error as a share of what is allowed)."""
    if got.shape != exact.shape or not got.isfinite().all():
        return float("inf"), float("inf")
    error = (got.double() - exact).abs().max().item()
    if got.dtype == torch.float64:
        return error, error / (1e-12 * max(1.0, exact.abs().max().item()))
    near = exact.to(got.dtype)
    rounding = (((near + 0.3) - 0.3).double() - near.double()).abs().max().item()
    allowed = 4 * (eager.double() - exact).abs().max().item() + 4 * rounding
    return error, error / allowed


@contextmanager
def _isa(name: str | None) -> Iterator[None]:
    """Run the CPU kernels with this instruction set."""
    if name is None:
        yield
        return
    native = _native.module()
    former = native.isa()
    native.set_isa(name)
    try:
        yield
    finally:
        native.set_isa(former)


def _draw(case: Case | Layer, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    leaves = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in case.leaves.items()}
    if "slopes" in leaves:
        leaves["slopes"] *= 0.1
    return leaves


@functools.cache
def _expected(case: Case | Layer, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Results of the fp64 reference on the inputs of that dtype, and of plain PyTorch in that dtype."""
    leaves = _draw(case, dtype)
    exact = _results(case, {name: leaf.double() for name, leaf in leaves.items()}, "reference")
    return exact, _results(case, leaves, "eager")


def _check(case: Case | Layer, dtype: torch.dtype, impl: str, isa: str | None) -> tuple[str, bool]:
    """One row of the table, and whether the check holds."""
    with _isa(isa):
        got = _results(case, _draw(case, dtype), impl)
    rows = [_share_of_limit(*row) for row in zip(got, *_expected(case, dtype), strict=True)]
    outputs = len(rows) - len(case.leaves)
    lse = f"{rows[1][0]:9.1e}" if outputs == 2 else f"{'-':>9}"
    gradient = max(error for error, _ in rows[outputs:])
    share = max(share for _, share in rows)
    return f"{rows[0][0]:9.1e}  {lse}  {gradient:9.1e}  {share:9.0%}", share <= 1


def _self_check() -> bool:
    native = _native.module()
    paths = [("cpu", isa) for isa in native.available_isas()] if _native.available() else []
    print("\nself-check: max error against the fp64 reference, forward and backward")
    print(f"  {'path':<16} {'dtype':<5} {'case':<8} {'out':>9}  {'lse':>9}  {'gradient':>9}  {'of limit':>9}")
    good = True
    for impl, isa in [*paths, ("reference", None)]:
        for label, dtype in DTYPES.items():
            for case in CASES:
                try:
                    numbers, holds = _check(case, dtype, impl, isa)
                except Exception as error:  # a self-check reports what goes wrong, whatever it is
                    numbers, holds = f"{type(error).__name__}: {error}", False
                good &= holds
                path = f"{impl}-{isa}" if isa else impl
                print(f"  {path:<16} {label:<5} {case.name:<8} {numbers}{'' if holds else '  WRONG'}")
    print("all checks hold" if good else "SOME CHECKS FAILED")
    return good


def main() -> int:
    print(f"pyext {pyext.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{platform.platform()}, {torch.get_num_threads()} threads")
    print("\nbackends of pyext.attention, fastest first")
    x = torch.zeros(1, 1, 1, 8)
    for name, why in _dispatch.explain(pyext.attention, x, x, x).items():
        print(f"  {name:<10} {why}")
    native = _native.module()
    if native is not None:
        print(f"\nCPU features: {', '.join(native.cpu_features()) or 'none that the kernels use'}")
        print(f"instruction sets: {', '.join(native.available_isas())} (in use: {native.isa()})")
        print(", ".join(f"{key} {value}" for key, value in native.build_info().items() if isinstance(value, str)))
    return 0 if _self_check() else 1


if __name__ == "__main__":
    warnings.simplefilter("default")
    sys.exit(main())
