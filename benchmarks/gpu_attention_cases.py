"""The cases of attention that run on a GPU, with the figures that they are to reach on an H200, in bf16. "pyext" is
what it chooses itself: CUDA's kernels where they take the call, else Triton's.

Work is counted as in `attention_cases`: products of matrices, forward 4 B H Lq Lk D and backward 10, half of it if
causal; the peak is cuBLAS's with as many flops. Peers are SDPA by cuDNN and by FlashAttention, and FlexAttention.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import pyext

from .gpu_cases import _draw, _run, _work
from .harness import Case, Figure, Measured, Work, percent_of_bandwidth, percent_of_peak, slowdown, speedup, time_ratio

Tensor = torch.Tensor
SDPA = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
FLEX, PLAIN, DENSE = "FlexAttention", "no bias", "dense causal"
BUCKETS = 32
LENGTHS = (1024, 2048, 4096, 8192, 16384)
DIRECTIONS = {"forward": 2, "backward": 5, "forward+backward": 7}  # products of matrices, of 2 B H Lq Lk D flops each


@dataclass(frozen=True)
class Sizes:
    """Batch, heads, length, width; tests take less."""

    plain: tuple[int, int, int, int] = (2, 16, 8192, 128)  # as many tokens for other lengths
    lengths: tuple[int, ...] = LENGTHS
    biased: tuple[int, int, int, int] = (4, 16, 4096, 64)
    sparse: tuple[int, int, int, int] = (1, 4, 32768, 64)
    stride: int = 128
    caches: tuple[int, int, int, int, int] = (16, 32, 8, 16384, 128)  # batch, heads, heads of keys, length, width


def teraflops(at_least: float | None, who: str = "pyext") -> Figure:
    def compute(m: Measured) -> float | None:
        return m.flops / m.seconds[who] / 1e12 if who in m.seconds else None

    return Figure("rate" if who == "pyext" else f"rate of {who}", "Tflop/s", compute, at_least=at_least)


def best_of_sdpa(at_least: float) -> Figure:
    """Seconds of the fastest of its backends that run here, over pyext's."""

    def compute(m: Measured) -> float | None:
        found = [m.seconds[name] for name in SDPA if name in m.seconds]
        return min(found) / m.seconds["pyext"] if found else None

    return Figure("speed-up over SDPA's best", "x", compute, at_least=at_least)


# --- What the cases share ---


def distances(queries: int, keys: int, device) -> Tensor:
    """(Lq, Lk): key position minus query position, the last of each at the same place."""
    return torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None] - (keys - queries)


def eager(bias: Callable | None, sees: Callable | None, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v, a head at a time, whose L x L matrices backward computes again.

    bias(h, q, k, distance, *more) -> (Lq, Lk) of one head; sees(distance) -> bool (Lq, Lk).
    """
    distance = distances(q.shape[2], k.shape[2], q.device)

    def head(h, q, k, v, *more):
        score = q @ k.T * q.shape[-1] ** -0.5
        if bias is not None:
            score = score + bias(h, q, k, distance, *more)
        if sees is not None:
            score = score.masked_fill(~sees(distance), -torch.inf)
        return score.softmax(-1) @ v

    group = q.shape[1] // k.shape[1]
    rows = [
        torch.stack([
            checkpoint(head, h, q[b, h], k[b, h // group], v[b, h // group], *more, use_reentrant=False)
            for h in range(q.shape[1])
        ])
        for b in range(q.shape[0])
    ]  # fmt: skip
    return torch.stack(rows)


def sdpa(backend: SDPBackend, causal: bool, q: Tensor, k: Tensor, v: Tensor, *_) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def flex(causal: bool, strip: Callable | None, q: Tensor) -> Callable:
    """Compiled, of (q, k, v, *more); strip(h, distance, *more) -> what is added to a score, by scalars."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length, mask = q.shape[2], None
    if causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=q.device)

    def attend(q, k, v, *more):
        by_distance = None if strip is None else strip(torch.arange(1 - length, length, device=q.device), *more)

        def add(score, b, h, i, j):
            return score + by_distance[h, j - i + length - 1]

        return flex_attention(q, k, v, score_mod=add if strip else None, block_mask=mask)

    return torch.compile(attend, dynamic=False)


def work(leaves: tuple, direction: str, options: Callable, formula: Callable, peers: dict, causal: bool) -> Work:
    """pyext with options(*more) for q, k, v, *more = leaves, and those of the peers that can do it here."""
    q, k, v, *more = leaves
    wide = {"is_causal": causal, "enable_gqa": q.shape[1] != k.shape[1]}

    def own(q, k, v, *more, impl="auto"):
        return pyext.attention(q, k, v, **wide, **options(*more), impl=impl)

    ways, notes = {"pyext": own}, []
    if pyext.explain(pyext.attention, q, k, v, **wide, **options(*more))["triton"] == "accepts":
        ways["triton"] = partial(own, impl="triton")
    for name, peer in peers.items():
        try:
            fresh = [leaf.detach().requires_grad_() for leaf in leaves]
            out = peer(*fresh)
            if direction != "forward":
                torch.autograd.grad(out.sum(), fresh, allow_unused=True)
            ways[name] = peer
        except RuntimeError as error:  # no such backend on this GPU, a compiler that gives up
            notes.append(f"{name} is not compared: {str(error).splitlines()[0][:200]}")
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    share = 2 if causal else 1
    flops = DIRECTIONS[direction] * 2.0 * batch * heads * queries * keys * width / share
    result = _work(ways, formula, leaves, direction != "forward", 0, flops, both=direction == "forward+backward")
    factor = q.new_ones(keys, max(int(flops / (2 * keys * keys)), 1))
    result.bandwidth_probe, result.notes = lambda: factor @ factor.T, notes
    return result


def of_pyext(causal: bool) -> Callable:
    """Attention of pyext without what else there is."""
    return lambda q, k, v, *_: pyext.attention(q, k, v, is_causal=causal)


def causal_part(distance: Tensor) -> Tensor:
    return distance <= 0


# --- The cases ---


def plain(direction: str, device: str, sizes: Sizes, seed: int, causal: bool = True, length: int | None = None) -> Work:
    """length: other than that of the sizes; then without FlexAttention, which takes long to compile."""
    batch, heads, usual, width = sizes.plain
    leaves = _draw(
        seed, device, "bf16", *[(max(batch * usual // (length or usual), 1), heads, length or usual, width)] * 3
    )
    peers = {}
    if device != "cpu":
        peers = {name: partial(sdpa, backend, causal) for name, backend in SDPA.items()}
        if length is None:
            peers[FLEX] = flex(causal, None, leaves[0])
    return work(leaves, direction, dict, partial(eager, None, causal_part if causal else None), peers, causal=causal)


def alibi(direction: str, device: str, sizes: Sizes, seed: int) -> Work:
    """Slopes are learned."""
    heads = sizes.biased[1]
    slopes = 2.0 ** (-8 / heads * torch.arange(1, heads + 1, device=device, dtype=torch.bfloat16))
    leaves = *_draw(seed, device, "bf16", *[sizes.biased] * 3), slopes
    peers = {PLAIN: of_pyext(True)}
    if device != "cpu":
        peers[FLEX] = flex(True, lambda distance, slopes: slopes[:, None] * distance, leaves[0])

    def bias(h, q, k, distance, slopes):
        return slopes[h] * distance

    formula = partial(eager, bias, causal_part)
    return work(leaves, direction, lambda s: {"bias": pyext.bias.alibi(s)}, formula, peers, causal=True)


def t5(direction: str, device: str, sizes: Sizes, seed: int) -> Work:
    """The table is learned."""
    leaves = _draw(seed, device, "bf16", *[sizes.biased] * 3, (BUCKETS, sizes.biased[1]))

    def bucket(distance):
        return pyext.bias.t5_bucket(distance, BUCKETS, True, 128)

    peers = {PLAIN: of_pyext(False)}
    if device != "cpu":
        peers[FLEX] = flex(False, lambda distance, table: table[bucket(distance)].T.contiguous(), leaves[0])

    def bias(h, q, k, distance, table):
        return table[:, h][bucket(distance)]

    options = lambda table: {"bias": pyext.bias.t5(table, bidirectional=True)}  # noqa: E731
    return work(leaves, direction, options, partial(eager, bias, None), peers, causal=False)


def transformer_xl(direction: str, device: str, sizes: Sizes, seed: int) -> Work:
    batch, heads, length, width = sizes.biased
    shapes = [sizes.biased] * 3 + [(2 * length - 1, heads, width), (heads, width), (heads, width)]
    leaves = _draw(seed, device, "bf16", *shapes)

    def bias(h, q, k, distance, r, u, v):
        position = ((q + v[h]) @ r[:, h].T).gather(1, distance + length - 1)
        return (k @ u[h] + position) * width**-0.5

    options = lambda *terms: {"bias": pyext.bias.transformer_xl(*terms)}  # noqa: E731
    return work(leaves, direction, options, partial(eager, bias, None), {PLAIN: of_pyext(False)}, causal=False)


def strided(direction: str, device: str, sizes: Sizes, seed: int) -> Work:
    leaves = _draw(seed, device, "bf16", *[sizes.sparse] * 3)
    mask = pyext.masks.strided(sizes.stride)

    def sees(distance):
        return (distance <= 0) & ((-distance < sizes.stride) | (distance % sizes.stride == 0))

    peers = {DENSE: of_pyext(True)}
    return work(leaves, direction, lambda: {"mask": mask}, partial(eager, None, sees), peers, causal=True)


def decode(direction: str, device: str, sizes: Sizes, seed: int) -> Work:
    """One query of each sequence; keys and values are read once."""
    batch, heads, kv_heads, length, width = sizes.caches
    shapes = (batch, heads, 1, width), (batch, kv_heads, length, width), (batch, kv_heads, length, width)
    leaves = _draw(seed, device, "bf16", *shapes)
    peers = {} if device == "cpu" else {name: partial(sdpa, backend, False) for name, backend in SDPA.items()}
    result = work(leaves, direction, dict, partial(eager, None, None), peers, causal=False)
    read = result.bytes = leaves[1].nbytes + leaves[2].nbytes
    source, target = (torch.empty(read // 2, dtype=torch.int8, device=device) for _ in range(2))
    result.flops, result.bandwidth_probe = 0.0, lambda: target.copy_(source)  # the bandwidth counts
    return result


def all_cases(device: str = "cuda", sizes: Sizes | None = None) -> list[Case]:
    """For a GPU; or, to check the results of small ones, for a CPU."""
    cases, sizes = [], sizes or Sizes()

    def add(title: str, setup: Callable[..., Work], direction: str, *figures: Figure) -> None:
        here = partial(setup, direction, device, sizes)
        how = {"setup": here} if device == "cpu" else {"run": _run(here)}
        name = f"attention, {title} {direction}"
        cases.append(Case(f"gpu/{name}/bf16", "gpu", name, "bf16", figures, op="attention", **how))

    peers = speedup("triton"), *(speedup(name) for name in SDPA)
    for direction, rate, of_triton in (("forward", 560, 480), ("backward", 450, 380)):
        rates = teraflops(rate), teraflops(of_triton, "triton"), percent_of_peak()
        add("causal", plain, direction, *rates, *peers, best_of_sdpa(1), speedup(FLEX))
    for direction, length in itertools.product(("forward", "backward"), sizes.lengths):
        for causal in (False, True):
            longest = direction == "forward" and not causal and length == LENGTHS[-1]
            title = f"{length} tokens, {'causal' if causal else 'full'}"
            setup = partial(plain, causal=causal, length=length)
            add(title, setup, direction, teraflops(620 if longest else None), best_of_sdpa(1))
    for direction, target in (("forward", None), ("backward", None), ("forward+backward", 1.5)):
        add("ALiBi", alibi, direction, slowdown(PLAIN, 8), speedup(FLEX))
        add("T5", t5, direction, slowdown(PLAIN, 8), speedup(FLEX, target))
        add("Transformer-XL", transformer_xl, direction, time_ratio(PLAIN, 2.2))
    for direction in ("forward", "forward+backward"):
        add("strided causal", strided, direction, time_ratio(DENSE, 0.25))
    add("decode", decode, "forward", percent_of_bandwidth(80, what="copy"), *peers)
    return cases
