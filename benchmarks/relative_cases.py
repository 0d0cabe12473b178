"""The cases of relative rows, Transformer-XL and DeBERTa, and the figures they are to reach (one AVX-512 + BF16 core).

Each is timed against plain fused attention of the same Lq x Lk, which says what the position term costs (a term is one
more product of the size of q k^T forward, two or three more backward), and against the eager formula: einsum and
relative shift for Transformer-XL, Transformers' own attention module, without its projections, for DeBERTa.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import pyext

from . import long_context
from .attention_cases import CALLS, DTYPES, FLOPS, FULL, both_ways, eager, shape_name
from .harness import Case, Contender, Figure, Tensors, Work, percent_of_peak, speedup, time_ratio

MEMORY = 2048
DEBERTA, SPAN, MAX_POSITION = (4, 12, 512, 64), 256, 512
PLAIN, SHIFT, TRANSFORMERS = "no bias", "eager", "Transformers"


@dataclass
class Inputs:
    """Named leaves and the output's gradient: what `attention_cases.CALLS` run on."""

    tensors: Tensors
    grad_out: torch.Tensor

    @classmethod
    def random(cls, shapes: dict[str, tuple[int, ...]], dtype: str, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        made = {name: torch.randn(size, generator=generator).to(DTYPES[dtype]) for name, size in shapes.items()}
        return cls(made, torch.randn(shapes["query"], generator=generator).to(DTYPES[dtype]))

    def leaves(self, dtype: torch.dtype | None = None) -> Tensors:
        return {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in self.tensors.items()}


def plain_attention(leaves: Tensors) -> torch.Tensor:
    return pyext.attention(leaves["query"], leaves["key"], leaves["value"])


def work(direction, inputs: Inputs, mine, truth, peer: str, theirs: Callable | None, products: int) -> Work:
    """products: GEMMs of the size of q k^T that the position terms add to the two forward, five backward."""
    (batch, heads, queries, dim), keys = inputs.grad_out.shape, inputs.tensors["key"].shape[2]
    make, gradients = CALLS[direction], direction != "forward"
    bare = dataclasses.replace(inputs, tensors={n: inputs.tensors[n] for n in ("query", "key", "value")})
    contenders = [Contender("pyext", make(inputs, mine)), Contender(PLAIN, make(bare, plain_attention))]
    if theirs is not None:
        contenders.append(Contender(peer, make(inputs, theirs)))
    return Work(
        contenders,
        flops=(FLOPS[direction] + 2 * products) * batch * heads * queries * keys * dim,
        got=lambda: both_ways(inputs, mine, gradients=gradients),
        truth=lambda to: both_ways(inputs, truth, to, gradients=gradients),
        dtype=inputs.grad_out.dtype,
        notes=[] if theirs is not None else [f"{peer} is not compared: it is not installed"],
    )


# --- Transformer-XL -------------------------------------------------------------------------------------------------


def shifted(score: torch.Tensor, keys: int) -> torch.Tensor:
    """The relative shift: entry (i, p) of (..., Lq, Lk) moves to key p - (Lq - 1 - i) (Dai et al., appendix B)."""
    batch, heads, queries, rows = score.shape
    padded = torch.cat([score.new_zeros(batch, heads, queries, 1), score], -1)
    return padded.view(batch, heads, rows + 1, queries)[:, :, 1:].view(batch, heads, queries, rows)[..., :keys]


def transformer_xl_eager(leaves: Tensors) -> torch.Tensor:
    """softmax((q + u) k^T + shift((q + v) r^T)) v, as the published code computes it."""
    query, key, value, r = (leaves[name] for name in ("query", "key", "value", "r"))
    scale, keys = query.shape[-1] ** -0.5, key.shape[2]
    content = torch.einsum("bhid,bhjd->bhij", query + leaves["u"][:, None], key)
    position = shifted(torch.einsum("bhid,phd->bhip", query + leaves["v"][:, None], r), keys)
    return ((content + position) * scale).softmax(-1) @ value


def transformer_xl_work(direction: str, dtype: str, seed: int) -> Work:
    batch, heads, queries, dim = FULL
    keys = queries + MEMORY
    rows = keys + queries - 1  # one per distance
    shapes = {"query": FULL, "key": (batch, heads, keys, dim), "value": (batch, heads, keys, dim)}
    shapes |= {"r": (rows, heads, dim), "u": (heads, dim), "v": (heads, dim)}

    def mine(leaves):
        bias = pyext.bias.transformer_xl(leaves["r"], leaves["u"], leaves["v"])
        return pyext.attention(leaves["query"], leaves["key"], leaves["value"], bias=bias)

    inputs = Inputs.random(shapes, dtype, seed)
    products = {"forward": 1, "backward": 3, "forward+backward": 4}[direction]
    return work(direction, inputs, mine, transformer_xl_eager, SHIFT, transformer_xl_eager, products)


# --- DeBERTa --------------------------------------------------------------------------------------------------------


def deberta_bias(leaves: Tensors) -> pyext.bias.Bias:
    return pyext.bias.disentangled(
        leaves["pos_key"], leaves["pos_query"], buckets=SPAN, max_position=MAX_POSITION, scale=(3 * 64) ** -0.5
    )


def deberta(leaves: Tensors) -> torch.Tensor:
    query, key, value = leaves["query"], leaves["key"], leaves["value"]
    return pyext.attention(query, key, value, bias=deberta_bias(leaves), scale=(3 * 64) ** -0.5)


def deberta_eager(leaves: Tensors) -> torch.Tensor:
    """q k^T + gather(q pos_key^T) + gather(k pos_query^T)^T (He et al., eq. 4)."""
    query, key = leaves["query"], leaves["key"]
    length, scale = query.shape[2], (3 * 64) ** -0.5
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]  # query - key
    middle = SPAN // 2
    steps = distance.abs().clamp(min=1).float() / middle
    far = torch.ceil(torch.log(steps) / torch.log(torch.tensor((MAX_POSITION - 1) / middle)) * (middle - 1)) + middle
    bucket = torch.where(distance.abs() <= middle, distance.float(), far * distance.sign()).long()
    index = (bucket + SPAN).clamp(0, 2 * SPAN - 1).expand(*query.shape[:2], length, length)
    c2p = (query @ leaves["pos_key"].transpose(-1, -2)).gather(-1, index)
    p2c = (key @ leaves["pos_query"].transpose(-1, -2)).gather(-1, index.transpose(-1, -2)).transpose(-1, -2)
    factor = query.shape[-1] ** 0.5 * scale  # `eager` divides by sqrt(D)
    return eager(query * factor, key, leaves["value"], (c2p + p2c) * scale)


def transformers_deberta(shape: tuple[int, ...]) -> Callable[[Tensors], torch.Tensor] | None:
    """The attention of Transformers' DeBERTa-v2 with identity projections: query, key and value are one tensor."""
    try:
        from transformers import DebertaV2Config
        from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention
    except ImportError:
        return None
    batch, heads, length, dim = shape
    config = DebertaV2Config(
        hidden_size=heads * dim, num_attention_heads=heads, relative_attention=True, position_buckets=SPAN,
        max_relative_positions=MAX_POSITION, pos_att_type=["c2p", "p2c"], share_att_key=True,
        attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
    )  # fmt: skip
    module = DisentangledSelfAttention(config).eval()
    module.query_proj = module.key_proj = module.value_proj = torch.nn.Identity()
    mask = torch.ones(batch, 1, length, length, dtype=torch.bool)

    def attend(leaves):
        hidden = leaves["query"].transpose(1, 2).reshape(batch, length, heads * dim)
        rows = leaves["pos_key"].transpose(0, 1).reshape(2 * SPAN, heads * dim)
        out = module(hidden, mask, rel_embeddings=rows)
        out = out[0] if isinstance(out, tuple) else out
        # The other leaves enter with no weight, so that every contender differentiates the same ones.
        unused = sum(leaves[name].flatten()[:1].sum() for name in ("key", "value", "pos_query"))
        return out.view(batch, length, heads, dim).transpose(1, 2) + 0 * unused

    return attend


def deberta_work(direction: str, dtype: str, seed: int, shape: tuple[int, ...] = DEBERTA) -> Work:
    rows = (shape[1], 2 * SPAN, shape[3])
    shapes = dict.fromkeys(("query", "key", "value"), shape) | dict.fromkeys(("pos_key", "pos_query"), rows)
    inputs = Inputs.random(shapes, dtype, seed)
    products = {"forward": 2, "backward": 6, "forward+backward": 8}[direction]
    return work(direction, inputs, deberta, deberta_eager, TRANSFORMERS, transformers_deberta(shape), products)


# --- The list -------------------------------------------------------------------------------------------------------


def all_cases() -> list[Case]:
    cases = []
    table = (  # name, title, work, peer; per direction: limits against no bias fp32 / bf16, least speed-up
        (
            f"transformer_xl/{{}}/{shape_name(FULL)}+{MEMORY}",
            f"Transformer-XL, {{}}, {FULL} + {MEMORY} memory",
            transformer_xl_work,
            SHIFT,
            {"forward": ((1.6, 1.6), 6), "backward": ((1.8, 1.85), None), "forward+backward": ((None, None), 4)},
        ),
        (
            f"deberta/{{}}/{shape_name(DEBERTA)}",
            f"DeBERTa-v3, c2p + p2c, {{}}, {DEBERTA}",
            deberta_work,
            TRANSFORMERS,
            {"forward": ((1.9, 1.95), 7), "backward": ((2.3, 2.4), None), "forward+backward": ((None, None), 4)},
        ),
    )
    for name, title, make, peer, directions in table:
        for direction, (limits, least) in directions.items():
            for dtype, limit in zip(("fp32", "bf16"), limits, strict=True):
                figures: tuple[Figure, ...] = time_ratio(PLAIN, limit), speedup(peer, least), percent_of_peak()
                cases.append(
                    Case(
                        f"{name.format(direction)}/{dtype}",
                        "relative rows",
                        title.format(direction),
                        dtype,
                        figures,
                        partial(make, direction, dtype),
                        peak=dtype,
                    )
                )
    length, heads, dim = long_context.LENGTH, long_context.HEADS, long_context.DIM
    figures = (
        Figure("memory above the inputs", "MiB", lambda m: m.extra["peak_mib"], at_most=400),
        Figure("one step", "s", lambda m: m.seconds["pyext"]),
    )
    title = f"DeBERTa-v3, {length} tokens, forward + backward, (1, {heads}, {length}, {dim})"
    name, run = f"deberta/memory/1x{heads}x{length}x{dim}/bf16", functools.partial(long_context.run, kind="deberta")
    return [*cases, Case(name, "memory", title, "bf16", figures, run=run)]
