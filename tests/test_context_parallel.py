"""pyext.distributed.context_parallel_attention on 1, 2 and 4 processes against one with the whole sequence."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import pyext
from pyext import _native
from support import processes, ring

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_equals_one_process(ranks, tmp_path, session_seed):
    impls = ["reference", *(["cpu"] if _native.available() else [])]
    failures = processes.run(ring.run, ranks, tmp_path, session_seed, impls)
    assert not failures, failures


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def qkv(*shape):
    return [torch.randn(shape, requires_grad=True) for _ in range(3)]


def test_one_process_is_plain_attention(group):
    q, k, v = qkv(1, 2, 10, 4)
    out = pyext.distributed.context_parallel_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, pyext.attention(q, k, v, is_causal=True))
    grad = torch.autograd.grad(out.sum(), q, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="there is no second derivative"):
        torch.autograd.grad(grad.sum(), q)


def test_frozen_inputs(group):
    q, k, v = qkv(1, 2, 10, 4)
    table = torch.randn(8, 2, requires_grad=True)
    bias = pyext.bias.t5(table, True, max_distance=20)
    wanted = torch.autograd.grad(pyext.attention(q, k, v, bias=bias).square().sum(), (q, table))
    out = pyext.distributed.context_parallel_attention(q, k.detach(), v.detach(), bias=bias)
    for ours, theirs in zip(torch.autograd.grad(out.square().sum(), (q, table)), wanted):
        torch.testing.assert_close(ours, theirs)
    out = pyext.distributed.context_parallel_attention(q.detach(), k.detach(), v.detach())
    assert not out.requires_grad


def test_block_tables_are_kept(group, monkeypatch):
    """Layers and steps that share a mask share its tables."""
    from pyext.masks import _tables

    built, build = [], _tables.build
    monkeypatch.setattr(_tables, "build", lambda *args: built.append(args) or build(*args))
    mask = pyext.masks.strided(3) | pyext.masks.window(1, 1)
    for _ in range(3):
        pyext.distributed.context_parallel_attention(*qkv(1, 2, 12, 4), mask=mask)
    assert len(built) <= 1 + 4  # the whole and each pair of two pieces


def test_shard_sequence(monkeypatch):
    from pyext.ops import context_parallel

    def parts(ranks, balanced):
        x = torch.arange(16).view(1, 16).expand(2, 16)
        for rank in range(ranks):
            monkeypatch.setattr(context_parallel, "_place", lambda _, rank=rank: (ranks, rank))
            yield pyext.distributed.shard_sequence(x, 1, balanced=balanced)[0].tolist()

    assert list(parts(2, True)) == [[0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11]]
    assert list(parts(4, False)) == [list(range(n, n + 4)) for n in (0, 4, 8, 12)]
    assert list(parts(1, True)) == [list(range(16))]
    with pytest.raises(ValueError, match="x must have a multiple of 6 positions along dim 1, got 16"):
        list(parts(3, True))


@pytest.mark.parametrize("ranks", [2, 4])
def test_causal_work_is_balanced(ranks):
    """Every process meets as many areas, of which as many are cut by the diagonal."""
    from pyext._primitives import AttentionProblem, Sizes
    from pyext.ops.context_parallel import _Layout, _Ring

    layout = _Layout(ranks, 8, True)
    sizes = Sizes((1,), 1, layout.total, layout.total, torch.device("cpu"), torch.float32)
    causal = AttentionProblem(None, None, None, right=0)
    for rank in range(ranks):
        ring = _Ring(None, rank, layout, layout, sizes, None, "reference", causal)
        areas = [area for source in range(ranks) for _, _, area in ring.areas(source)]
        assert len(areas) == 2 * ranks + 1 and sum(area.own for area in areas) == 2


def test_refusals(group):
    call = pyext.distributed.context_parallel_attention
    q, k, v = qkv(1, 2, 10, 4)
    with pytest.raises(ValueError, match=r"query must have shape \(B, H, L, D\) with L even for balanced=True"):
        call(q[:, :, 1:], k, v)
    with pytest.raises(ValueError, match=r"key must have shape \(B, H, L, D\) with four dimensions"):
        call(q, k[0], v)
    with pytest.raises(ValueError, match="value must have shape"):
        call(q, k, v[:, :, 1:])
    with pytest.raises(TypeError, match="mask must be a pyext.masks object"):
        call(q, k, v, mask=torch.ones(10, 10).bool())
    with pytest.raises(TypeError, match="bias must be a pyext.bias object"):
        call(q, k, v, bias=torch.ones(10, 10))
    with pytest.raises(NotImplementedError, match=r"pyext\.attention: impl='cuda' refuses"):
        call(q, k, v, impl="cuda")
    r, u = torch.randn(19, 2, 4), torch.randn(2, 4)
    with pytest.raises(ValueError, match="softcap must be None beside bias.transformer_xl with u"):
        call(q, k, v, bias=pyext.bias.transformer_xl(r, u), softcap=2.0)


def test_needs_a_group():
    with pytest.raises(
        ValueError, match=r"group must be a process group \(call torch\.distributed\.init_process_group"
    ):
        pyext.distributed.context_parallel_attention(*qkv(1, 2, 10, 4))
