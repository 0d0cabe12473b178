"""Layers of experts: inputs, `forward` and its three steps with all gradients, and the check of both against loops."""

from __future__ import annotations

import torch

import pyext

from . import moe
from .cases import on_threads
from .tolerance import assert_close_to_reference, decisive

NAMES = ("x", "weights", "w_gate_up", "w_down", "b_gate_up", "b_down")


def layer(t, h, i, e, j=None, activation="swiglu", bias=True, dtype=torch.float64, seed=0, device="cpu"):
    """x, experts' weights and biases as leaves, at the scale of a trained layer."""
    generator = torch.Generator().manual_seed(seed)
    j, rows = h if j is None else j, (2 * i if activation in moe.GATED else i)

    def normal(*size, scale=1.0):
        drawn = torch.randn(*size, generator=generator, dtype=torch.float64, device="cpu") * scale
        return drawn.to(device, dtype).requires_grad_()

    leaves = {"x": normal(t, h), "w_gate_up": normal(e, rows, h, scale=max(h, 1) ** -0.5)}
    leaves["w_down"] = normal(e, j, i, scale=max(i, 1) ** -0.5)
    leaves["b_gate_up"] = normal(e, rows) if bias else None
    leaves["b_down"] = normal(e, j) if bias else None
    return leaves


def routed(t, e, k=2, seed=0, dtype=torch.float64, policy="softmax_topk", device="cpu", **options):
    """A routing whose weights are a leaf."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(t, e, generator=generator, dtype=torch.float64, device="cpu")
    routing = pyext.moe.route(logits, k, policy=policy, generator=generator, impl="reference", **options)
    return leaf_weights(pyext.moe.Routing(*(part.to(device) for part in routing)), dtype)


def leaf_weights(routing, dtype=None):
    return routing._replace(weights=routing.weights.detach().to(dtype or routing.weights.dtype).requires_grad_())


def routed_by(rows, e, dtype=torch.float64, seed=0):
    """The routing in which token t goes to the experts rows[t], with weights of normal numbers."""
    index = torch.tensor(rows, dtype=torch.int64)
    index = index[:, None] if index.dim() == 1 else index
    flat = index.flatten()
    order = flat.argsort(stable=True)
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), flat.bincount(minlength=e).cumsum(0)])
    weights = torch.randn(index.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    whole = [index, weights, offsets, order // max(index.shape[1], 1), position.view_as(index)]
    zero = torch.zeros(())
    return leaf_weights(pyext.moe.Routing(*(x if x is weights else x.int() for x in whole), zero, zero, zero.int()))


def gradients(out, leaves, grad):
    """out, and the gradient of every leaf by its name, zero where there is none."""
    named = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    found = torch.autograd.grad(out, list(named.values()), grad, allow_unused=True)
    zeros = {name: torch.zeros_like(leaf) for name, leaf in named.items()}
    return {"out": out.detach()} | {
        name: zeros[name] if got is None else got for name, got in zip(named, found, strict=True)
    }


def whole(leaves, routing, activation, **options):
    """out by `forward`, and all leaves."""
    leaves = {**leaves, "weights": routing.weights}
    arguments = {name: leaf for name, leaf in leaves.items() if name not in ("x", "weights")}
    out = pyext.moe.forward(leaves["x"], routing, activation=activation, **arguments, **options)
    return out, {name: leaves[name] for name in NAMES}


def steps(leaves, routing, activation, **options):
    """The same in three steps."""
    xs = pyext.moe.dispatch(leaves["x"], routing)
    arguments = {name: leaf for name, leaf in leaves.items() if name != "x"}
    ys = pyext.moe.experts(xs, routing, activation=activation, **arguments, **options)
    return pyext.moe.combine(ys, routing), {**leaves, "weights": routing.weights}


def expected(leaves, routing, activation, grad, dtype=torch.float64):
    """out and all gradients by the loops, in a dtype (weights in fp32 at least)."""
    copies = {name: None if leaf is None else leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}
    weights = routing.weights.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    copies["weights"] = weights
    out = moe.forward(*(copies[name] for name in NAMES), routing, activation)
    return gradients(out + 0 * sum(leaf.sum() for leaf in copies.values() if leaf is not None), copies, grad.to(dtype))


_last: list = [None, None]  # what the last case was made of, and what it gives


def _expected(leaves, routing, activation, grad):
    """`expected` in fp64 and in the dtype itself; kept, since backends come after each other with the same case."""
    made_of = [*leaves.values(), *routing, grad]
    kinds = activation, [x if x is None else (x.dtype, x.shape, x.device) for x in made_of]
    former = _last[0]
    if not (former and former[0] == kinds and all(x is None or torch.equal(x, y) for x, y in zip(made_of, former[1]))):
        exact = expected(leaves, routing, activation, grad)
        narrow = grad.dtype != torch.float64
        eager = expected(leaves, routing, activation, grad, grad.dtype) if narrow else exact
        _last[:] = (kinds, made_of), (exact, eager)
    return _last[1]


def check(leaves, routing, activation, backend, dtype=None, threads=1):
    """`forward` and the three steps, outputs and all gradients, against the loops.

    In fp64 almost to the bit; elsewhere by the rule of tolerance, beside the same loops in the dtype itself. The steps
    round between one another, so in bf16 and fp16 they have no such limit.
    """
    dtype = dtype or backend.widest
    leaves = {name: None if x is None else x.detach().to(dtype).requires_grad_() for name, x in leaves.items()}
    routing = leaf_weights(routing, torch.promote_types(dtype, torch.float32))
    sizes = routing.position.shape[0], leaves["w_down"].shape[1]
    grad = torch.randn(sizes, generator=torch.Generator().manual_seed(1), dtype=torch.float64, device="cpu")
    grad = grad.to(leaves["x"].device, dtype)
    exact, eager = _expected(leaves, routing, activation, grad)
    for compute in (whole, steps) if dtype in (torch.float32, torch.float64) else (whole,):
        with on_threads(threads):
            out, named = compute(leaves, routing, activation, impl=backend.impl)
            results = gradients(out, named, grad)
        for name, got in results.items():
            assert got.dtype == (routing.weights.dtype if name == "weights" else dtype), name
            what = f"{name} by {compute.__name__}"
            if dtype == torch.float64:
                torch.testing.assert_close(got, exact[name], rtol=1e-10, atol=1e-11, msg=lambda m, w=what: f"{w}: {m}")
            else:
                # All that is computed passes through the pre-activations, which are rounded.
                count = min(decisive(exact[name]), len(routing.source) * leaves["w_down"].shape[2])
                assert_close_to_reference(got, exact[name], eager[name], name=what, independent=count)
