"""Latent diffusion: the scale factor, precision, and what its parts are asked."""

import pytest
import torch
from torch import Tensor, nn

from uldm_cli.core.denoiser import Denoiser
from uldm_cli.core.latent import LatentDiffusion
from uldm_cli.core.schedules import VariancePreserving, linear_betas


class Autoencoder(nn.Module):
    """Latents are a quarter of the images' size, and three times their values; it remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(3.0))

    def to_latent(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        self.seen = x
        return self.factor * nn.functional.avg_pool2d(x, 2)

    def from_latent(self, z: Tensor) -> Tensor:
        self.seen = z
        return nn.functional.interpolate(z / self.factor, scale_factor=2)


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.factor * x


@pytest.fixture
def model() -> LatentDiffusion:
    denoiser = Denoiser(Half(), VariancePreserving(linear_betas(10, 0.01, 0.1)), "eps")
    return LatentDiffusion(Autoencoder(), denoiser, 0.25, (3, 4, 4), (3, 8, 8))


def images() -> Tensor:
    """Of two by two equal pixels, so that nothing is lost."""
    small = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def test_scale_factor_multiplies_latents(model: LatentDiffusion) -> None:
    z = model.encode(images())
    torch.testing.assert_close(z, 0.75 * images()[:, :, ::2, ::2])
    torch.testing.assert_close(model.decode(z), images())
    torch.testing.assert_close(model.autoencoder.seen, 4 * z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autoencoder_computes_in_its_precision_and_the_rest_in_float32(model: LatentDiffusion, dtype) -> None:
    model.autoencoder.to(dtype)
    z = model.encode(images())
    assert model.autoencoder.seen.dtype == dtype
    decoded = model.decode(z)
    assert model.autoencoder.seen.dtype == dtype
    assert z.dtype == decoded.dtype == torch.float32
    assert decoded.is_contiguous()
    torch.testing.assert_close(decoded, images(), rtol=0.02, atol=0.02)


def test_it_denoises_with_its_denoiser(model: LatentDiffusion) -> None:
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(model(x, 3).eps, 0.5 * x)
    assert model.schedule is model.denoiser.schedule
