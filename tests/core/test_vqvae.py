"""The VQ-VAE: what its methods take and give, where its layers are, and configs that do not fit together."""

import pytest
import torch
from torch import Tensor

from uldm_cli.core.blocks import Downsample, SelfAttention, Upsample
from uldm_cli.core.quantizers import EMAQuantizer, NearestQuantizer
from uldm_cli.core.vqvae import VQVAE
from uldm_cli.errors import ConfigError
from uldm_cli.specs import autoencoders
from uldm_cli.specs.load import load_config

SMALL = {
    "down_channels": (8, 16, 24),
    "mid_channels": (24, 16, 24),
    "num_down_layers": 1,
    "num_up_layers": 1,
    "num_heads": 2,
    "norm_channels": 4,
    "z_channels": 5,
    "codebook_size": 32,
    "quantizer": "nearest",
}


def build(**fields: object) -> VQVAE:
    torch.manual_seed(0)
    return autoencoders.VQVAE.model_validate(SMALL | fields).build()


def images(channels: int = 3) -> Tensor:
    return torch.rand(2, channels, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_forward_gives_reconstruction_latents_and_losses() -> None:
    model = build()
    recon, quantized, losses = model(images())
    assert recon.shape == (2, 3, 16, 24)
    assert quantized.shape == (2, 5, 4, 6)
    assert sorted(losses) == ["codebook_loss", "commitment_loss"]
    assert all(loss.shape == () and loss > 0 for loss in losses.values())


def test_encode_and_decode_are_the_halves_of_forward() -> None:
    model = build().eval()
    recon, quantized, losses = model(images())
    encoded, losses_again = model.encode(images())
    assert torch.equal(encoded, quantized)
    assert losses_again == losses
    assert torch.equal(model.decode(encoded), recon)


def test_indices_name_the_codes() -> None:
    model = build().eval()
    quantized, _, indices = model.encode_with_indices(images())
    assert indices.shape == (2, 4, 6)
    assert indices.dtype == torch.int64
    assert torch.allclose(model.quantize.codes[indices].permute(0, 3, 1, 2), quantized, atol=1e-6)


def test_to_latent_comes_before_quantizing_and_from_latent_quantizes() -> None:
    model = build().eval()
    z = model.to_latent(images())
    recon, quantized, _ = model(images())
    assert not torch.allclose(z, quantized, atol=1e-3)
    torch.testing.assert_close(model.quantize(z).z, quantized)
    torch.testing.assert_close(model.from_latent(z), recon)
    assert not torch.allclose(model.decode(z), recon, atol=1e-4)
    # Latents near a code decode as it does.
    torch.testing.assert_close(model.from_latent(quantized + 1e-4), model.from_latent(quantized))
    # The noise is for autoencoders whose latents are drawn.
    assert torch.equal(model.to_latent(images(), torch.randn(2, 5, 4, 6)), z)


@pytest.mark.parametrize(
    ("down_sample", "size"),
    [((True, True), (4, 6)), ((True, False), (8, 12)), ((False, True), (8, 12)), ((False, False), (16, 24))],
)
def test_each_level_halves_or_does_not(down_sample: tuple[bool, bool], size: tuple[int, int]) -> None:
    model = build(down_sample=down_sample)
    assert model.to_latent(images()).shape[2:] == size
    assert model(images())[0].shape == (2, 3, 16, 24)
    assert autoencoders.VQVAE.model_validate(SMALL | {"down_sample": down_sample}).factor == 16 // size[0]


@pytest.mark.parametrize(
    ("down_sample", "width"),
    [((True, False), 16), ((False, True), 24)],
)
def test_the_decoder_grows_where_the_encoder_shrinks(down_sample: tuple[bool, bool], width: int) -> None:
    model = build(down_sample=down_sample)
    assert [layer.conv.in_channels for layer in model.encoder.down if isinstance(layer, Downsample)] == [width]
    assert [layer.conv.in_channels for layer in model.decoder.up if isinstance(layer, Upsample)] == [width]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_of_the_images(channels: int) -> None:
    assert build(in_channels=channels)(images(channels))[0].shape == (2, channels, 16, 24)


def attention_widths(part: torch.nn.Module) -> list[int]:
    return [layer.q.in_channels for layer in part.modules() if isinstance(layer, SelfAttention)]


@pytest.mark.parametrize(
    ("attn_down", "encoder", "decoder"),
    [((False, False), [], []), ((True, False), [16], [8]), ((False, True), [24, 24], [16, 16])],
)
def test_attention_is_where_attn_down_says(attn_down, encoder: list[int], decoder: list[int]) -> None:
    blocks = 2 if attn_down[1] else 1
    model = build(attn_down=attn_down, num_down_layers=blocks, num_up_layers=blocks)
    assert attention_widths(model.encoder.down) == encoder
    assert attention_widths(model.decoder.up) == decoder
    assert attention_widths(model.encoder.mid) == [16, 24]  # mid_channels 24 -> 16 -> 24
    assert attention_widths(model.decoder.mid) == [16, 24]


@pytest.mark.parametrize("quantizer", ["nearest", "ema"])
def test_every_parameter_learns(quantizer: str) -> None:
    model = build(quantizer=quantizer, attn_down=(True, True))
    recon, _, losses = model(images())
    (recon.square().mean() + sum(losses.values())).backward()
    learning = {name: p.grad is not None and bool(p.grad.any()) for name, p in model.named_parameters()}
    # Nothing depends on the bias of the keys: it shifts all of a query's logits alike.
    still = {name for name, learns in learning.items() if not learns and not name.endswith(".k.bias")}
    assert still == ({"quantize.embedding"} if quantizer == "ema" else set())


def test_quantizer_is_that_of_the_config() -> None:
    assert type(build().quantize) is NearestQuantizer
    ema = build(quantizer={"kind": "ema", "decay": 0.5, "revive_below": 0.25, "seed": 3}).quantize
    assert isinstance(ema, EMAQuantizer)
    assert (ema.decay, ema.revive_below, ema.seed) == (0.5, 0.25, 3)
    assert ema.codes.shape == (32, 5)


def test_channels_last_gives_the_same() -> None:
    model = build(attn_down=(True, True)).eval()
    contiguous = model(images())[0]
    model.to(memory_format=torch.channels_last)
    last = model(images().contiguous(memory_format=torch.channels_last))[0]
    torch.testing.assert_close(last, contiguous, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [2, 8])
def test_norm_channels_are_the_groups(groups: int) -> None:
    norms = [layer for layer in build(norm_channels=groups).modules() if isinstance(layer, torch.nn.GroupNorm)]
    assert {norm.num_groups for norm in norms} == {groups}
    assert {norm.eps for norm in norms} == {1e-6}


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("down_sample=[true]", ["down_sample", "expected 2 entries", "down_channels"]),
        ("down_sample=[true,true,true]", ["down_sample", "expected 2 entries", "down_channels"]),
        ("attn_down=[true]", ["attn_down", "expected 2 entries", "down_channels"]),
        ("down_channels=[32,128]", ["down_sample", "expected 1 entry", "down_channels"]),
        ("mid_channels=[64,128]", ["mid_channels", "128", "down_channels"]),
        ("mid_channels=[128,64]", ["mid_channels", "128", "down_channels"]),
        ("norm_channels=48", ["norm_channels", "32"]),
        ("num_heads=3", ["num_heads", "128"]),
        ("down_channels=[128]", ["down_channels"]),
    ],
)
def test_lists_that_do_not_fit_together_are_refused_in_one_line(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(autoencoders.VQVAE, None, [override])
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
