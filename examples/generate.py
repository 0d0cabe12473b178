"""Generates text with LLaMA and BLOOM: patched, and with Transformers' own attention, by every search and cache.

    python examples/generate.py                  a few minutes
    python examples/generate.py --quick          one minute
    python examples/generate.py --arch llama --prompt 4096 --tokens 256 --batch 1 --layers 16 --width 1024 --heads 16
    python examples/generate.py --arch llama --compile

Small models of random weights, patched by `pyext.integrations.transformers.patch(model)`, learn the source code of
Python's standard library for some steps, a text of `--prompt` bytes at a time. Then they continue texts that they have
not seen: greedily, by beam search and by chance, with a cache that grows and one of fixed size. The same weights,
unpatched, do it with "eager" attention and, where Transformers has it for the model, "sdpa". Nothing is downloaded.

Printed: new tokens per second of the whole call, prompt included, and how many of the tokens are those of eager
attention: all, unless two continuations were equally likely up to rounding. One picture shows the speeds. `--compile`
puts the models through `torch.compile`. Needs `transformers` >= 5.4.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from side_by_side import DTYPES, announce, arguments, checked, corpus, make_runs, pieces, pyplot, save, train
from torch import nn
from tqdm import tqdm
from train_lm import PAD, VOCABULARY, Batch, Config, batches
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from pyext.integrations.transformers import patch, unpatch

THEIRS = {"llama": ("eager", "sdpa"), "bloom": ("eager",)}  # what Transformers has
SEARCHES = {"greedy": {}, "beams": {"num_beams": 4}, "sample": {"do_sample": True}}
CACHES = ("dynamic", "static")


class CausalLM(nn.Module):
    """A model of Transformers as the examples train it: a batch in, the loss out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch):
        logits = self.model(batch.inputs).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())


def made(arch: str, args: argparse.Namespace) -> nn.Module:
    """The published architecture, over bytes. Nothing ends a text."""
    common = dict(vocab_size=VOCABULARY, hidden_size=args.width, bos_token_id=None, eos_token_id=None, pad_token_id=PAD)
    if arch == "bloom":
        return BloomForCausalLM(BloomConfig(**common, n_layer=args.layers, n_head=args.heads))
    config = LlamaConfig(
        **common, num_hidden_layers=args.layers, num_attention_heads=args.heads, intermediate_size=args.width * 8 // 3,
        num_key_value_heads=args.heads // 2 or 1, max_position_embeddings=args.prompt + args.tokens,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def trained(arch: str, args: argparse.Namespace) -> nn.Module:
    """A patched model that has read some text."""
    torch.manual_seed(args.seed)
    model = made(arch, args)
    print(patch(model))
    announce(f"{arch}, {args.prompt} bytes", model, args)
    run = make_runs({arch: CausalLM(model)}, args.learning_rate, compiled=False)
    config = Config("gpt2", args.layers, args.width, args.heads, args.prompt)
    stream = batches(corpus()[0], config, 1, args.seed)
    train(run, stream, args.steps, args.learning_rate, DTYPES[args.dtype])
    return model.eval()


def contenders(arch: str, model: nn.Module) -> dict[str, nn.Module]:
    """The patched model, and copies of it as published."""
    models = {"pyext": model}
    for name in THEIRS[arch]:
        models[name] = copy.deepcopy(model)
        unpatch(models[name])
        models[name].set_attn_implementation(name)
    return models


@dataclass
class Row:
    """One search with one cache, by all contenders: what they wrote and how fast."""

    arch: str
    search: str
    cache: str
    written: dict[str, torch.Tensor] = field(default_factory=dict)  # (B, tokens)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def speed(self, name: str) -> float:
        """New tokens per second."""
        return self.written[name].numel() / statistics.median(self.seconds[name])

    @property
    def equal(self) -> int:
        return int((self.written["pyext"] == self.written["eager"]).sum())


def generate(model: nn.Module, prompts: torch.Tensor, count: int, row: Row) -> torch.Tensor:
    options = {"cache_implementation": row.cache, "do_sample": False, **SEARCHES[row.search]}
    torch.manual_seed(0)  # the same chances for all
    out = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), min_new_tokens=count, max_new_tokens=count, **options
    )
    return out[:, prompts.shape[1] :]


def measure(arch: str, models: dict[str, nn.Module], prompts: torch.Tensor, args: argparse.Namespace) -> list[Row]:
    """Every search with every cache, the contenders in turns; their first turn does not count."""
    rows = [Row(arch, search, cache) for search in SEARCHES for cache in CACHES]
    turns = [(row, turn) for row in rows for turn in range(1 + args.rounds)]
    for row, turn in tqdm(turns, desc=arch, unit="turn", disable=None):
        for name, model in models.items():
            start = time.perf_counter()
            row.written[name] = generate(model, prompts, args.tokens, row)
            if turn > 0:
                row.seconds.setdefault(name, []).append(time.perf_counter() - start)
    return rows


# --- The report -----------------------------------------------------------------------------------------------------


def report(rows: list[Row], args: argparse.Namespace) -> None:
    print(f"{'':21s}   new tokens per second, {args.batch} texts of {args.prompt} bytes, {args.dtype}")
    print(f"{'':21s} {'pyext':>9s} {'eager':>9s} {'sdpa':>9s}   tokens as eager's")
    for row in rows:
        speeds = (f"{row.speed(name):,.0f}" if name in row.seconds else "" for name in ("pyext", "eager", "sdpa"))
        columns = " ".join(f"{speed:>9s}" for speed in speeds)
        print(f"{row.arch:6s}{row.search:7s}{row.cache:8s} {columns}   {row.equal} of {row.written['pyext'].numel()}")
    text = bytes(rows[-1].written["pyext"][0].clamp(max=255).tolist()).decode(errors="replace")
    print(f"The last of them, in part: {text!r}")
    print(f"Picture: {args.out}")


def draw(rows: list[Row], args: argparse.Namespace) -> None:
    figure, axes = pyplot().subplots(figsize=(8, 3.5))
    colours = {"pyext": "#1f6f8b", "eager": "black", "sdpa": "grey"}
    for place, (name, colour) in enumerate(colours.items()):
        at = [i for i, row in enumerate(rows) if name in row.seconds]
        heights = [rows[i].speed(name) for i in at]
        axes.bar([i + 0.27 * (place - 1) for i in at], heights, width=0.25, color=colour, label=name)
    axes.set_xticks(range(len(rows)), [f"{row.arch}\n{row.search}\n{row.cache}" for row in rows], fontsize=7)
    axes.set_ylabel("new tokens per second")
    title = f"{args.batch} texts of {args.prompt} bytes, {args.layers} layers of width {args.width}"
    axes.set_title(f"{title}, {args.dtype}, {args.threads} thread(s)", fontsize=10)
    axes.margins(y=0.2)
    axes.legend(frameon=False, ncols=len(colours))
    save(figure, args.out)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=THEIRS, help="default: both")
    parser.add_argument("--prompt", type=int, default=512, help="bytes of a text that is continued")
    parser.add_argument("--tokens", type=int, help="bytes to write (default 64, quick 32)")
    parser.add_argument("--rounds", type=int, help="measurements, of which the median counts (default 3, quick 1)")
    args = parser.parse_args(argv)
    for name, quick, default in (("tokens", 32, 64), ("rounds", 1, 3)):
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else default)
    checked(parser, args, ("prompt", "tokens", "rounds"))
    if args.width % (2 * args.heads):
        parser.error(f"--width must be a multiple of twice --heads, got {args.width} and {args.heads}")
    args.out = args.out or Path("generate.png")
    return args


def main(argv: list[str] | None = None) -> list[Row]:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    prompts = next(pieces(corpus()[1], args.prompt, args.batch, torch.Generator().manual_seed(args.seed)))
    rows = []
    for arch in [args.arch] if args.arch else THEIRS:
        models = contenders(arch, trained(arch, args))
        for model in models.values():
            model.to(DTYPES[args.dtype])
            if args.compile:
                model.forward = torch.compile(model.forward)
        rows += measure(arch, models, prompts, args)
    draw(rows, args)
    report(rows, args)
    return rows


if __name__ == "__main__":
    main()
