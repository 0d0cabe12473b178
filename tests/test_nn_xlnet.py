"""pyext.nn.XLNetAttention against Transformers' own, and TransformerXLAttention against its paper."""

from __future__ import annotations

import pytest
import torch

import pyext

D_MODEL, HEADS, WIDTH, BATCH, LENGTH, MEMORY = 24, 3, 8, 2, 13, 7
TOLERANCE = {torch.float64: dict(rtol=1e-9, atol=1e-10), torch.float32: dict(rtol=1e-4, atol=1e-4)}


def seeded(module):
    """Weights large enough for positions and segments to matter."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module.eval()


def published():
    from transformers import XLNetConfig
    from transformers.models.xlnet.modeling_xlnet import XLNetRelativeAttention

    return seeded(XLNetRelativeAttention(XLNetConfig(d_model=D_MODEL, n_head=HEADS, d_inner=8, n_layer=1, dropout=0.0)))


def segments(ids_q, ids_k, dtype):
    """The published one-hot matrix, entry 1 where segments differ: (Lq, Lk, B, 2)."""
    different = (ids_q.t()[:, None] != ids_k.t()[None, :]).long()
    return torch.nn.functional.one_hot(different, 2).to(dtype)


def permutation_masks(dtype):
    """perm_mask of a random order as the model makes it: h sees itself, g does not; memory is seen by both."""
    rank = torch.stack([torch.randperm(LENGTH) for _ in range(BATCH)])
    hidden = rank[:, :, None] <= rank[:, None, :]  # (B, i, j): j is not before i
    rank_first = rank.argmin(1)
    hidden[torch.arange(BATCH), rank_first, rank_first] = False  # the first of g would see nothing without memory
    hidden = torch.cat([torch.zeros(BATCH, LENGTH, MEMORY, dtype=torch.bool), hidden], -1)
    mask_g = hidden.permute(1, 2, 0)[..., None].to(dtype)
    own = torch.cat([torch.zeros(LENGTH, MEMORY), torch.eye(LENGTH)], -1)[..., None, None].to(dtype)
    return ((mask_g - own) > 0).to(dtype), mask_g


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("streams", ["h", "h, g", "targets"])
@pytest.mark.parametrize("batched", [True, False], ids=["r per batch", "one r"])
def test_equals_published(streams, batched, dtype, backend):
    theirs = published()
    ours = pyext.nn.XLNetAttention(D_MODEL, HEADS, impl=backend.impl).eval()
    ours.load_state_dict(theirs.state_dict())  # strict: the same names and shapes
    theirs.load_state_dict(ours.state_dict())
    ours, theirs = ours.to(dtype), theirs.to(dtype)

    def leaf(*size):
        return torch.randn(*size, dtype=dtype, requires_grad=True)

    keys = MEMORY + LENGTH
    h, mems, r = leaf(LENGTH, BATCH, D_MODEL), leaf(MEMORY, BATCH, D_MODEL), leaf(keys + LENGTH, 1, D_MODEL)
    inputs = [h, mems, r]
    if batched:
        r = leaf(keys + LENGTH, BATCH, D_MODEL)
        inputs[2] = r
    g = target = None
    if streams != "h":
        g = leaf(3 if streams == "targets" else LENGTH, BATCH, D_MODEL)
        inputs.append(g)
    if streams == "targets":
        chosen = torch.stack([torch.randperm(LENGTH)[:3] for _ in range(BATCH)], -1)
        target = torch.nn.functional.one_hot(chosen, LENGTH).permute(0, 2, 1).to(dtype)
    seg = torch.randint(0, 2, (BATCH, LENGTH))
    seg_k = torch.cat([torch.zeros(BATCH, MEMORY, dtype=torch.long), seg], 1)
    mask_h, mask_g = permutation_masks(dtype)
    everywhere = r if batched else r.expand(-1, BATCH, -1)
    wanted = theirs(h, g, mask_h, mask_g, everywhere, segments(seg, seg_k, dtype), mems, target)
    got = ours(h, g, mask_h, mask_g, everywhere, seg, None, mems, target)
    names = [name for name, _ in ours.named_parameters()]
    leaves = [[*inputs, *module.parameters()] for module in (ours, theirs)]
    theirs_by_name = dict(theirs.named_parameters())
    leaves[1][len(inputs) :] = [theirs_by_name[name] for name in names]
    totals = []
    for a, b in zip(got, wanted):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **TOLERANCE[dtype])
            weight = torch.randn_like(a)
            totals.append(((a * weight).sum(), (b * weight).sum()))
    gradients = [torch.autograd.grad(sum(t[n] for t in totals), leaves[n]) for n in (0, 1)]
    for name, a, b in zip(["h", "mems", "r", *(["g"] if g is not None else []), *names], *gradients):
        torch.testing.assert_close(a, b, **TOLERANCE[dtype], msg=lambda m, n=name: f"{n}: {m}")


def test_segments_of_keys_and_structured_masks(fp64_backend):
    """seg_k given, masks as objects, no memory, sinusoids made here."""
    module = seeded(pyext.nn.XLNetAttention(D_MODEL, HEADS, WIDTH, impl=fp64_backend.impl)).double()
    h = torch.randn(LENGTH, BATCH, D_MODEL, dtype=torch.float64)
    seg = torch.randint(0, 3, (BATCH, LENGTH))
    hidden = torch.ones(LENGTH, LENGTH).triu(1)[..., None, None]
    wanted, _ = module(h, attn_mask_h=hidden, seg_q=seg)
    got, none = module(h, attn_mask_h=pyext.masks.causal(), seg_q=seg, seg_k=seg)
    assert none is None
    torch.testing.assert_close(got, wanted)
    assert not torch.allclose(module(h, seg_q=seg)[0], module(h)[0])


def test_xlnet_model_end_to_end(backend):
    """A whole XLNetModel with its attention replaced gives the same hidden states, with memory and permutation."""
    from transformers import XLNetConfig, XLNetModel

    config = XLNetConfig(vocab_size=50, d_model=D_MODEL, n_head=HEADS, d_inner=16, n_layer=2, dropout=0.0, mem_len=9)
    model = seeded(XLNetModel(config))
    ids, types = torch.randint(0, 50, (BATCH, LENGTH)), torch.randint(0, 2, (BATCH, LENGTH))
    perm = torch.rand(BATCH, LENGTH, LENGTH).round()
    target = torch.nn.functional.one_hot(torch.randint(0, LENGTH, (BATCH, 4)), LENGTH).float()
    options = dict(token_type_ids=types, perm_mask=perm, target_mapping=target, use_mems=True)
    first = model(ids, **options)
    second = model(ids, mems=first.mems, **options)
    seg_of_call = {}

    class Adapter(torch.nn.Module):
        def __init__(self, theirs):
            super().__init__()
            self.ours = pyext.nn.XLNetAttention(D_MODEL, HEADS, impl=backend.impl).eval()
            self.ours.load_state_dict(theirs.state_dict())

        def forward(self, h, g, mask_h, mask_g, r, seg_mat, mems=None, target_mapping=None, output_attentions=False):
            return self.ours(h, g, mask_h, mask_g, r, seg_of_call["q"], None, mems, target_mapping)

    for layer in model.layer:
        layer.rel_attn = Adapter(layer.rel_attn)
    seg_of_call["q"] = types
    # rows that see nothing differ by design; with memory there are none
    again = model(ids, mems=first.mems, **options)
    torch.testing.assert_close(again.last_hidden_state, second.last_hidden_state, rtol=1e-4, atol=1e-4)


def transformer_xl_by_the_paper(module, w, mems, hidden, normalize):
    """Section 3.3, pair by pair, with the parameters of the module."""
    heads = (HEADS, WIDTH)
    states = torch.cat([mems, w])
    content = module.layer_norm(states) if module.pre_lnorm and normalize else states
    q, k, v = (x.unflatten(-1, heads) for x in module.qkv_net(content).chunk(3, -1))
    q = q[len(mems) :]
    i, j = torch.arange(len(w)).view(-1, 1), torch.arange(len(states)).view(1, -1)
    position = (i + len(mems) - j).to(w.dtype)
    angles = position[..., None] / 10000 ** (torch.arange(0, D_MODEL, 2, dtype=w.dtype) / D_MODEL)
    rows = module.r_net(torch.cat([angles.sin(), angles.cos()], -1)).unflatten(-1, heads)  # (i, j, H, D)
    score = torch.einsum("ibhd,jbhd->bhij", q + module.r_w_bias, k)
    score = (score + torch.einsum("ibhd,ijhd->bhij", q + module.r_r_bias, rows)) / WIDTH**0.5
    weights = torch.softmax(score.masked_fill(hidden, -torch.inf), -1)
    out = module.o_net(torch.einsum("bhij,jbhd->ibhd", weights, v).flatten(2))
    if not normalize:
        return out
    return w + out if module.pre_lnorm else module.layer_norm(w + out)


@pytest.mark.parametrize("memory", [0, 7])
@pytest.mark.parametrize("norm", ["post", "pre", "none"])
@pytest.mark.parametrize("direction", ["causal", "both"])
def test_transformer_xl_is_the_paper(direction, norm, memory, fp64_backend):
    options = dict(pre_lnorm=norm == "pre", normalize=norm != "none", impl=fp64_backend.impl)
    module = seeded(pyext.nn.TransformerXLAttention(HEADS, D_MODEL, WIDTH, **options)).double()
    w, mems = (torch.randn(n, BATCH, D_MODEL, dtype=torch.float64, requires_grad=True) for n in (LENGTH, memory))
    keys = LENGTH + memory
    hidden = torch.zeros(LENGTH, keys, dtype=torch.bool)
    mask = None
    if direction == "causal":
        hidden = torch.ones(LENGTH, keys, dtype=torch.bool).triu(memory + 1)
    else:
        mask = pyext.masks.window(None, None)
    wanted = transformer_xl_by_the_paper(module, w, mems, hidden, norm != "none")
    got = module(w, attn_mask=mask, mems=mems if memory else None)
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-9)
    weight, leaves = torch.randn_like(got), [w, mems, *module.parameters()]
    for a, b in zip(*(torch.autograd.grad(x, leaves, weight, allow_unused=True) for x in (got, wanted))):
        if a is not None:  # no memory, no gradient
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_transformer_xl_published_masks_and_rows():
    module = seeded(pyext.nn.TransformerXLAttention(HEADS, D_MODEL, WIDTH)).double()
    w, mems = (torch.randn(n, BATCH, D_MODEL, dtype=torch.float64) for n in (5, 4))
    wanted = module(w, mems=mems)
    causal = torch.ones(5, 9, dtype=torch.uint8).triu(5)[..., None]  # as Transformers' model makes it
    torch.testing.assert_close(module(w, attn_mask=causal, mems=mems), wanted)
    positions = torch.arange(8, -1, -1.0, dtype=torch.float64)
    r = pyext.nn.positions.sinusoids(positions, D_MODEL, torch.float64)[:, None]
    torch.testing.assert_close(module(w, r, causal.bool(), mems), wanted)
    padding = torch.zeros(9, BATCH)
    padding[:3, 1] = 1
    visible = pyext.masks.dense(padding.t()[:, None, None] == 0)
    torch.testing.assert_close(module(w, attn_mask=padding, mems=mems), module(w, attn_mask=visible, mems=mems))


def test_transformer_xl_segments_equal_one_pass():
    """A sequence in two segments, the first remembered, is one pass where memory reaches back far enough."""
    module = seeded(pyext.nn.TransformerXLAttention(HEADS, D_MODEL, WIDTH)).double()
    w = torch.randn(12, BATCH, D_MODEL, dtype=torch.float64)
    whole = module(w)
    mems = module.memory(w[:7], None, 9)
    assert mems.shape[0] == 7 and not mems.requires_grad
    torch.testing.assert_close(module(w[7:], mems=mems), whole[7:])
    assert torch.equal(module.memory(w[7:], mems, 9), w[3:])
    assert module.memory(w, None, 0).shape[0] == 0


def test_transformer_xl_names_and_shared_biases():
    module = pyext.nn.TransformerXLAttention(HEADS, D_MODEL, WIDTH)
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert shapes == {
        "qkv_net.weight": (72, 24), "o_net.weight": (24, 24), "r_net.weight": (24, 24), "r_r_bias": (3, 8),
        "r_w_bias": (3, 8), "layer_norm.weight": (24,), "layer_norm.bias": (24,),
    }  # fmt: skip
    other = pyext.nn.TransformerXLAttention(HEADS, D_MODEL, WIDTH, r_r_bias=module.r_r_bias, r_w_bias=module.r_w_bias)
    assert other.r_r_bias is module.r_r_bias and other.r_w_bias is module.r_w_bias
    with pytest.raises(ValueError, match="r_r_bias and r_w_bias must both be given"):
        pyext.nn.TransformerXLAttention(HEADS, D_MODEL, WIDTH, r_r_bias=module.r_r_bias)
    with pytest.raises(ValueError, match="d_model must be a multiple of n_head"):
        pyext.nn.XLNetAttention(10, 3)


def test_dropout_only_in_training():
    w = torch.randn(6, BATCH, D_MODEL)
    for module in (
        pyext.nn.TransformerXLAttention(HEADS, D_MODEL, WIDTH, dropatt=0.5),
        pyext.nn.XLNetAttention(D_MODEL, HEADS, dropout=0.5),
    ):

        def call(module=module):
            out = module(w)
            return out[0] if isinstance(out, tuple) else out

        assert not torch.equal(call(), call())
        module.eval()
        assert torch.equal(call(), call())


def test_half_precision_and_autocast():
    for dtype in (torch.bfloat16, torch.float16):
        module = seeded(pyext.nn.XLNetAttention(D_MODEL, HEADS))
        h, seg = torch.randn(6, BATCH, D_MODEL), torch.randint(0, 2, (BATCH, 6))
        wanted = module(h, h, seg_q=seg)
        with torch.autocast("cpu", dtype=dtype):
            got = module(h, h, seg_q=seg)
        half = module.to(dtype)(h.to(dtype), h.to(dtype), seg_q=seg)
        for a, b, c in zip(got, wanted, half):
            assert c.dtype == dtype
            torch.testing.assert_close(a.float(), b, rtol=0.1, atol=0.1)
            torch.testing.assert_close(c.float(), b, rtol=0.1, atol=0.1)
