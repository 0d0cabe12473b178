"""pyext.integrations.transformers: the three registries, `patch` and `unpatch`. Whole families: tests/systems."""

from __future__ import annotations

import copy
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyext
from support.systems import VOCABULARY, Watch, agree, padding, patched, tiny, tokens

transformers = pytest.importorskip("transformers", minversion="5")
masking = importlib.import_module("transformers.masking_utils")
ours = pyext.integrations.transformers
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, eos_token_id=None, pad_token_id=0,
)  # fmt: skip


def config(**options):
    return transformers.LlamaConfig(**SIZES, **options)


def llama(**options):
    return tiny(transformers.LlamaForCausalLM, config(**options))


def t5():
    sizes = dict(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0)
    made = transformers.T5Config(**sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
    return tiny(transformers.T5ForConditionalGeneration, made)


# --- Registries ---


def test_register():
    ours.register()
    model = transformers.MixtralForCausalLM._from_config(
        transformers.MixtralConfig(**SIZES, num_local_experts=4), attn_implementation="pyext",
        experts_implementation="pyext",
    )  # fmt: skip
    model = model.eval()
    given = dict(input_ids=tokens(), attention_mask=padding(left=True))
    with Watch() as watch:
        got = model(**given).logits
    assert {"attention", "moe.forward"} <= watch.ops.keys() and not watch.square
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    kept = given["attention_mask"].bool()
    torch.testing.assert_close(got[kept], model(**given).logits[kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("version", ["4.57.1", "5.3.0.dev0"])
def test_older_releases(version, tmp_path):
    """What one sees who has one of them installed."""
    (tmp_path / "transformers.py").write_text(f"__version__ = {version!r}", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(Path(pyext.__file__).parents[1])])
    code = "import pyext\nassert pyext.nn\nimport pyext.integrations.transformers"
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    said = done.stderr.splitlines()[-1]
    assert said.startswith("ImportError: pyext.integrations.transformers needs transformers >= 5.4, ")
    assert f"found {version}: pip install 'transformers>=5.4'; pyext.attention and pyext.nn work with any" in said
    for newer in ("5.4.0", "5.23.0", "6.0.dev1"):
        ours._check_release(newer)


@pytest.mark.parametrize("given", ["softcap", "sinks", "window", "GQA", "float mask", "bool mask", "static prefill"])
def test_attention_function(given):
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    module, mask, options, wanted = torch.nn.Module(), None, {}, dict(enable_gqa=True, scale=0.3)
    module.is_causal = given not in ("GQA", "float mask", "bool mask")
    wanted["mask"] = pyext.masks.causal() if module.is_causal else None
    if given == "softcap":
        options, wanted["softcap"] = {"softcap": 2.0}, 2.0
    elif given == "sinks":
        options["s_aux"] = wanted["sinks"] = torch.randn(4)
    elif given == "window":
        options["sliding_window"], wanted["mask"] = 3, pyext.masks.window(2, 0)
    elif given == "float mask":
        mask = wanted["attn_mask"] = torch.randn(2, 1, 9, 9)
    elif given == "bool mask":
        mask = wanted["attn_mask"] = torch.rand(2, 1, 9, 9) < 0.5
    keys = (k, v)
    if given == "static prefill":  # a cache with room beyond what was written
        keys = tuple(torch.cat([x, torch.randn(2, 2, 5, 8)], 2) for x in keys)
    out, weights = ours.attention_forward(module, q, *keys, mask, scaling=0.3, **options)
    assert weights is None
    torch.testing.assert_close(out, pyext.attention(q, k, v, **wanted).transpose(1, 2))


def test_attention_function_refuses_what_it_lacks():
    x = torch.randn(1, 1, 2, 8)
    for name in ("cache", "indices", "block_indices", "sinks"):
        with pytest.raises(ValueError, match=f'{name} must be None with attn_implementation="pyext"'):
            ours.attention_forward(torch.nn.Module(), x, x, x, None, **{name: object()})


def test_window_in_every_second_layer_softcap_and_two_scales():
    sizes = dict(SIZES, head_dim=8, sliding_window=7, query_pre_attn_scalar=16, attn_logit_softcapping=3.0)
    model = tiny(transformers.Gemma2ForCausalLM, transformers.Gemma2Config(**sizes))
    mask = padding()
    agree(
        model, dict(input_ids=tokens(), attention_mask=mask), family="", name="Gemma 2", keep=mask.bool(),
        ops=("attention", "gated_mlp", "rotary"),
    )  # fmt: skip


def test_models_of_attention_that_is_not_known():
    """BigBird-Pegasus: its encoder computes with the mask itself, so the decoder keeps its attention, too."""
    sizes = dict(vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4)
    made = transformers.BigBirdPegasusConfig(
        **sizes, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64
    )
    model = tiny(transformers.BigBirdPegasusModel, made)
    report = ours.patch(twin := copy.deepcopy(model))
    assert any("shares its masks" in why for _, _, why in report.left)
    given = dict(input_ids=tokens(), attention_mask=padding(), decoder_input_ids=tokens(9))
    torch.testing.assert_close(twin(**given)[0], model(**given)[0], rtol=1e-4, atol=1e-5)


# --- Masks ---


def seen(mask, queries, keys, batch):
    """Which keys attention reads: bool (B, 1, Lq, Lk)."""
    q, k = torch.zeros(batch, 1, queries, 4), torch.zeros(batch, 1, keys, 4)
    return pyext.attention(q, k, torch.eye(keys).expand(batch, 1, keys, keys), mask=mask) > 0


LEFT_PADDING = torch.tensor([0, 3])
PACKED = torch.tensor([[0] * 4 + [1] * 6 + [2] * 3, [0] * 9 + [1] * 4])
POSITIONS = torch.tensor([[*range(4), *range(6), *range(3)], [*range(9), *range(4)]])
FUNCTIONS = {
    "causal": lambda: masking.causal_mask_function,
    "full": lambda: masking.bidirectional_mask_function,
    "window": lambda: masking.sliding_window_causal_mask_function(4),
    "window of both sides": lambda: masking.sliding_window_bidirectional_mask_function(3),
    "chunks": lambda: masking.chunked_causal_mask_function(5, LEFT_PADDING),
}


def of_cache(kind):
    """(queries, keys, the first one's position, and this one's)."""
    sizes = {"no": (13, 13, 0, 0), "grown": (5, 13, 8, 0), "sliding": (3, 7, 10, 6), "static": (4, 20, 6, 0)}
    return (4, 20, torch.tensor(6), 0) if kind == "static tensor" else sizes[kind]


@pytest.mark.parametrize("tokens_are", ["all there", "right", "left", "gaps", "none"])
@pytest.mark.parametrize("cache", ["no", "grown", "static", "static tensor", "sliding"])
@pytest.mark.parametrize("kind", list(FUNCTIONS))
def test_masks_are_transformers_own(kind, cache, tokens_are):
    queries, keys, first_query, first_key = of_cache(cache)
    there = {
        "all there": torch.ones(2, 13, dtype=torch.bool),
        "right": torch.arange(13) < torch.tensor([[13], [9]]),
        "left": torch.arange(13) >= LEFT_PADDING[:, None],
        "gaps": torch.rand(2, 13) < 0.6,
        "none": None,
    }[tokens_are]
    call = dict(
        batch_size=2, q_length=queries, kv_length=keys, q_offset=first_query, kv_offset=first_key,
        mask_function=FUNCTIONS[kind](), attention_mask=there,
    )  # fmt: skip
    mask = ours.model_mask(**call)
    assert isinstance(mask, pyext.masks.Mask) and mask.shape == (2, 1, queries, keys)
    wanted = masking.sdpa_mask(**call, allow_is_causal_skip=False)
    assert torch.equal(seen(mask, queries, keys, 2), wanted.expand(2, 1, queries, keys))
    last = mask.last_row(torch.device("cpu"))
    assert torch.equal(last, wanted[:, :, -1:].expand(2, 1, 1, keys))


@pytest.mark.parametrize("kind", ["causal", "window", "full"])
def test_packed_sequences(kind):
    function = masking.packed_sequence_compatibility_function(FUNCTIONS[kind](), POSITIONS, PACKED)
    call = dict(batch_size=2, q_length=13, kv_length=13, mask_function=function)
    mask = ours.model_mask(**call)
    assert isinstance(mask, pyext.masks.Mask)
    assert torch.equal(seen(mask, 13, 13, 2), masking.sdpa_mask(**call, allow_is_causal_skip=False))


@pytest.mark.parametrize(
    "kind, cache",
    [
        ("window", "no"), ("window", "static tensor"), ("window of both sides", "grown"), ("chunks", "sliding"),
        ("packed causal", "no"), ("packed window", "no"), ("packed full", "no"),
    ],
)  # fmt: skip
def test_masks_of_compiled_models(kind, cache):
    """Functions that are joined inside of a graph cannot be read there, and yet become masks, not tensors."""
    queries, keys, first_query, first_key = of_cache(cache)
    there = None if kind.startswith("packed") else torch.arange(13) < torch.tensor([[13], [9]])

    def call(packed, positions, padding, there):
        if kind.startswith("packed"):
            made = FUNCTIONS[kind.split()[1]]()
            made = masking.packed_sequence_compatibility_function(made, positions, packed)
        elif kind == "chunks":
            made = masking.chunked_causal_mask_function(5, padding)
        else:
            made = FUNCTIONS[kind]()
        return dict(
            batch_size=2, q_length=queries, kv_length=keys, q_offset=first_query, kv_offset=first_key,
            mask_function=made, attention_mask=there, use_vmap=False,
        )  # fmt: skip

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(*tensors):
        mask = ours.model_mask(**call(*tensors))
        assert not isinstance(mask, torch.Tensor)
        return seen(mask, queries, keys, 2)

    tensors = PACKED, POSITIONS, LEFT_PADDING, there
    wanted = masking.sdpa_mask(**call(*tensors), allow_is_causal_skip=False).expand(2, 1, queries, keys)
    assert torch.equal(compiled(*tensors), wanted)


def test_other_functions_become_tensors():
    images = masking.blockwise_overlay(torch.tensor([[-1, 0, 0, -1, 1, 1, 1]]))
    function = masking.or_masks(masking.causal_mask_function, images)
    call = dict(batch_size=1, q_length=7, kv_length=7, mask_function=function)
    mask = ours.model_mask(**call)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, masking.sdpa_mask(**call, allow_is_causal_skip=False))


def test_a_finished_mask_stays_as_it_is():
    """`generate` makes the masks of static caches before the call, which then makes them again."""
    first = ours.model_mask(batch_size=1, q_length=3, kv_length=3)
    assert ours.model_mask(batch_size=1, q_length=3, kv_length=3, attention_mask=first) is first.contiguous()


# --- patch and unpatch ---


def test_linear_layers_of_slow_products(monkeypatch):
    """As on a CPU where pyext's matrix products are the faster ones, with and without adapters."""
    slow = importlib.import_module("pyext.integrations.transformers._linear")
    monkeypatch.setattr(slow, "torch_is_slow", lambda: True)
    model = llama()
    ops = ("attention", "gated_mlp", "moe.grouped_linear")
    agree(model, dict(input_ids=tokens()), family="", name="linear layers", ops=ops)
    sizes = dict(vocab_size=VOCABULARY, d_model=32, n_layer=1, n_head=4, d_inner=48, dropout=0.0)
    xlnet = tiny(transformers.XLNetModel, transformers.XLNetConfig(**sizes))
    agree(xlnet, dict(input_ids=tokens(), use_mems=False), family="", name="XLNet", ops=ops[::2], buckets=False)
    with Watch() as watch:
        patched(model)(tokens(3, 2))  # too few rows
    assert "moe.grouped_linear" not in watch.ops
    monkeypatch.setattr(slow, "torch_is_slow", lambda: False)
    assert not any(part == "linear" for part, _ in ours.patch(model).replaced)


def test_patch_is_of_the_instance_and_can_be_undone():
    shared = config()
    model, other = (transformers.LlamaForCausalLM(shared).eval() for _ in range(2))
    ids, before = tokens(), dict(model.state_dict())
    classes = [type(module) for module in model.modules()]
    wanted, theirs = model(ids).logits, other(ids).logits
    report = ours.patch(model)
    assert str(report) == str(ours.patch(model))  # once more changes nothing
    assert list(model.state_dict()) == list(before)
    assert all(a.data_ptr() == before[name].data_ptr() for name, a in model.state_dict().items())
    assert [type(m).__name__ for m in model.modules()] == [c.__name__ for c in classes]
    assert all(isinstance(m, c) for m, c in zip(model.modules(), classes))
    assert shared._attn_implementation != "pyext"
    with Watch() as watch:
        assert torch.equal(other(ids).logits, theirs)
    assert not watch.ops
    with Watch() as watch:
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    assert watch.ops
    ours.unpatch(model)
    assert [type(module) for module in model.modules()] == classes
    with Watch() as watch:
        assert torch.equal(model(ids).logits, wanted)
    assert not watch.ops
    ours.unpatch(model)  # nothing to undo


def test_report():
    report = ours.patch(t5())
    assert len(report.replaced["T5 position table", "T5Attention"]) == 6
    assert len(report.replaced["gated feed-forward", "T5DenseGatedActDense"]) == 4
    assert "  left as it was: nothing" in str(report)
    left = ours.patch(llama(hidden_act="relu2")).left
    assert list(left) == [("gated feed-forward", "LlamaMLP", "no kernel for the activation ReLUSquaredActivation")]
    sizes = dict(vocab_size=VOCABULARY, d_model=32, n_head=4, d_inner=48, block_sizes=[1])
    (unknown,) = {why for _, _, why in ours.patch(transformers.FunnelModel(transformers.FunnelConfig(**sizes))).left}
    assert unknown == "neither the registry nor pyext has what it computes"
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        ours.patch("t5-small")


@pytest.mark.parametrize("make", [llama, t5])
def test_copies_and_whole_models_on_disk(make):
    model = patched(make())
    given = dict(input_ids=tokens()) if make is llama else dict(input_ids=tokens(), decoder_input_ids=tokens(9))
    wanted = model(**given).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with Watch() as watch:
            assert torch.equal(twin(**given).logits, wanted)
        assert {"attention", "gated_mlp"} <= watch.ops.keys()
        assert next(twin.parameters()).data_ptr() != next(model.parameters()).data_ptr()
        ours.unpatch(twin)
        with Watch() as watch:
            torch.testing.assert_close(twin(**given).logits, wanted, rtol=1e-4, atol=1e-5)
        assert not watch.ops


class Adapter(torch.nn.Module):
    """A low-rank adapter, as PEFT puts it around a linear layer."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.a, self.b = (torch.nn.Linear(*size, bias=False) for size in ((32, 2), (2, layer.out_features)))

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(x))


def adapt(model):
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
        layer.mlp.gate_proj = Adapter(layer.mlp.gate_proj)
    return model


@pytest.mark.parametrize("order", ["adapted, then patched", "patched, then adapted"])
def test_adapters(order):
    model = llama()
    ids, wanted = tokens(), adapt(copy.deepcopy(model))
    got = patched(adapt(model)) if order.startswith("adapted") else adapt(patched(model))
    weight = torch.randn(*ids.shape, VOCABULARY)
    results = []
    for net in (got, wanted):
        out = net(ids).logits
        leaves = [p for name, p in net.named_parameters() if ".a." in name or ".b." in name]
        results.append([out, *torch.autograd.grad(out, leaves, weight)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("masked", [None, "flat", "last row"])
@pytest.mark.parametrize("priority", [False, True], ids=["in order", "by priority"])
@pytest.mark.parametrize("before", [False, True], ids=["normalised after dropping", "before"])
@pytest.mark.parametrize("capacity", ["eval", None, 4, 64])
def test_nllb_router(capacity, before, priority, masked):
    """What it routes, with which gates, and their gradient."""
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router

    made = transformers.NllbMoeConfig(
        d_model=16, num_experts=5, router_dtype="float32", expert_capacity=4 if capacity == 4 else 64,
        normalize_router_prob_before_dropping=before, batch_prioritized_routing=priority,
        moe_eval_capacity_token_fraction=0.2,
    )  # fmt: skip
    router = NllbMoeTop2Router(made).train(capacity != "eval")
    if capacity is None:
        router.expert_capacity = None  # that of the first call
    torch.nn.init.normal_(router.classifier.weight)
    both, count = torch.nn.ModuleList([router, copy.deepcopy(router)]), 33
    assert ("mixture of experts", "NllbMoeTop2Router") in ours.patch(both[0]).replaced
    hidden = torch.rand(count) < 0.3
    mask = {None: None, "flat": hidden, "last row": hidden.float().expand(1, 1, 7, count)}[masked]
    x, weight = torch.randn(count, 16), torch.randn(count, 5)
    results = []
    for net in both:
        first, gates, logits = net(x, mask)
        gradient = torch.autograd.grad(gates, net.classifier.weight, weight)[0]
        results.append((first, gates, logits, gradient, torch.tensor(net.expert_capacity)))
    for got, wanted in zip(*results):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(results[0][1] > 0, results[1][1] > 0)
    empty = [net(x[:0])[1] for net in both]
    assert empty[0].shape == empty[1].shape == (0, 5)


@pytest.mark.parametrize("policy", ["sampling", "random"])
def test_nllb_router_that_draws_is_left(policy):
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router

    router = NllbMoeTop2Router(transformers.NllbMoeConfig(d_model=16, num_experts=5, second_expert_policy=policy))
    ((part, kind, why),) = ours.patch(router).left
    assert kind == "NllbMoeTop2Router" and repr(policy) in why


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = llama().train()
    plain, saved = patched(model), patched(model)
    saved.gradient_checkpointing_enable({"use_reentrant": reentrant})
    given = dict(input_ids=tokens(), attention_mask=padding(), use_cache=False)
    for net in (plain, saved):
        net.get_input_embeddings().register_forward_hook(lambda m, i, o: o.requires_grad_())
        net(**given).logits.square().mean().backward()
    for (name, a), b in zip(saved.named_parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("make", [llama, t5])
def test_compile(make):
    """One graph, lengths that vary."""
    model = make()
    net = torch.compile(patched(model), backend="eager", fullgraph=True, dynamic=True)
    for length in (37, 23):
        mask = padding(length, (length, 9, 5))
        given = dict(input_ids=tokens(length), attention_mask=mask)
        if make is t5:
            given["decoder_input_ids"] = tokens(length - 10)
        got, wanted = net(**given).logits, model(**given).logits
        kept = mask.bool() if make is llama else slice(None)
        torch.testing.assert_close(got[kept], wanted[kept], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = llama()
    net, ids = patched(model), tokens()
    with torch.autocast("cpu", dtype):
        got = net(ids).logits
    torch.testing.assert_close(got.float(), model(ids).logits, rtol=0.1, atol=0.15)


def test_saved_models_are_published_ones(tmp_path):
    model = patched(llama())
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation != "pyext" and type(again) is transformers.LlamaForCausalLM
    ids = tokens()
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
