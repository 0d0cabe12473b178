"""pyext.nn.GatedMLP against Transformers' LlamaMLP and plain linear layers."""

from __future__ import annotations

import pytest
import torch

import pyext
from support.gated import ACTIVATIONS


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_formula_and_gradients(activation, bias, cpu_best):
    module = pyext.nn.GatedMLP(24, 40, activation=activation, bias=bias, dtype=torch.float64)
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    leaves = [x, *module.parameters()]
    out = module(x)
    wanted = module.down_proj(ACTIVATIONS[activation](module.gate_proj(x)) * module.up_proj(x))
    torch.testing.assert_close(out, wanted)
    grads = (torch.autograd.grad(y.square().sum(), leaves) for y in (out, wanted))
    for got, expected in zip(*grads):
        torch.testing.assert_close(got, expected)


def test_state_dict_of_llama(cpu_best):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=32, intermediate_size=80, mlp_bias=True)
    theirs, ours = llama.LlamaMLP(config), pyext.nn.GatedMLP(32, 80, bias=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 7, 32)
    torch.testing.assert_close(ours(x), theirs(x))


def test_construction():
    module = pyext.nn.GatedMLP(8, 12, activation="geglu", device="meta", dtype=torch.bfloat16)
    assert {n for n, _ in module.named_parameters()} == {f"{p}_proj.weight" for p in ("gate", "up", "down")}
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in module.parameters())
    assert "activation='geglu'" in repr(module)


def test_functional_call_and_autocast(cpu_best):
    module = pyext.nn.GatedMLP(8, 12)
    doubled = {name: 2 * p for name, p in module.named_parameters()}
    x = torch.randn(4, 8)
    torch.testing.assert_close(torch.func.functional_call(module, doubled, x), _scaled(module, x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def _scaled(module, x):
    gate, up = 2 * module.gate_proj(x), 2 * module.up_proj(x)
    return 2 * module.down_proj(torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pyext.nn.GatedMLP(8, 12, activation="silu"), ValueError, "activation must be one of 'geglu'"),
        (lambda: pyext.nn.GatedMLP(8.0, 12), TypeError, "hidden_size must be an int, got float"),
        (lambda: pyext.nn.GatedMLP(8, -1), ValueError, "intermediate_size must be a non-negative int, got -1"),
        (lambda: pyext.nn.GatedMLP(8, 12, bias="no"), TypeError, "bias must be a bool, got str"),
        (lambda: pyext.nn.GatedMLP(8, 12)(torch.randn(3, 9)), ValueError, "w_gate must have shape"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
