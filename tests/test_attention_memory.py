"""Addresses beyond 2^31 elements, and memory that grows with L, not with L^2."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

import pyext
from support.layouts import far_apart


def gradients(q, k, v, impl, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = pyext.attention(*leaves, return_lse=True, impl=impl, **options)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out, lse, *torch.autograd.grad([out, lse], leaves, [weight, torch.ones_like(lse)])]


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "row"])
@pytest.mark.parametrize("role", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("lq", [1, 33], ids=["decode", "tiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
def test_offsets_beyond_two_billion(dtype, lq, role, dim, cpu):
    if lq == 1 and role == 0 and dim == 2:
        dim = 1  # one row has no row stride
    tensors = [torch.randn(2, 2, n, 16).to(dtype) for n in (lq, 70, 70)]
    wanted = gradients(*tensors, cpu.impl)
    tensors[role] = far_apart(tensors[role], dim)
    for got, expected in zip(gradients(*tensors, cpu.impl), wanted):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "row"])
def test_bias_and_mask_beyond_two_billion(dim, cpu):
    q, k, v = (torch.randn(2, 2, n, 16) for n in (33, 70, 70))
    bias, mask = torch.randn(2, 2, 33, 70), torch.rand(2, 2, 33, 70) < 0.8

    def call(bias, mask):
        return gradients(q, k, v, cpu.impl, bias=pyext.bias.dense(bias), mask=pyext.masks.dense(mask))

    wanted = call(bias, mask)
    for got, expected in zip(call(far_apart(bias.half(), dim), far_apart(mask, dim)), call(bias.half(), mask)):
        assert torch.equal(got, expected)
    for got, expected in zip(call(bias, far_apart(mask, dim)), wanted):
        assert torch.equal(got, expected)


def test_gradient_arriving_from_far_apart(cpu):
    """The incoming gradient may have any strides, too."""
    leaves = [torch.randn(2, 2, n, 16, requires_grad=True) for n in (33, 70, 70)]
    out = pyext.attention(*leaves, impl=cpu.impl)
    g = torch.randn(2, 2, 33, 16)
    wanted = torch.autograd.grad(out, leaves, g, retain_graph=True)
    for got, expected in zip(torch.autograd.grad(out, leaves, far_apart(g, 1)), wanted):
        assert torch.equal(got, expected)


SCRIPT = """
    import resource, torch, pyext

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    torch.set_num_threads(2)
    table = torch.randn(32, {heads}, requires_grad=True)
    slopes = torch.rand({heads}, requires_grad=True)
    lengths = torch.tensor([{length} - 5])
    made = lambda n: [torch.randn(1, {heads}, n, 64).bfloat16().requires_grad_() for _ in range(3)]
    run = lambda x: pyext.attention(
        *x, bias=pyext.bias.t5(table, bidirectional=True) + pyext.bias.alibi(slopes),
        mask=pyext.masks.padding(lengths[:1]) & pyext.masks.documents(torch.zeros(x[0].shape[2], dtype=torch.int64)),
        impl="cpu").backward(torch.ones_like(x[0]))
    run(made(64))
    x = made({length})
    before = peak()
    run(x)
    assert all(t.grad is not None for t in (*x, table, slopes))
    print(peak() - before)
"""


def test_memory_is_linear_in_length(cpu_best):
    """8k tokens, T5 + ALiBi + padding + documents, forward and backward: the score matrix alone would be 512 MiB."""
    heads, length = 4, 8192
    script = textwrap.dedent(SCRIPT.format(heads=heads, length=length))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    used = float(result.stdout)
    tensor = heads * length * 64 * 2 / 2**20  # MiB of one bf16 tensor
    # out, the copy of grad_out's ones, three gradients and fp32 partial sums: some twenty tensors' worth, and scratch.
    assert used < 20 * tensor + 40, f"{used:.0f} MiB above the inputs"
