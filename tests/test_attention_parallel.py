"""The wrappers that train on many devices, with one process: DDP and FSDP2 around modules that call the op."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

import pyext

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed")


class Block(nn.Module):
    """T5's relative positions in one layer of attention."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(16, 48)
        self.table = nn.Parameter(torch.randn(8, 2))

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        bias = pyext.bias.t5(self.table, bidirectional=False, max_distance=20)
        return pyext.attention(q, k, v, bias=bias, mask=pyext.masks.causal()).transpose(1, 2).flatten(2)


@pytest.fixture
def group(tmp_path, monkeypatch):
    if sys.platform == "linux":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # whatever the machine's name resolves to
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def replicated(module):
    return nn.parallel.DistributedDataParallel(module)


def sharded(module):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(module, mesh=init_device_mesh("cpu", (1,)))


@pytest.mark.parametrize("wrap", [replicated, sharded])
def test_wrapped_equals_plain(wrap, group, cpu_best):
    x, grad = torch.randn(3, 21, 16), torch.randn(3, 21, 16)
    plain, wrapped = Block(), Block()
    wrapped.load_state_dict(plain.state_dict())
    out = plain(x)
    out.backward(grad)
    model = wrap(wrapped)
    got = model(x)
    got.backward(grad)
    assert torch.equal(got, out)
    for (name, parameter), other in zip(plain.named_parameters(), wrapped.parameters(), strict=True):
        found = other.grad.full_tensor() if hasattr(other.grad, "full_tensor") else other.grad
        assert torch.equal(found, parameter.grad), name
