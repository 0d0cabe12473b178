"""pyext.integrations.diffusers against diffusers itself: outputs and all gradients, before and after `patch`."""

from __future__ import annotations

import copy
import pickle
import sys

import diffusers
import pytest
import torch
from diffusers.models import attention_processor as theirs
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from torch import nn

from pyext.integrations import diffusers as ours

CHANNELS, CONTEXT, HEADS = 32, 20, 4
TOLERANCE = {torch.float64: dict(rtol=1e-9, atol=1e-10), torch.float32: dict(rtol=1e-3, atol=1e-4)}


def layer(dtype=torch.float64, **options):
    torch.manual_seed(3)
    return theirs.Attention(CHANNELS, heads=HEADS, dim_head=8, **options).to(dtype).train()


def run(module, given):
    """The output, and the gradients of all inputs and parameters."""
    leaves = {name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in given.items()}
    out = module(**leaves)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    wanted = {**{name: x for name, x in leaves.items() if x.requires_grad}, **dict(module.named_parameters())}
    gradients = torch.autograd.grad((out * weight).sum(), list(wanted.values()), allow_unused=True)
    return {"out": out.detach(), **dict(zip(wanted, gradients))}


def assert_same(got, wanted, dtype=torch.float64):
    assert got.keys() == wanted.keys()
    for name, x in wanted.items():
        assert (got[name] is None) == (x is None), name
        if x is not None:
            torch.testing.assert_close(got[name], x, **TOLERANCE[dtype], msg=lambda m, n=name: f"{n}: {m}")


def normal(*size, dtype=torch.float64):
    return torch.randn(*size, dtype=dtype)


ATTENTION = {
    "self": ({}, {}),
    "no bias, rescaled": (dict(bias=False, out_bias=False, rescale_output_factor=1.7), {}),
    "residual": (dict(residual_connection=True, rescale_output_factor=2.0**0.5), {}),
    "group norm": (dict(norm_num_groups=4, residual_connection=True), {}),
    "spatial norm": (dict(norm_num_groups=4, spatial_norm_dim=6, residual_connection=True), {"temb": (2, 6, 5, 4)}),
    "cross": (dict(cross_attention_dim=CONTEXT), {"context": True}),
    "cross, layer norm": (dict(cross_attention_dim=CONTEXT, cross_attention_norm="layer_norm"), {"context": True}),
    "cross, group norm": (
        dict(cross_attention_dim=CONTEXT, cross_attention_norm="group_norm", cross_attention_norm_num_groups=4),
        {"context": True},
    ),
    "query and key norms": (dict(qk_norm="layer_norm"), {}),
    "unscaled": (dict(scale_qk=False), {}),
    "upcast": (dict(upcast_attention=True, upcast_softmax=True, scale_qk=False), {}),
}


CASES = [(name, shape) for name in ATTENTION for shape in ("sequence", "image")]
CASES.remove(("spatial norm", "sequence"))


@pytest.mark.parametrize("name, shape", CASES)
def test_attention(name, shape, fp64_backend):
    options, inputs = ATTENTION[name]
    dtype = torch.float64
    module = layer(dtype, **options)
    given = {"hidden_states": normal(2, CHANNELS, 5, 4, dtype=dtype)}
    if shape == "sequence":
        given["hidden_states"] = normal(2, 13, CHANNELS, dtype=dtype)
    if "context" in inputs:
        given["encoder_hidden_states"] = normal(2, 7, CONTEXT, dtype=dtype)
    if "temb" in inputs:
        given["temb"] = normal(*inputs["temb"], dtype=dtype)
    wanted = run(module, given)
    module.set_processor(ours.AttnProcessor(fp64_backend.impl))
    upcast = torch.float32 if name == "upcast" else dtype  # which in fp64 is a downcast
    assert_same(run(module, given), wanted, upcast)


@pytest.mark.parametrize("kind", ["float", "bool"])
@pytest.mark.parametrize("rows", [1, 13], ids=["row", "matrix"])
@pytest.mark.parametrize("repeated", [False, True], ids=["shared", "per head"])
def test_masks(repeated, rows, kind):
    module = layer(cross_attention_dim=CONTEXT)
    given = {"hidden_states": normal(2, 13, CHANNELS), "encoder_hidden_states": normal(2, 7, CONTEXT)}
    mask = normal(2 * HEADS if repeated else 2, rows, 7)
    given["attention_mask"] = mask if kind == "float" else mask > -1
    wanted = run(module, given)
    module.set_processor(ours.AttnProcessor())
    assert_same(run(module, given), wanted)


@pytest.mark.parametrize("cross", [False, True])
def test_fused_projections(cross):
    module = layer(cross_attention_dim=CONTEXT if cross else None)
    given = {"hidden_states": normal(2, 13, CHANNELS)}
    if cross:
        given["encoder_hidden_states"] = normal(2, 7, CONTEXT)
    module.fuse_projections()
    module.set_processor(theirs.FusedAttnProcessor2_0())
    wanted = run(module, given)
    assert list(ours.patch(module).replaced.values()) == ["attention (FusedAttnProcessor2_0)"]
    assert_same(run(module, given), wanted)


def test_grouped_heads():
    """Attention of diffusers has an argument for it, though none of the processors that are replaced takes it."""
    module = theirs.Attention(CHANNELS, heads=4, kv_heads=2, dim_head=6).double()
    x = normal(2, 5, CHANNELS)
    module.set_processor(ours.AttnProcessor())
    got = module(x)
    for projection in (module.to_k, module.to_v):
        repeated = projection.weight.unflatten(0, (2, 6)).repeat_interleave(2, 0).flatten(0, 1)
        projection.weight = nn.Parameter(repeated)
    module.set_processor(theirs.AttnProcessor2_0())
    torch.testing.assert_close(got, module(x))


FEED_FORWARD = {
    "geglu": {},
    "swiglu": dict(activation_fn="swiglu"),
    "no bias": dict(bias=False),
    "dropout": dict(dropout=0.5),
    "final dropout": dict(final_dropout=True, dropout=0.5),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FEED_FORWARD)
def test_feed_forward(name, training):
    module = FeedForward(CHANNELS, mult=3, **FEED_FORWARD[name]).double().train(training)
    given = {"hidden_states": normal(2, 5, CHANNELS)}
    torch.manual_seed(7)
    wanted = run(module, given)
    report = ours.patch(module)
    gate = "swiglu" if name == "swiglu" else "geglu"
    assert report.replaced == {"": f"gated_mlp ({gate})", "net.0": f"gated_linear ({gate})"} and not report.left
    torch.manual_seed(7)
    assert_same(run(module, given), wanted)


def unet(**options):
    torch.manual_seed(5)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=CONTEXT, norm_num_groups=4, attention_head_dim=4, **options,
    ).double()  # fmt: skip


class Sample(nn.Module):
    """The U-Net as a function of tensors."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, sample, context, mask):
        return self.unet(sample, 3, context, encoder_attention_mask=mask).sample


def test_unet():
    model = Sample(unet())
    given = {"sample": normal(2, 4, 8, 8), "context": normal(2, 7, CONTEXT), "mask": torch.ones(2, 7).bool()}
    given["mask"][1, 4:] = False
    wanted, state = run(model, given), {name: x.clone() for name, x in model.state_dict().items()}
    report = ours.patch(model)
    attention = [name for name, what in report.replaced.items() if what == "attention (AttnProcessor2_0)"]
    gated = [name for name, what in report.replaced.items() if what == "gated_mlp (geglu)"]
    assert len(attention) == 2 * len(gated) and len(gated) == 4 and not report.left
    assert "replaced: 16\n" in str(report) and "unet.mid_block.attentions.0.transformer_blocks.0.ff: gated" in str(
        report
    )
    assert_same(run(model, given), wanted)
    assert ours.patch(model).replaced == report.replaced
    assert_same(run(model, given), wanted)
    assert model.state_dict().keys() == state.keys()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(run(twin, given), wanted)
        gated = [module for module in twin.modules() if isinstance(module, FeedForward)]
        assert all(module.forward.args[0] is module for module in gated)
    ours.unpatch(model)
    assert {type(p).__name__ for p in model.unet.attn_processors.values()} == {"AttnProcessor2_0"}
    assert not [m for m in model.modules() if "forward" in vars(m)]
    assert_same(run(model, given), wanted)


def test_parts_of_a_model():
    block = BasicTransformerBlock(CHANNELS, HEADS, 8, cross_attention_dim=CONTEXT).double()
    only = ours.patch(block, feed_forward=False).replaced
    assert set(only) == {"attn1", "attn2"}
    ours.unpatch(block)
    only = ours.patch(block, attention=False, impl="reference").replaced
    assert set(only) == {"ff", "ff.net.0"} and block.ff.forward.args[2] == "reference"


def test_compiles_and_checkpoints():
    torch._dynamo.reset()
    block = BasicTransformerBlock(CHANNELS, HEADS, 8, cross_attention_dim=CONTEXT, dropout=0.0)
    given = {"hidden_states": normal(2, 6, CHANNELS).float(), "encoder_hidden_states": normal(2, 7, CONTEXT).float()}
    wanted = run(block, given)
    ours.patch(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    got = run(compiled, given)
    assert_same({name.removeprefix("_orig_mod."): x for name, x in got.items()}, wanted, torch.float32)
    checkpointed = torch.utils.checkpoint.checkpoint
    leaf = given["hidden_states"].clone().requires_grad_()
    checkpointed(block, leaf, None, given["encoder_hidden_states"], use_reentrant=False).sum().backward()
    assert leaf.grad.isfinite().all()


class Doubled(nn.Linear):
    """A layer as an adapter makes one: more than its weight."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("where", ["proj", "down"])
@pytest.mark.parametrize("how", ["class", "hook", "forward"])
def test_layers_that_are_more_than_linear_run_as_before(how, where):
    module = FeedForward(CHANNELS, mult=2).double()
    ours.patch(module)
    linear = module.net[0].proj if where == "proj" else module.net[2]
    if how == "class":
        linear.__class__ = Doubled
    elif how == "hook":
        linear.register_forward_hook(lambda module, inputs, out: 2 * out)
    else:
        linear.forward = lambda x: 2 * nn.functional.linear(x, linear.weight, linear.bias)
    given = {"hidden_states": normal(2, 5, CHANNELS)}
    got = run(module, given)
    ours.unpatch(module)
    assert_same(got, run(module, given))


def test_what_is_left():
    added = layer(cross_attention_dim=CONTEXT, added_kv_proj_dim=CONTEXT, norm_num_groups=4)
    own = layer(processor=theirs.SlicedAttnProcessor(1))
    unscaled = layer(scale_qk=False, processor=theirs.AttnProcessor2_0())
    normed = layer(qk_norm="layer_norm", processor=theirs.AttnProcessor())
    other = diffusers.models.transformers.transformer_flux.FluxAttention(8, 2, 4)
    plain = FeedForward(CHANNELS, activation_fn="gelu")
    wrapped = FeedForward(CHANNELS)
    wrapped.forward = wrapped.forward
    model = nn.ModuleList([added, own, unscaled, normed, other, plain, wrapped])
    report = ours.patch(model)
    assert report.left == {
        "0": "it has projections of its own for added keys and values",
        "1": "its processor is a SlicedAttnProcessor, which is not plain attention",
        "2": "its AttnProcessor2_0 scales the scores in spite of scale_qk=False",
        "3": "its AttnProcessor leaves norm_q and norm_k out",
        "4": "FluxAttention is not diffusers' Attention",
        "5": "its GELU is not GEGLU or SwiGLU",
        "6": "its forward was replaced before",
    }
    assert report.replaced == {"6.net.0": "gated_linear (geglu)"}


def test_errors(monkeypatch):
    class Pipeline:
        components = {}

    with pytest.raises(TypeError, match="model must be a torch.nn.Module .of a pipeline, patch its unet"):
        ours.patch(Pipeline())
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        ours.unpatch(3)
    ours._library.cache_clear()
    monkeypatch.setitem(sys.modules, "diffusers.models", None)
    with pytest.raises(ImportError, match="needs diffusers .pip install diffusers."):
        ours.patch(nn.Linear(2, 2))
