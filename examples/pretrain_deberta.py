"""Pretrains Transformers' DeBERTa by masked language modelling twice, side by side: patched, and as published.

    python examples/pretrain_deberta.py                 a few minutes
    python examples/pretrain_deberta.py --quick         one minute
    python examples/pretrain_deberta.py --version 1     3 (also called v2), or 1
    python examples/pretrain_deberta.py --length 512 --layers 12 --width 768 --heads 12 --batch 16

One line makes the difference: `pyext.integrations.transformers.patch(model)`. Transformers computes the scores of
content to position and of position to content for all pairs, gathers them by relative position and adds them up; pyext
has them inside of attention (`bias.disentangled`), with log buckets and shared projections in version 3, clipped
distances and projections of their own in version 1.

The task is BERT's, on padded texts: of 15 % of the bytes, 80 % are hidden, 10 % replaced, 10 % left. The text is the
source code of Python's standard library; nothing is downloaded. Both models start from the same weights, have no
dropout, see the same batches, and their steps alternate. Needs `transformers` >= 5.4.
"""

from __future__ import annotations

from pathlib import Path

import torch
from side_by_side import Run, arguments, checked, corpus, published_and_patched, side_by_side
from torch import nn
from train_lm import PAD, VOCABULARY, Batch, Config, batches
from transformers import DebertaConfig, DebertaForMaskedLM, DebertaV2Config, DebertaV2ForMaskedLM


class MaskedLM(nn.Module):
    """A model of Transformers as the examples call it: a batch in, the loss out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch):
        there = torch.arange(batch.inputs.shape[1]) < batch.lengths[:, None]
        return self.model(input_ids=batch.inputs, attention_mask=there.long(), labels=batch.targets).loss


def deberta(version: int, layers: int, width: int, heads: int, length: int) -> MaskedLM:
    """The published architecture; its tables reach as far as the texts are long."""
    sizes = dict(
        vocab_size=VOCABULARY, pad_token_id=PAD, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, max_position_embeddings=length, max_relative_positions=length,
        relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False, type_vocab_size=0,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    if version == 1:
        return MaskedLM(DebertaForMaskedLM(DebertaConfig(**sizes)))
    config = DebertaV2Config(
        **sizes, position_buckets=max(2, length // 2), share_att_key=True, norm_rel_ebd="layer_norm"
    )
    return MaskedLM(DebertaV2ForMaskedLM(config))


def main(argv: list[str] | None = None) -> list[Run]:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--version", type=int, choices=(1, 3), default=3, help="of DeBERTa")
    parser.add_argument("--length", type=int, default=512, help="bytes of the longest texts")
    args = checked(parser, parser.parse_args(argv), ("length",))
    if args.version == 1 and args.dtype == "bf16":
        parser.error("--dtype bf16 needs --version 3: Transformers' DeBERTa v1 overflows under autocast")
    args.out = args.out or Path("pretrain_deberta.png")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    models = published_and_patched(deberta(args.version, args.layers, args.width, args.heads, args.length))
    config = Config("bert", args.layers, args.width, args.heads, args.length)
    streams = (batches(part, config, args.batch, args.seed + n) for n, part in enumerate(corpus()))
    return side_by_side(models, *streams, f"DeBERTa v{args.version}, {args.length} bytes", args)


if __name__ == "__main__":
    main()
