"""Gated feed-forward layers and mixtures of experts of Transformers' models."""

import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import activations

from ... import moe as _moe
from ..._primitives import Routing, acc_dtype
from ...ops.gated_linear import gated_linear, gated_mlp
from ...reference.moe_route import maps
from ._masks import ModelMask
from ._swap import original_class, same_code

_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}


def activation_name(function) -> str | None:
    """ "silu", "gelu", "gelu_tanh" or "relu", where an activation of Transformers or torch is one of them."""
    kind = type(function)
    if kind in (nn.SiLU, activations.SiLUActivation) or function is nn.functional.silu:
        return "silu"
    if kind is nn.ReLU or function in (nn.functional.relu, torch.relu):
        return "relu"
    if kind is activations.GELUActivation or function is nn.functional.gelu:
        return "gelu"
    if kind in (activations.NewGELUActivation, activations.GELUTanh):
        return "gelu_tanh"
    if kind is nn.GELU:
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    return None


def is_plain(*layers: nn.Module) -> bool:
    """Whether these are `nn.Linear` and nothing besides: no adapter, quantisation, hook or wrapper."""
    return all(
        original_class(layer) is nn.Linear
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)
        and "forward" not in layer.__dict__
        for layer in layers
    )


# --- Gated feed-forward layers ---


def _llama(self, x):
    """`LlamaMLP.forward`."""
    gate, up, down = self.gate_proj, self.up_proj, self.down_proj
    if not is_plain(gate, up, down):
        return self._pyext_original.forward(self, x)
    activation = _GATED[activation_name(self.act_fn)]
    return gated_mlp(x, gate.weight, up.weight, down.weight, gate.bias, up.bias, down.bias, activation)


def _phi3(self, hidden_states):
    """`Phi3MLP.forward`: gate and up are one projection."""
    both, down = self.gate_up_proj, self.down_proj
    if not is_plain(both, down):
        return self._pyext_original.forward(self, hidden_states)
    activation = _GATED[activation_name(self.activation_fn)]
    return gated_mlp(hidden_states, both.weight, None, down.weight, both.bias, None, down.bias, activation)


def _t5(self, hidden_states):
    """`T5DenseGatedActDense.forward`: dropout before the last projection, which may be kept in fp32."""
    gate, up, down = self.wi_0, self.wi_1, self.wo
    if not is_plain(gate, up, down):
        return self._pyext_original.forward(self, hidden_states)
    activation = _GATED[activation_name(self.act)]
    drops = self.training and self.dropout.p > 0
    if down.weight.dtype == gate.weight.dtype and not drops:
        return gated_mlp(hidden_states, gate.weight, up.weight, down.weight, activation=activation)
    inner = self.dropout(gated_linear(hidden_states, gate.weight, up.weight, activation=activation))
    return down(inner.to(down.weight.dtype))


#: Layers by the text of their forward: (module of Transformers, class, name of the activation, projections, ours).
_LAYERS = (
    ("llama", "LlamaMLP", "act_fn", ("gate_proj", "up_proj", "down_proj"), _llama),
    ("phi3", "Phi3MLP", "activation_fn", ("gate_up_proj", "down_proj"), _phi3),
    ("t5", "T5DenseGatedActDense", "act", ("wi_0", "wi_1", "wo"), _t5),
)


def gated(module: nn.Module, cls: type) -> dict[str, Callable] | str | None:
    """The methods of a gated feed-forward layer; why it stays as it is; None for other modules."""
    for family, name, activation, projections, ours in _LAYERS:
        if not all(isinstance(getattr(module, p, None), nn.Module) for p in (*projections, activation)):
            continue
        published = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        if not same_code(cls.forward, getattr(published, name).forward):
            return f"its forward is not {name}'s"
        if activation_name(getattr(module, activation)) is None:
            return f"no kernel for the activation {type(getattr(module, activation)).__name__}"
        return {"forward": ours}
    return None


# --- Mixtures of experts ---


def experts_forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts as Transformers' `ExpertsInterface` calls them.

    Args:
        self: the module that holds gate_up_proj (or up_proj), down_proj and their biases, all experts in one tensor.
        hidden_states: (T, H).
        top_k_index: (T, K), the experts of each token; num_experts or more = an expert of another rank.
        top_k_weights: (T, K).
    Returns:
        (T, H) in the dtype of hidden_states.
    """
    up = self.gate_up_proj if self.has_gate else self.up_proj
    down = self.down_proj
    b_up, b_down = None, None
    if self.has_bias:
        b_up, b_down = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias, self.down_proj_bias
    if self.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    routing = routing_of(top_k_index, top_k_weights, self.num_experts)
    x = hidden_states if torch.is_autocast_enabled(hidden_states.device.type) else hidden_states.to(up.dtype)
    activation = _experts_activation(self)
    norm = self.post_expert_norm if getattr(self, "has_post_expert_norm", False) else None  # not in older releases
    if activation is not None and norm is None:
        out = _moe.forward(x, routing, up, down, activation, b_up, b_down)
    else:
        inner = _moe.grouped_linear(_moe.dispatch(x, routing), up, routing.offsets, b_up)
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        ys = _moe.grouped_linear(inner, down, routing.offsets, b_down)
        out = _moe.combine(ys if norm is None else norm(ys), routing)
    return out.to(hidden_states.dtype)


def _experts_activation(self) -> str | None:
    """The activation of `pyext.moe` that these experts have, or None for one of their own."""
    name = activation_name(getattr(self, "act_fn", None))
    if name is None or not self.has_gate:
        return name
    default = importlib.import_module("transformers.integrations.moe")._default_apply_gate
    concatenated = getattr(self, "is_concatenated", True)  # as all are where experts do not say so
    return _GATED[name] if concatenated and type(self)._apply_gate is default else None


def routing_of(index: Tensor, weights: Tensor, experts: int) -> Routing:
    """The `Routing` of choices made elsewhere: index and weights (T, K), index outside [0, experts) = no expert."""
    index = torch.where((index >= 0) & (index < experts), index, -1)
    offsets, source, position = maps(index, experts, index.numel())
    zero = weights.new_zeros((), dtype=torch.float32)
    weights = weights.to(acc_dtype(weights.dtype)).masked_fill(index < 0, 0.0)
    dropped = torch.zeros((), dtype=torch.int32, device=index.device)
    return Routing(index.to(torch.int32), weights, offsets, source, position, zero, zero, dropped)


def _switch_router(self, hidden_states):
    """`SwitchTransformersTop1Router.forward`; in place of one-hot choices and weights it returns the `Routing`."""
    hidden_states = hidden_states.to(self.dtype)
    if self.training and self.jitter_noise > 0:
        noise = torch.empty_like(hidden_states).uniform_(1.0 - self.jitter_noise, 1.0 + self.jitter_noise)
        hidden_states = hidden_states * noise
    self.classifier = self.classifier.to(self.dtype)
    logits = self.classifier(hidden_states)
    # a capacity of C slots is a factor of C E / S
    factor = self.expert_capacity * self.num_experts / max(hidden_states.shape[1], 1)
    routing = _moe.route(logits, 1, policy="switch", capacity_factor=factor)
    return routing, routing.weights, logits


def _switch_layer(self, hidden_states):
    """`SwitchTransformersSparseMLP.forward`."""
    routing, _, _ = self.router(hidden_states)
    return self.experts(hidden_states.flatten(0, 1), routing, None).view(hidden_states.shape)


def _switch_experts(self, hidden_states, routing, routing_weights):
    """`SwitchTransformersExperts.forward`."""
    layers = [self[f"expert_{n}"] for n in range(self.num_experts)]
    if not _are_plain(layers, "wi", "wo"):
        chosen = routing.expert_index[..., None] == torch.arange(self.num_experts, device=hidden_states.device)
        weights = routing.weights.to(hidden_states.dtype)
        return self._pyext_original.forward(self, hidden_states, chosen.long(), weights)
    return _side_by_side(layers, "wi", "wo", hidden_states, routing)


def _are_plain(layers: list[nn.Module], up: str, down: str) -> bool:
    return is_plain(*(getattr(layer, name) for layer in layers for name in (up, down)))


def _side_by_side(layers: list[nn.Module], up: str, down: str, x: Tensor, routing: Routing) -> Tensor:
    """Experts that are modules of their own: their matrices together, all tokens at once."""
    (w_up, b_up), (w_down, b_down) = (_stacked([getattr(layer, name) for layer in layers]) for name in (up, down))
    first = layers[0]
    activation, drops = activation_name(first.act), first.training and first.dropout.p > 0
    if activation is not None and not drops and w_up.dtype == w_down.dtype:
        return _moe.forward(x, routing, w_up, w_down, activation, b_up, b_down)
    inner = _moe.grouped_linear(_moe.dispatch(x, routing), w_up, routing.offsets, b_up)
    inner = first.dropout(first.act(inner)).to(w_down.dtype)
    return _moe.combine(_moe.grouped_linear(inner, w_down, routing.offsets, b_down), routing).to(x.dtype)


def _stacked(layers: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    biases = None if layers[0].bias is None else torch.stack([layer.bias for layer in layers])
    return torch.stack([layer.weight for layer in layers]), biases


def switch(module: nn.Module, cls: type) -> dict[str, Callable] | str | None:
    """The methods of Switch's mixture of experts. Its three parts are replaced together, by the layer around them."""
    published = importlib.import_module("transformers.models.switch_transformers.modeling_switch_transformers")
    ours = {
        published.SwitchTransformersTop1Router: _switch_router,
        published.SwitchTransformersExperts: _switch_experts,
        published.SwitchTransformersSparseMLP: _switch_layer,
    }
    if cls in ours:
        return {"forward": ours[cls]}
    return None


def _nllb_experts(self, hidden_states, router_mask, router_probs):
    """`NllbMoeExperts.forward`, which reads the router's mask of zeros and ones as numbers of experts: column j sends a
    token to expert router_mask[:, j] with weight router_probs[:, j]. So all tokens go to the first two."""
    layers = [self[f"expert_{n}"] for n in range(2)]
    if not _are_plain(layers, "fc1", "fc2") or (self.training and self.moe_token_dropout > 0):
        return self._pyext_original.forward(self, hidden_states, router_mask, router_probs)
    weights = torch.stack([(router_probs * (router_mask == n)).sum(1) for n in range(2)], dim=1)
    both = torch.arange(2, device=hidden_states.device).expand(len(hidden_states), 2)
    out = _side_by_side(layers, "fc1", "fc2", hidden_states, routing_of(both, weights, 2))
    return out * (1 - self.moe_token_dropout) if self.moe_token_dropout > 0 else out


def _nllb_layer(self, hidden_states, padding_mask=None):
    """`NllbMoeSparseMLP.forward`. Its router reads padding from the last row of the mask, nonzero = hidden."""
    if isinstance(padding_mask, ModelMask):
        padding_mask = ~padding_mask.last_row(hidden_states.device)
    return self._pyext_original.forward(self, hidden_states, padding_mask)


def _nllb_route(self, router_logits, input_dtype=torch.float32, padding_mask=None):
    """`NllbMoeTop2Router.route_tokens` where both experts are always wanted, by probabilities that are not rounded."""
    tokens, experts = router_logits.shape
    if not self.training and self.moe_eval_capacity_token_fraction > 0:
        self.expert_capacity = math.ceil(self.moe_eval_capacity_token_fraction * tokens)
    elif self.expert_capacity is None:
        self.expert_capacity = 2 * math.ceil(tokens / experts)
    if tokens == 0 or self.expert_capacity == 0:
        return self._pyext_original.route_tokens(self, router_logits, input_dtype, padding_mask)
    routed = None
    if padding_mask is not None and not self.router_ignore_padding_tokens:
        if padding_mask.dim() == 4:
            padding_mask = padding_mask[:, :, -1, :].reshape(-1)[-tokens:]
        routed = ~padding_mask.bool()
    before = self.normalize_router_prob_before_dropping
    routing = _moe.route(
        router_logits, 2, renormalize=before, capacity_factor=self.expert_capacity * experts / (2 * tokens),
        batch_priority=self.batch_prioritized_routing, token_mask=routed,
    )  # fmt: skip
    weights = routing.weights
    if not before:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(input_dtype).eps)
    index = routing.expert_index.long() % (experts + 1)  # -1, no expert, is a column of its own
    first = nn.functional.one_hot(index[:, 0], experts + 1)[:, :experts]
    gates = weights.new_zeros(tokens, experts + 1).scatter(1, index, weights)[:, :experts]
    return first, gates.to(input_dtype)


def nllb(module: nn.Module, cls: type) -> dict[str, Callable] | str | None:
    """The methods of NLLB's mixture of experts: its router, its experts and the layer around them."""
    if cls.__name__ == "NllbMoeSparseMLP":
        return {"forward": _nllb_layer}
    if cls.__name__ not in ("NllbMoeExperts", "NllbMoeTop2Router"):
        return None
    if module.num_experts == 1:
        return "one expert twice"
    if cls.__name__ == "NllbMoeExperts":
        return {"forward": _nllb_experts}
    if module.second_expert_policy != "all":
        return f"second_expert_policy={module.second_expert_policy!r}: its chance is not GShard's"
    return {"route_tokens": _nllb_route}


def _bloom_gelu(self, x):
    """`BloomGelu.forward`: GELU by tanh, in one pass."""
    return nn.functional.gelu(x, approximate="tanh")


def bloom_gelu(module: nn.Module, cls: type) -> dict[str, Callable] | None:
    """The methods of BLOOM's activation, whose seven passes and their backward take a tenth of a layer's time."""
    return {"forward": _bloom_gelu} if cls.__name__ == "BloomGelu" else None
