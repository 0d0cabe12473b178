"""Diffusers' transformer blocks on pyext: attention of `BasicTransformerBlock` and U-Nets, and their gated layers.

    from pyext.integrations import diffusers as pyext_diffusers
    print(pyext_diffusers.patch(unet))  # what it replaced, what it left, and why
    pyext_diffusers.unpatch(unet)

Instances are changed, no classes; parameters and `state_dict` stay what they are. Diffusers is imported when one of
these functions is first called.
"""

import functools
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..ops.attention import attention
from ..ops.gated_linear import gated_linear, gated_mlp


class AttnProcessor:
    """An attention processor: `attn.set_processor(AttnProcessor())`, or `model.set_attn_processor(AttnProcessor())`.

    Computes what diffusers' `AttnProcessor2_0`, `AttnProcessor` and `FusedAttnProcessor2_0` compute, by
    `pyext.attention`: normalisation of the input (spatial, group) and of the context, projections, attention with
    `attn.scale`, output projection, residual and rescaling. A mask that is common to all heads is not repeated for
    each; fewer heads of keys than of queries (`kv_heads`) are taken, too.

    Args:
        impl: backend of the attention.
    """

    def __init__(self, impl: str = "auto"):
        self.impl = impl

    def __call__(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """What `attn.forward` returns.

        Args:
            attn: diffusers' `Attention`.
            hidden_states: (B, L, C), or an image (B, C, height, width).
            encoder_hidden_states: (B, Lk, C'), the context to attend to; None = hidden_states.
            attention_mask: (B or B * heads, 1 or L, Lk): float, added to the score, or bool, True = attend.
            temb: for `attn.spatial_norm`.
        """
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image = hidden_states.shape if hidden_states.dim() == 4 else None
        if image is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        query, key, value = _projected(attn, hidden_states, encoder_hidden_states)
        mask = _mask(attn, attention_mask, query.shape[0], key.shape[2])
        out = attention(query, key, value, mask, scale=attn.scale, enable_gqa=True, impl=self.impl)
        out = attn.to_out[0](out.transpose(1, 2).flatten(2))
        out = attn.to_out[1](out)
        if image is not None:
            out = out.transpose(-1, -2).reshape(image)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor


def _projected(attn, hidden_states: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value (B, H, L, D), after their norms."""
    if context is not None and attn.norm_cross:
        context = attn.norm_encoder_hidden_states(context)
    if attn.fused_projections and context is None:
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        query, context = attn.to_q(hidden_states), hidden_states if context is None else context
        if attn.fused_projections:
            key, value = attn.to_kv(context).chunk(2, dim=-1)
        else:
            key, value = attn.to_k(context), attn.to_v(context)
    width = query.shape[-1] // attn.heads
    query, key, value = (x.unflatten(-1, (-1, width)).transpose(1, 2) for x in (query, key, value))
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return query, key, value


def _mask(attn, mask: Tensor | None, batch: int, keys: int) -> Tensor | None:
    """The mask as (B, 1 or heads, 1 or Lq, Lk)."""
    if mask is None:
        return None
    if mask.dim() == 3 and mask.shape[0] == batch and mask.shape[-1] == keys:
        return mask[:, None]
    mask = attn.prepare_attention_mask(mask, keys, batch)
    return mask.unflatten(0, (batch, attn.heads)) if mask.dim() == 3 else mask


# --- Gated layers ---


def _is_plain(*layers: nn.Module) -> bool:
    """Whether these are linear layers and nothing besides: no adapter, no quantisation, no hook, no other forward."""
    return all(type(layer) is nn.Linear and "forward" not in vars(layer) and not _has_hooks(layer) for layer in layers)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _gate_and_value(proj: nn.Linear) -> tuple[Tensor | None, ...]:
    """w_gate, w_value, b_gate, b_value: diffusers stacks the value first, the gate second."""
    value, gate = proj.weight.chunk(2)
    b_value, b_gate = (None, None) if proj.bias is None else proj.bias.chunk(2)
    return gate, value, b_gate, b_value


def _gated_forward(module: nn.Module, activation: str, impl: str, hidden_states: Tensor, *args, **kwargs) -> Tensor:
    """`GEGLU.forward` and `SwiGLU.forward`; other arguments are deprecated, and theirs to complain about."""
    if args or kwargs or not _is_plain(module.proj):
        return type(module).forward(module, hidden_states, *args, **kwargs)
    return gated_linear(hidden_states, *_gate_and_value(module.proj), activation, impl=impl)


def _feed_forward(module: nn.Module, activation: str, impl: str, hidden_states: Tensor, *args, **kwargs) -> Tensor:
    """`FeedForward.forward`, in one op where no dropout stands between the two projections."""
    gated, dropout, down, *rest = module.net
    drops = dropout.training and dropout.p > 0
    if args or kwargs or drops or _has_hooks(gated) or _has_hooks(dropout) or not _is_plain(gated.proj, down):
        return type(module).forward(module, hidden_states, *args, **kwargs)
    gate, value, b_gate, b_value = _gate_and_value(gated.proj)
    out = gated_mlp(hidden_states, gate, value, down.weight, b_gate, b_value, down.bias, activation, impl=impl)
    for layer in rest:
        out = layer(out)
    return out


# --- Models ---


@dataclass
class Report:
    """What `patch` did: names of modules, with what they became or why they were left."""

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        for title, rows in (("replaced", self.replaced), ("left", self.left)):
            lines.append(f"{title}: {len(rows)}")
            lines += [f"  {name or '(the model)'}: {what}" for name, what in rows.items()]
        return "\n".join(lines)


class _Restorable(AttnProcessor):
    """The processor that `patch` sets, with the one it stands for."""

    def __init__(self, impl: str, original):
        super().__init__(impl)
        self.original = original


def patch(model: nn.Module, *, attention: bool = True, feed_forward: bool = True, impl: str = "auto") -> Report:
    """Let the attention and the gated feed-forward layers of a model of diffusers run on pyext.

    Patching a model again changes nothing but `impl`.

    Args:
        model: any module that contains diffusers' blocks.
        attention: replace processors of `Attention` that compute plain attention.
        feed_forward: replace the forward of `GEGLU`, `SwiGLU` and the `FeedForward` around them. Layers that are not
            plain linear ones when they run (LoRA, quantised, hooked) run as before.
        impl: backend of all.
    Returns:
        a printable `Report`.
    Raises:
        ImportError without diffusers; TypeError if model is no module.
    """
    library, report = _library(), Report()
    for name, module in _modules(model):
        if attention and hasattr(module, "set_processor") and hasattr(module, "processor"):
            _patch_attention(library, name, module, impl, report)
        if feed_forward and isinstance(module, (library.gated, library.FeedForward)):
            _patch_gated(library, name, module, impl, report)
    return report


def unpatch(model: nn.Module) -> None:
    """Undo `patch`."""
    library = _library()
    for _, module in _modules(model):
        if isinstance(getattr(module, "processor", None), _Restorable):
            module.set_processor(module.processor.original)
        if isinstance(module, (library.gated, library.FeedForward)) and _is_patched(module):
            del module.forward


def _modules(model):
    if not isinstance(model, nn.Module):
        hint = " (of a pipeline, patch its unet or transformer)" if hasattr(model, "components") else ""
        raise TypeError(f"model must be a torch.nn.Module{hint}, got {type(model).__name__}")
    return model.named_modules()


def _patch_attention(library, name: str, module: nn.Module, impl: str, report: Report) -> None:
    processor = module.processor
    original = processor.original if isinstance(processor, _Restorable) else processor
    kind = type(original).__name__
    if not isinstance(module, library.Attention):
        report.left[name] = f"{type(module).__name__} is not diffusers' Attention"
    elif module.added_kv_proj_dim is not None:
        report.left[name] = "it has projections of its own for added keys and values"
    elif type(original) not in library.processors:
        report.left[name] = f"its processor is a {kind}, which is not plain attention"
    elif kind == "AttnProcessor" and module.norm_q is not None:
        report.left[name] = "its AttnProcessor leaves norm_q and norm_k out"
    elif kind != "AttnProcessor" and not module.scale_qk:
        report.left[name] = f"its {kind} scales the scores in spite of scale_qk=False"
    else:
        module.set_processor(_Restorable(impl, original))
        report.replaced[name] = f"attention ({kind})"


def _patch_gated(library, name: str, module: nn.Module, impl: str, report: Report) -> None:
    """One gated layer, or a feed-forward layer around one."""
    if isinstance(module, library.FeedForward):
        gated, forward, what = module.net[0], _feed_forward, "gated_mlp"
        others = [type(layer) for layer in module.net[1:]]
        if type(gated) not in library.activations or others[:2] != [nn.Dropout, nn.Linear]:
            report.left[name] = f"its {type(gated).__name__} is not GEGLU or SwiGLU"
            return
    else:
        gated, forward, what = module, _gated_forward, "gated_linear"
    activation = library.activations.get(type(gated))
    if activation is None:
        report.left[name] = f"{type(gated).__name__} changes what GEGLU or SwiGLU compute"
    elif "forward" in vars(module) and not _is_patched(module):
        report.left[name] = "its forward was replaced before"
    else:
        module.forward = functools.partial(forward, module, activation, impl)
        report.replaced[name] = f"{what} ({activation})"


def _is_patched(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, functools.partial) and forward.func in (_gated_forward, _feed_forward)


@dataclass(frozen=True)
class _Library:
    """The classes of diffusers that matter here."""

    Attention: type
    FeedForward: type
    processors: tuple[type, ...]
    activations: dict[type, str]

    @property
    def gated(self) -> tuple[type, ...]:
        return tuple(self.activations)


@functools.cache
def _library() -> _Library:
    try:
        from diffusers.models import activations, attention_processor
        from diffusers.models.attention import FeedForward
    except ImportError as error:
        message = f"pyext.integrations.diffusers needs diffusers (pip install diffusers): {error}"
        raise ImportError(message) from error
    names = ("AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0")
    return _Library(
        attention_processor.Attention,
        FeedForward,
        tuple(getattr(attention_processor, name) for name in names),
        {activations.GEGLU: "geglu", activations.SwiGLU: "swiglu"},
    )
