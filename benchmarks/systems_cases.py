"""Layers of whole model families at their base size, patched, against the same as published: forward and backward.

Each model has one layer, random weights and a small vocabulary, so that what is timed is the layer. Families whose
positions have no end are timed at a length of their pretraining and at 2048 tokens, where the targets hold: shorter
sequences are mostly linear layers, which eager computes near the machine's peak in bf16 (at the peak, T5's layer of
1024 tokens would take 44 % of eager's time), so there the aim is not to be slower. The contenders are
`pyext.integrations.transformers.patch`, eager attention and, where the model has it, SDPA; experts take Transformers'
own choice (`grouped_mm` where it can). They are checked on a shorter sequence than they are timed on; mixtures of
experts in fp32 only, because what a router decides on numbers in bf16 differs with how they were rounded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

import pyext

from .attention_cases import DTYPES
from .harness import Case, Contender, Tensors, Work, speedup

VOCABULARY, CHECKED = 128, 96  # words; the length of the sequence that results are compared on
GENERAL = dict(vocab_size=VOCABULARY, hidden_size=768, num_hidden_layers=1, num_attention_heads=12)
T5 = dict(vocab_size=VOCABULARY, d_model=768, d_kv=64, num_heads=12, num_layers=1, dropout_rate=0.0)
EAGER, SDPA = "eager", "SDPA"
FROM_512, FROM_1024 = ((2, 512), (1, 2048)), ((1, 1024), (1, 2048))


@dataclass(frozen=True)
class System:
    """A family: class and configuration in Transformers, (sequences, tokens of each), and how much faster than eager it
    is meant to be at the last of these."""

    family: str
    model: str
    config: str
    options: dict = field(hash=False)
    sizes: tuple[tuple[int, int], ...] = FROM_1024
    at_least: tuple[float, float] = (1.0, 1.0)  # fp32, bf16


SYSTEMS = (
    System(
        "t5", "T5EncoderModel", "T5Config", dict(T5, d_ff=2048, feed_forward_proj="gated-gelu"),
        at_least=(2.0, 3.0),
    ),
    System(
        "deberta-v3", "DebertaV2Model", "DebertaV2Config",
        dict(
            GENERAL, intermediate_size=3072, relative_attention=True, position_buckets=256, share_att_key=True,
            norm_rel_ebd="layer_norm", pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ),
        FROM_512, at_least=(2.5, 2.5),
    ),
    System(
        "xlnet", "XLNetModel", "XLNetConfig",
        dict(vocab_size=VOCABULARY, d_model=768, n_layer=1, n_head=12, d_inner=3072, dropout=0.0),
        FROM_512, at_least=(2.5, 2.5),
    ),
    System(
        "bloom", "BloomModel", "BloomConfig", dict(vocab_size=VOCABULARY, hidden_size=1024, n_layer=1, n_head=16),
        at_least=(2.0, 2.0),
    ),
    System(
        "switch", "SwitchTransformersEncoderModel", "SwitchTransformersConfig",
        dict(T5, d_ff=3072, num_experts=8, expert_capacity=192, num_sparse_encoder_layers=1),
        at_least=(1.8, 1.8),
    ),
    System(
        "mixtral", "MixtralModel", "MixtralConfig",
        dict(GENERAL, num_key_value_heads=4, intermediate_size=2048, num_local_experts=8, max_position_embeddings=4096),
        at_least=(1.8, 1.8),
    ),
    System(
        "llama", "LlamaModel", "LlamaConfig",
        dict(GENERAL, num_key_value_heads=4, intermediate_size=2048, max_position_embeddings=4096),
    ),
    System(
        "bert", "BertModel", "BertConfig",
        dict(GENERAL, intermediate_size=3072, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), FROM_512[:1],
    ),
    System(
        "gpt2", "GPT2Model", "GPT2Config",
        dict(
            vocab_size=VOCABULARY, n_embd=768, n_layer=1, n_head=12, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        ),
        FROM_1024[:1],
    ),
    System(
        "gptj", "GPTJModel", "GPTJConfig",
        dict(
            vocab_size=VOCABULARY, n_embd=1024, n_layer=1, n_head=16, rotary_dim=32, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
    ),
    System(
        "gpt-neox", "GPTNeoXModel", "GPTNeoXConfig",
        dict(GENERAL, intermediate_size=3072, max_position_embeddings=4096),
    ),
    System(
        "falcon", "FalconModel", "FalconConfig", dict(GENERAL),
    ),
)  # fmt: skip


def published(system: System, dtype: str, seed: int) -> torch.nn.Module:
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, system.model)(getattr(transformers, system.config)(**system.options))
    return model.eval().to(DTYPES[dtype])


def with_attention(model: torch.nn.Module, kind: str) -> torch.nn.Module:
    twin = copy.deepcopy(model)
    if twin._can_set_attn_implementation():
        twin.set_attn_implementation(kind)
    return twin


def both_ways(model: torch.nn.Module, ids: torch.Tensor, weight: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Forward and backward with fresh gradients."""

    def call():
        model.zero_grad(set_to_none=True)
        out = model(input_ids=ids).last_hidden_state
        out.backward(weight)
        return out.detach()

    return call


def work_of(system: System, size: tuple[int, int], dtype: str, seed: int) -> Work:
    model = published(system, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, size, generator=generator)
    short = ids[:, :CHECKED]
    width = model.config.hidden_size
    weight, little = (torch.randn(*x.shape, width, generator=generator).to(DTYPES[dtype]) for x in (ids, short))

    def patched() -> torch.nn.Module:
        twin = with_attention(model, "eager")
        pyext.integrations.transformers.patch(twin)
        return twin

    def results(net: torch.nn.Module, to: torch.dtype) -> Tensors:
        net = net.to(to)
        if to == torch.float64:
            if hasattr(net.config, "num_local_experts"):
                net.set_experts_implementation("eager")  # grouped_mm knows no fp64
            for router in (module for module in net.modules() if hasattr(module, "jitter_noise")):
                router.dtype = to  # Switch's computes in a dtype of its own, fp32
        out = both_ways(net, short, little.to(to))()
        grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None and p.dim() > 1}
        return {"out": out, **{f"grad_{name}": grads[name] for name in sorted(grads)[:6]}}

    ways = {"pyext": patched(), EAGER: with_attention(model, "eager")}
    if model._supports_sdpa and system.family != "bloom":
        ways[SDPA] = with_attention(model, "sdpa")
    decides = "num_experts" in system.options or "num_local_experts" in system.options
    return Work(
        [Contender(name, both_ways(net, ids, weight)) for name, net in ways.items()],
        got=None if decides and dtype == "bf16" else lambda: results(patched(), DTYPES[dtype]),
        truth=lambda to: results(with_attention(model, "eager"), to),
        dtype=DTYPES[dtype],
    )


def all_cases() -> list[Case]:
    cases = []
    for system in SYSTEMS:
        for batch, length in system.sizes:
            targets = system.at_least if (batch, length) == system.sizes[-1] else (1.0, 1.0)
            for dtype, target in zip(("fp32", "bf16"), targets, strict=True):
                cases.append(
                    Case(
                        f"systems/{system.family}/{batch}x{length}/{dtype}",
                        "systems",
                        f"{system.model}, one layer, {batch} x {length} tokens, forward+backward",
                        dtype,
                        (speedup(EAGER, at_least=target), speedup(SDPA)),
                        partial(work_of, system, (batch, length), dtype),
                        op="systems",
                    )
                )
    return cases
