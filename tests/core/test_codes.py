"""What an autoencoder makes of images, one image at a time."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from uldm_cli.core.autoencoders import KL, VQ, divergence
from uldm_cli.core.codes import blend, code_pictures, cover, fit_multiple, look, principal
from uldm_cli.specs import autoencoders

SMALL = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "resolution": 16}


def images(count: int = 3, height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def vq() -> VQ:
    torch.manual_seed(0)
    module = autoencoders.VQ.model_validate({**SMALL, "codebook_size": 32}).build().eval()
    nn.init.normal_(module.quantize.embedding)
    return module


@pytest.fixture(scope="module")
def kl() -> KL:
    torch.manual_seed(0)
    return autoencoders.KL.model_validate({**SMALL, "ch_mult": (1, 2), "z_channels": 4}).build().eval()


def test_with_a_codebook_each_image_has_what_it_has_alone(vq: VQ) -> None:
    batch = images()
    seen = look(vq, batch)
    with torch.no_grad():
        for image, one in zip(batch, seen, strict=True):
            recon, _, losses = vq(image[None])
            torch.testing.assert_close(one.recon, recon[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(one.latent, vq.to_latent(image[None])[0], atol=1e-5, rtol=1e-5)
            assert one.indices is not None
            assert torch.equal(one.indices, vq.encode_with_indices(image[None])[2][0])
            assert one.indices.shape == (8, 12)
            assert one.losses == pytest.approx({name.removesuffix("_loss"): float(v) for name, v in losses.items()})
            assert one.logvar is None
    assert len({one.losses["codebook"] for one in seen}) == len(batch)


def test_of_a_posterior_the_mean_is_decoded_and_the_divergence_is_torch_s(kl: KL) -> None:
    batch = images()
    for image, one in zip(batch, look(kl, batch), strict=True):
        with torch.no_grad():
            mean, logvar = kl.moments(image[None])
            torch.testing.assert_close(one.recon, kl.from_latent(mean)[0], atol=1e-5, rtol=1e-5)
        posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
        standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
        expected = torch.distributions.kl_divergence(posterior, standard).detach()
        assert one.logvar is not None
        torch.testing.assert_close(divergence(one.latent, one.logvar), expected[0], atol=1e-5, rtol=1e-4)
        assert one.losses["kl"] == pytest.approx(float(expected.sum()), rel=1e-4)
        assert one.indices is None


def test_any_other_autoencoder_has_latents_and_reconstructions_only() -> None:
    class Halves(nn.Module):
        def to_latent(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
            return x[:, :, ::2, ::2]

        def from_latent(self, z: Tensor) -> Tensor:
            return z.repeat_interleave(2, 2).repeat_interleave(2, 3)

    [one] = look(Halves(), images(1))
    assert (one.losses, one.indices, one.logvar) == ({}, None, None)
    assert one.recon.shape == (3, 16, 24)


def test_a_code_is_drawn_as_its_own_latents_are(vq: VQ) -> None:
    chosen = torch.tensor([7, 30])
    pictures = code_pictures(vq, chosen, side=3)
    assert pictures.shape == (2, 3, 6, 6)
    with torch.no_grad():
        expected = vq.decode(vq.quantize.codes[30].view(1, -1, 1, 1).expand(1, -1, 3, 3))
    torch.testing.assert_close(pictures[1:], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "quantizer",
    [{"kind": "ema"}, {"kind": "cosine"}, {"kind": "cosine", "code_dim": 2}, {"kind": "fsq", "levels": [4, 4, 3]}],
    ids=str,
)
def test_every_quantizer_can_be_looked_into(quantizer: dict[str, object]) -> None:
    """An image is decoded from its codes, and a code's picture is that of a latent that is this code everywhere."""
    torch.manual_seed(0)
    module = autoencoders.VQ.model_validate({**SMALL, "codebook_size": 48, "quantizer": quantizer}).build().eval()
    [one] = look(module, images(1))
    assert one.indices is not None
    codes = module.quantize.codes[one.indices]
    assert codes.shape == (8, 12, 3)
    with torch.no_grad():
        torch.testing.assert_close(one.recon, module.decode(codes.permute(2, 0, 1)[None])[0], atol=1e-5, rtol=1e-5)
        alone = module.decode(module.quantize.codes[47].view(1, -1, 1, 1).expand(1, -1, 3, 3))
    torch.testing.assert_close(code_pictures(module, torch.tensor([47]), side=3), alone, atol=1e-5, rtol=1e-5)
    assert set(one.losses) == {"codebook", "commitment"}
    points, shares = principal(module.quantize.codes.detach().numpy())
    assert points.shape == (48, 2)
    assert np.isfinite(points).all()
    assert np.isfinite(shares).all()


def test_a_blend_is_straight_before_quantizing(vq: VQ, kl: KL) -> None:
    ends = images(2)
    for module in (vq, kl):
        drawn = blend(module, ends, 5)
        with torch.no_grad():
            first, last = module.to_latent(ends)
            for part, picture in zip((0, 0.25, 0.5, 0.75, 1), drawn, strict=True):
                expected = module.from_latent(((1 - part) * first + part * last)[None])[0]
                assert (picture - expected).abs().mean() < 1e-3  # a latent midway between two codes may go to either


def test_principal_components_are_those_of_the_covariance() -> None:
    codes = np.random.default_rng(0).normal(size=(200, 5)) * (1, 4, 0.5, 2, 0.1) + 3
    points, shares = principal(codes.astype(np.float32))
    variances, directions = np.linalg.eigh(np.cov(codes.T))
    np.testing.assert_allclose(shares, variances[::-1][:2] / variances.sum(), rtol=1e-4)
    expected = (codes - codes.mean(0)) @ directions[:, ::-1][:, :2]
    np.testing.assert_allclose(np.abs(points), np.abs(expected), atol=1e-3)
    assert np.array_equal(points, principal(codes.astype(np.float32))[0])


@pytest.mark.parametrize("codes", [np.arange(6.0)[:, None], np.ones((4, 3)), np.zeros((1, 2))])
def test_codes_of_few_dimensions_have_finite_places(codes: np.ndarray) -> None:
    points, shares = principal(codes.astype(np.float32))
    assert points.shape == (len(codes), 2)
    assert np.isfinite(points).all()
    assert np.isfinite(shares).all()
    assert np.allclose(points[:, 1], 0)


@pytest.mark.parametrize(
    ("size", "multiple", "side", "most", "scaled", "result"),
    [
        ((64, 64), 4, None, 10**6, (64, 64), (64, 64)),
        ((45, 67), 4, None, 10**6, (45, 67), (44, 64)),
        ((45, 67), 8, 32, 10**6, (32, 48), (32, 48)),
        ((10, 20), 8, 40, 10**6, (40, 80), (40, 80)),
        ((100, 200), 8, None, 5_000, (50, 100), (48, 96)),
        ((100, 200), 8, 200, 5_000, (200, 400), (200, 400)),
        ((3, 40), 4, None, 10**6, (3, 40), (0, 40)),
    ],
)
def test_an_image_is_scaled_only_where_it_must_and_loses_its_edges(
    size: tuple[int, int],
    multiple: int,
    side: int | None,
    most: int,
    scaled: tuple[int, int],
    result: tuple[int, int],
) -> None:
    image = torch.arange(size[0] * size[1]).remainder(251).to(torch.uint8).view(1, *size)
    fitted, was = fit_multiple(image, multiple, side, most)
    assert was == scaled
    assert tuple(fitted.shape) == (1, *result)
    if scaled == size:
        top, left = (size[0] - result[0]) // 2, (size[1] - result[1]) // 2
        assert torch.equal(fitted, image[:, top : top + result[0], left : left + result[1]])


def test_covering_scales_and_keeps_the_centre() -> None:
    image = torch.zeros(3, 20, 60, dtype=torch.uint8)
    image[:, :, 20:40] = 255
    covered = cover(image, (10, 10))
    assert covered.shape == (3, 10, 10)
    assert covered.float().mean() > 230
    expected = np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).crop((20, 0, 40, 20)).resize((10, 10)))
    assert abs(covered.float().mean() - expected.mean()) < 20
    assert cover(image, (20, 60)) is image
