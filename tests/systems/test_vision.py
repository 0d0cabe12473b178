"""ViT, CLIP, CoCa, PaLM-E: encoders of patches; pooling by a few learned queries."""

from __future__ import annotations

import torch

import pyext
from support.systems import BATCH, VOCABULARY, Watch, agree, compare, padding, tiny, tokens

FAMILY = "ViT, CLIP, CoCa, PaLM-E"
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def test_vit():
    from transformers import ViTConfig, ViTModel

    model = tiny(ViTModel, ViTConfig(**SIZES, image_size=24, patch_size=4, hidden_dropout_prob=0.0))
    agree(model, dict(pixel_values=torch.randn(BATCH, 3, 24, 24)), family=FAMILY, name="ViTModel")


def test_clip():
    from transformers import CLIPConfig, CLIPModel

    text = dict(
        SIZES, vocab_size=VOCABULARY, max_position_embeddings=64, eos_token_id=2, bos_token_id=1, pad_token_id=0
    )
    config = CLIPConfig(text_config=text, vision_config=dict(SIZES, image_size=24, patch_size=4), projection_dim=16)
    model = tiny(CLIPModel, config)
    inputs = dict(input_ids=tokens(), attention_mask=padding(), pixel_values=torch.randn(BATCH, 3, 24, 24))
    agree(model, inputs, family=FAMILY, name="CLIPModel", output=lambda out: out.logits_per_image)


class Pooling(torch.nn.Module):
    """CoCa's attention pooling: learned queries attend to all patches (Yu et al., 2022, section 3.2)."""

    def __init__(self, attention: type):
        super().__init__()
        self.queries = torch.nn.Parameter(torch.randn(5, 32))
        self.attention = attention(32, 4, batch_first=True)

    def forward(self, x, padded):
        queries = self.queries.expand(x.shape[0], -1, -1)
        return self.attention(queries, x, x, key_padding_mask=padded, need_weights=False)[0]


def test_pooling():
    theirs, ours = Pooling(torch.nn.MultiheadAttention), Pooling(pyext.nn.MultiheadAttention)
    ours.load_state_dict(theirs.state_dict())
    wide = Pooling(torch.nn.MultiheadAttention).double()
    wide.load_state_dict(theirs.state_dict())
    x, padded = torch.randn(BATCH, 37, 32), ~padding().bool()
    runs = [(net, lambda net=net: net(x.to(net.queries.dtype), padded), None) for net in (wide, theirs, ours)]
    contexts = (torch.enable_grad(), torch.enable_grad(), Watch())
    runs = [(net, call, context) for (net, call, _), context in zip(runs, contexts)]
    compare(runs, family=FAMILY, name="attention pooling")
