"""Patched models under what others wrap around them: Trainer, PEFT, compiled generation, caches."""

from __future__ import annotations

import copy

import pytest
import torch

import pyext
from support.systems import VOCABULARY, Watch, padding, patched, tiny, tokens

transformers = pytest.importorskip("transformers", minversion="5")
patch, unpatch = pyext.integrations.transformers.patch, pyext.integrations.transformers.unpatch
COMMON = dict(vocab_size=VOCABULARY, eos_token_id=None, bos_token_id=1, pad_token_id=0)
SIZES = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64
)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
SEQ2SEQ = dict(d_model=32, decoder_start_token_id=1)
MODELS = {
    "Llama": ("ForCausalLM", dict(SIZES, num_key_value_heads=2)),
    "Gemma2": ("ForCausalLM", dict(SIZES, num_key_value_heads=2, head_dim=8, sliding_window=7)),
    "Bloom": ("ForCausalLM", dict(hidden_size=32, n_layer=2, n_head=4)),
    "DebertaV2": (
        "ForMaskedLM",
        dict(SIZES, **NO_DROPOUT, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8),
    ),
    "T5": (
        "ForConditionalGeneration",
        dict(SEQ2SEQ, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, feed_forward_proj="gated-gelu"),
    ),
    "Bart": (
        "ForConditionalGeneration",
        dict(SEQ2SEQ, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
             encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, forced_eos_token_id=None, dropout=0.0),
    ),
}  # fmt: skip
DECODERS, ENCODER_DECODERS = ("Llama", "Gemma2", "Bloom"), ("T5", "Bart")
SEARCHES = {"greedy": {}, "beams": {"num_beams": 3}, "static cache": {"cache_implementation": "static"}}


def model_of(name: str):
    head, sizes = MODELS[name]
    config = getattr(transformers, f"{name}Config")(**COMMON, **sizes)
    return tiny(getattr(transformers, f"{name}{head}"), config)


def inputs(name: str, left: bool | None = None, length: int = 23) -> dict:
    """Padded on the left for decoders, as generation wants it, unless said otherwise."""
    left = name in DECODERS if left is None else left
    given = dict(input_ids=tokens(length), attention_mask=padding(length, (length, 15, 9), left=left))
    if name in ENCODER_DECODERS:
        given["decoder_input_ids"] = tokens(11)
    return given


def of_tokens(logits: torch.Tensor, name: str, mask: torch.Tensor) -> torch.Tensor:
    """(N, V): the logits where there are tokens."""
    return logits.flatten(0, 1) if name in ENCODER_DECODERS else logits[mask[:, -logits.shape[1] :].bool()]


def same(got: torch.Tensor, wanted: torch.Tensor, name: str, mask: torch.Tensor) -> None:
    torch.testing.assert_close(of_tokens(got, name, mask), of_tokens(wanted, name, mask), rtol=1e-3, atol=1e-4)


def generates_the_same(got, wanted, name: str, searches=tuple(SEARCHES)) -> None:
    prompt = {key: x for key, x in inputs(name).items() if key != "decoder_input_ids"}
    for search in searches:
        asked = dict(SEARCHES[search], max_new_tokens=6, min_new_tokens=6, do_sample=False)
        assert torch.equal(got.generate(**prompt, **asked), wanted.generate(**prompt, **asked)), search


# --- Trainer ---


def losses(model, data: list, folder, **options) -> list[float]:
    """Of some steps of Trainer, and of the data afterwards."""
    found = []

    class Noting(transformers.Trainer):
        def training_step(self, *args, **kwargs):
            found.append(super().training_step(*args, **kwargs).item())
            return torch.tensor(found[-1])

    arguments = transformers.TrainingArguments(
        folder, max_steps=4, per_device_train_batch_size=3, learning_rate=1e-3, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = Noting(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    return [*found, trainer.evaluate()["eval_loss"]]


def texts(name: str) -> list[dict]:
    """Padded on the right, so that no query without keys predicts the first token; padding is not to be learned."""
    given = inputs(name, left=False)
    labels = given.pop("decoder_input_ids", given["input_ids"].masked_fill(given["attention_mask"] == 0, -100))
    return [dict(zip((*given, "labels"), row)) for row in zip(*given.values(), labels)]


@pytest.mark.parametrize(
    "name, options",
    [
        ("Llama", {}),
        ("Llama", {"gradient_checkpointing": True}),
        ("Bloom", {}),
        ("DebertaV2", {}),
        ("T5", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
        ("T5", {"bf16": True}),
    ],
)
def test_trainer(name, options, tmp_path):
    pytest.importorskip("accelerate")
    model, data = model_of(name), texts(name)
    wanted = losses(copy.deepcopy(model), data, tmp_path, **options)
    with Watch() as watch:
        got = losses(patched(model), data, tmp_path, **options)
    assert "attention" in watch.ops and not watch.square
    tolerance = 2e-2 if "bf16" in options else 1e-4
    assert len(got) == 5 and got == pytest.approx(wanted, rel=tolerance) and got[3] < got[0]


# --- PEFT ---


def adapters(kind: str, name: str):
    peft = pytest.importorskip("peft")
    task = "SEQ_2_SEQ_LM" if name in ENCODER_DECODERS else "CAUSAL_LM" if name in DECODERS else None
    if kind == "LoRA":
        return peft.LoraConfig(task_type=task, r=3, target_modules="all-linear", init_lora_weights=False)
    return peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=5)


def adapted(model, kind: str, name: str):
    """The same random adapters each time."""
    import peft

    with torch.random.fork_rng():
        torch.manual_seed(5)
        return peft.get_peft_model(model, adapters(kind, name)).eval()


@pytest.mark.parametrize("order", ["adapted, then patched", "patched, then adapted"])
@pytest.mark.parametrize(
    "name, kind", [("Llama", "LoRA"), ("Llama", "prefix"), ("Bloom", "prefix"), ("DebertaV2", "LoRA"), ("T5", "LoRA")]
)
def test_peft(name, kind, order):
    adapters(kind, name)
    model, given = model_of(name), inputs(name)
    wanted = adapted(copy.deepcopy(model), kind, name)
    if order.startswith("adapted"):
        got = adapted(copy.deepcopy(model), kind, name)
        patch(got)
    else:
        got = adapted(patched(model), kind, name)
    results = []
    for net in (got, wanted):
        with Watch() as watch:
            out = net(**given).logits
        assert ("attention" in watch.ops) == (net is got)
        meant = of_tokens(out, name, given["attention_mask"])
        weight = torch.linspace(-1, 1, meant.numel()).view(meant.shape)
        leaves = {key: p for key, p in net.named_parameters() if p.requires_grad}
        results.append((out, dict(zip(leaves, torch.autograd.grad(meant, leaves.values(), weight)))))
    (out, gradients), (theirs, reference) = results
    same(out, theirs, name, given["attention_mask"])
    assert gradients.keys() == reference.keys()
    if name in DECODERS + ENCODER_DECODERS:
        generates_the_same(got, wanted, name, ("greedy", "beams"))
    for key, gradient in gradients.items():
        size = reference[key].abs().max().item()  # T5 as it is initialised has gradients of 10
        torch.testing.assert_close(
            gradient, reference[key], rtol=1e-3, atol=1e-3 * max(size, 1), msg=lambda m, k=key: f"{k}: {m}"
        )
    if kind == "LoRA":
        merged = got.merge_and_unload()
        same(merged(**given).logits, theirs, name, given["attention_mask"])
        unpatch(merged)
        same(merged(**given).logits, theirs, name, given["attention_mask"])


# --- Compiled generation, caches ---


@pytest.mark.parametrize("name", ["Gemma2", "Bloom", "T5"])
def test_compiled_generation(name):
    """One graph each for the prompt and for all steps."""
    model = model_of(name)
    got = patched(model)
    torch._dynamo.reset()
    got.forward = torch.compile(got.forward, backend="eager", fullgraph=True)
    generates_the_same(got, model, name, ("static cache",))


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_a_cache_filled_in_pieces(name, static):
    """Several tokens at a time, then one, then several: as all at once without a cache."""
    model, given = model_of(name), inputs(name)
    net, key = patched(model), "decoder_input_ids" if name in ENCODER_DECODERS else "input_ids"
    wanted, ids = model(**given).logits, given.pop(key)
    mask, length = given.pop("attention_mask"), ids.shape[1]
    caches = [
        transformers.StaticCache(net.config, max_cache_len=30)
        if static
        else transformers.DynamicCache(config=net.config)
        for _ in range(2)
    ]
    cache = transformers.EncoderDecoderCache(*caches) if name in ENCODER_DECODERS else caches[0]
    for start, stop in ((0, 7), (7, 8), (8, length)):
        if name in ENCODER_DECODERS:
            extra = dict(given, attention_mask=mask)
        else:
            seen = mask[:, :stop]
            if name == "Bloom":  # it counts tokens by the mask, and wants it as long as the cache
                extra = dict(attention_mask=torch.nn.functional.pad(seen, (0, 30 - stop if static else 0)))
            else:
                extra = dict(attention_mask=seen, position_ids=(seen.cumsum(1) - 1).clamp(min=0)[:, start:])
        got = net(**{key: ids[:, start:stop]}, past_key_values=cache, use_cache=True, **extra).logits
        same(got, wanted[:, start:stop], name, mask[:, :stop])
