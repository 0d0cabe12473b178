"""Layers of models that no library has, written from their papers twice: by the book, and on pyext.

By the book is plain PyTorch, pair by pair where positions enter. `fused` says which one a block computes; parameters
are the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, silu, softmax

import pyext


def heads(x: Tensor, count: int) -> Tensor:
    """(B, L, H * D) -> (B, H, L, D)."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def by_the_book(query, key, value, visible, bias=0.0, scale=None):
    """softmax(scale q k^T + bias) v over the visible keys; keys of fewer heads are repeated."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    score = (scale * query @ key.transpose(-1, -2) + bias).masked_fill(~visible, -torch.inf)
    return softmax(score, -1) @ value


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class DecoderBlock(nn.Module):
    """A causal block: attention by one of three position schemes, then (or beside it) a gated feed-forward layer.

    Args:
        positions: "transformer_xl" (Dai et al., 2019, section 3.3), "t5" (Raffel et al., 2020, section 2.1) or "rotary"
            (Su et al., 2021, section 3.2.2).
        kv_heads: 1 = multi-query (Shazeer, 2019).
        activation: "gelu" or "silu", of the gate (Shazeer, 2020).
        rms: RMSNorm (Zhang and Sennrich, 2019) instead of LayerNorm.
        parallel: y = x + MLP(norm(x)) + Attention(norm(x)), as in PaLM (Chowdhery et al., 2022, section 2).
        experts: 0, or how many, of which each token takes two (GLaM: Du et al., 2022, section 4).
    """

    WIDTH, HEADS, INNER, BUCKETS, DISTANCE = 32, 4, 40, 8, 20

    def __init__(self, positions, *, kv_heads=4, activation="gelu", rms=False, parallel=False, experts=0):
        super().__init__()
        self.positions, self.kv_heads, self.activation = positions, kv_heads, activation
        self.rms, self.parallel, self.experts, self.fused = rms, parallel, experts, False
        width, inner, depth = self.WIDTH, self.INNER, self.WIDTH // self.HEADS
        shapes = {
            "q": (width, width), "k": (kv_heads * depth, width), "v": (kv_heads * depth, width), "o": (width, width),
            "norm_1": (width,), "norm_2": (width,),
        }  # fmt: skip
        if positions == "transformer_xl":
            shapes |= {"r": (width, width), "u": (self.HEADS, depth), "w": (self.HEADS, depth)}
        if positions == "t5":
            shapes["table"] = (self.BUCKETS, self.HEADS)
        many = (experts,) if experts else ()
        shapes |= {"up": (*many, 2 * inner, width), "down": (*many, width, inner)}
        if experts:
            shapes["router"] = (experts, width)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) * 0.2 + (1.0 if name.startswith("norm") else 0.0)))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        states = x if memory is None else torch.cat([memory, x], dim=1)
        attended = self.attention(self.normalised(x, self.norm_1), self.normalised(states, self.norm_1))
        if self.parallel:
            return x + attended + self.feed_forward(self.normalised(x, self.norm_1)) + 0.0 * self.norm_2.sum()
        x = x + attended
        return x + self.feed_forward(self.normalised(x, self.norm_2))

    def normalised(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight) if self.rms else layer_norm(x, (self.WIDTH,), weight)

    def attention(self, x: Tensor, states: Tensor) -> Tensor:
        query = heads(linear(x, self.q), self.HEADS)
        key, value = (heads(linear(states, weight), self.kv_heads) for weight in (self.k, self.v))
        attend = self.on_pyext if self.fused else self.pair_by_pair
        return linear(merged(attend(query, key, value)), self.o)

    # --- Attention ---

    def pair_by_pair(self, query, key, value):
        length, keys = query.shape[2], key.shape[2]
        i = torch.arange(length)[:, None] + keys - length
        j = torch.arange(keys)
        bias, scale = 0.0, None
        if self.positions == "rotary":
            query, key = self.rotated(query, i[:, 0]), self.rotated(key, j)
        elif self.positions == "t5":
            bias, scale = self.table[self.bucket(i - j)].permute(2, 0, 1), 1.0
        else:
            rows = linear(self.sinusoids(i - j, query.dtype), self.r).unflatten(-1, (self.HEADS, -1))  # (i, j, H, D)
            content = torch.einsum("hd,bhjd->bhj", self.u, key)[:, :, None]
            position = torch.einsum("bhid,ijhd->bhij", query + self.w[:, None], rows)
            bias = (content + position) / math.sqrt(query.shape[-1])
        return by_the_book(query, key, value, j <= i, bias, scale)

    def bucket(self, back: Tensor) -> Tensor:
        """T5's bucket of how far a key lies back: one each for the near half, then logarithmic."""
        back, exact = back.clamp(min=0), self.BUCKETS // 2
        ratio = torch.log(back.clamp(min=1).to(torch.float32) / exact) / math.log(self.DISTANCE / exact)
        far = exact + (ratio * (self.BUCKETS - exact)).long()
        return torch.where(back < exact, back, far.clamp(max=self.BUCKETS - 1))

    def angles(self, positions: Tensor, dtype) -> Tensor:
        half = self.WIDTH // self.HEADS // 2
        return positions[:, None].to(dtype) * 10000.0 ** (-torch.arange(half, dtype=dtype) / half)

    def rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = self.angles(positions, x.dtype)
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def sinusoids(self, positions: Tensor, dtype) -> Tensor:
        pairs = torch.arange(0, self.WIDTH, 2, dtype=dtype) / self.WIDTH
        angles = positions[..., None].to(dtype) / 10000.0**pairs
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def on_pyext(self, query, key, value):
        options = {}
        if self.positions == "rotary":
            angles = self.angles(torch.arange(key.shape[2]), query.dtype)
            options["rotary"] = pyext.Rotary(angles.cos(), angles.sin())
        elif self.positions == "t5":
            options = {"bias": pyext.bias.t5(self.table, False, self.DISTANCE), "scale": 1.0}
        else:
            back = torch.arange(key.shape[2] - 1, -1, -1)  # keys after the query are hidden, and need no row
            rows = linear(self.sinusoids(back, query.dtype), self.r).unflatten(-1, (self.HEADS, -1))
            options["bias"] = pyext.bias.transformer_xl(rows, self.u, self.w)
        return pyext.attention(query, key, value, mask=pyext.masks.causal(), enable_gqa=True, **options)

    # --- Feed-forward ---

    def feed_forward(self, x: Tensor) -> Tensor:
        name = {"gelu": "geglu", "silu": "swiglu"}[self.activation]
        if self.experts:
            return self.mixture(x.flatten(0, 1), name).view(x.shape)
        if self.fused:
            return pyext.gated_mlp(x, self.up, None, self.down, activation=name)
        return self.gated(x, self.up, self.down)

    def gated(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        gate, value = linear(x, up).chunk(2, dim=-1)
        act = gelu if self.activation == "gelu" else silu
        return linear(act(gate) * value, down)

    def mixture(self, x: Tensor, name: str) -> Tensor:
        logits = linear(x, self.router)
        if self.fused:
            routing = pyext.moe.route(logits, 2, renormalize=True)
            return pyext.moe.forward(x, routing, self.up, self.down, name)
        weights, chosen = softmax(logits, -1).topk(2, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        every = torch.stack([self.gated(x, up, down) for up, down in zip(self.up, self.down)], dim=1)
        return (every.gather(1, chosen[..., None].expand(-1, -1, x.shape[1])) * weights[..., None]).sum(1)


class GShardLayer(nn.Module):
    """The two best experts of each token, the second by chance, each with a capacity: GShard (2020), algorithm 1."""

    def __init__(self, experts=4, width=32, inner=40, capacity=6, seed=7):
        super().__init__()
        self.capacity, self.seed, self.fused = capacity, seed, False
        self.router = nn.Parameter(torch.randn(experts, width) * 0.4)
        self.up = nn.Parameter(torch.randn(experts, inner, width) * 0.2)
        self.down = nn.Parameter(torch.randn(experts, width, inner) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        """x (G, S, width): groups of tokens, each with its own capacity."""
        chance = torch.Generator().manual_seed(self.seed)
        groups, tokens, _ = x.shape
        logits = linear(x, self.router)
        if self.fused:
            factor = self.capacity * len(self.router) / (2 * tokens)
            routing = pyext.moe.route(logits, 2, policy="gshard", capacity_factor=factor, generator=chance)
            return pyext.moe.forward(x.flatten(0, 1), routing, self.up, self.down, "relu").view(x.shape)
        uniform = torch.rand(groups, tokens, generator=chance)
        return torch.stack([self.group(x[g], logits[g], uniform[g]) for g in range(groups)])

    def group(self, x: Tensor, logits: Tensor, uniform: Tensor) -> Tensor:
        gates, chosen = softmax(logits, -1).topk(2, dim=-1)
        gates = gates / gates.sum(-1, keepdim=True)
        used = [0] * len(self.router)
        kept = torch.zeros(gates.shape, dtype=torch.bool)
        for choice in (0, 1):  # all first choices claim slots before any second one
            for token in range(len(x)):
                expert = int(chosen[token, choice])
                wanted = choice == 0 or 2 * float(gates[token, 1].detach()) > float(uniform[token])
                if wanted and used[expert] < self.capacity:
                    kept[token, choice] = True
                    used[expert] += 1
        every = torch.stack([linear(linear(x, up).relu(), down) for up, down in zip(self.up, self.down)], dim=1)
        weights = gates * kept
        return (every.gather(1, chosen[..., None].expand(-1, -1, x.shape[1])) * weights[..., None]).sum(1)


class ErnieBlock(nn.Module):
    """The aggregator of ERNIE: tokens and entities attend by themselves, then a layer fuses those that belong together.

    h = gelu(W_t w + W_e e + b), w' = gelu(W_t' h + b_t), e' = gelu(W_e' h + b_e); a token without an entity has no e.
    Source: Zhang et al., "ERNIE: Enhanced language representation with informative entities" (ACL 2019), section 3.3.
    """

    def __init__(self, width=32, count=4, inner=40):
        super().__init__()
        self.count, self.fused = count, False
        self.attentions = nn.ModuleList(nn.ModuleList(nn.Linear(width, width) for _ in range(4)) for _ in range(2))
        self.inwards = nn.ModuleList([nn.Linear(width, inner), nn.Linear(width, inner, bias=False)])
        self.outwards = nn.ModuleList([nn.Linear(inner, width), nn.Linear(inner, width)])

    def forward(self, tokens, entities, token_lengths, entity_mask):
        """tokens, entities (B, L, width), entity l belonging to token l where entity_mask says that there is one."""
        there = torch.arange(tokens.shape[1]) < token_lengths[:, None]
        tokens = self.attend(self.attentions[0], tokens, there, pyext.masks.padding(token_lengths))
        visible = pyext.masks.dense(entity_mask[:, None, None])
        entities = self.attend(self.attentions[1], entities, entity_mask, visible) * entity_mask[..., None]
        hidden = gelu(self.inwards[0](tokens) + self.inwards[1](entities))
        tokens, entities = (gelu(layer(hidden)) for layer in self.outwards)
        return torch.cat([tokens * there[..., None], entities * entity_mask[..., None]], dim=1)

    def attend(self, layers, x, visible, mask):
        query, key, value = (heads(layer(x), self.count) for layer in layers[:3])
        if self.fused:
            out = pyext.attention(query, key, value, mask=mask)
        else:
            out = by_the_book(query, key, value, visible[:, None, None])
        return x + layers[3](merged(out))


class ImageBlock(nn.Module):
    """The transformer block of Stable Diffusion's U-Net: attention to itself, to a text, then a GEGLU layer.

    Value first, gate second. Source: Rombach et al., "High-resolution image synthesis" (2022), appendix E.2.1.
    """

    def __init__(self, width=32, text=24, count=4, inner=40):
        super().__init__()
        self.count, self.fused = count, False
        for name, context in (("itself", width), ("text", text)):
            layers = [nn.Linear(size, width, bias=False) for size in (width, context, context)]
            self.add_module(name, nn.ModuleList([*layers, nn.Linear(width, width)]))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.up, self.down = nn.Linear(width, 2 * inner), nn.Linear(inner, width)

    def forward(self, x, text):
        x = x + self.attend(self.itself, self.norms[0](x), None)
        x = x + self.attend(self.text, self.norms[1](x), text)
        both = self.up(self.norms[2](x))
        if self.fused:
            return x + self.down(pyext.geglu(both, gate_first=False))
        value, gate = both.chunk(2, dim=-1)
        return x + self.down(value * gelu(gate))

    def attend(self, layers, x, text):
        context = x if text is None else text
        query, key, value = (
            heads(layer(y), self.count) for layer, y in zip(layers[:3], (x, context, context), strict=True)
        )
        attend = pyext.attention if self.fused else torch.nn.functional.scaled_dot_product_attention
        return layers[3](merged(attend(query, key, value)))
