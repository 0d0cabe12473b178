"""GPT-4, as described in public: sparse causal attention over long sequences."""

from __future__ import annotations

import pytest
import torch

import pyext
from support.systems import mask_rows_agree

FAMILY = "GPT-4 (as described in public)"
LENGTH = 32768


@pytest.mark.parametrize("kind", ["window", "strided", "fixed"])
def test_long_sequences(kind):
    i = torch.tensor([0, 1, 127, 128, 5000, 20011, LENGTH - 1])[:, None]
    j = torch.arange(LENGTH)
    if kind == "window":
        mask, sparse = pyext.masks.window(200, 0), i - j <= 200
    elif kind == "strided":
        mask, sparse = pyext.masks.causal() & pyext.masks.strided(128), (i - j < 128) | ((i - j) % 128 == 0)
    else:
        mask, sparse = pyext.masks.causal() & pyext.masks.fixed(128), (i // 128 == j // 128) | (j % 128 == 127)
    mask_rows_agree(mask, i[:, 0], sparse & (j <= i), LENGTH, family=FAMILY, name=f"{kind}, 32k tokens")
