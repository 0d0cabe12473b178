"""`patch` and `unpatch`: one model instance at a time."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from . import _families, _feed_forward, _linear, _positions
from ._attention import UNKNOWN
from ._swap import original_class, replace, restore

#: What `patch` looks for, in this order: what it is called in the report, and what says how a module is replaced.
_RULES: tuple[tuple[str, Callable], ...] = (
    ("attention", _families.own_attention),
    ("T5 position table", _positions.t5_tables),
    ("rotary embedding", _positions.rotating),
    ("gated feed-forward", _feed_forward.gated),
    ("mixture of experts", _feed_forward.switch),
    ("mixture of experts", _feed_forward.nllb),
    ("activation", _feed_forward.bloom_gelu),
    ("linear", _linear.plain_linear),
)
_ATTENTION, _EXPERTS = "attention", "mixture of experts"


@dataclass
class Report:
    """What `patch` did. Print it.

    Attributes:
        replaced: (part, class) -> the names of the modules.
        left: (part, class, why) -> the names of the modules.
    """

    model: str
    replaced: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    left: dict[tuple[str, str, str], list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"pyext in {self.model}"]
        for title, entries in (("replaced", self.replaced), ("left as it was", self.left)):
            lines.append(f"  {title}:" if entries else f"  {title}: nothing")
            for (part, kind, *why), names in entries.items():
                reason = f": {why[0]}" if why else ""
                lines.append(f"    {part:<20} {len(names):>3} x {kind} ({names[0] or 'the model'}, ...){reason}")
        return "\n".join(lines)


def patch(model: nn.Module) -> Report:
    """Let a Transformers model run on pyext: this instance only, in place.

    Attention goes through `attn_implementation="pyext"` where the model asks the registry, experts likewise; layers
    that ask none are replaced: the attention of DeBERTa, XLNet, XLM, BLOOM, GPT, GPT-J, GPT-Neo, Falcon and ImageGPT,
    T5's position bias (and its relatives'), rotary embeddings, gated feed-forward layers, experts and routers of Switch
    and NLLB; on CPUs where torch's matrix products are slow, linear layers in fp32.
    Parameters, their names and the state_dict stay as they are; attention weights are not returned.

    Args:
        model: a `PreTrainedModel`, or a module that holds some (wrapped by PEFT, DDP, ...).
    Returns:
        a `Report`: what was replaced, what was left, and why. Patching again changes nothing and reports the same.
    Raises:
        TypeError if model is no module.
    """
    from . import register

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    register()
    report = Report(type(model).__name__)
    _own_configs(model)
    _choose([module for module in model.modules() if isinstance(module, PreTrainedModel)])
    for name, module in model.named_modules():
        _replace(module, name, report)
    return report


def unpatch(model: nn.Module) -> None:
    """Undo `patch`. Weights trained meanwhile stay."""
    for module in list(model.modules()):
        restore(module)
        for config, attribute, former in module.__dict__.pop("_pyext_former", ()):
            setattr(config, attribute, former)


def _own_configs(model: nn.Module) -> None:
    """Give the instance configurations of its own: models made from one configuration share it."""
    if any("_pyext_former" in module.__dict__ for module in model.modules()):
        return
    copies: dict = {}
    for module in model.modules():
        if isinstance(module.__dict__.get("config"), PreTrainedConfig):
            module.config = copy.deepcopy(module.config, copies)


def _choose(models: list[PreTrainedModel]) -> None:
    """Set the implementations of attention and experts of these models, and remember the former ones.

    Models that share a configuration share the kind of their masks: if there is attention among them that is neither
    the registry's nor known here, all keep theirs.
    """
    mixed = {id(model.config) for model in models if any(map(_is_unknown_attention, model.modules()))}
    for model in models:
        if "_pyext_former" in model.__dict__:
            continue
        config, wanted = model.config, []
        asks = any(map(_asks_registry, model.modules())) and id(config) not in mixed
        if asks or _families.family(original_class(model)) in _families.MASKED:
            wanted.append("_attn_implementation_internal")
        if model._can_set_experts_implementation():
            wanted.append("_experts_implementation_internal")
        wanted = [name for name in wanted if getattr(config, name) != "pyext"]
        model._pyext_former = [(config, name, getattr(config, name)) for name in wanted]
        for name in wanted:
            setattr(config, name, "pyext")


def _asks_registry(module: nn.Module) -> bool:
    """Whether the module takes its attention from the registry, and passes nothing that pyext does not have."""
    code = getattr(getattr(original_class(module), "forward", None), "__code__", None)
    if "ALL_ATTENTION_FUNCTIONS" not in getattr(code, "co_names", ()):
        return False
    keywords = {word for names in code.co_consts if isinstance(names, tuple) for word in names}
    return keywords.isdisjoint(UNKNOWN)


def methods_of(module: nn.Module) -> dict:
    """What replaces the module's methods."""
    methods: dict = {}
    for _, rule in _RULES:
        found = rule(module, original_class(module))
        if found is not None and not isinstance(found, str):
            methods = {**found, **methods}  # the first rule counts
    return methods


def _replace(module: nn.Module, name: str, report: Report) -> None:
    cls = original_class(module)
    replaced = set()
    for part, rule in _RULES:
        found = rule(module, cls)
        if isinstance(found, str):
            report.left.setdefault((part, cls.__name__, found), []).append(name)
        elif found is not None and not found.keys() <= replaced:
            replaced |= found.keys()
            report.replaced.setdefault((part, cls.__name__), []).append(name)
    if replaced:
        replace(module, methods_of(module))
    if _asks_registry(module):
        if getattr(getattr(module, "config", None), "_attn_implementation", "pyext") == "pyext":
            report.replaced.setdefault((_ATTENTION, cls.__name__), []).append(name)
        else:
            why = "it shares its masks with attention that pyext does not have"
            report.left.setdefault((_ATTENTION, cls.__name__, why), []).append(name)
    elif hasattr(cls, "_apply_gate"):
        report.replaced.setdefault((_EXPERTS, cls.__name__), []).append(name)
    elif _is_unknown_attention(module):
        why = "neither the registry nor pyext has what it computes"
        report.left.setdefault((_ATTENTION, cls.__name__, why), []).append(name)


def _is_unknown_attention(module: nn.Module) -> bool:
    """An attention layer, by its name and as it holds projections itself, that nothing here reaches."""
    cls = original_class(module)
    weights = [getattr(child, "weight", None) for child in module.children()]
    matrices = sum(weight is not None and weight.dim() == 2 for weight in weights)
    known = _asks_registry(module) or isinstance(_families.own_attention(module, cls), dict)
    return "Attention" in cls.__name__ and matrices > 1 and not known
