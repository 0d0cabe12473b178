"""Work shared between processes by `torch.distributed`.

q, k, v = (pyext.distributed.shard_sequence(x) for x in (q, k, v))  # or made from a sharded x in the first place
out = pyext.distributed.context_parallel_attention(q, k, v, is_causal=True)  # sharded likewise

ep = pyext.distributed.ExpertParallel()
routing = ep.route(logits, top_k)  # of this process' tokens
out = ep.forward(x, routing, ep.shard(w_gate_up), ep.shard(w_down))
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from . import _checks, moe
from ._primitives import Routing, acc_dtype
from .ops._collectives import GatheredParts, ScaledGradient, eager, exchanged, gathered, gathered_parts, place
from .ops._register import is_recorded
from .ops.context_parallel import context_parallel_attention as context_parallel_attention
from .ops.context_parallel import shard_sequence as shard_sequence
from .ops.moe_dispatch import checked_routing
from .reference.moe_route import maps


class Exchange(NamedTuple):
    """Which rows go where: what `ExpertParallel.dispatch` finds out and `combine` needs."""

    routing: Routing  # of the rows that came here, each a token with one choice, among the experts of this process
    sent: list[int]  # rows to each process
    received: list[int]  # rows from each
    is_recorded: bool  # by autograd, on some process and therefore on all
    tied: tuple[Tensor, ...] = ()  # what came, if there is no expert for it to go through

    def used(self, routing: Routing) -> Routing:
        """A routing of this process' tokens without its unused rows."""
        return routing._replace(source=routing.source[: sum(self.sent)])


class ExpertParallel:
    """Experts divided between the processes of a group; rows travel to their experts and back.

    Process p of R holds the next floor(E / R) experts, one more if p < E mod R. `route`, `dispatch`, `combine` and
    `forward` are those of `pyext.moe` for this process' tokens, of which processes may have different numbers, or none.
    An expert gets its rows by process, then by token. If process after process holds a range of some tokens, they come
    in the order in which one process has them, and outputs and gradients have the same bits as there (in fp32 and fp64;
    narrower rows are rounded once more on the way back).

    All processes must make the same calls in the same order, backward calls included. How many rows travel has to be
    known before they do: `dispatch` and `forward` wait for the device once, `route` with `together` too, and
    `torch.compile` breaks its graph there. Gradients of parameters are those of the sum of the losses of all processes:
    complete for experts, this process' share for all others, which are summed over the processes as in any data
    parallelism.

    Args:
        group: the processes; None = all. Beside DDP or FSDP it should be a group of its own
            (`torch.distributed.new_group()`): theirs is busy during backward.
        average: `forward` gives experts the gradients of the mean of the losses, as DDP and FSDP give the others.
        together: `route` counts capacity and losses over the tokens of all processes, as one process would; else each
            process counts its own.
    Source: Lepikhin et al., "GShard" (2020), section 3.2.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None, *, average: bool = False, together: bool = False):
        self.group = group
        self.size, self.rank = place(group)
        self.average, self.together = _checks.flag("average", average), _checks.flag("together", together)

    def __deepcopy__(self, memo):
        return self  # the copy of a module talks to the same processes

    def local_experts(self, experts: int, rank: int | None = None) -> range:
        """The experts that a process holds, by default this one."""
        rank = self.rank if rank is None else rank
        each, more = divmod(_checks.length("experts", experts), self.size)
        first = rank * each + min(rank, more)
        return range(first, first + each + (rank < more))

    def shard(self, value: Tensor) -> Tensor:
        """The part of a tensor (E, ...) that belongs to the experts of this process: a view."""
        if _checks.tensor("value", value).dim() == 0:
            raise _checks.shape_error("value", "(E, ...)", "", value)
        own = self.local_experts(value.shape[0])
        return value[own.start : own.stop]

    def unshard(self, value: Tensor, experts: int) -> Tensor:
        """(E, ...), made of the parts of all processes. No gradient flows back."""
        sizes = [len(self.local_experts(experts, rank)) for rank in range(self.size)]
        own = sizes[self.rank]
        if _checks.tensor("value", value).dim() == 0 or value.shape[0] != own:
            raise _checks.shape_error("value", f"({own}, ...)", f"on process {self.rank} of {self.size}", value)
        return gathered_parts(self.group, value.detach(), sizes)

    def route(self, logits: Tensor, top_k: int, **options) -> Routing:
        """`pyext.moe.route` of this process' tokens, (T, E) or (G, S, E).

        With `together`, every process routes the logits of all, in their order, and keeps its own part; S is then the
        same on all processes, but not G or T. balance_loss, z_loss and dropped are those of all tokens. The losses' own
        gradient is that of their sum over the processes, which must all add them with the same factor.

        Args:
            options: as there. With `together`, jitter and "gshard" need a generator, in one state on all processes.
        """
        return (self._route_together if self.together else moe.route)(logits, top_k, **options)

    @eager
    def _route_together(self, logits: Tensor, top_k: int, **options) -> Routing:
        if _checks.floating("logits", logits).dim() not in (2, 3):
            raise _checks.shape_error("logits", "(T, E) or (G, S, E)", "", logits)
        if options.get("generator") is None and (options.get("jitter") or options.get("policy") == "gshard"):
            raise ValueError("generator must be given, in one state on all processes, where chance decides, got None")
        mask = options.get("token_mask")
        if mask is not None and _checks.boolean("token_mask", mask, "a token").shape != logits.shape[:-1]:
            raise _checks.shape_error("token_mask", _checks.shape_text(logits.shape[:-1]), "to match logits", mask)
        sizes = gathered(self.group, torch.tensor(logits.shape[:1], device=logits.device)).flatten().tolist()
        if mask is not None:
            options["token_mask"] = gathered_parts(self.group, mask, sizes)
        routing = moe.route(GatheredParts.apply(self.group, logits, sizes), top_k, **options)
        each = logits.shape[1] if logits.dim() == 3 else 1
        own = slice(each * sum(sizes[: self.rank]), each * sum(sizes[: self.rank + 1]))
        index = routing.expert_index[own]
        offsets, source, position = maps(index, logits.shape[-1], index.numel())
        losses = (ScaledGradient.apply(loss, self.size) for loss in (routing.balance_loss, routing.z_loss))
        return Routing(index, routing.weights[own], offsets, source, position, *losses, routing.dropped)

    @eager
    def dispatch(self, x: Tensor, routing: Routing, *, impl: str = "auto") -> tuple[Tensor, Exchange]:
        """The rows of all processes for the experts of this one.

        Args:
            x: (T, H), this process' tokens.
            routing: of these tokens, over all E experts.
            impl: "auto", "reference", "cpu", "triton" or "cuda"; see `pyext.explain`.
        Returns:
            xs (M, H), rows sorted by expert, then by process, then by token, for
            `pyext.moe.experts(xs, exchange.routing, ...)`; and the exchange, which `combine` needs.
        """
        exchange = self._exchange(checked_routing(routing, x, "x"), torch.is_grad_enabled())
        (rows,) = self._to_experts(exchange, moe.dispatch(x, exchange.used(routing), impl=impl))
        xs = moe.dispatch(rows, exchange.routing, impl=impl)
        return xs, exchange if len(exchange.routing.offsets) > 1 else exchange._replace(tied=(xs,))

    @eager
    def combine(self, ys: Tensor, routing: Routing, exchange: Exchange, *, impl: str = "auto") -> Tensor:
        """out (T, J): the rows back at their tokens, and their weighted sum.

        Args:
            ys: (M, J), rows as `dispatch` orders them.
            routing, exchange: as given to `dispatch`, and as it returned.
        """
        ys = moe.combine(_tied(ys, exchange.tied), exchange.routing, impl=impl)
        return moe.combine(self._from_experts(exchange, ys), exchange.used(routing), impl=impl)

    @eager
    def forward(
        self,
        x: Tensor,
        routing: Routing,
        w_gate_up: Tensor,
        w_down: Tensor,
        activation: str = "swiglu",
        b_gate_up: Tensor | None = None,
        b_down: Tensor | None = None,
        *,
        impl: str = "auto",
    ) -> Tensor:
        """`pyext.moe.forward` with the experts of all processes.

        The weights travel with the rows, so that the fused kernels apply them where the experts are: no permuted copy
        of what came, and no output of an expert kept for backward.

        Args:
            x: (T, H), this process' tokens.
            routing: of these tokens, over all E experts.
            w_gate_up, w_down, b_gate_up, b_down: of the experts of this process, as `shard` cuts them.
            activation, impl: as there.
        Returns:
            (T, J) in x's dtype. Differentiable as there.
        Raises:
            as there.
        """
        (x,) = _checks.autocast(_checks.floating("x", x))
        routing = checked_routing(routing, x, "x")
        layer = w_gate_up, w_down, b_gate_up, b_down
        self._check_layer(routing, w_gate_up=w_gate_up, w_down=w_down, b_gate_up=b_gate_up, b_down=b_down)
        exchange = self._exchange(routing, is_recorded((x, routing.weights, *layer)))
        if self.average:
            layer = (value if value is None else ScaledGradient.apply(value, 1 / self.size) for value in layer)
        w_gate_up, w_down, *biases = layer
        used = exchange.used(routing)
        weights = _row_weights(used).to(acc_dtype(x.dtype))
        rows, weights = self._to_experts(exchange, moe.dispatch(x, used, impl=impl), weights)
        if w_gate_up.shape[0]:
            there = exchange.routing._replace(weights=weights)
            ys = moe.forward(rows, there, w_gate_up, w_down, activation, *biases, impl=impl)
        else:
            ys = _tied(rows.new_empty(0, w_down.shape[1]), (rows, weights))
        ones = used._replace(weights=torch.ones_like(used.weights))
        return moe.combine(self._from_experts(exchange, ys), ones, impl=impl)

    def _check_layer(self, routing: Routing, **layer: Tensor | None) -> None:
        """Weights and biases are those of the experts of this process."""
        experts = routing.offsets.shape[0] - 1
        own = self.local_experts(experts)
        for name, value in layer.items():
            if (value is not None or name.startswith("w")) and _checks.tensor(name, value).shape[:1] != (len(own),):
                why = f"for experts {own.start} to {own.stop} of {experts} on process {self.rank} of {self.size}"
                raise _checks.shape_error(name, f"({len(own)}, ...)", why, value)

    def _exchange(self, routing: Routing, record: bool) -> Exchange:
        """What the processes have for one another: how many rows each expert gets. All wait for that."""
        counts = routing.offsets.diff().to(torch.int64)
        experts = counts.shape[0]
        table = gathered(self.group, torch.cat([counts, counts.new_tensor([record])]))  # (processes, E + 1)
        listed = table.tolist()
        own = self.local_experts(experts)
        ranges = [self.local_experts(experts, rank) for rank in range(self.size)]
        sent = [sum(listed[self.rank][expert] for expert in there) for there in ranges]
        received = [sum(listed[rank][expert] for expert in own) for rank in range(self.size)]
        arrived = _sorted_by_expert(table[:, own.start : own.stop], sum(received), routing.weights)
        return Exchange(arrived, sent, received, any(row[experts] for row in listed))

    def _to_experts(self, exchange: Exchange, *tensors: Tensor) -> tuple[Tensor, ...]:
        return exchanged(self.group, tensors, exchange.sent, exchange.received, exchange.is_recorded)

    def _from_experts(self, exchange: Exchange, ys: Tensor) -> Tensor:
        return exchanged(self.group, (ys,), exchange.received, exchange.sent, exchange.is_recorded)[0]


def _sorted_by_expert(counts: Tensor, rows: int, like: Tensor) -> Routing:
    """The routing of what came: by process, of each process counts[process, expert] rows by expert."""
    processes, experts = counts.shape
    by_process, by_expert = counts.flatten(), counts.T.flatten()
    ends = by_expert.cumsum(0)
    # How far a block of rows of one process for one expert moves when experts come first: in the order of arrival,
    # and in the order of experts.
    moves = (ends - by_expert).view(experts, processes).T - (by_process.cumsum(0) - by_process).view_as(counts)
    row = torch.arange(rows, device=counts.device)
    expert = torch.arange(experts, device=counts.device).repeat(processes)
    return Routing(
        expert_index=_spread(expert, by_process, rows).to(torch.int32)[:, None],
        weights=like.new_ones(rows, 1),
        offsets=torch.cat([ends.new_zeros(1), ends.view(experts, processes)[:, -1]]).to(torch.int32),
        source=(row - _spread(moves.T.flatten(), by_expert, rows)).to(torch.int32),
        position=(row + _spread(moves.flatten(), by_process, rows)).to(torch.int32)[:, None],
        balance_loss=like.new_zeros(()),
        z_loss=like.new_zeros(()),
        dropped=counts.new_zeros((), dtype=torch.int32),
    )


def _spread(values: Tensor, counts: Tensor, rows: int) -> Tensor:
    return values.repeat_interleave(counts, output_size=rows)


def _row_weights(routing: Routing) -> Tensor:
    """(N, 1): the weight of each row, which are all used."""
    rows = routing.source.shape[0]
    row = routing.position.flatten().to(torch.int64)
    weights = routing.weights.flatten()
    # Choices without a row fill one more at the end.
    return weights.new_zeros(rows + 1).scatter(0, torch.where(row < 0, rows, row), weights)[:rows, None]


def _tied(ys: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """ys of no rows, as a function of inputs of none: others wait for backward to come through here."""
    return ys + sum(value.sum().to(ys.dtype) for value in inputs) if inputs else ys


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """name -> parameter, of the experts of all `pyext.nn.MoE` in a model that have an `ExpertParallel`.

    They are not the same on all processes, and DDP and FSDP must leave them alone.
    """
    return {
        f"{prefix}{name}": parameter
        for prefix, layer in _layers(model)
        for name, parameter in layer.expert_parameters().items()
    }


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model in one process, on all of them; `load_state_dict` takes it for any number of them."""
    state = model.state_dict()
    for prefix, layer in _layers(model):
        for name in layer.expert_parameters():
            state[prefix + name] = layer.expert_parallel.unshard(state[prefix + name], layer.num_experts)
    return state


def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` by the norm of all gradients, those of the experts of other processes included.

    Clipped by norms of their own, processes would part. Returns the norm before.
    """
    rest = [parameter for parameter in model.parameters() if parameter.grad is not None]
    shards: dict[ExpertParallel, list[nn.Parameter]] = {}
    for _, layer in _layers(model):
        own = list(layer.expert_parameters().values())
        shards.setdefault(layer.expert_parallel, []).extend(own)
        rest = [parameter for parameter in rest if all(parameter is not other for other in own)]
    norm = get_total_norm([parameter.grad for parameter in rest])
    square = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).square()  # FSDP's is a DTensor
    for parallel, own in shards.items():
        norm = get_total_norm([parameter.grad for parameter in own if parameter.grad is not None])
        square = square + gathered(parallel.group, norm.to(square).square()).sum()
    norm = square.sqrt()
    for parameters in (rest, *shards.values()):  # apart, as FSDP's do not mix with others
        clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(the beginning of its parameters' names, layer) of each layer whose experts are shared out."""
    for name, layer in model.named_modules():
        if getattr(layer, "expert_parallel", None) is not None:
            yield name and f"{name}.", layer
