"""pyext.nn.MultiheadAttention against torch.nn.MultiheadAttention: every argument, forward and all gradients."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

import pyext

EMBED, HEADS, BATCH, QUERIES, KEYS = 24, 4, 3, 9, 14
Torch, Ours = torch.nn.MultiheadAttention, pyext.nn.MultiheadAttention
LAYOUTS = ("batch second", "batch first", "unbatched")
TOLERANCE = {torch.float64: dict(rtol=1e-10, atol=1e-11), torch.float32: dict(rtol=1e-4, atol=1e-4)}


def pair(impl="auto", dtype=torch.float64, **options):
    """The same module twice, with biases that are not zero."""
    theirs = Torch(EMBED, HEADS, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    ours = Ours(EMBED, HEADS, dtype=dtype, impl=impl, **options)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def tensors(layout, dtype=torch.float64, kdim=EMBED, vdim=EMBED):
    def leaf(length, width):
        size = {"batch second": (length, BATCH), "batch first": (BATCH, length), "unbatched": (length,)}[layout]
        return torch.randn(*size, width, dtype=dtype, requires_grad=True)

    return leaf(QUERIES, EMBED), leaf(KEYS, kdim), leaf(KEYS, vdim)


def compare(ours, theirs, inputs, dtype=torch.float64, **options):
    got, weights = ours(*inputs, **options)
    wanted, wanted_weights = theirs(*inputs, **options)
    torch.testing.assert_close(got, wanted, **TOLERANCE[dtype])
    assert (weights is None) == (wanted_weights is None)
    weight = torch.randn_like(got)
    totals = [(got * weight).sum(), (wanted * weight).sum()]
    if weights is not None:
        torch.testing.assert_close(weights, wanted_weights, **TOLERANCE[dtype])
        weight = torch.randn_like(weights)
        totals = [totals[0] + (weights * weight).sum(), totals[1] + (wanted_weights * weight).sum()]
    extra = [x for x in options.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    names = [name for name, _ in ours.named_parameters()]
    assert names == [name for name, _ in theirs.named_parameters()]
    distinct = list({id(x): x for x in inputs}.values())
    gradients = [
        torch.autograd.grad(total, [*distinct, *extra, *module.parameters()], allow_unused=True)
        for total, module in zip(totals, (ours, theirs))
    ]
    names = [f"input {n}" for n in range(len(distinct) + len(extra))] + names
    for name, a, b in zip(names, *gradients):
        torch.testing.assert_close(a, b, **TOLERANCE[dtype], msg=lambda m, n=name: f"{n}: {m}")


def bool_mask(*size):
    mask = torch.rand(*size) < 0.4
    mask[..., 0] = False  # every query sees a key: torch gives NaN otherwise
    return mask


def masks(layout):
    lead = () if layout == "unbatched" else (BATCH,)
    heads = HEADS if layout == "unbatched" else BATCH * HEADS
    kpm = bool_mask(*lead, KEYS)
    hidden = torch.zeros(*lead, KEYS, dtype=torch.float64).masked_fill(kpm, -torch.inf)
    additive = torch.randn(QUERIES, KEYS, dtype=torch.float64, requires_grad=True)
    return {
        "none": {},
        "bool 2-D": dict(attn_mask=bool_mask(QUERIES, KEYS)),
        "bool 3-D": dict(attn_mask=bool_mask(heads, QUERIES, KEYS)),
        "float 2-D": dict(attn_mask=additive),
        "float 3-D": dict(attn_mask=torch.randn(heads, QUERIES, KEYS, dtype=torch.float64, requires_grad=True)),
        "padding": dict(key_padding_mask=kpm),
        "float padding": dict(key_padding_mask=torch.randn(*lead, KEYS, dtype=torch.float64)),
        "both": dict(key_padding_mask=kpm, attn_mask=bool_mask(QUERIES, KEYS)),
        "both, float": dict(key_padding_mask=hidden, attn_mask=additive),
    }


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "fused"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", masks("unbatched"))
def test_masks(name, layout, weights, fp64_backend):
    ours, theirs = pair(fp64_backend.impl, batch_first=layout == "batch first")
    compare(ours, theirs, tensors(layout), need_weights=weights, **masks(layout)[name])


OPTIONS = {
    "no bias": dict(bias=False),
    "bias_kv": dict(add_bias_kv=True),
    "zero": dict(add_zero_attn=True),
    "bias_kv, zero": dict(add_bias_kv=True, add_zero_attn=True),
    "kdim": dict(kdim=10),
    "vdim": dict(vdim=6),
    "kdim, vdim, no bias": dict(kdim=10, vdim=6, bias=False),
    "all": dict(kdim=10, vdim=6, add_bias_kv=True, add_zero_attn=True, dropout=0.5),
}


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "fused"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_constructor(name, layout, weights, fp64_backend):
    options = OPTIONS[name]
    ours, theirs = pair(fp64_backend.impl, batch_first=layout == "batch first", **options)
    ours, theirs = ours.eval(), theirs.eval()
    inputs = tensors(layout, kdim=options.get("kdim", EMBED), vdim=options.get("vdim", EMBED))
    for given in (masks(layout)["none"], masks(layout)["both"], masks(layout)["float 2-D"]):
        compare(ours, theirs, inputs, need_weights=weights, **given)


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "fused"])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
def test_self_and_cross_attention(dtype, average, weights, backend):
    """The same tensor in several roles."""
    ours, theirs = pair(backend.impl, dtype=dtype, batch_first=True)
    query, key, _ = tensors("batch first", dtype)
    for inputs in ((query, query, query), (query, key, key)):
        compare(ours, theirs, inputs, dtype, need_weights=weights, average_attn_weights=average)


@pytest.mark.parametrize("extra", [{}, dict(add_zero_attn=True)], ids=["", "zero"])
@pytest.mark.parametrize("weights", [True, False], ids=["weights", "fused"])
def test_is_causal(weights, extra, fp64_backend):
    ours, theirs = pair(fp64_backend.impl, batch_first=True, **extra)
    query = tensors("batch first")[0]
    causal = torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1)
    padding = torch.zeros(BATCH, QUERIES, dtype=torch.bool)
    padding[0, 6:] = True
    for given in ({}, dict(key_padding_mask=padding)):
        if extra and not weights and not given:
            continue  # torch then drops the mask's column for the appended key, and hides it
        compare(ours, theirs, (query,) * 3, attn_mask=causal, is_causal=True, need_weights=weights, **given)
    hinted = ours(query, query, query, is_causal=True, need_weights=weights)[0]
    torch.testing.assert_close(hinted, ours(query, query, query, attn_mask=causal, need_weights=weights)[0])


def test_same_constructor_and_initial_values():
    theirs, ours = (inspect.signature(x.__init__).parameters for x in (Torch, Ours))
    assert {"args", "kwargs", "impl"} <= set(ours) and "embed_dim" in theirs
    for options in (dict(add_bias_kv=True), dict(kdim=10, vdim=6), dict(bias=False, dropout=0.1)):
        torch.manual_seed(3)
        a = Torch(EMBED, HEADS, **options)
        torch.manual_seed(3)
        b = Ours(EMBED, HEADS, **options)
        assert a.state_dict().keys() == b.state_dict().keys()
        assert all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())
        for name in ("embed_dim", "num_heads", "head_dim", "dropout", "batch_first", "kdim", "vdim"):
            assert getattr(a, name) == getattr(b, name)
    assert list(inspect.signature(Torch.forward).parameters) == list(inspect.signature(Ours.forward).parameters)


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "fused"])
def test_hidden_queries_attend_to_nothing(weights, fp64_backend):
    ours, _ = pair(fp64_backend.impl, batch_first=True)
    inputs = tensors("batch first")
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[1] = True
    out, seen = ours(*inputs, key_padding_mask=padding, need_weights=weights)
    torch.testing.assert_close(out[1], ours.out_proj.bias.expand_as(out[1]))
    assert seen is None or (seen[1] == 0).all()
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)
    assert (inputs[0].grad[1] == 0).all() and (inputs[1].grad[1] == 0).all()


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "fused"])
def test_dropout_only_in_training(weights, fp64_backend):
    ours, theirs = pair(fp64_backend.impl, batch_first=True, dropout=0.5)
    inputs = tensors("batch first")

    def call():
        return ours(*inputs, need_weights=weights, average_attn_weights=False)

    assert not torch.equal(call()[0], call()[0])
    out, seen = call()
    if weights:
        kept = (seen > 0).double().mean()
        assert 0.3 < kept < 0.7
    compare(ours.eval(), theirs.eval(), inputs, need_weights=weights)


def test_inside_torch_encoder_layer(fp64_backend):
    """torch's own layers with the module put in: training and evaluation."""
    layer = torch.nn.TransformerEncoderLayer(EMBED, HEADS, 32, dropout=0.0, batch_first=True).double()
    other = copy.deepcopy(layer)
    ours = Ours(EMBED, HEADS, batch_first=True, dtype=torch.float64, impl=fp64_backend.impl)
    ours.load_state_dict(layer.self_attn.state_dict())
    other.self_attn = ours
    x = torch.randn(2, 11, EMBED, dtype=torch.float64)
    padding = torch.arange(11) >= torch.tensor([[11], [7]])
    for mode in (True, False):
        layer.train(mode), other.train(mode)
        a, b = (m(x, src_key_padding_mask=padding) for m in (layer, other))
        torch.testing.assert_close(b[~padding], a[~padding], rtol=1e-10, atol=1e-11)


def test_compiles_whole(cpu_best):
    ours, _ = pair(cpu_best.impl, dtype=torch.float32, batch_first=True)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 12, 33):
        x = torch.randn(2, length, EMBED, requires_grad=True)
        padding = torch.arange(length) >= torch.tensor([[length], [3]])
        got, wanted = (f(x, x, x, key_padding_mask=padding, need_weights=False)[0] for f in (compiled, ours))
        torch.testing.assert_close(got, wanted)
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), [x, *ours.parameters()]) for y in (got, wanted))):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_refuses():
    ours, _ = pair(batch_first=True)
    q, k, v = tensors("batch first")
    for call, error, message in (
        (lambda: ours(q[0, 0], k, v), ValueError, r"query must have shape \(L, E\) or with a batch"),
        (lambda: ours(q, k[0], v), ValueError, r"key must have shape 3 dimensions to match query"),
        (lambda: ours(q, k, v, attn_mask=torch.ones(3, 4)), ValueError, r"attn_mask must have shape \(9, 14\) or"),
        (lambda: ours(q, k, v, torch.ones(3, 4)), ValueError, r"key_padding_mask must have shape \(3, 14\)"),
        (lambda: ours(q, k, v, torch.ones(3, 14).int()), TypeError, r"key_padding_mask must be a bool or float tensor"),
        (lambda: ours(q, k, v, attn_mask=[1]), TypeError, r"attn_mask must be a torch\.Tensor, got list"),
        (lambda: ours(torch.nested.nested_tensor([q[0]]), k, v), TypeError, r"query must be a dense"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
