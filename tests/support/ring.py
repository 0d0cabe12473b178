"""What each process of the tests of `context_parallel_attention` runs: every case against the whole sequence."""

from __future__ import annotations

import traceback

import torch
import torch.distributed as dist

B, HQ, HKV, D, DV = 2, 4, 2, 8, 6


def leaves(seed, queries, keys, dtype, **more):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (B, HQ, queries, D), "k": (B, HKV, keys, D), "v": (B, HKV, keys, DV), **more}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def cases(length):
    """name -> (queries, keys, shapes of more leaves, the options made of the leaves)."""
    import pyext

    bias, masks = pyext.bias, pyext.masks
    n = length
    generator = torch.Generator().manual_seed(5)
    ids = torch.sort(torch.randint(0, 4, (B, n), generator=generator)).values
    order = torch.randperm(n, generator=generator)
    some = torch.rand(B, 1, n, n, generator=generator) < 0.5
    segments = torch.randint(0, 2, (B, n), generator=generator)
    lengths = torch.tensor([n, n // 3])
    return {
        "plain": (n, n, {}, lambda t: {}),
        "causal": (n, n, {}, lambda t: dict(is_causal=True)),
        "causal, more keys": (n, 2 * n, {}, lambda t: dict(mask=masks.causal())),
        "causal, fewer keys": (2 * n, n, {}, lambda t: dict(mask=masks.causal())),
        "upper left": (n, 2 * n, {}, lambda t: dict(is_causal=True)),
        "window": (n, n, {}, lambda t: dict(mask=masks.window(5, 2), softcap=3.0)),
        "window ahead": (n, n, {}, lambda t: dict(mask=masks.window(0, 9))),
        "padding": (n, n, {"sinks": (HQ,)}, lambda t: dict(mask=masks.padding(lengths), sinks=t["sinks"])),
        "sinks, nothing to see": (n, n, {"sinks": (HQ,)}, lambda t: dict(
            mask=masks.padding(torch.tensor([0, 3])), sinks=t["sinks"], is_causal=True)),
        "nothing to see": (n, n, {}, lambda t: dict(mask=masks.padding(torch.tensor([0, 3])))),
        "documents": (n, n, {}, lambda t: dict(mask=masks.documents(ids) & masks.causal())),
        "strided": (n, n, {}, lambda t: dict(mask=masks.strided(7) & masks.causal())),
        "permutation": (n, n, {}, lambda t: dict(mask=masks.permutation(order))),
        "dense mask": (n, n, {}, lambda t: dict(mask=masks.dense(some), is_causal=True)),
        "alibi": (n, n, {"slopes": (HQ,)}, lambda t: dict(bias=bias.alibi(t["slopes"]), is_causal=True)),
        "t5": (n, n, {"table": (16, HQ)}, lambda t: dict(bias=bias.t5(t["table"], True, max_distance=20), scale=0.3)),
        "diagonal": (n, 2 * n, {"values": (HQ, 3 * n - 1)}, lambda t: dict(bias=bias.diagonal(t["values"]))),
        "dense": (n, n, {"values": (1, HQ, n, n)}, lambda t: dict(bias=bias.dense(t["values"]), is_causal=True)),
        "dense columns": (n, n, {"values": (B, 1, 1, n)}, lambda t: dict(bias=bias.dense(t["values"]))),
        "transformer-xl": (n, 2 * n, {"r": (3 * n, HQ, D), "u": (HQ, D), "w": (HQ, D)}, lambda t: dict(
            bias=bias.transformer_xl(t["r"], t["u"], t["w"], first_distance=-2 * n), mask=masks.causal())),
        "shaw": (n, n, {"rows": (9, D)}, lambda t: dict(bias=bias.shaw(t["rows"], 4))),
        "deberta": (n, n, {"c": (HQ, 12, D), "p": (HQ, 12, D)}, lambda t: dict(
            bias=bias.disentangled(t["c"], t["p"], buckets=6, max_position=30), scale=0.2)),
        "segment": (n, n, {"scores": (B, HQ, n, 2)}, lambda t: dict(
            bias=bias.segment(t["scores"], segments, segments))),
        "t5 + alibi": (n, n, {"table": (16, HQ), "slopes": (HQ,)}, lambda t: dict(
            bias=bias.t5(t["table"], False, max_distance=20) + bias.alibi(t["slopes"]), mask=masks.causal())),
    }  # fmt: skip


def compare(case, dtype, impl, balanced, seed, tolerance):
    """out, lse and all gradients against the fp64 reference on the whole sequence; gradients of tables add up."""
    import pyext
    from pyext.distributed import context_parallel_attention, shard_sequence

    queries, keys, more, options = case
    drawn = leaves(seed, queries, keys, dtype, **more)
    whole = {name: x.detach().double().requires_grad_() for name, x in drawn.items()}
    out, lse = pyext.attention(
        *(whole[n] for n in "qkv"), enable_gqa=True, return_lse=True, impl="reference", **options(whole)
    )
    generator = torch.Generator().manual_seed(seed + 1)
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype).double()
    grad_lse = torch.randn(lse.shape, generator=generator).double() * (lse != -torch.inf)
    wanted = torch.autograd.grad((out, lse), list(whole.values()), (grad_out, grad_lse))

    def part(x):
        return shard_sequence(x.detach(), 2, balanced=balanced)

    own = {name: (part(x) if name in "qkv" else x.detach().clone()).requires_grad_() for name, x in drawn.items()}
    got, got_lse = context_parallel_attention(
        *(own[n] for n in "qkv"), enable_gqa=True, balanced=balanced, return_lse=True, impl=impl, **options(own)
    )
    assert got.dtype == dtype
    grads = (part(grad_out).to(got.dtype), part(grad_lse).to(got_lse.dtype))
    grads = torch.autograd.grad((got, got_lse), list(own.values()), grads)
    pairs = {"out": (got.double(), part(out)), "lse": (got_lse.double(), part(lse))}
    for name, mine, theirs in zip(own, grads, wanted):
        if name in "qkv":
            pairs[name] = mine.double(), part(theirs)
        else:
            total = mine.double()
            dist.all_reduce(total)
            pairs[name] = total, theirs
        assert mine.dtype == dtype, name
    for name, (mine, theirs) in pairs.items():
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def run(seed, impls) -> list[str]:
    """All cases; returns the failures."""
    failures = []
    for impl in impls:
        for n, (name, case) in enumerate(cases(24).items()):
            for balanced in (True, False):
                for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 6e-2)):
                    if dtype != torch.float64 and (impl == "reference" or n % 3):
                        continue
                    try:
                        compare(case, dtype, impl, balanced, seed + n, tolerance)
                    except Exception:
                        failures.append(f"{name}, {impl}, balanced={balanced}, {dtype}\n{traceback.format_exc()}")
                        if "assert_close" not in failures[-1]:  # the processes may have parted: stop
                            break
    return failures
