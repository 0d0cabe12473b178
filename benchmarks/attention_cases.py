"""The cases of `pyext.attention` and the figures they are to reach (one AVX-512 + BF16 core).

Work is counted as GEMM flops: forward 4*B*H*Lq*Lk*D, backward 10*B*H*Lq*Lk*D (five GEMMs; the recomputed one counts,
as it does for everybody who does not keep the L x L matrix), half of that when causal. Peers do the same mathematics:
`F.scaled_dot_product_attention` with the bias materialised as its float mask, and compiled `flex_attention`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import pyext

from . import long_context, peers
from .harness import (
    Case,
    Contender,
    Figure,
    Tensors,
    Work,
    microseconds,
    percent_of_bandwidth,
    percent_of_peak,
    slowdown,
    speedup,
    time_ratio,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
BUCKETS, MAX_DISTANCE = 32, 128
FULL, WIDE, SHORT, ODD = (1, 8, 2048, 64), (1, 8, 2048, 128), (4, 8, 512, 64), (2, 6, 777, 72)
MASK_GIVEN = "SDPA, mask given"
PADDED = (2, 8, 2048, 64)


def shape_name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


# --- Inputs and the eager formula -----------------------------------------------------------------------------------


@dataclass
class Inputs:
    """query, key, value, the output's gradient (B, H, L, D), and the case's bias tensor (or None), learned or not."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grad_out: torch.Tensor
    bias: torch.Tensor | None = None
    learned: bool = True

    @classmethod
    def random(cls, shape, dtype, seed, bias_shape=None, kv_shape=None) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def make(size):
            return torch.randn(size, generator=generator).to(dtype)

        kv_shape = kv_shape or shape
        bias = make(bias_shape) if bias_shape else None
        return cls(make(shape), make(kv_shape), make(kv_shape), make(shape), bias)

    def leaves(self, dtype: torch.dtype | None = None) -> Tensors:
        """Fresh leaves that ask for gradients, in another dtype if given."""
        named = {"query": self.query, "key": self.key, "value": self.value, "bias": self.bias}
        leaves = {n: t.detach().to(dtype or t.dtype) for n, t in named.items() if t is not None}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name != "bias" or self.learned)
        return leaves


def eager(query, key, value, bias=None, keep=None):
    """softmax(q k^T / sqrt(D) + bias) v, one line each; keep: bool, True = attend. The truth when given fp64."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    score = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if bias is not None:
        score = score + bias
    if keep is not None:
        score = score.masked_fill(~keep, -math.inf)
    return score.softmax(-1) @ value


def both_ways(inputs: Inputs, attend: Callable[[Tensors], torch.Tensor], dtype=None, gradients=True) -> Tensors:
    """Output and, if asked, the gradient of every leaf, of one way to attend."""
    leaves = inputs.leaves(dtype)
    if not gradients:
        with torch.no_grad():
            return {"out": attend(leaves)}
    out = attend(leaves)
    names = [name for name, leaf in leaves.items() if leaf.requires_grad]
    grads = torch.autograd.grad(out, [leaves[name] for name in names], inputs.grad_out.to(out.dtype))
    return {"out": out.detach(), **{f"grad_{name}": g for name, g in zip(names, grads, strict=True)}}


@dataclass
class Scheme:
    """One position scheme or mask: how pyext says it, how PyTorch materialises it."""

    pyext_kwargs: Callable[[torch.Tensor | None], dict]  # bias leaf -> keyword arguments of pyext.attention
    dense_bias: Callable[[torch.Tensor | None], torch.Tensor | None]  # bias leaf -> (.., Lq, Lk)
    keep: torch.Tensor | None = None  # bool, True = attend
    causal: bool = False
    bias_shape: tuple[int, ...] | None = None
    constant: torch.Tensor | None = None  # the bias tensor, where it is not learned

    def inputs(self, shape, dtype: str, seed: int) -> Inputs:
        inputs = Inputs.random(shape, DTYPES[dtype], seed, self.bias_shape)
        if self.constant is not None:
            inputs = dataclasses.replace(inputs, bias=self.constant.to(DTYPES[dtype]), learned=False)
        return inputs

    def pyext(self, leaves: Tensors) -> torch.Tensor:
        kwargs = self.pyext_kwargs(leaves.get("bias"))
        return pyext.attention(leaves["query"], leaves["key"], leaves["value"], is_causal=self.causal, **kwargs)

    def eager(self, leaves: Tensors) -> torch.Tensor:
        keep = peers.causal_keep(leaves["query"].shape[2]) if self.causal else self.keep
        bias = self.dense_bias(leaves.get("bias"))
        return eager(leaves["query"], leaves["key"], leaves["value"], bias, keep)

    def sdpa_mask(self, bias: torch.Tensor | None) -> tuple[torch.Tensor | None, bool]:
        """(attn_mask, is_causal). SDPA takes one or the other, so with a bias the causal mask goes into it."""
        mask = self.dense_bias(bias)
        if mask is None:
            return self.keep, self.causal
        return (mask.masked_fill(~peers.causal_keep(mask.shape[-1]), -math.inf) if self.causal else mask), False

    def sdpa(self, leaves: Tensors) -> torch.Tensor:
        """Makes the mask from the bias tensor on every call, so that its gradient reaches the tensor."""
        return _sdpa(leaves, *self.sdpa_mask(leaves.get("bias")))

    def sdpa_with_mask_made_before(self, bias: torch.Tensor | None) -> Callable[[Tensors], torch.Tensor]:
        """The mask exists when the clock starts: generous to SDPA, as a model's second layer sees it."""
        mask, causal = self.sdpa_mask(bias)
        mask = mask.contiguous() if mask is not None else None
        return lambda leaves: _sdpa(leaves, mask, causal)


def _sdpa(leaves: Tensors, mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
    query, key, value = leaves["query"], leaves["key"], leaves["value"]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)


def plain(causal: bool = False) -> Scheme:
    return Scheme(lambda _: {}, lambda _: None, causal=causal)


def t5(heads: int, length: int) -> Scheme:
    bucket = peers.t5_buckets(length, BUCKETS, MAX_DISTANCE)
    return Scheme(
        lambda table: {"bias": pyext.bias.t5(table, bidirectional=True, max_distance=MAX_DISTANCE)},
        lambda table: table[bucket].permute(2, 0, 1)[None],
        bias_shape=(BUCKETS, heads),
    )


def alibi(heads: int, length: int) -> Scheme:
    distance = peers.distances(length)
    return Scheme(
        lambda slopes: {"bias": pyext.bias.alibi(slopes)},
        lambda slopes: (slopes[:, None, None] * distance.to(slopes.dtype))[None],
        causal=True,
        constant=2.0 ** (-8 * torch.arange(1, heads + 1) / heads),  # BLOOM's; exact in bf16 for 8 heads
    )


def dense(heads: int, length: int) -> Scheme:
    shape = (1, heads, length, length)
    return Scheme(lambda t: {"bias": pyext.bias.dense(t)}, lambda t: t, bias_shape=shape)


def padded(lengths: torch.Tensor, length: int) -> Scheme:
    keep = torch.arange(length) < lengths[:, None, None, None]
    return Scheme(lambda _: {"mask": pyext.masks.padding(lengths)}, lambda _: None, keep=keep)


# --- The three directions a scheme is measured in -------------------------------------------------------------------


def forward_call(inputs: Inputs, attend) -> Callable[[], None]:
    leaves = {name: leaf.detach() for name, leaf in inputs.leaves().items()}

    def call():
        with torch.no_grad():
            attend(leaves)

    return call


def backward_call(inputs: Inputs, attend) -> Callable[[], None]:
    leaves = inputs.leaves()
    wanted, state = [leaf for leaf in leaves.values() if leaf.requires_grad], []

    def call():
        if not state:  # the first call, in the warm-up, builds the graph that the others run again
            state.append(attend(leaves))
        torch.autograd.grad(state[0], wanted, inputs.grad_out, retain_graph=True)

    return call


def step_call(inputs: Inputs, attend) -> Callable[[], None]:
    leaves = inputs.leaves()
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]

    def call():
        torch.autograd.grad(attend(leaves), wanted, inputs.grad_out)

    return call


CALLS = {"forward": forward_call, "backward": backward_call, "forward+backward": step_call}
FLOPS = {"forward": 4, "backward": 10, "forward+backward": 14}


def work_of(direction, scheme, shape, dtype, seed, others=(), sdpa=True) -> Work:
    """pyext and SDPA on one scheme; others: (name, Scheme) that pyext also does, on the same query, key, value."""
    batch, heads, length, dim = shape
    inputs = scheme.inputs(shape, dtype, seed)
    bare = dataclasses.replace(inputs, bias=None)
    make, gradients = CALLS[direction], direction != "forward"
    contenders = [Contender("pyext", make(inputs, scheme.pyext))]
    contenders += [Contender(name, make(bare, other.pyext)) for name, other in others]
    if sdpa:
        learns = gradients and inputs.learned
        attend = scheme.sdpa if learns else scheme.sdpa_with_mask_made_before(inputs.bias)
        contenders.append(Contender("SDPA", make(inputs, attend)))
    return Work(
        contenders,
        flops=FLOPS[direction] * batch * heads * length * length * dim / (2 if scheme.causal else 1),
        got=lambda: both_ways(inputs, scheme.pyext, gradients=gradients),
        truth=lambda to: both_ways(inputs, scheme.eager, to, gradients=gradients),
        dtype=DTYPES[dtype],
    )


# --- Special work ---------------------------------------------------------------------------------------------------


def decode_work(dtype: str, seed: int, length: int = 8192, heads: int = 32, kv_heads: int = 8, dim: int = 128) -> Work:
    """One new token against a long cache. Calls rotate over several caches, as a model's layers do.

    Otherwise the last-level cache would hold half of K and V, and no one would be reading memory.
    """
    cache_bytes = 2 * kv_heads * length * dim * DTYPES[dtype].itemsize
    count = max(2, math.ceil(256 * 2**20 / cache_bytes))
    shapes = (1, heads, 1, dim), (1, kv_heads, length, dim)
    caches = [Inputs.random(shapes[0], DTYPES[dtype], seed + i, kv_shape=shapes[1]) for i in range(count)]

    def turning(attend):
        turn = [0]

        def call():
            turn[0] = (turn[0] + 1) % count
            with torch.no_grad():
                return attend(caches[turn[0]])

        return call

    def mine(c):
        return pyext.attention(c.query, c.key, c.value, enable_gqa=True)

    def theirs(c):
        return F.scaled_dot_product_attention(c.query, c.key, c.value, enable_gqa=True)

    def truth(to):
        c = caches[0]
        return {"out": eager(c.query.to(to), c.key.to(to), c.value.to(to))}

    return Work(
        [Contender("pyext", turning(mine)), Contender("SDPA", turning(theirs))],
        flops=4 * heads * length * dim,
        bytes=cache_bytes,
        got=lambda: {"out": mine(caches[0])},
        truth=truth,
        dtype=DTYPES[dtype],
        bandwidth_probe=turning(peers.fastest_reader([(c.key, c.value) for c in caches])),
    )


def padded_work(direction: str, dtype: str, seed: int) -> Work:
    length = PADDED[2]
    lengths = torch.tensor([length * 3 // 4, length // 4])  # half of all keys are padding
    work = work_of(direction, padded(lengths, length), PADDED, dtype, seed, [("full length", plain())])
    work.flops /= 2
    return work


def threads_work(direction: str, dtype: str, seed: int) -> Work:
    work = work_of(direction, plain(), FULL, dtype, seed, sdpa=False)
    call = work.contenders[0].call
    work.contenders = [Contender("pyext", call, threads=2), Contender("one thread", call, threads=1)]
    return work


def overhead_work(dtype: str, seed: int) -> Work:
    return work_of("forward", plain(), (1, 1, 4, 8), dtype, seed)


def t5_step_work(dtype: str, seed: int) -> Work:
    """Forward + backward to the table. SDPA makes the mask from the table; a second entry is given the mask.

    The second is what each further layer of a model pays, where the first one's mask is used again.
    """
    heads, length = FULL[1:3]
    scheme = t5(heads, length)
    work = work_of("forward+backward", scheme, FULL, dtype, seed)
    inputs = scheme.inputs(FULL, dtype, seed)
    given = dataclasses.replace(inputs, bias=scheme.dense_bias(inputs.bias).contiguous())
    work.contenders.append(Contender(MASK_GIVEN, step_call(given, dense(heads, length).sdpa)))
    return work


def flex_work(kind: str, scheme: Scheme, shape, dtype: str, seed: int, others=()) -> Work:
    work = work_of("forward", scheme, shape, dtype, seed, others)
    inputs = scheme.inputs(shape, dtype, seed)
    attend, reason = peers.flex_attention(kind, inputs.query, inputs.key, inputs.value, inputs.bias, MAX_DISTANCE)
    if attend is None:
        work.notes.append(f"flex_attention is not compared: {reason}")
    else:
        work.contenders.append(Contender("flex_attention", attend))
    return work


# --- The list -------------------------------------------------------------------------------------------------------


def _of(*args, make=work_of, **kwargs) -> Callable[[int], Work]:
    return lambda seed: make(*args, seed=seed, **kwargs)


def plain_cases() -> list[Case]:
    """Forward and backward without bias, then the AVX2 build against SDPA on the same shapes."""
    table = (  # kind, shape, causal, forward target fp32/bf16, backward target fp32/bf16
        ("full", FULL, False, (75, 72), (75, 72)),
        ("full", WIDE, False, (80, 78), (75, 72)),
        ("causal", FULL, True, (72, 68), (75, 72)),
        ("short", SHORT, False, (70, 65), (75, 72)),
        ("odd", ODD, False, (60, 55), (None, None)),
    )
    cases = []
    for direction in ("forward", "backward"):
        for kind, shape, causal, *targets in table:
            target = targets[direction == "backward"]
            for dtype, at_least in zip(("fp32", "bf16"), target, strict=True):
                cases.append(
                    Case(
                        f"{direction}/{kind}/{shape_name(shape)}/{dtype}",
                        direction,
                        f"{direction}, {'causal' if causal else kind}, {shape}",
                        dtype,
                        (percent_of_peak(at_least), speedup("SDPA")),
                        _of(direction, plain(causal), shape, dtype),
                        peak=dtype,
                    )
                )
    for direction in ("forward", "backward"):
        for kind, shape, causal, *_ in table:
            cases.append(
                Case(
                    f"avx2/{direction}/{kind}/{shape_name(shape)}/fp32",
                    "AVX2 build",
                    f"AVX2 build, {direction}, {'causal' if causal else kind}, {shape}",
                    "fp32",
                    (speedup("SDPA", 1.0), percent_of_peak()),
                    _of(direction, plain(causal), shape, "fp32"),
                    isa="avx2",
                    peak="fp32",
                )
            )
    return cases


def bias_cases() -> list[Case]:
    """T5, ALiBi and dense bias: against the same call without one, against SDPA and flex_attention."""
    cases = []

    def add(name, title, dtype, figures, setup):
        cases.append(Case(f"{name}/{shape_name(FULL)}/{dtype}", "bias", title, dtype, figures, setup, peak=dtype))

    none, causal = [("no bias", plain())], [("no bias", plain(causal=True))]
    for i, dtype in enumerate(("fp32", "bf16")):
        figures = slowdown("no bias", 3), speedup("SDPA"), speedup("flex_attention"), percent_of_peak()
        setup = _flex_setup("t5", t5, none, dtype)
        add("t5/forward", "T5 bias, forward", dtype, figures, setup)
        figures = slowdown("no bias", 6), speedup("SDPA"), percent_of_peak()
        add("t5/backward", "T5 bias, backward", dtype, figures, _bias_setup("backward", t5, none, dtype))
        figures = speedup("SDPA", (4, 7)[i]), speedup(MASK_GIVEN), percent_of_peak()
        setup = _of(dtype, make=t5_step_work)
        add("t5/forward+backward", "T5 bias with gradient, forward + backward", dtype, figures, setup)
        figures = slowdown("no bias"), speedup("SDPA"), speedup("flex_attention"), percent_of_peak()
        setup = _flex_setup("alibi", alibi, causal, dtype)
        add("alibi/forward", "ALiBi, causal, forward", dtype, figures, setup)
        figures = slowdown("no bias"), speedup("SDPA"), percent_of_peak()
        setup = _bias_setup("forward+backward", alibi, causal, dtype)
        add("alibi/forward+backward", "ALiBi, causal, forward + backward", dtype, figures, setup)
        add("dense/forward", "dense bias, forward", dtype, figures, _bias_setup("forward", dense, none, dtype))
        setup = _bias_setup("forward+backward", dense, none, dtype)
        add("dense/forward+backward", "dense bias with gradient, forward + backward", dtype, figures, setup)
    return cases


def _bias_setup(direction, scheme, others, dtype):
    return lambda seed: work_of(direction, scheme(FULL[1], FULL[2]), FULL, dtype, seed, others)


def _flex_setup(kind, scheme, others, dtype):
    return lambda seed: flex_work(kind, scheme(FULL[1], FULL[2]), FULL, dtype, seed, others)


def special_cases() -> list[Case]:
    """Padding, decoding, fp16, two threads, call overhead, memory."""
    cases = []
    for i, dtype in enumerate(("fp32", "bf16")):
        for direction in ("forward", "forward+backward"):
            cases.append(
                Case(
                    f"padded/{direction}/{shape_name(PADDED)}/{dtype}",
                    "padding",
                    f"half the keys padded, {direction}, {PADDED}",
                    dtype,
                    (time_ratio("full length", 0.6), speedup("SDPA"), percent_of_peak()),
                    _of(direction, dtype, make=padded_work),
                    peak=dtype,
                )
            )
        cases.append(
            Case(
                f"decode/1x32x8x8192x128/{dtype}",
                "decode",
                "decode, Lq=1, Lk=8192, Hq=32, Hkv=8, D=128",
                dtype,
                (speedup("SDPA", (1.5, 3)[i]), percent_of_bandwidth((70, None)[i])),
                _of(dtype, make=decode_work),
            )
        )
        for direction in ("forward", "backward"):
            cases.append(
                Case(
                    f"threads/{direction}/{shape_name(FULL)}/{dtype}",
                    "two threads",
                    f"two threads against one, {direction}, {FULL}",
                    dtype,
                    (speedup("one thread", 1.85),),
                    _of(direction, dtype, make=threads_work),
                    threads=2,
                )
            )
    name, shape = f"forward/full/{shape_name(FULL)}/fp16", FULL
    figures = speedup("SDPA", 3), percent_of_peak()
    setup = _of("forward", plain(), shape, "fp16")
    cases.append(Case(name, "forward", f"forward, fp16, {shape}", "fp16", figures, setup, peak="fp32"))
    figures = microseconds(15), speedup("SDPA")
    setup = _of("fp32", make=overhead_work)
    cases.append(Case("overhead/1x1x4x8/fp32", "overhead", "a tiny call without grad", "fp32", figures, setup))
    length, heads, dim = long_context.LENGTH, long_context.HEADS, long_context.DIM
    figures = (
        Figure("memory above the inputs", "MiB", lambda m: m.extra["peak_mib"], at_most=300),
        Figure("one step", "s", lambda m: m.seconds["pyext"]),
    )
    title = f"T5 bias, {length} tokens, forward + backward, (1, {heads}, {length}, {dim})"
    case_name = f"memory/1x{heads}x{length}x{dim}/bf16"
    cases.append(Case(case_name, "memory", title, "bf16", figures, run=long_context.run))
    return cases


def all_cases() -> list[Case]:
    return plain_cases() + bias_cases() + special_cases()
