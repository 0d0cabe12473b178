"""`PYEXT_AUTOTUNE=1`: which tiles are tried and kept, and that results do not depend on it. The clock is a stub."""

from __future__ import annotations

import pytest
import torch

import pyext
from support import backends

pytestmark = pytest.mark.skipif(not backends.TRITON, reason="Triton is not installed")
if backends.TRITON:
    from triton.runtime.errors import OutOfResources

    from pyext.kernels import _attention_autotune as autotune
    from pyext.kernels import attention
    from pyext.kernels._attention_configs import Config


@pytest.fixture
def timed(monkeypatch):
    """The tiles that were tried, as (kernel, configuration); a stub says that the last of them is the fastest."""
    tried = []

    def milliseconds(launch):
        tried.append(*autotune._given.get().items())
        launch()
        return 1.0 / len(tried)

    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    monkeypatch.setattr(autotune, "_fastest", {})
    return tried


def results(length: int = 70) -> tuple[torch.Tensor, ...]:
    """Attention with a table of T5, and its gradients."""
    generator = torch.Generator().manual_seed(length)
    device = backends.TRITON[0].device
    shapes = (1, 2, length, 24), (1, 1, length, 24), (1, 1, length, 24), (8, 2)
    leaves = [torch.randn(s, generator=generator).to(device).requires_grad_() for s in shapes]
    with backends.TRITON[0].selected():
        bias = pyext.bias.t5(leaves[3], bidirectional=False, max_distance=20)
        out = pyext.attention(*leaves[:3], bias=bias, is_causal=True, enable_gqa=True, impl="triton")
        return out.detach(), *torch.autograd.grad(out, leaves, out.detach())


def test_nothing_is_timed_unless_asked(timed, monkeypatch):
    monkeypatch.delenv("PYEXT_AUTOTUNE", raising=False)
    results()
    assert not timed and not autotune.asked(torch.device("cuda"))


@pytest.mark.skipif(backends.HAS_GPU, reason="there is a GPU")
def test_the_interpreter_ignores_it(timed, monkeypatch):
    before = results()
    monkeypatch.setenv("PYEXT_AUTOTUNE", "1")
    assert all(map(torch.equal, results(), before)) and not timed


def test_who_is_asked(monkeypatch):
    """GPUs, and not while a graph is captured."""
    monkeypatch.setenv("PYEXT_AUTOTUNE", "1")
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert autotune.asked(torch.device("cuda")) is not capturing


def test_every_kernel_is_tried_once(timed, monkeypatch):
    """Forward, dQ, dK with dV and the table's sum each keep the fastest of their candidates, and the results stay."""
    before = results()
    monkeypatch.setattr(autotune, "asked", lambda device: True)
    for got, wanted in zip(results(), before, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    kernels = [kernel for kernel, _ in timed]
    assert set(kernels) == {"forward", "queries", "keys", "sums"} and all(kernels.count(k) > 3 for k in kernels)
    kept = {key[1]: config for key, config in autotune._fastest.items()}
    assert kept == dict(timed)  # the last of each
    tries = len(timed)
    ran = []
    monkeypatch.setattr(attention, "chosen", lambda *table: ran.append(autotune.chosen(*table)) or ran[-1])
    results(65)  # of the same rough size
    assert len(timed) == tries and ran == [kept["forward"]]
    results(20)
    assert len(timed) > tries


def test_neighbours():
    config = Config(128, 64, 8, 3)
    found = autotune.neighbours("forward", config)
    assert found == [config] + [
        config._replace(**change)
        for change in ({"rows": 64}, {"columns": 32}, {"columns": 128}, {"warps": 4}, {"stages": 2})
    ]
    assert all(c.rows == c.columns for c in autotune.neighbours("sums", Config(32, 32, 4, 1)))


def test_what_does_not_fit_is_passed_over(monkeypatch):
    """Unless it is the table's."""
    first, large, quick = candidates = [Config(16, 16, 4, 1), Config(128, 128, 4, 3), Config(32, 16, 4, 1)]
    times = {first: 2.0, quick: 1.0}

    def milliseconds(launch):
        if launch() == large:
            raise OutOfResources(1, 0, "shared memory")
        return times[launch()]

    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    assert autotune.fastest("keys", lambda: autotune.chosen("keys", first), candidates) == quick
    with pytest.raises(OutOfResources):
        autotune.fastest("keys", lambda: autotune.chosen("keys", first), candidates[1:])
