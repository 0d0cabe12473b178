"""The operators of routing, dispatch and combine by csrc/cuda/moe_route.cu and moe_dispatch.cu; see ops.py."""

from __future__ import annotations

import torch

from pyext._primitives import POLICIES

from .problems import DTYPES, CombineProblem, DispatchProblem, RouteProblem, Strided, view

Tensor = torch.Tensor


def _int32(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32)


def _rows(tensor: Tensor) -> Strided:
    """A (row, feature) tensor."""
    return view(tensor[None, None])


def _pointers(problem: RouteProblem | DispatchProblem | CombineProblem, tensors: dict[str, Tensor | None]) -> None:
    """Points the fields of these names at the tensors."""
    for name, tensor in tensors.items():
        setattr(problem, name, None if tensor is None else tensor.data_ptr())


# --- Routing ---


def _route_problem(logits: Tensor, token_mask: Tensor | None, columns: int, policy: int, renormalize: bool):
    p = RouteProblem(dtype=DTYPES.index(logits.dtype), policy=policy, columns=columns, renormalize=renormalize)
    p.groups, p.tokens, p.experts = logits.shape
    p.logits, p.capacity, p.expert_groups, p.top_groups = view(logits[None]), -1, 1, 1
    p.token_mask = None if token_mask is None else token_mask.data_ptr()
    return p


def route_forward(
    launch, logits, token_mask, expert_bias, uniform, policy, top_k, capacity, renormalize, batch_priority, groups,
    top_groups,
):  # fmt: skip
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    given = dict(token_mask=token_mask, expert_bias=expert_bias, uniform=uniform)
    given = {name: None if tensor is None else tensor.contiguous() for name, tensor in given.items()}
    columns = logits.shape[2] if POLICIES[policy] == "expert_choice" else top_k
    p = _route_problem(logits, None, columns, policy, renormalize)
    p.capacity, p.batch_priority, p.expert_groups, p.top_groups = capacity, batch_priority, groups, top_groups
    tokens = p.groups * p.tokens
    p.rows = tokens * columns if capacity < 0 else min(tokens * columns, p.groups * p.experts * min(capacity, p.tokens))
    results = dict(
        expert_index=_int32(tokens, columns),
        weights=torch.empty(tokens, columns),
        offsets=_int32(p.experts + 1),
        source=_int32(p.rows),
        position=_int32(tokens, columns),
        balance_loss=torch.empty(()),
        z_loss=torch.empty(()),
        dropped=_int32(),
        choice=_int32(tokens, columns),
        load=_int32(p.groups, p.experts),
    )
    _pointers(p, {**given, **results})
    launch(p, dict(results, workspace=launch.workspace(p, "pyext_cuda_moe_route_workspace")), logits=logits, **given)
    return tuple(results.values())


def route_backward(
    launch, grad_weights, grad_balance, grad_z, logits, token_mask, expert_index, choice, load, policy, renormalize
):
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    given = dict(grad_weights=grad_weights, grad_balance=grad_balance, grad_z=grad_z, token_mask=token_mask)
    given.update(kept=expert_index, chosen=choice, counted=load)
    given = {name: None if tensor is None else tensor.contiguous() for name, tensor in given.items()}
    p = _route_problem(logits, given["token_mask"], choice.shape[1], policy, renormalize)
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype)
    _pointers(p, dict(given, grad_logits=grad_logits))
    launch(
        p,
        dict(grad_logits=grad_logits, workspace=launch.workspace(p, "pyext_cuda_moe_route_workspace")),
        logits=logits,
        **given,
    )
    return grad_logits


# --- Dispatch and combine ---


def _readable(tensor: Tensor) -> Tensor:
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def dispatch_forward(launch, x, source, position):
    x, source = _readable(x), source.contiguous()
    out = x.new_empty(source.shape[0], x.shape[1])
    p = DispatchProblem(dtype=DTYPES.index(x.dtype), x=_rows(x), out=_rows(out), source=source.data_ptr())
    p.tokens, p.choices, p.rows, p.width = x.shape[0], position.shape[1], *out.shape
    launch(p, dict(out=out), x=x, source=source)
    return out


def _combine_problem(like: Tensor, position: Tensor, rows: int, **tensors: Tensor | None) -> CombineProblem:
    p = CombineProblem(dtype=DTYPES.index(like.dtype), rows=rows, width=like.shape[1])
    p.tokens, p.choices = position.shape
    _pointers(p, dict(position=position, **tensors))
    return p


def combine_forward(launch, ys, weights, position):
    ys, position = _readable(ys), position.contiguous()
    weights = None if weights is None else weights.contiguous()
    out = ys.new_empty(position.shape[0], ys.shape[1])
    p = _combine_problem(ys, position, ys.shape[0], weights=weights)
    p.ys, p.out = _rows(ys), _rows(out)
    launch(p, dict(out=out), ys=ys, weights=weights, position=position)
    return out


def combine_backward(launch, grad, ys, weights, position, need_ys, need_weights):
    grad, ys, position = _readable(grad), _readable(ys), position.contiguous()
    weights = None if weights is None else weights.contiguous()
    grad_ys = ys.new_empty(ys.shape if need_ys else (0,))
    grad_weights = torch.empty(position.shape if need_weights else (0,))
    results = dict(used=torch.empty(ys.shape[0], dtype=torch.uint8) if need_ys else None)
    results["grad_weights"] = grad_weights if need_weights else None
    p = _combine_problem(ys, position, ys.shape[0], weights=weights, **results)
    p.grad = _rows(grad)
    if need_ys:
        p.grad_ys, results["grad_ys"] = _rows(grad_ys), grad_ys
    if need_weights:
        p.ys = _rows(ys)
    results = {name: tensor for name, tensor in results.items() if tensor is not None}
    launch(p, results, grad=grad, ys=ys if need_weights else None, weights=weights, position=position)
    return grad_ys, grad_weights
