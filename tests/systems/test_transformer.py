"""The Transformer of 2017 as torch has it: `nn.Transformer`, its attention replaced. (Marian: see test_bart.)"""

from __future__ import annotations

import torch

import pyext
from support.systems import BATCH, Watch, compare, padding

FAMILY = "Transformer (2017)"


class Translator(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Transformer(32, 4, 2, 2, 48, dropout=0.0, batch_first=True)
        self.source, self.target = (torch.nn.Parameter(torch.randn(BATCH, n, 32)) for n in (37, 19))

    def forward(self):
        absent = ~padding().bool()
        causal = torch.ones(19, 19, dtype=torch.bool).triu(1)
        return self.model(
            self.source, self.target, tgt_mask=causal, src_key_padding_mask=absent, memory_key_padding_mask=absent
        )


def on_pyext(model):
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.MultiheadAttention):
            ours = pyext.nn.MultiheadAttention(32, 4, batch_first=True)
            ours.load_state_dict(module.state_dict())
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, ours)
    return model


def test_encoder_and_decoder():
    theirs = Translator()
    copies = []
    for _ in range(2):
        copies.append(Translator())
        copies[-1].load_state_dict(theirs.state_dict())
    nets = copies[0].double(), theirs, on_pyext(copies[1])
    contexts = torch.enable_grad(), torch.enable_grad(), Watch()
    compare([(net, net, c) for net, c in zip(nets, contexts)], family=FAMILY, name="torch.nn.Transformer")
