"""The published autoencoders: every published shape, and their parts. Their numbers are in test_golden."""

import pytest
import torch
from torch import Tensor

from uldm_cli.core.autoencoders import KL, VQ
from uldm_cli.core.blocks import SelfAttention
from uldm_cli.core.quantizers import EMAQuantizer, NearestQuantizer
from uldm_cli.specs import autoencoders

SMALL = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "resolution": 16}


@pytest.mark.parametrize(
    ("kind", "fields", "latent", "parameters"),
    [
        ("vq", {}, (3, 64, 64), 55_322_782),
        ("vq", {"attn_type": "none"}, (3, 64, 64), None),
        ("vq", {"ch_mult": (1, 2, 2, 4), "attn_resolutions": (32,), "z_channels": 4}, (4, 32, 32), None),
        ("vq", {"ch_mult": (1, 1, 2, 2, 4), "attn_resolutions": (16,), "z_channels": 8}, (8, 16, 16), None),
        ("kl", {"ch_mult": (1, 2, 4), "z_channels": 3}, (3, 64, 64), None),
        ("kl", {}, (4, 32, 32), 83_653_863),
        ("kl", {"ch_mult": (1, 1, 2, 2, 4), "attn_resolutions": (16,), "z_channels": 16}, (16, 16, 16), None),
        ("kl", {"ch_mult": (1, 1, 2, 2, 4, 4), "attn_resolutions": (16, 8), "z_channels": 64}, (64, 8, 8), None),
    ],
)
def test_published_shapes(
    kind: str, fields: dict[str, object], latent: tuple[int, ...], parameters: int | None
) -> None:
    spec = {"vq": autoencoders.VQ, "kl": autoencoders.KL}[kind].model_validate(fields)
    with torch.device("meta"):
        model = spec.build().requires_grad_(False)
        z = model.to_latent(torch.empty(1, 3, 256, 256))
        assert model.decoder(model.post_quant_conv(z)).shape == (1, 3, 256, 256)
    assert tuple(z.shape[1:]) == latent == (spec.latent_channels, 256 // spec.factor, 256 // spec.factor)
    if parameters is not None:
        assert sum(p.numel() for p in model.parameters()) == parameters


def vq(**fields: object) -> VQ:
    torch.manual_seed(0)
    return autoencoders.VQ.model_validate(SMALL | {"codebook_size": 32} | fields).build()


def kl(**fields: object) -> KL:
    torch.manual_seed(0)
    return autoencoders.KL.model_validate(SMALL | fields).build()


def images(channels: int = 3) -> Tensor:
    return torch.rand(2, channels, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def attention(model: torch.nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, SelfAttention)]


def test_attention_is_at_the_levels_of_the_named_sizes() -> None:
    fields = {"resolution": 64, "ch_mult": (1, 1, 2), "num_res_blocks": 2}
    middle = ["encoder.mid.attn_1", "decoder.mid.attn_1"]
    at_32 = ["encoder.down.1.attn.0", "encoder.down.1.attn.1"]
    at_32 += ["decoder.up.1.attn.0", "decoder.up.1.attn.1", "decoder.up.1.attn.2"]
    assert sorted(attention(kl(**fields))) == sorted(middle)
    assert sorted(attention(kl(**fields, attn_resolutions=[32]))) == sorted(middle + at_32)
    assert attention(kl(**fields, attn_resolutions=[32], attn_type="none")) == []


def test_latents_of_kl_are_drawn_with_the_noise_given() -> None:
    model = kl().eval()
    with torch.no_grad():
        model.quant_conv.weight[4:] *= 30  # deviations that matter
        mean, logvar = model.moments(images())
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(2))
        drawn = model.to_latent(images(), noise)
    assert (drawn - mean).std() > 0.1
    torch.testing.assert_close(drawn, mean + (logvar / 2).exp() * noise)
    assert torch.equal(model.to_latent(images()), model.moments(images())[0])


def test_log_variances_are_kept_within_bounds() -> None:
    model = kl().eval()
    with torch.no_grad():
        model.quant_conv.bias[4:] += torch.tensor([1000.0, -1000.0, 0.0, 0.0])
        mean, logvar = model.moments(images())
    assert mean.abs().max() < 100
    assert (logvar[:, 0] == 20).all()
    assert (logvar[:, 1] == -30).all()
    assert (logvar[:, 2:].abs() < 10).all()


def test_vq_is_trained_like_a_vqvae() -> None:
    model = vq(attn_resolutions=(8,))
    recon, quantized, losses = model(images())
    assert recon.shape == (2, 3, 16, 24)
    assert quantized.shape == (2, 3, 8, 12)
    (recon.square().mean() + sum(losses.values())).backward()
    still = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # Nothing depends on the bias of the keys: it shifts all of a query's logits alike.
    assert {name for name in still if not name.endswith(".k.bias")} == set()


def test_quantizer_is_that_of_the_config() -> None:
    plain, legacy = vq().quantize, vq(quantizer={"kind": "nearest", "legacy": True}).quantize
    assert type(plain) is type(legacy) is NearestQuantizer
    assert (plain.legacy, legacy.legacy) == (False, True)
    assert plain.codes.shape == (32, 3)
    assert isinstance(vq(quantizer="ema").quantize, EMAQuantizer)


def test_latents_may_have_other_channels_than_the_decoder_takes() -> None:
    for model in (vq(z_channels=6, embed_dim=5), kl(z_channels=6, embed_dim=5)):
        z = model.to_latent(images())
        assert z.shape == (2, 5, 8, 12)
        assert model.from_latent(z).shape == (2, 3, 16, 24)


@pytest.mark.parametrize("channels", [1, 4])
def test_channels_of_the_images(channels: int) -> None:
    assert vq(in_channels=channels)(images(channels))[0].shape == (2, channels, 16, 24)


def test_dropout_is_for_training() -> None:
    model = vq(dropout=0.5)
    assert not torch.equal(model.to_latent(images()), model.to_latent(images()))
    model.eval()
    assert torch.equal(model.to_latent(images()), model.to_latent(images()))
    assert torch.equal(model.to_latent(images()), vq().to_latent(images()))


def test_channels_last_gives_the_same() -> None:
    for model in (vq().eval(), kl(attn_resolutions=(8,)).eval()):
        z = model.to_latent(images())
        contiguous = model.from_latent(z)
        model.to(memory_format=torch.channels_last)
        last = model.from_latent(z.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(last, contiguous, rtol=1e-4, atol=1e-5)
