"""Packed sequences against the same sequences one by one, and against the oracle."""

from __future__ import annotations

import pytest
import torch

import pyext
from support import oracle, parts
from support.cases import on_threads
from support.tolerance import assert_close_to_reference

LENGTHS = {
    "mixed": ((5, 0, 33, 1, 70), (5, 7, 40, 0, 70)),
    "self": ((64, 1, 129, 30), (64, 1, 129, 30)),
    "decode": ((1, 1, 1, 2), (300, 17, 0, 513)),
    "one": ((77,), (90,)),
    "more queries": ((50, 20), (3, 19)),
    "all empty": ((0, 0), (0, 0)),
    "no keys": ((3, 4), (0, 0)),
    "no queries": ((0, 0), (3, 4)),
}
HEADS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (4, 1)}
FEATURES = {
    "plain": {},
    "is_causal": {"is_causal": True},
    "causal": {"mask": lambda: pyext.masks.causal()},
    "window": {"mask": lambda: pyext.masks.window(9, 4)},
    "alibi": {"bias": lambda t: pyext.bias.alibi(t["slopes"]), "mask": lambda: pyext.masks.causal()},
    "t5": {"bias": lambda t: pyext.bias.t5(t["table"], bidirectional=True)},
    "t5, causal, sinks": {
        "bias": lambda t: pyext.bias.t5(t["table"], bidirectional=False, max_distance=40),
        "is_causal": True,
        "sinks": True,
    },
    "t5 + alibi, softcap": {
        "bias": lambda t: pyext.bias.t5(t["table"], bidirectional=True) + pyext.bias.alibi(t["slopes"], symmetric=True),
        "softcap": 2.0,
        "scale": 0.4,
    },
    "transformer-xl, causal": {
        "bias": lambda t: pyext.bias.transformer_xl(t["r"], t["u"], t["w"], first_distance=-40),
        "is_causal": True,
    },
    "deberta": {"bias": lambda t: pyext.bias.disentangled(t["pos_key"], t["pos_query"], buckets=8, max_position=40)},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def leaves_for(name, lengths, heads, dtype, seed, dims=(24, 16)):
    g = torch.Generator().manual_seed(seed)
    total_q, total_k = sum(lengths[0]), sum(lengths[1])

    def normal(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

    leaves = {"q": normal(total_q, heads[0], dims[0]), "k": normal(total_k, heads[1], dims[0])}
    leaves["v"] = normal(total_k, heads[1], dims[1])
    if "alibi" in name:
        leaves["slopes"] = normal(heads[0]) * 0.3
    if "t5" in name:
        leaves["table"] = normal(32, heads[0])
    if "sinks" in name:
        leaves["sinks"] = normal(heads[0])
    if "transformer-xl" in name:
        leaves.update(r=normal(50, heads[0], dims[0]), u=normal(heads[0], dims[0]), w=normal(heads[0], dims[0]))
    if "deberta" in name:
        leaves.update(pos_key=normal(heads[0], 16, dims[0]), pos_query=normal(1, 16, dims[0]))
    cotangents = (
        normal(total_q, heads[0], dims[1]),
        normal(heads[0], total_q).to(torch.promote_types(dtype, torch.float32)),
    )
    return {key: x.requires_grad_() for key, x in leaves.items()}, cotangents


def options_for(feature, leaves):
    options = {key: value for key, value in FEATURES[feature].items() if key not in ("bias", "mask", "sinks")}
    if "bias" in FEATURES[feature]:
        options["bias"] = FEATURES[feature]["bias"](leaves)
    if "mask" in FEATURES[feature]:
        options["mask"] = FEATURES[feature]["mask"]()
    if "sinks" in leaves:
        options["sinks"] = leaves["sinks"]
    return options


def sequences(leaves, lengths):
    """(q, k, v) of each sequence as (1, H, L, D)."""
    split = leaves["q"].split(lengths[0]), leaves["k"].split(lengths[1]), leaves["v"].split(lengths[1])
    return [tuple(x.transpose(0, 1)[None] for x in sequence) for sequence in zip(*split)]


def pack(outs, lses):
    """out (total_q, Hq, Dv) and lse (Hq, total_q) from the results of `sequences`."""
    return torch.cat([out[0].transpose(0, 1) for out in outs]), torch.cat([lse[0] for lse in lses], 1)


def visible(feature, d):
    if feature in ("is_causal", "causal", "alibi", "t5, causal, sinks", "transformer-xl, causal"):
        return d <= 0
    return (d >= -9) & (d <= 4) if feature == "window" else None


def dense_score(feature, leaves, d, q, k):
    score = None
    if feature == "transformer-xl, causal":
        row = (d + 40).masked_fill((d < -40) | (d >= 10), -1)
        score = parts.query_rows(q + leaves["w"].unsqueeze(1), leaves["r"].transpose(0, 1), row)
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        score = (score + leaves["u"][None, :, None] @ keys.mT) * q.shape[-1] ** -0.5
    if feature == "deberta":
        row = (oracle.deberta_bucket(-d, 8, 40) + 8).clamp(0, 15)
        score = parts.query_rows(q, leaves["pos_key"], row) + parts.key_rows(k, leaves["pos_query"], row, q.shape[1])
        score = score * q.shape[-1] ** -0.5
    if feature.startswith("t5"):
        one_way = "causal" in feature
        bucket = oracle.t5_bucket(d, not one_way, 32, 40 if one_way else 128)
        score = leaves["table"][bucket].permute(2, 0, 1)
    if "alibi" in feature:
        slopes = leaves["slopes"].view(-1, 1, 1) * (-d.abs() if "+" in feature else d)
        score = slopes if score is None else score + slopes
    return score


def dense_sequences(feature, lengths, leaves):
    """The oracle's (out, lse) of each sequence."""
    options = {key: FEATURES[feature].get(key) for key in ("softcap", "scale")}
    results = []
    for q, k, v in sequences(leaves, lengths):
        d = oracle.distance(q.shape[2], k.shape[2])
        score, allowed = dense_score(feature, leaves, d, q, k), visible(feature, d)
        results.append(oracle.attention(q, k, v, allowed=allowed, score=score, sinks=leaves.get("sinks"), **options))
    return tuple(zip(*results))


def magnitudes(feature, lengths, leaves, cotangents, outs, lses):
    """The two yardsticks of `oracle.magnitudes`, packed; those of shared leaves summed over sequences."""
    totals = {}, {}
    shared = {name: leaf for name, leaf in leaves.items() if name not in "qkv"}
    upstream = zip(cotangents[0].double().split(lengths[0]), cotangents[1].double().split(lengths[0], 1))
    for (q, k, v), out, lse, (grad_out, grad_lse) in zip(sequences(leaves, lengths), outs, lses, upstream):
        if q.shape[2] == 0:
            continue
        d = oracle.distance(q.shape[2], k.shape[2])
        yardsticks = oracle.magnitudes(
            {"query": q, "key": k, "value": v, **shared},
            *(lambda t, d=d: dense_score(feature, t, d, t["query"], t["key"]), out, lse),
            *(grad_out.transpose(0, 1)[None], grad_lse[None]),
            scale=FEATURES[feature].get("scale", q.shape[-1] ** -0.5),
            softcap=FEATURES[feature].get("softcap"),
            allowed=visible(feature, d),
            keep=None,
            p=0.0,
        )
        for total, part in zip(totals, yardsticks):
            for name, value in part.items():
                name = {"grad query": "grad q", "grad key": "grad k", "grad value": "grad v"}.get(name, name)
                if name[5:] in shared:
                    total[name] = total.get(name, 0) + value
                else:
                    total[name] = torch.cat([total.get(name, value[:0].flatten()), value.flatten()])
    return totals


def results(leaves, cotangents, out, lse):
    pairs = [(x, g.to(x.dtype)) for x, g in ((out, cotangents[0]), (lse, cotangents[1])) if x.requires_grad]
    outputs, upstream = zip(*pairs)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True)
    named = {"out": out.detach(), "lse": lse.detach()}
    for (name, leaf), gradient in zip(leaves.items(), gradients):
        named[f"grad {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return named


def packed(feature, lengths, leaves, cotangents, impl, threads=2):
    tensors = *(leaves[n] for n in "qkv"), offsets(lengths[0]), offsets(lengths[1])
    options = dict(options_for(feature, leaves), enable_gqa=True, return_lse=True, impl=impl)
    with on_threads(threads):
        return results(leaves, cotangents, *pyext.varlen_attention(*tensors, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_against_oracle(lengths, feature, dtype, backend, seed):
    heads = HEADS[list(HEADS)[seed % 3]]
    lengths = LENGTHS[lengths]
    leaves, cotangents = leaves_for(feature, lengths, heads, dtype, seed)
    got = packed(feature, lengths, leaves, cotangents, backend.impl)
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    outs, lses = dense_sequences(feature, lengths, wide)
    magnitude, floor = magnitudes(feature, lengths, wide, cotangents, outs, lses)
    eps = torch.finfo(dtype).eps
    reference = results(wide, cotangents, *pack(outs, lses))
    same = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    eager = results(same, cotangents, *pack(*dense_sequences(feature, lengths, same)))
    for name, value in got.items():
        independent = heads[0] * sum(lengths[0])
        limits = dict(magnitude=magnitude.get(name), floor=floor[name] * eps if name in floor else None)
        options = dict(name=name, independent=independent, **limits)
        assert_close_to_reference(value, reference[name], eager[name], **options)
    assert got["out"].dtype == dtype and got["lse"].shape == (heads[0], sum(lengths[0]))


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("heads", HEADS)
def test_equals_single_calls(heads, feature, cpu, seed):
    """Packed and one by one: the same numbers, dropout's mask apart, to the rounding of sums over sequences."""
    lengths, heads = LENGTHS["mixed"], HEADS[heads]
    leaves, cotangents = leaves_for(feature, lengths, heads, torch.float32, seed)
    got = packed(feature, lengths, leaves, cotangents, cpu.impl)
    options = options_for(feature, leaves)
    if options.pop("is_causal", False):
        options["mask"] = pyext.masks.causal()
    single = [
        pyext.attention(*qkv, enable_gqa=True, return_lse=True, impl=cpu.impl, **options)
        for qkv in sequences(leaves, lengths)
    ]
    wanted = results(leaves, cotangents, *pack(*zip(*single)))
    for name, value in got.items():
        scale = float(wanted[name][wanted[name].isfinite()].abs().max().clamp(min=1.0))
        torch.testing.assert_close(value, wanted[name], rtol=2e-5, atol=4e-6 * scale, msg=lambda m, n=name: f"{n}: {m}")


def close(backend) -> dict[str, float]:
    """To the last places of the widest dtype."""
    return {"rtol": 1e-10, "atol": 1e-11} if backend.widest == torch.float64 else {"rtol": 1e-4, "atol": 2e-5}


def test_diagonal_values(backend, seed):
    """A strip of total_q + total_k - 1 values with distance 0 at index total_k - 1; each sequence uses its middle."""
    lengths = LENGTHS["mixed"]
    total_q, total_k = sum(lengths[0]), sum(lengths[1])
    leaves, cotangents = leaves_for("plain", lengths, (4, 4), backend.widest, seed)
    leaves["values"] = torch.randn(4, total_q + total_k - 1, dtype=backend.widest, requires_grad=True)
    out, lse = pyext.varlen_attention(
        *(leaves[n] for n in "qkv"),
        offsets(lengths[0]),
        offsets(lengths[1]),
        bias=pyext.bias.diagonal(leaves["values"]),
        return_lse=True,
        impl=backend.impl,
    )
    got = results(leaves, cotangents, out, lse)
    dense = []
    for q, k, v in sequences(leaves, lengths):
        score = leaves["values"][:, oracle.distance(q.shape[2], k.shape[2]) + total_k - 1]
        dense.append(oracle.attention(q, k, v, score=score))
    wanted = results(leaves, cotangents, *pack(*zip(*dense)))
    for name, value in got.items():
        torch.testing.assert_close(value, wanted[name], **close(backend), msg=lambda m, n=name: f"{n}: {m}")


def test_prefix(backend, seed):
    lengths = ((20, 7, 0, 33), (20, 30, 4, 33))
    prefixes = torch.tensor([5, 30, 2, 0])
    leaves, cotangents = leaves_for("plain", lengths, (4, 2), backend.widest, seed)
    options = dict(enable_gqa=True, mask=pyext.masks.prefix(prefixes), return_lse=True, impl=backend.impl)
    got = pyext.varlen_attention(*(leaves[n] for n in "qkv"), offsets(lengths[0]), offsets(lengths[1]), **options)
    dense = []
    for (q, k, v), prefix in zip(sequences(leaves, lengths), prefixes):
        allowed = (oracle.distance(q.shape[2], k.shape[2]) <= 0) | (torch.arange(k.shape[2]) < prefix)
        dense.append(oracle.attention(q, k, v, allowed=allowed))
    wanted = results(leaves, cotangents, *pack(*zip(*dense)))
    for name, value in results(leaves, cotangents, *got).items():
        torch.testing.assert_close(value, wanted[name], **close(backend), msg=lambda m, n=name: f"{n}: {m}")


def test_dropout_is_keyed_by_sequence(cpu, seed):
    """Sequence n drops what batch entry n of a padded call drops."""
    lengths = (5, 0, 33, 12)
    longest = max(lengths)
    total = sum(lengths)

    def generator():
        return torch.Generator().manual_seed(seed)

    zeros = torch.zeros(total, 2, 4)
    eye = torch.cat([torch.eye(longest)[:n] for n in lengths]).unsqueeze(1).expand(total, 2, longest)
    cu = offsets(lengths)
    got = pyext.varlen_attention(zeros, zeros, eye, cu, cu, dropout_p=0.4, generator=generator(), impl=cpu.impl)
    q = torch.zeros(4, 2, longest, 4)
    v = torch.eye(longest).expand(4, 2, longest, longest)
    padding = pyext.masks.padding(torch.tensor(lengths))
    whole = pyext.attention(q, q, v, dropout_p=0.4, mask=padding, generator=generator(), impl=cpu.impl)
    wanted = torch.cat([whole[n, :, :length].transpose(0, 1) for n, length in enumerate(lengths)])
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)


def test_strides_and_offset_dtypes(cpu, seed):
    """Slices of a packed projection, int64 offsets: the same bits as contiguous tensors with int32 offsets."""
    lengths = LENGTHS["self"]
    leaves, _ = leaves_for("plain", lengths, (4, 4), torch.float32, seed, dims=(24, 24))
    q, k, v = (leaves[n].detach() for n in "qkv")
    cu = offsets(lengths[0])
    wanted = pyext.varlen_attention(q, k, v, cu, cu, is_causal=True, impl=cpu.impl)
    projection = torch.full((len(q), 4, 3 * 24 + 5), float("nan"))
    for n, x in enumerate((q, k, v)):
        projection[..., 24 * n : 24 * (n + 1)] = x
    sliced = (projection[..., 24 * n : 24 * (n + 1)] for n in range(3))
    assert torch.equal(wanted, pyext.varlen_attention(*sliced, cu.long(), cu.long(), is_causal=True, impl=cpu.impl))
    every_second = (torch.stack([x, x * float("nan")], -1).flatten(-2)[..., ::2] for x in (q, k, v))
    assert torch.equal(wanted, pyext.varlen_attention(*every_second, cu, cu, is_causal=True, impl=cpu.impl))


def test_threads_change_no_bit(cpu, seed):
    lengths = LENGTHS["mixed"]
    for heads in HEADS.values():
        feature = "t5, causal, sinks"
        leaves, cotangents = leaves_for(feature, lengths, heads, torch.bfloat16, seed)
        once = packed(feature, lengths, leaves, cotangents, cpu.impl, threads=1)
        for threads in (2, 3, 8):
            again = packed(feature, lengths, leaves, cotangents, cpu.impl, threads)
            assert all(torch.equal(value, again[name]) for name, value in once.items())


def test_gradcheck(cpu_best, seed):
    lengths = ((3, 0, 2), (2, 1, 4))
    leaves, _ = leaves_for("t5, causal, sinks", lengths, (2, 1), torch.float64, seed, dims=(3, 2))
    names = list(leaves)

    def call(*values):
        given = dict(zip(names, values))
        out, lse = pyext.varlen_attention(
            *(given[n] for n in "qkv"),
            offsets(lengths[0]),
            offsets(lengths[1]),
            enable_gqa=True,
            return_lse=True,
            impl=cpu_best.impl,
            **options_for("t5, causal, sinks", given),
        )
        return out, lse

    assert torch.autograd.gradcheck(call, tuple(leaves.values()), eps=1e-6, atol=1e-7, rtol=1e-5)
