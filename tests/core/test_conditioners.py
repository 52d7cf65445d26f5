"""Conditioners, where the reference's numbers do not reach."""

import pytest
import torch
from torch import nn

from uldm_cli.core.conditioners import ClassEmbedder, Rescaler, TokenEncoder
from uldm_cli.errors import UsageError

TOKENS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])


@pytest.fixture(scope="module")
def encoder() -> TokenEncoder:
    torch.manual_seed(0)
    return TokenEncoder(vocab_size=10, max_seq_len=6, n_embed=16, n_layer=2)


def test_every_token_sees_every_other(encoder: TokenEncoder) -> None:
    seen = encoder(TOKENS)
    assert seen.shape == (2, 4, 16)
    for changed in range(4):
        other = TOKENS.clone()
        other[:, changed] = 0
        assert ((encoder(other) - seen).abs().amax(2) > 1e-6).all()


def test_the_place_of_a_token_matters(encoder: TokenEncoder) -> None:
    assert not torch.allclose(encoder(TOKENS.flip(1)).flip(1), encoder(TOKENS), rtol=1e-2, atol=1e-3)


def test_all_of_an_encoder_learns(encoder: TokenEncoder) -> None:
    encoder(TOKENS).pow(3).sum().backward()
    without = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_a_class_is_one_token() -> None:
    embedder = ClassEmbedder(5, 8)
    context = embedder(torch.tensor([4, 0, 4]))
    assert context.shape == (3, 1, 8)
    assert torch.equal(context[0, 0], embedder.embedding.weight[4])
    context.sum().backward()
    assert embedder.embedding.weight.grad.sum(1).tolist() == [8, 0, 0, 0, 16]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda e: e(torch.zeros(1, 7, dtype=torch.int64)), "7 tokens are given. This model takes 6 at most"),
        (lambda e: e(torch.tensor([[3, 10]])), "token 10 is unknown. This model knows 0 to 9"),
        (lambda e: e(torch.tensor([[-1, 3]])), "token -1 is unknown. This model knows 0 to 9"),
        (lambda e: e(torch.rand(1, 3)), "token ids are torch.float32. They must be whole numbers, int64"),
        (lambda e: ClassEmbedder(5, 8)(torch.tensor([5])), "class 5 is unknown. This model knows 0 to 4"),
        (lambda e: Rescaler(1, "area", 0.5, 3, None, False)(torch.rand(1, 4, 2, 2)), "the map has 4 channels."),
    ],
)
def test_values_that_a_conditioner_cannot_take(encoder: TokenEncoder, ask, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        ask(encoder)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic", "area"])
def test_a_map_is_resized_in_stages(method: str) -> None:
    x = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    rescaler = Rescaler(2, method, 0.5, 3, None, bias=False)
    assert not rescaler.state_dict()
    once = nn.functional.interpolate(x, scale_factor=0.5, mode=method)
    torch.testing.assert_close(rescaler(x), nn.functional.interpolate(once, scale_factor=0.5, mode=method))
    assert torch.equal(Rescaler(0, method, 0.5, 3, None, bias=False)(x), x)


def test_channels_of_a_map_are_mixed_last() -> None:
    rescaler = Rescaler(1, "nearest", 0.5, 3, 2, bias=True)
    x = torch.rand(1, 3, 4, 4)
    weight, bias = rescaler.channel_mapper.weight[:, :, 0, 0], rescaler.channel_mapper.bias
    expected = torch.einsum("oi,nihw->nohw", weight, x[:, :, ::2, ::2]) + bias[:, None, None]
    torch.testing.assert_close(rescaler(x), expected)
