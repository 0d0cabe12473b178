"""Calls that look for defects of csrc/cuda/moe_route.cu and moe_dispatch.cu: small, and each past one more corner."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import pyext
from support import layouts, moe
from support.moe import Case
from support.tolerance import assert_close_to_reference

Tensor = torch.Tensor
#: Of more tokens than a tile holds, with more experts than are counted at once, where tiles are small (mutants.SMALL).
ROUTES = {
    "plain": Case("softmax_topk", g=2, s=21, e=9, k=3, masked=True),
    "many choices": Case("topk_softmax", g=None, s=7, e=40, k=35),
    "capacity": Case("softmax_topk", g=2, s=45, e=9, k=2, capacity_factor=0.8, renormalize=True),
    "priority": Case("switch", g=2, s=45, e=6, k=1, capacity_factor=0.7, batch_priority=True, masked=True),
    "second choices": Case("gshard", g=2, s=21, e=6, capacity_factor=1.0),
    "groups": Case("sigmoid", g=1, s=120, e=12, k=3, groups=(4, 2), biased=True, renormalize=True),
    "scores": Case("sigmoid", g=3, s=5, e=33, k=2, masked=True, capacity_factor=1.3),
    "experts choose": Case("expert_choice", g=2, s=21, e=6, k=2, masked=True),
    "experts share": Case("expert_choice", g=1, s=300, e=5, k=1, renormalize=True),
}
#: Of the gradient, which is rounded to the dtype; all else is fp32.
TOLERANCE = {torch.float32: 5e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def check_route(name: str, dtype: torch.dtype, seed: int) -> None:
    """Every decision, weight, loss and gradient against loops in fp64."""
    case = ROUTES[name]
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(*case.shape, case.e, generator=generator)
    # Tokens that are alike: those with the lower number come first. Many, where an expert must choose among them.
    kinds = case.s // (10 if case.policy == "expert_choice" else 2) + 1
    alike = torch.randint(0, kinds, (case.s,), generator=generator)
    logits = logits.index_select(-2, alike)
    if case.policy in ("softmax_topk", "topk_softmax", "gshard"):
        logits = logits.round()  # and experts, and 0 beside -0
    logits, options = logits.to(dtype).requires_grad_(), case.options(generator)
    if case.biased:
        options["expert_bias"] = 0.2 * options["expert_bias"].to(torch.float32)  # or it alone decides
    routing = pyext.moe.route(
        logits, case.k, generator=torch.Generator().manual_seed(seed), impl="cpu", **options
    )  # fmt: skip
    uniform = torch.rand((1, *case.shape)[-2:], generator=torch.Generator().manual_seed(seed))
    moe.check(case, logits, options, routing, uniform, TOLERANCE[dtype])


@dataclass(frozen=True)
class Rows:
    """Dispatch and combine of rows of `width` features, in a layout of `layouts`; `fixed` ys get no gradient."""

    tokens: int = 11
    experts: int = 7
    choices: int = 5
    width: int = 80
    layout: str = "contiguous"
    fixed: bool = False


ROWS = {
    "vectors": Rows(),
    "long rows": Rows(tokens=3, width=1320),
    "single elements": Rows(width=33),
    "unaligned": Rows(layout="unaligned"),
    "gaps": Rows(choices=2, layout="padded_rows"),
    "weights alone": Rows(
        width=37, layout="padded_rows", fixed=True
    ),  # rows that begin where vectors may, but end else
}


def check_rows(name: str, dtype: torch.dtype, seed: int) -> None:
    """xs, out and all gradients against the reference in fp64, by the tolerance rule."""
    case, generator = ROWS[name], torch.Generator().manual_seed(seed)
    logits = torch.randn(case.tokens, case.experts, generator=generator)
    mask = torch.arange(case.tokens) % 4 > 0
    routing = pyext.moe.route(logits, case.choices, capacity_factor=0.9, token_mask=mask, impl="reference")
    sizes = (case.tokens, len(routing.source), len(routing.source), case.tokens)
    drawn = [torch.randn(1, 1, size, case.width, generator=generator).to(dtype) for size in sizes]
    inputs = [layouts.place(x, case.layout)[0, 0] for x in drawn]

    def results(dtype: torch.dtype, impl: str, inputs: list[Tensor] = inputs) -> list[Tensor]:
        x, ys, *grads = inputs if dtype == inputs[0].dtype else [t.to(dtype) for t in inputs]
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        leaves = [t.detach().requires_grad_() for t in (x, routing.weights.to(acc), ys)]
        ys = leaves.pop().detach() if case.fixed else leaves[2]
        used = routing._replace(weights=leaves[1])
        xs, out = pyext.moe.dispatch(leaves[0], used, impl=impl), pyext.moe.combine(ys, used, impl=impl)
        return [xs.detach(), out.detach(), *torch.autograd.grad([xs, out], leaves, grads)]

    three = (results(dtype, "cpu"), results(torch.float64, "reference"), results(dtype, "reference"))
    terms = results(torch.float64, "reference", [x.double().abs() for x in inputs])[3]  # of the inner products
    names = ("xs", "out", "grad x", "grad weights", "grad ys")
    for what, got, exact, plain in zip(names, *three):
        magnitude = terms if what == "grad weights" else None
        assert_close_to_reference(got, exact, plain, name=f"{what} of {name}", magnitude=magnitude)
