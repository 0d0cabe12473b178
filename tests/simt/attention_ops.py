"""attention_forward and attention_backward of torch.ops.pyext by csrc/cuda/attention_sm80*.cu: see ops.py."""

from __future__ import annotations

import torch

from pyext._primitives import AttentionProblem as Call

from .problems import DTYPES, AttentionProblem, view

Tensor = torch.Tensor


def _as_rows(tensor: Tensor) -> Tensor:
    """What the kernels copy 16 bytes at a time: as it is, or contiguous."""
    unit = 16 // tensor.element_size()
    aligned = tensor.data_ptr() % 16 == 0 and all(step % unit == 0 for step in tensor.stride()[:3])
    return tensor if tensor.stride(-1) == 1 and aligned else tensor.contiguous()


def _fresh(batch: int, heads: int, rows: int, features: int, like: Tensor) -> Tensor:
    return torch.empty(batch, rows, heads, features, dtype=like.dtype).transpose(1, 2)


def _problem(call: Call) -> tuple[AttentionProblem, dict[str, Tensor | None]]:
    """The problem of a forward without its results, and the tensors that it points at."""
    inputs = {name: _as_rows(getattr(call, name)) for name in ("query", "key", "value")}
    query, key, value = inputs.values()
    p = AttentionProblem(dtype=DTYPES.index(query.dtype), left=call.left, right=call.right, scale=call.scale)
    p.batch, p.heads, p.q_len, p.head_dim = query.shape
    p.kv_heads, p.k_len, p.value_dim = key.shape[1], key.shape[2], value.shape[3]
    p.query, p.key, p.value = map(view, inputs.values())
    p.softcap, p.dropout_p = call.softcap, call.dropout_p
    for name in ("rel_query", "rel_q", "rel_k"):
        tensor = getattr(call, name)
        if tensor is not None:
            inputs[name] = _as_rows(tensor)
            setattr(p, name, view(inputs[name]))
    if call.rel_q is not None:
        p.rel_q_batch, p.rel_q_heads, p.rel_rows = call.rel_q.shape[:3]
    if call.rel_k is not None:
        p.rel_k_batch, p.rel_k_heads, p.rel_rows = call.rel_k.shape[:3]
    for name in ("diag", "diag_index", "intervals", "rel_index", "segment", "segment_q", "segment_k"):
        tensor = getattr(call, name)
        if tensor is not None:
            inputs[name] = tensor.contiguous()
            setattr(p, name, inputs[name].data_ptr())
    if call.diag is not None:
        p.diag_heads, p.diag_rows = call.diag.shape
    for name in ("segment_q", "segment_k"):
        if inputs.get(name) is not None and inputs[name].shape[0] > 1:
            setattr(p, f"{name}_batch", inputs[name].shape[1])
    if call.intervals is not None and call.intervals.shape[0] > 1:
        p.intervals_batch = 2 * p.q_len
    return p, inputs


def _run(launch, p: AttentionProblem, results: dict[str, Tensor], inputs: dict[str, Tensor | None]) -> None:
    workspace = launch.workspace(p, f"{launch.launcher}_workspace")
    launch(p, dict(results, workspace=workspace), **inputs)


def forward(launch, *arguments):
    call = Call(*arguments)
    if call.rel_q is not None and launch.operator == "attention_forward":
        launch = launch.of("attention_relative_forward")
    p, inputs = _problem(call)
    out = _fresh(p.batch, p.heads, p.q_len, p.value_dim, call.query)
    lse = torch.empty(p.batch, p.heads, p.q_len, dtype=torch.float64)
    p.out, p.lse = view(out), lse.data_ptr()
    _run(launch, p, dict(out=out, lse=lse), inputs)
    return out, lse


def backward(launch, grad_out, grad_lse, query, key, value, out, lse, *arguments):
    *rest, _, need_diag, need_rel_q, need_rel_k, need_segment = arguments
    call = Call(query, key, value, *rest)
    if call.rel_q is not None:
        both = "" if call.rel_k is None else "_both"
        launch = launch.of(launch.operator.replace("attention_", f"attention_relative{both}_"))
    p, inputs = _problem(call)
    inputs |= dict(grad_out=_as_rows(grad_out), out=_as_rows(out), lse=lse.contiguous())
    p.grad_out, p.out, p.lse = view(inputs["grad_out"]), view(inputs["out"]), inputs["lse"].data_ptr()
    if grad_lse is not None:
        inputs["grad_lse"] = grad_lse.contiguous()
        p.grad_lse = inputs["grad_lse"].data_ptr()
    results = dict(
        grad_query=_fresh(p.batch, p.heads, p.q_len, p.head_dim, query),
        grad_key=_fresh(p.batch, p.kv_heads, p.k_len, p.head_dim, key),
        grad_value=_fresh(p.batch, p.kv_heads, p.k_len, p.value_dim, value),
    )
    if call.rel_q is not None:
        results["grad_rel_query"] = _fresh(p.batch, p.heads, p.q_len, p.head_dim, query)
    for name, tensor in results.items():
        setattr(p, name, view(tensor))
    tables = dict(diag=need_diag, rel_q=need_rel_q, rel_k=need_rel_k, segment=need_segment)
    for name, needed in tables.items():
        table = getattr(call, name)
        if table is not None and needed:
            results[f"grad_{name}"] = torch.empty(table.shape, dtype=torch.float32)
            setattr(p, f"grad_{name}", results[f"grad_{name}"].data_ptr())
    _run(launch, p, results, inputs)
    order = ("query", "key", "value", "dense", "diag", "rel_query", "rel_q", "rel_k", "segment", "sinks")
    return tuple(results.get(f"grad_{name}", torch.empty(0, dtype=torch.float32)) for name in order)
