"""pyext.distributed.ExpertParallel on 1, 2 and 4 processes against one that has all experts and tokens."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import pyext
from pyext import _dispatch, distributed
from support import experts, processes

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_equals_one_process(ranks, tmp_path, session_seed):
    ops = ("moe.dispatch", "moe.combine", "moe.experts", "moe.forward")
    has_kernels = all("cpu" in _dispatch._OPS[op].kernels for op in ops)
    failures = processes.run(experts.run, ranks, tmp_path, session_seed % 10**6, has_kernels)
    assert not failures, failures


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "processes, experts, shares",
    [(1, 5, [5]), (2, 5, [3, 2]), (4, 10, [3, 3, 2, 2]), (4, 3, [1, 1, 1, 0]), (3, 0, [0, 0, 0])],
)
def test_shares(processes, experts, shares, monkeypatch):
    monkeypatch.setattr(distributed, "place", lambda group: (processes, 1 % processes))
    ep = distributed.ExpertParallel()
    ranges = [ep.local_experts(experts, rank) for rank in range(processes)]
    assert [len(own) for own in ranges] == shares
    assert [expert for own in ranges for expert in own] == list(range(experts))
    assert ep.shard(torch.arange(experts)).tolist() == list(ep.local_experts(experts))


def layer(experts=4):
    return torch.randn(experts, 12, 8), torch.randn(experts, 8, 6)


def test_one_process_is_the_plain_layer(group):
    ep, x, logits = distributed.ExpertParallel(), torch.randn(9, 8), torch.randn(9, 4)
    routing = ep.route(logits, 2)
    weights = layer()
    assert torch.equal(ep.forward(x, routing, *weights), pyext.moe.forward(x, routing, *weights))
    inputs = torch.empty(0, 8), pyext.moe.route(torch.empty(0, 4), 2)
    assert ep.forward(*inputs, *weights).shape == (0, 8)


def test_clipping(group):
    """With one process that of torch; without experts, too."""
    ep = distributed.ExpertParallel()
    for model in (experts.Model(0, ep), experts.Model(0)):
        model(torch.randn(2, 7, 6)).backward()
        before = [parameter.grad.clone() for parameter in model.parameters()]
        norm = distributed.clip_grad_norm_(model, 0.1)
        clipped = [parameter.grad.clone() for parameter in model.parameters()]
        for parameter, grad in zip(model.parameters(), before):
            parameter.grad = grad
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        for mine, theirs in zip(clipped, model.parameters()):
            torch.testing.assert_close(mine, theirs.grad)


def test_refusals(group, monkeypatch):
    ep, x, logits = distributed.ExpertParallel(), torch.randn(9, 8), torch.randn(9, 4)
    routing, (w_gate_up, w_down) = ep.route(logits, 2), layer()
    why = "for experts 0 to 4 of 4 on process 0 of 1"
    with pytest.raises(ValueError, match=rf"w_gate_up must have shape \(4, \.\.\.\) {why}, got \(3, 12, 8\)"):
        ep.forward(x, routing, w_gate_up[:3], w_down)
    with pytest.raises(ValueError, match=rf"b_down must have shape \(4, \.\.\.\) {why}, got \(5, 8\)"):
        ep.forward(x, routing, w_gate_up, w_down, b_down=torch.zeros(5, 8))
    with pytest.raises(TypeError, match="w_down must be a torch.Tensor, got NoneType"):
        ep.forward(x, routing, w_gate_up, None)
    with pytest.raises(ValueError, match=r"x must have shape \(9, H\)"):
        ep.forward(x[1:], routing, w_gate_up, w_down)
    with pytest.raises(TypeError, match="routing must be a pyext.moe.Routing, got Tensor"):
        ep.dispatch(x, logits)
    with pytest.raises(NotImplementedError, match=r"impl='cuda' refuses"):
        ep.forward(x, routing, w_gate_up, w_down, impl="cuda")
    with pytest.raises(ValueError, match=r"value must have shape \(4, \.\.\.\) on process 0 of 1, got \(3, 8\)"):
        ep.unshard(torch.zeros(3, 8), 4)
    with pytest.raises(TypeError, match="expert_parallel must be a pyext.distributed.ExpertParallel or None, got int"):
        pyext.nn.MoE(8, 6, 4, 2, expert_parallel=2)
    together = distributed.ExpertParallel(together=True)
    with pytest.raises(ValueError, match="generator must be given, in one state on all processes"):
        together.route(logits, 2, policy="gshard")
    with pytest.raises(ValueError, match=r"token_mask must have shape \(9,\) to match logits, got \(8,\)"):
        together.route(logits, 2, token_mask=torch.ones(8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"logits must have shape \(T, E\) or \(G, S, E\), got \(4,\)"):
        together.route(logits[0], 2)


def test_needs_a_group():
    with pytest.raises(ValueError, match="group must be a process group"):
        distributed.ExpertParallel()


def test_the_calls_of_the_docs(monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text()
    monkeypatch.setattr(
        dist,
        "init_process_group",
        functools.partial(dist.init_process_group, store=dist.HashStore(), rank=0, world_size=1),
    )
    names = {}
    try:
        for snippet in text.split("```python\n")[1:]:
            exec(snippet.partition("```")[0], names)
    finally:
        dist.destroy_process_group()
    assert names["q"].grad.isfinite().all() and names["layer"].w_down.grad.isfinite().all()
    assert names["whole"].keys() == names["model"].state_dict().keys() and names["norm"] > 0
