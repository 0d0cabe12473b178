"""`MoE`: a feed-forward layer of many experts, of which each token uses a few."""

import math
from types import NoneType

import torch
from torch import Tensor, nn

from .. import _checks
from .._primitives import ACTIVATIONS, EXPERT_ACTIVATIONS, POLICIES, Routing
from ..distributed import ExpertParallel
from ..ops._collectives import gathered
from ..ops.moe_experts import forward as _forward
from ..ops.moe_route import route

_EXPERTS = ("w_gate_up", "w_down", "b_gate_up", "b_down")


class MoE(nn.Module):
    """sum_k weight_k expert_k(x) + shared(x), the experts chosen by a linear router whose logits are computed in fp32.

    expert_e(x) = act(x w_gate_up[e]^T + b_gate_up[e]) w_down[e]^T + b_down[e].

    Args:
        d_model, d_hidden: width of x, and of the experts' hidden layer.
        num_experts, top_k: experts, and how many a token uses.
        activation: "geglu", "geglu_tanh", "swiglu", "reglu"; not gated: "gelu", "gelu_tanh", "silu", "relu".
        policy, capacity_factor, renormalize, jitter, groups, batch_priority: as in `pyext.moe.route`, but nothing is
            random in evaluation: there is no jitter, and "gshard" becomes "softmax_topk" with renormalize, which keeps
            every second choice.
        per_sequence: capacity and balance loss count per sequence (the second last dimension of x), not per call.
        bias: the experts have biases.
        expert_bias: "sigmoid" chooses with a bias, a buffer that `update_expert_bias` moves.
        scale: factor on the weights (DeepSeek's routed_scaling_factor).
        shared: a module that all tokens go through besides, such as a gated feed-forward layer.
        expert_parallel: a `pyext.distributed.ExpertParallel`: its processes divide the experts, and the module holds
            this one's. Its state dict has these only, and can be loaded from one of all experts, as
            `pyext.distributed.full_state_dict` makes it. Made with one seed, the modules of all processes hold what
            the module of one process would.
        impl: backend of routing and experts.
        device, dtype: of the parameters.
    Source: Shazeer et al., "Outrageously large neural networks" (2017), eq. 1; a shared expert: Dai et al., DeepSeekMoE
        (2024), section 3.2.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        num_experts: int,
        top_k: int,
        activation: str = "swiglu",
        policy: str = "softmax_topk",
        capacity_factor: float | None = None,
        renormalize: bool = False,
        jitter: float = 0.0,
        groups: tuple[int, int] | None = None,
        batch_priority: bool = False,
        per_sequence: bool = False,
        bias: bool = False,
        expert_bias: bool = False,
        scale: float = 1.0,
        shared: nn.Module | None = None,
        expert_parallel: ExpertParallel | None = None,
        impl: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        _checks.one_of("activation", activation, EXPERT_ACTIVATIONS)
        _checks.one_of("policy", policy, POLICIES)
        if expert_bias and policy != "sigmoid":
            raise ValueError(f"expert_bias must be False with policy={policy!r}: it belongs to 'sigmoid'")
        self.top_k, self.activation, self.policy, self.renormalize = top_k, activation, policy, renormalize
        self.capacity_factor, self.jitter, self.groups, self.batch_priority = (
            capacity_factor,
            jitter,
            groups,
            batch_priority,
        )
        self.per_sequence, self.scale, self.impl = per_sequence, scale, impl
        if not isinstance(expert_parallel, (ExpertParallel, NoneType)):
            raise TypeError(
                "expert_parallel must be a pyext.distributed.ExpertParallel or None, "
                f"got {type(expert_parallel).__name__}"
            )
        self.num_experts, self.expert_parallel = _checks.length("num_experts", num_experts), expert_parallel
        own = len(self.local_experts)
        where = {"device": device, "dtype": dtype}
        rows = 2 * d_hidden if activation in ACTIVATIONS else d_hidden
        self.router = nn.Linear(d_model, num_experts, bias=False, **where)
        self.w_gate_up = nn.Parameter(torch.empty(own, rows, d_model, **where))
        self.w_down = nn.Parameter(torch.empty(own, d_model, d_hidden, **where))
        self.b_gate_up = nn.Parameter(torch.empty(own, rows, **where)) if bias else None
        self.b_down = nn.Parameter(torch.empty(own, d_model, **where)) if bias else None
        self.register_buffer("expert_bias", torch.zeros(num_experts, device=device) if expert_bias else None)
        self.shared = shared
        if expert_parallel is not None:
            self.register_load_state_dict_pre_hook(_take_own)
        self.reset_parameters()

    @property
    def local_experts(self) -> range:
        """The experts whose weights this module holds."""
        count = self.num_experts
        return range(count) if self.expert_parallel is None else self.expert_parallel.local_experts(count)

    def expert_parameters(self) -> dict[str, nn.Parameter]:
        """name -> parameter of the experts, whose first dimension is `local_experts`."""
        return {name: value for name in _EXPERTS if (value := getattr(self, name)) is not None}

    def reset_parameters(self) -> None:
        """Every expert as an `nn.Linear` of its sizes."""
        self.router.reset_parameters()
        for weight, bias in ((self.w_gate_up, self.b_gate_up), (self.w_down, self.b_down)):
            bound = 1 / math.sqrt(max(weight.shape[2], 1))
            for parameter in (weight, bias):
                if parameter is not None:
                    self._draw(parameter, bound)

    @torch.no_grad()
    def _draw(self, parameter: Tensor, bound: float) -> None:
        """Draw all experts and keep this module's, so that with one seed no two processes have the same."""
        other = parameter.new_empty(parameter.shape[1:])
        own = self.local_experts
        for expert in range(self.num_experts):
            nn.init.uniform_(parameter[own.index(expert)] if expert in own else other, -bound, bound)

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Routing]:
        """Route every token and sum the outputs of its experts.

        Args:
            x: (..., d_model).
            token_mask: x's shape without the last dimension, bool, False = padding: its routed output is 0.
            generator: source of the random numbers, if there are any.
            return_routing: also return the routing, which holds the losses: add
                coefficient * routing.balance_loss, and likewise z_loss, to the loss of the model.
        Returns:
            x's shape, in the dtype of the experts' products; with `return_routing` also the `Routing`.
        Raises:
            TypeError, ValueError naming the argument.
        """
        if _checks.floating("x", x).dim() == 0 or x.shape[-1] != self.router.in_features:
            raise _checks.shape_error("x", f"(..., {self.router.in_features})", "", x)
        if token_mask is not None and _checks.tensor("token_mask", token_mask).shape != x.shape[:-1]:
            raise _checks.shape_error("token_mask", _checks.shape_text(x.shape[:-1]), "to match x", token_mask)
        lead, width = x.shape[:-1], x.shape[-1]
        grouped = (math.prod(lead[:-1]), lead[-1]) if self.per_sequence and lead else (math.prod(lead),)
        if token_mask is not None:
            token_mask = token_mask.reshape(grouped)
        routing = self._route(x.reshape(*grouped, width), token_mask, generator)
        layer = self.w_gate_up, self.w_down, self.activation, self.b_gate_up, self.b_down
        compute = _forward if self.expert_parallel is None else self.expert_parallel.forward
        out = compute(x.reshape(math.prod(lead), width), routing, *layer, impl=self.impl).view(x.shape)
        if self.shared is not None:
            out = out + self.shared(x)
        return (out, routing) if return_routing else out

    def _route(self, x: Tensor, token_mask: Tensor | None, generator) -> Routing:
        with _checks.without_autocast(x.device):
            wide = torch.promote_types(x.dtype, torch.float32)
            logits = nn.functional.linear(x.to(wide), self.router.weight.to(wide))
        policy, renormalize = self.policy, self.renormalize
        if policy == "gshard" and not self.training:
            policy, renormalize = "softmax_topk", True
        routing = (route if self.expert_parallel is None else self.expert_parallel.route)(
            logits,
            self.top_k,
            policy=policy,
            capacity_factor=self.capacity_factor,
            renormalize=renormalize,
            token_mask=token_mask,
            expert_bias=self.expert_bias,
            jitter=self.jitter if self.training else 0.0,
            generator=generator,
            groups=self.groups,
            batch_priority=self.batch_priority,
            impl=self.impl,
        )
        return routing if self.scale == 1.0 else routing._replace(weights=routing.weights * self.scale)

    @torch.no_grad()
    def update_expert_bias(self, routing: Routing, rate: float) -> None:
        """After a step: raise the bias of experts with less than their share of this routing's rows, lower the others'.

        The rows of all processes count, and all must call this.

        Source: Wang et al., "Auxiliary-loss-free load balancing strategy for mixture-of-experts" (2024), algorithm 1.
        """
        if self.expert_bias is None:
            raise ValueError("expert_bias must be True where the module is made, to have a bias to update")
        load = routing.offsets.diff().to(self.expert_bias.dtype)
        if self.expert_parallel is not None:
            load = gathered(self.expert_parallel.group, load).sum(dim=0)
        self.expert_bias.add_(torch.sign(load.mean() - load), alpha=_checks.real("rate", rate))


def _take_own(module: MoE, state: dict, prefix: str, *_) -> None:
    """Before a state dict is loaded: of weights of all experts keep those of this module."""
    for name in module.expert_parameters():
        value = state.get(prefix + name)
        if value is not None and value.shape[0] == module.num_experts:
            state[prefix + name] = module.expert_parallel.shard(value)
