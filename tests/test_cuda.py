"""The CUDA kernels as a GPU program meets them: streams, graphs, several devices, nothing to do."""

import pytest
import torch

import pyext
from support import backends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not any(b.device == "cuda" for b in backends.CUDA), reason="no GPU with CUDA kernels"),
]
DTYPE = torch.bfloat16
#: Of the policies that draw no random numbers.
POLICIES = (
    dict(top_k=2, capacity_factor=1.0, renormalize=True, batch_priority=True),
    dict(top_k=3, policy="sigmoid", groups=(3, 2)),
    dict(top_k=1, policy="expert_choice"),
)


def inputs(device="cuda"):
    """x, cos, sin, positions, gate and up."""
    x = torch.randn(2, 5, 64, 48, device=device, dtype=DTYPE)
    cos, sin = torch.randn(2, 70, 16, device=device)
    positions = torch.randint(0, 70, (2, 64), device=device)
    return x, cos, sin, positions, *torch.randn(2, 64, 129, device=device, dtype=DTYPE)


def everything(x, cos, sin, positions, gate, up):
    """Results and gradients of all ops, without a host sync."""
    leaves = [t.detach().requires_grad_() for t in (x, cos, sin, gate, up)]
    turned = pyext.rotary(*leaves[:3], positions=positions, impl="cuda")
    gated = [op(*leaves[3:], impl="cuda") for op in (pyext.geglu, pyext.swiglu, pyext.reglu)]
    packed = pyext.geglu(torch.cat(leaves[3:], -1), approximate="tanh", impl="cuda")
    bias = pyext.bias.alibi(leaves[2][0, :5])
    attended = pyext.attention(turned, turned, leaves[0], is_causal=True, bias=bias, impl="cuda")
    results = [turned, *gated, packed, attended]
    logits, rows = (leaf.flatten(0, -2) for leaf in leaves[3:])
    for options in POLICIES:
        routing = pyext.moe.route(logits, impl="cuda", **options)
        combined = pyext.moe.combine(pyext.moe.dispatch(rows, routing, impl="cuda"), routing, impl="cuda")
        results += [routing.weights, routing.balance_loss, routing.z_loss, combined]
    return [r.detach() for r in results] + list(torch.autograd.grad(results, leaves, [r.detach() for r in results]))


def test_no_sync():
    given = inputs()
    everything(*given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph():
    given = inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        everything(*given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = everything(*given)
    fresh = inputs()
    for old, new in zip(given, fresh):
        old.copy_(new)
    graph.replay()
    for got, expected in zip(recorded, everything(*fresh)):
        assert torch.equal(got, expected)


def test_current_stream():
    """Work on a side stream waits for what that stream does, and not for the default one."""
    given = inputs()
    expected = everything(*given)
    stale = [torch.zeros_like(t) for t in given]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for old, new in zip(stale, given):
            old.copy_(new, non_blocking=True)
        got = everything(*stale)
    side.synchronize()
    assert all(map(torch.equal, got, expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_device_of_the_tensors():
    given = inputs("cuda:1")
    with torch.cuda.device(0):
        got = everything(*given)
    with torch.cuda.device(1):
        expected = everything(*given)
    assert all(map(torch.equal, got, expected))


def test_nothing_is_launched_for_nothing():
    x, cos, sin, *_ = inputs()
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        torch.ops.pyext.rotary_forward(x[:0], cos, sin, None, False, False)
        torch.ops.pyext.rotary_backward(x[:0], x[:0], None, 1, 0, 16, False, False)
        torch.ops.pyext.glu_forward(x[:, :, :0], None, 0, True, False)
        torch.cuda.synchronize()
    assert not [event.name for event in profiler.events() if "rotary" in event.name or "glu" in event.name]


def test_same_bits_each_time():
    given = inputs()
    first = everything(*given)
    for _ in range(5):
        assert all(map(torch.equal, everything(*given), first))


def test_devices_must_agree():
    x, cos, sin, positions, gate, up = inputs()
    with pytest.raises(RuntimeError, match="x's device"):
        torch.ops.pyext.rotary_forward(x, cos.cpu(), sin.cpu(), None, False, False)
    with pytest.raises(RuntimeError, match="up must match gate"):
        torch.ops.pyext.glu_forward(gate, up.cpu(), 0, True, False)
