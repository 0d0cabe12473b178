"""impl=, pyext.explain and the loading of the native module: who computes a call, who refuses it and why."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch._subclasses import FakeTensorMode

import pyext
from pyext import _dispatch, _native

BACKENDS = ["cuda", "cpu", "triton", "reference"]


def qkv(*size, **options):
    return tuple(torch.randn(*(size or (1, 2, 5, 4)), **options) for _ in range(3))


def packed():
    offsets = torch.tensor([0, 2, 5])
    return (*qkv(5, 2, 4), offsets, offsets)


@pytest.fixture
def no_native(monkeypatch):
    monkeypatch.setattr(_native, "_module", None)
    monkeypatch.setattr(_native, "_reason", "it was taken away")


def test_order():
    assert list(pyext.explain(pyext.attention, *qkv())) == BACKENDS == list(_dispatch.NAMES)


def test_auto_is_the_first_that_accepts(cpu):
    table = pyext.explain(pyext.attention, *qkv())
    assert table.auto == "cpu" and table["cpu"] == table["reference"] == "accepts"
    assert table["cuda"] in ("no CUDA kernel in this build", "the tensors are on cpu")
    assert table["triton"] == "accepts" or "(TRITON_INTERPRET=1 would interpret the kernels there)" in table["triton"]


def test_auto_equals_the_backend_it_names(cpu):
    call = qkv()
    assert torch.equal(pyext.attention(*call), pyext.attention(*call, impl="cpu"))


def test_without_native_module(no_native):
    table = pyext.explain(pyext.attention, *qkv())
    assert table["cpu"] == "it was taken away" and table.auto == "reference"
    call = qkv()
    assert torch.equal(pyext.attention(*call), pyext.attention(*call, impl="reference"))
    with pytest.raises(NotImplementedError, match="cpu: it was taken away"):
        pyext.attention(*call, impl="cpu")


@pytest.mark.parametrize("impl", ["cuda", "triton"])
@pytest.mark.parametrize("op", ["attention", "varlen_attention"])
def test_forced_backend_never_falls_back(op, impl):
    call = [x.double() if x.is_floating_point() else x for x in (qkv() if op == "attention" else packed())]
    with pytest.raises(NotImplementedError) as caught:
        getattr(pyext, op)(*call, impl=impl)
    message = str(caught.value)
    assert message.startswith(f"pyext.{op}: impl='{impl}' refuses this call\n")
    for name in BACKENDS:
        assert f"\n  {name}: " in message
    assert "\n  cuda: no CUDA kernel in this build\n" in message or "\n  cuda: the tensors are on cpu\n" in message


@pytest.mark.parametrize("impl", ["CPU", "native", "", None])
def test_unknown_impl(impl):
    with pytest.raises(ValueError, match=r"impl must be one of 'auto', 'cuda', 'cpu', 'triton', 'reference', got"):
        pyext.attention(*qkv(), impl=impl)
    with pytest.raises(ValueError, match="impl must be one of"):
        pyext.explain(pyext.attention, *qkv(), impl=impl)


def test_table_prints():
    text = str(pyext.explain(pyext.attention, *qkv()))
    lines = text.splitlines()
    assert lines[0] == "pyext.attention (* = impl='auto')" and len(lines) == 5
    assert sum(line.startswith("  * ") for line in lines) == 1
    assert repr(pyext.explain(pyext.attention, *qkv())) == text
    assert len(pyext.explain("varlen_attention", *packed())) == 4


def test_explain_takes_names_and_whole_calls():
    call = qkv()
    by_name = pyext.explain("attention", *call, is_causal=True, bias=pyext.bias.alibi(torch.ones(2)), return_lse=True)
    assert dict(by_name) == dict(pyext.explain(pyext.attention, *call, impl="reference"))
    assert pyext.explain(pyext.varlen_attention, *packed()).op == "varlen_attention"


@pytest.mark.parametrize("op", ["softmax", torch.nn.functional.scaled_dot_product_attention, len, 3, None])
def test_explain_refuses_other_ops(op):
    with pytest.raises(ValueError, match="op must be a pyext op or one of .*'attention', 'varlen_attention'.*, got"):
        pyext.explain(op, *qkv())


def test_explain_validates():
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"key must have shape \(B, Hkv, Lk, 4\) to match query"):
        pyext.explain(pyext.attention, q, k[..., :3], v)
    with pytest.raises(TypeError, match="missing a required argument: .value"):
        pyext.explain(pyext.attention, k, v)
    with pytest.raises(TypeError, match="generator"):
        pyext.explain(pyext.attention, q, k, v, generator=1)


def test_explain_runs_nothing(monkeypatch):
    """Neither a kernel nor the random generator is touched, even with dropout."""
    monkeypatch.setattr("pyext.ops.attention._run", None)
    call, generator = qkv(), torch.Generator().manual_seed(3)
    state, own = torch.get_rng_state(), generator.get_state()
    pyext.explain(pyext.attention, *call, dropout_p=0.5)
    pyext.explain(pyext.attention, *call, dropout_p=0.5, generator=generator)
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(own, generator.get_state())


def test_other_devices_run_on_the_reference():
    call = qkv(device="meta")
    table = pyext.explain(pyext.attention, *call)
    assert (table.auto == "reference" and "meta" in table["cpu"]) or not _native.available()
    out, lse = pyext.attention(*call, mask=pyext.masks.causal(), return_lse=True)
    assert out.device.type == "meta" and out.shape == (1, 2, 5, 4) and lse.shape == (1, 2, 5)


def test_fake_tensors(cpu):
    """Shapes, dtypes and strides without computing, as export and torch.compile ask for them."""
    with FakeTensorMode():
        out, lse = pyext.attention(*qkv(2, 3, 7, 4, dtype=torch.bfloat16), return_lse=True)
    real, real_lse = pyext.attention(*qkv(2, 3, 7, 4, dtype=torch.bfloat16), return_lse=True)
    for fake, wanted in ((out, real), (lse, real_lse)):
        assert (fake.shape, fake.dtype, fake.stride()) == (wanted.shape, wanted.dtype, wanted.stride())


def test_func_transforms_run_on_the_reference(cpu):
    q, k, v = qkv(1, 2, 5, 4, dtype=torch.float64)

    def loss(q):
        return pyext.attention(q, k, v, mask=pyext.masks.causal()).square().sum()

    wanted = torch.autograd.grad(loss(q.requires_grad_()), q)[0]
    torch.testing.assert_close(torch.func.grad(loss)(q.detach()), wanted)
    many = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64)
    each = torch.stack([pyext.attention(x, k, v) for x in many])
    torch.testing.assert_close(torch.func.vmap(lambda x: pyext.attention(x, k, v))(many), each)
    with pytest.raises(NotImplementedError, match=r"cpu: the CPU kernels do not support torch\.func"):
        torch.func.grad(lambda x: pyext.attention(x, k, v, impl="cpu").sum())(q.detach())


def test_functional_call_runs_on_the_kernels(cpu):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.zeros(32, 2))

        def forward(self, q, k, v):
            return pyext.attention(q, k, v, bias=pyext.bias.t5(self.table, True), impl="cpu")

    call, table = qkv(), torch.randn(32, 2, requires_grad=True)
    out = torch.func.functional_call(Layer(), {"table": table}, call)
    assert torch.equal(out, pyext.attention(*call, bias=pyext.bias.t5(table, True), impl="cpu"))
    out.sum().backward()
    assert table.grad is not None


def test_forward_mode_derivative(cpu):
    """The kernels have none and must not drop a tangent in silence; the reference has one."""
    q, k, v = qkv(1, 2, 5, 4, dtype=torch.float64)
    tangent, step = torch.randn_like(q), 1e-6
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, tangent)
        got = forward_ad.unpack_dual(pyext.attention(dual, k, v)).tangent
        with pytest.raises(NotImplementedError, match="cpu: the CPU kernels have no forward-mode derivative"):
            pyext.attention(dual, k, v, impl="cpu")
        assert pyext.explain(pyext.attention, q, k, v).auto == "cpu"  # no tangent in this one
    ahead, behind = (pyext.attention(q + s * tangent, k, v, impl="reference") for s in (step, -step))
    torch.testing.assert_close(got, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    ("isa", "reason"),
    [("avx1024", "PYEXT_ISA=avx1024 is not usable on this machine (usable: "), ("none", "PYEXT_ISA=none switches")],
)
def test_unusable_isa(isa, reason, cpu):
    """One warning with the reason, in the line that imports pyext, and every call on the reference."""
    code = "import torch\nimport pyext\nprint(pyext.explain(pyext.attention, *[torch.randn(1, 1, 2, 4)] * 3)['cpu'])"
    result = run(code, PYEXT_ISA=isa)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(reason)
    warnings = [line for line in result.stderr.splitlines() if "RuntimeWarning" in line]
    assert len(warnings) == 1 and "pyext runs on its slow PyTorch reference: " + reason in warnings[0]
    assert warnings[0].startswith("<string>:2: ")


def test_import_is_quiet_and_light(cpu):
    """No warning, and none of torch's slow corners (dynamo takes a second) are imported."""
    code = "import torch, sys\nbefore = set(sys.modules)\nimport pyext\nprint(sorted(set(sys.modules) - before))"
    result = run(code)
    assert result.returncode == 0 and "Warning" not in result.stderr
    assert "torch._dynamo" not in result.stdout and "torch._inductor" not in result.stdout


def test_public_names():
    assert pyext.__version__ == "0.1.0"
    for name in pyext.__all__:
        assert getattr(pyext, name) is not None
    for op in (pyext.attention, pyext.varlen_attention, pyext.rotary, pyext.Rotary, pyext.explain):
        assert op.__doc__
    for namespace in (pyext.bias, pyext.masks):
        for name in (
            ("dense", "diagonal", "alibi", "t5") if namespace is pyext.bias else ("causal", "window", "padding")
        ):
            assert getattr(namespace, name).__doc__
