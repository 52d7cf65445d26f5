"""Conditioners that a config can name."""

import pytest
import torch
from pydantic import ValidationError

from uldm_cli.specs.conditioners import Class, FirstStage, Identity, Rescaler, Tokens
from uldm_cli.testing import check_spec


def test_class():
    assert check_spec(Class(n_classes=3, embed_dim=8))(torch.tensor([2])).shape == (1, 1, 8)


def test_tokens():
    module = check_spec(Tokens(vocab_size=10, max_seq_len=4, n_embed=8, n_layer=1, tokenizer=False))
    assert module(torch.tensor([[1, 2]])).shape == (1, 2, 8)


def test_rescaler():
    module = check_spec(Rescaler(n_stages=2, in_channels=5, out_channels=2))
    assert module(torch.zeros(1, 5, 8, 8)).shape == (1, 2, 2, 2)
    with pytest.raises(ValidationError, match="'nearest', 'bilinear', 'bicubic' or 'area'"):
        Rescaler(method="linear")


def test_what_has_no_weights():
    x = torch.zeros(1, 3, 4, 4)
    assert check_spec(Identity())(x) is x
    assert not check_spec(FirstStage()).state_dict()
