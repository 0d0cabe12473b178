"""Fine-tunes a T5 with Transformers' Trainer twice: patched, and as published.

    python examples/finetune_t5.py                           a few minutes
    python examples/finetune_t5.py --quick                   one minute
    python examples/finetune_t5.py --model google/byt5-small --batch 8 --dtype bf16
    python examples/finetune_t5.py --length 1024 --layers 12 --width 768 --heads 12 --batch 16

One line makes the difference: `pyext.integrations.transformers.patch(model)`. Transformers makes the position bias, a
tensor over all pairs of queries and keys, once per step and stack, and its gradient with it; pyext reads the table
inside of attention (`bias.t5`) and sums the gradient over the layers.

Without `--model` the model is a small T5 1.1 of random weights, and nothing is downloaded; with it, any T5 over bytes
that `from_pretrained` finds, by name or in a directory. Tokens are ByT5's: a byte's value plus 3. The encoder reads L
bytes of the source code of Python's standard library, the decoder learns the L bytes that follow. Both models start
from the same weights, have no dropout and see the same batches, one training after the other, on a GPU where there is
one. Needs `transformers` >= 5.4 and `accelerate`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from side_by_side import Curve, announce, arguments, checked, corpus, draw, published_and_patched, report, sizes
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

SPECIAL, VOCABULARY = 3, 384  # ByT5's: padding, end and unknown come before the bytes, sentinels after
HELD_OUT = 8  # pairs of texts that validate


class Continuations(Dataset):
    """Pairs of pieces that follow each other, `count` of them evenly over the text."""

    def __init__(self, text: torch.Tensor, length: int, count: int):
        self.pairs = SPECIAL + text[: len(text) // (2 * length) * 2 * length].view(-1, 2, length)
        self.places = torch.linspace(0, len(self.pairs) - 1, count).long()

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        before, after = self.pairs[self.places[index]]
        return {"input_ids": before, "labels": after}


def t5(args: argparse.Namespace) -> nn.Module:
    """T5 1.1, or the one that `--model` names, without dropout: the two trainings would draw different masks."""
    if args.model is not None:
        return T5ForConditionalGeneration.from_pretrained(args.model, dropout_rate=0.0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=args.width, d_kv=args.width // args.heads, d_ff=args.width * 8 // 3,
        num_layers=args.layers, num_heads=args.heads, feed_forward_proj="gated-gelu", dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


class Meter(TrainerCallback):
    """The time of each step, and a progress bar."""

    def __init__(self, curve: Curve, tokens: int):
        self.curve, self.tokens = curve, tokens

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, unit="step", desc=self.curve.name, disable=None)

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.curve.rates.append(self.tokens / (time.perf_counter() - self.start))
        self.bar.set_postfix_str(f"{self.curve.losses[-1]:.3f} {self.curve.speed:,.0f} tok/s")
        self.bar.update()

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class MeteredTrainer(Trainer):
    """Notes every loss as it is: the log's are rounded."""

    def __init__(self, curve: Curve, tokens: int, **options):
        super().__init__(callbacks=[Meter(curve, tokens)], **options)
        self.curve = curve
        self.remove_callback(PrinterCallback)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.curve.losses.append(loss.item())
        return loss


def fine_tune(name: str, model: nn.Module, args: argparse.Namespace) -> Curve:
    text, held_out = corpus()
    curve, on_gpu = Curve(name), torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=args.steps, per_device_train_batch_size=args.batch, per_device_eval_batch_size=args.batch,
            learning_rate=args.learning_rate, warmup_steps=max(1, args.steps // 10), bf16=args.dtype == "bf16",
            seed=args.seed, save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no",
            torch_compile=args.compile, dataloader_pin_memory=on_gpu, use_cpu=not on_gpu,
        )  # fmt: skip
        trainer = MeteredTrainer(
            curve, 2 * args.batch * args.length, model=model, args=settings,
            train_dataset=Continuations(text, args.length, args.steps * args.batch),
            eval_dataset=Continuations(held_out, args.length, HELD_OUT),
        )  # fmt: skip
        trainer.train()
        curve.validation = trainer.evaluate()["eval_loss"]
    return curve


def main(argv: list[str] | None = None) -> list[Curve]:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--model", help="a T5 over bytes to begin with: a name or a directory")
    parser.add_argument("--length", type=int, default=512, help="bytes that are read, and bytes that are predicted")
    args = checked(parser, parser.parse_args(argv), ("length",))
    args.out = args.out or Path("finetune_t5.png")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = t5(args)
    args.layers, args.width = model.config.num_layers, model.config.d_model
    title = f"{args.model or 'T5'}, {args.length} bytes"
    models = published_and_patched(model)
    announce(title, model, args)
    runs = [fine_tune(name, model, args) for name, model in models.items()]
    draw(runs, sizes(title, args), args.out)
    report(runs, title, args)
    return runs


if __name__ == "__main__":
    main()
