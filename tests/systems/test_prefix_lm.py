"""Prefix language models (the T5 study): causal, but the prefix is seen by all."""

from __future__ import annotations

import pytest
import torch

import pyext
from support.systems import mask_agrees

FAMILY = "prefix-LM (T5 study)"


@pytest.mark.parametrize("length", [37, 150])
def test_prefix(length):
    lengths = torch.tensor([length // 3, 0])
    i, j = torch.arange(length).view(-1, 1), torch.arange(length)
    visible = (j <= i) | (j < lengths.view(-1, 1, 1, 1))
    mask_agrees(pyext.masks.prefix(lengths), visible, family=FAMILY, name=f"prefix mask, {length} tokens")
