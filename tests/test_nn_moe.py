"""pyext.nn.MoE against Transformers' mixtures of experts with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pyext

DTYPE = torch.float64


def compare(ours, theirs, shared, x, call=None):
    """Outputs, gradients of the input and of every pair of parameters in `shared`: ours by name -> theirs' tensors."""
    results = []
    for module, compute in ((ours, ours), (theirs, call or theirs)):
        leaf = x.detach().clone().requires_grad_()
        out = compute(leaf)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        module.zero_grad()
        (out * weight).sum().backward()
        results.append((out.detach(), leaf.grad))
    for mine, yours in zip(*results):
        torch.testing.assert_close(mine, yours, rtol=1e-9, atol=1e-10)
    for name, parameters in shared.items():
        wanted = torch.stack([p.grad for p in parameters]) if isinstance(parameters, list) else parameters.grad
        torch.testing.assert_close(ours.get_parameter(name).grad, wanted, rtol=1e-9, atol=1e-10, msg=name)


def load(ours, shared):
    with torch.no_grad():
        for name, theirs in shared.items():
            ours.get_parameter(name).copy_(torch.stack(list(theirs)) if isinstance(theirs, list) else theirs)


def randomise(module, std=0.3):
    module.double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return module


@pytest.mark.parametrize("policy", ["softmax_topk", "topk_softmax"])
def test_mixtral(policy, monkeypatch):
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # their router rounds its logits to fp32
    config = MixtralConfig(hidden_size=12, intermediate_size=20, num_local_experts=6, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    theirs = randomise(MixtralSparseMoeBlock(config))
    ours = pyext.nn.MoE(12, 20, 6, 2, policy=policy, renormalize=True, dtype=DTYPE)
    shared = {
        "router.weight": theirs.gate.weight,
        "w_gate_up": theirs.experts.gate_up_proj,
        "w_down": theirs.experts.down_proj,
    }
    load(ours, shared)
    compare(ours, theirs, shared, torch.randn(2, 9, 12, dtype=DTYPE))


@pytest.mark.parametrize("capacity", [2, 64])
def test_switch(capacity):
    """Capacity counts per sequence. Their dropped tokens and ours have output 0."""
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    config = SwitchTransformersConfig(
        hidden_size=12, d_model=12, d_ff=20, num_experts=4, expert_capacity=capacity, dropout_rate=0.0
    )
    theirs = randomise(SwitchTransformersSparseMLP(config)).eval()
    theirs.router.dtype = DTYPE
    ours = pyext.nn.MoE(
        12,
        20,
        4,
        1,
        activation="relu",
        policy="switch",
        capacity_factor=capacity * 4 / 11,
        per_sequence=True,
        dtype=DTYPE,
    )
    experts = [theirs.experts[f"expert_{n}"] for n in range(4)]
    shared = {
        "router.weight": theirs.router.classifier.weight,
        "w_gate_up": [expert.wi.weight for expert in experts],
        "w_down": [expert.wo.weight for expert in experts],
    }
    load(ours, shared)
    x = torch.randn(3, 11, 12, dtype=DTYPE)
    compare(ours, theirs, shared, x)
    _, routing = ours(x, return_routing=True)
    assert (int(routing.dropped) > 0) == (capacity == 2)


def test_deepseek(monkeypatch):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    monkeypatch.setattr(torch, "float32", torch.float64)  # their router computes in fp32
    config = DeepseekV3Config(
        hidden_size=12, moe_intermediate_size=7, n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2,
        routed_scaling_factor=2.5, n_shared_experts=2,
    )  # fmt: skip
    config._experts_implementation = "eager"
    theirs = randomise(DeepseekV3MoE(config))
    theirs.gate.e_score_correction_bias.normal_(std=0.2)
    ours = pyext.nn.MoE(
        12, 7, 8, 3, policy="sigmoid", groups=(4, 2), renormalize=True, expert_bias=True, scale=2.5,
        shared=theirs.shared_experts, dtype=DTYPE,
    )  # fmt: skip
    ours.expert_bias = theirs.gate.e_score_correction_bias.double()
    shared = {
        "router.weight": theirs.gate.weight,
        "w_gate_up": theirs.experts.gate_up_proj,
        "w_down": theirs.experts.down_proj,
    }
    load(ours, shared)
    compare(ours, theirs, shared, torch.randn(2, 9, 12, dtype=DTYPE))


@pytest.mark.parametrize("policy", ["softmax_topk", "topk_softmax", "switch", "gshard", "sigmoid", "expert_choice"])
def test_every_policy_trains(policy):
    k = 1 if policy == "switch" else 2
    module = pyext.nn.MoE(6, 4, 5, k, policy=policy, capacity_factor=1.25, bias=True, jitter=0.1)
    x, generator = torch.randn(3, 7, 6, requires_grad=True), torch.Generator().manual_seed(1)
    mask = torch.rand(3, 7) < 0.7
    state = torch.get_rng_state()
    out, routing = module(x, token_mask=mask, generator=generator, return_routing=True)
    assert torch.equal(state, torch.get_rng_state())
    assert out.shape == x.shape and not out[~mask].any()
    (out.square().sum() + routing.balance_loss + routing.z_loss).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in module.parameters())
    assert not x.grad[~mask].any()
    module.eval()
    assert torch.equal(module(x), module(x)) and torch.equal(state, torch.get_rng_state())


def test_capacity_counts_per_call_or_per_sequence():
    x = torch.randn(1, 1, 6).expand(2, 8, 6)  # all tokens want the same expert
    for per_sequence, kept in ((False, range(4)), (True, [0, 1, 8, 9])):
        module = pyext.nn.MoE(6, 4, 4, 1, policy="switch", capacity_factor=1.0, per_sequence=per_sequence)
        _, routing = module(x, return_routing=True)
        assert (routing.expert_index[:, 0] >= 0).nonzero()[:, 0].tolist() == list(kept)


@pytest.mark.parametrize("shape", [(6,), (0, 6), (5, 6), (2, 0, 6), (2, 3, 4, 6)], ids=str)
@pytest.mark.parametrize("per_sequence", [False, True])
def test_shapes(shape, per_sequence):
    module, x = pyext.nn.MoE(6, 4, 5, 2, per_sequence=per_sequence), torch.randn(shape)
    out = module(x)
    assert out.shape == shape
    torch.testing.assert_close(out.view(-1, 6), module(x.view(-1, 6)))


def test_router_is_computed_in_single_precision():
    module, x = pyext.nn.MoE(6, 4, 5, 2), torch.randn(9, 6)
    wanted = module(x, return_routing=True)[1]
    with torch.autocast("cpu", torch.bfloat16):
        out, routing = module(x, return_routing=True)
    assert out.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(routing, wanted))
    half = module.to(torch.bfloat16)
    out, routing = half(x.bfloat16(), return_routing=True)
    assert out.dtype == torch.bfloat16 and routing.weights.dtype == torch.float32


def test_bias_update_balances():
    """Experts with more rows than their share become less likely, the others more."""
    module = pyext.nn.MoE(6, 4, 4, 1, policy="sigmoid", expert_bias=True)
    assert "expert_bias" in module.state_dict()
    x = torch.randn(400, 6)
    with torch.no_grad():
        module.router.weight[0] += 0.5
    spread = []
    for _ in range(100):
        _, routing = module(x, return_routing=True)
        spread.append(float(routing.offsets.diff().double().std()))
        module.update_expert_bias(routing, 0.01)
    assert spread[-1] < 0.5 * spread[0]
    before = module.expert_bias.clone()
    module.update_expert_bias(routing._replace(offsets=torch.tensor([0, 10, 20, 20, 40])), 0.5)
    torch.testing.assert_close(module.expert_bias - before, torch.tensor([0.0, 0.0, 0.5, -0.5]))


def test_compile():
    module = pyext.nn.MoE(6, 4, 5, 2, capacity_factor=1.5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, 6)
    torch.testing.assert_close(compiled(x), module(x))


def test_the_call_of_the_docs():
    text = (Path(__file__).parents[1] / "docs" / "moe.md").read_text()
    names = {}
    exec(text.partition("```python\n")[2].partition("```")[0], names)
    names["loss"].backward()
    assert names["out"].shape == (32, 16) and names["logits"].grad.isfinite().all()


def test_refusals():
    with pytest.raises(ValueError, match="activation must be one of"):
        pyext.nn.MoE(6, 4, 5, 2, activation="tanh")
    with pytest.raises(ValueError, match="policy must be one of"):
        pyext.nn.MoE(6, 4, 5, 2, policy="best")
    with pytest.raises(ValueError, match="expert_bias must be False with policy='switch'"):
        pyext.nn.MoE(6, 4, 5, 1, policy="switch", expert_bias=True)
    module = pyext.nn.MoE(6, 4, 5, 2)
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 6\), got \(3, 5\)"):
        module(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"token_mask must have shape \(3,\) to match x"):
        module(torch.zeros(3, 6), token_mask=torch.ones(3, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="expert_bias must be True"):
        module.update_expert_bias(module(torch.zeros(3, 6), return_routing=True)[1], 0.1)
    with pytest.raises(NotImplementedError, match=r"pyext\.moe\.route: impl='cuda' refuses"):
        pyext.nn.MoE(6, 4, 5, 2, impl="cuda")(torch.zeros(3, 6))
