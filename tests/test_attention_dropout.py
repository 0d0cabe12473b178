"""Dropout is a function of (seed, batch, head, query, key) only: the same mask everywhere, and the right statistics."""

from __future__ import annotations

import math

import pytest
import torch

import pyext
from support.cases import case, draw, probe_dropout, run
from support.parts import Shape, causal, t5


def keep_of(shape, p, seed, impl, **options):
    """The keep mask, read off uniform attention over an identity."""
    q, k = torch.zeros(shape.b, shape.hq, shape.lq, 4), torch.zeros(shape.b, shape.hkv, shape.lk, 4)
    v = torch.eye(shape.lk).expand(shape.b, shape.hkv, shape.lk, shape.lk)
    generator = torch.Generator().manual_seed(seed)
    out = pyext.attention(q, k, v, dropout_p=p, generator=generator, enable_gqa=True, impl=impl, **options)
    return out != 0


def test_same_mask_as_reference(cpu, seed):
    for shape in (Shape(2, 3, 3, 40, 70), Shape(1, 4, 2, 1, 1000), Shape(1, 8, 1, 7, 513), Shape(3, 1, 1, 257, 33)):
        for p in (0.1, 0.5, 0.9):
            assert torch.equal(keep_of(shape, p, seed, cpu.impl), keep_of(shape, p, seed, "reference"))


def test_mask_ignores_tiling(cpu, seed):
    """Decode-sized, tiled, shorter and longer calls cut their masks from one: keyed by absolute (i, j)."""
    whole = keep_of(Shape(1, 2, 2, 130, 300), 0.4, seed, cpu.impl)
    for lq, lk in ((1, 300), (1, 17), (8, 299), (64, 128), (65, 129), (130, 3)):
        part = keep_of(Shape(1, 2, 2, lq, lk), 0.4, seed, cpu.impl)
        assert torch.equal(part, whole[:, :, :lq, :lk]), (lq, lk)


def test_mask_ignores_dtype_threads_and_layout(cpu, seed):
    shape = Shape(2, 4, 2, 37, 150)
    wanted = keep_of(shape, 0.3, seed, cpu.impl)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(wanted, keep_of(shape, 0.3, seed, cpu.impl))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        q, k = (torch.zeros(2, h, n, 4, dtype=dtype) for h, n in ((4, 37), (2, 150)))
        v = torch.eye(150, dtype=dtype).expand(2, 2, 150, 150)
        generator = torch.Generator().manual_seed(seed)
        out = pyext.attention(q, k, v, dropout_p=0.3, generator=generator, enable_gqa=True, impl=cpu.impl)
        assert torch.equal(wanted, out != 0)


def test_masked_rows_do_not_shift_the_mask(cpu, seed):
    """A causal or padded call drops the same (i, j) as a plain one, among those it may see."""
    shape = Shape(2, 2, 2, 90, 90)
    plain = keep_of(shape, 0.5, seed, cpu.impl)
    visible = torch.ones(90, 90, dtype=torch.bool).tril()
    assert torch.equal(keep_of(shape, 0.5, seed, cpu.impl, is_causal=True), plain & visible)
    lengths = torch.tensor([90, 41])
    visible = torch.arange(90) < lengths.view(-1, 1, 1, 1)
    masked = keep_of(shape, 0.5, seed, cpu.impl, mask=pyext.masks.padding(lengths))
    assert torch.equal(masked, plain & visible)


def test_backward_uses_the_mask_of_forward(cpu, seed):
    """dv of uniform attention is the transpose of the dropped weights."""
    drawn = draw(case(Shape(2, 3, 3, 40, 70, 8, 8), dropout=0.35), torch.float64, seed)
    keep = probe_dropout(drawn)
    with torch.no_grad():
        drawn.leaves["query"].zero_()
    got = run(drawn, cpu.impl)
    wanted = (keep.double() / 70 / 0.65).mT @ drawn.grad_out
    torch.testing.assert_close(got["grad value"], wanted, rtol=1e-10, atol=1e-12)


def test_zero_and_one(backend, seed):
    """p = 0 is no dropout to the bit; p = 1 gives zeros and finite gradients, and leaves lse alone."""
    q, k, v = (torch.randn(2, 2, n, 16, requires_grad=True) for n in (20, 33, 33))
    plain, lse = pyext.attention(q, k, v, return_lse=True, impl=backend.impl)
    assert torch.equal(plain, pyext.attention(q, k, v, dropout_p=0.0, impl=backend.impl))
    out, dropped_lse = pyext.attention(q, k, v, dropout_p=1.0, return_lse=True, impl=backend.impl)
    assert (out == 0).all()
    assert torch.equal(lse, dropped_lse)
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("p", [0.05, 0.5, 0.8])
def test_statistics(p, backend, seed):
    """Rate p within seven standard deviations, per key column and head too; neighbours are independent."""
    shape = Shape(2, 4, 4, 200, 250)
    keep = keep_of(shape, p, seed, backend.impl)
    for axes, count in (
        ((0, 1, 2, 3), keep.numel()),
        ((0, 1, 2), 2 * 4 * 200),
        ((2, 3), 200 * 250),
        ((0, 1, 3), 2 * 4 * 250),
    ):
        rate = keep.double().mean(axes)
        assert ((rate - (1 - p)).abs() < 7 * math.sqrt(p * (1 - p) / count)).all(), axes
    neighbours = (keep[..., 1:] & keep[..., :-1]).double().mean()
    assert abs(neighbours - (1 - p) ** 2) < 0.01
    assert not torch.equal(keep[0], keep[1]) and not torch.equal(keep[:, 0], keep[:, 1])


def test_generator_decides(backend):
    """The same generator state repeats a call; a generator moves on; without one the global state decides."""
    q = torch.randn(1, 2, 30, 8)

    def call(generator=None):
        return pyext.attention(q, q, q, dropout_p=0.5, generator=generator, impl=backend.impl)

    first, second = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    assert torch.equal(call(first), call(second))
    assert not torch.equal(call(first), call(torch.Generator().manual_seed(5)))
    torch.manual_seed(11)
    a, b = call(), call()
    torch.manual_seed(11)
    assert torch.equal(a, call()) and not torch.equal(a, b)


def test_same_gradients_on_all_backends(cpu, seed):
    """One seed, reference and kernel: equal to fp64 rounding, through a bias and a mask."""
    drawn = draw(case(Shape(2, 4, 2, 45, 131, 24, 24), causal(), t5(), sinks=True, dropout=0.25), torch.float64, seed)
    wanted, got = run(drawn, "reference"), run(drawn, cpu.impl)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
