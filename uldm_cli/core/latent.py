"""Latent diffusion: a denoiser in the latents of an autoencoder."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from uldm_cli.core.denoiser import Denoiser
from uldm_cli.core.samplers import Prediction
from uldm_cli.core.schedules import Schedule


class Autoencoder(Protocol):
    """What latent diffusion asks of an autoencoder. Latents are unscaled: the scale factor is the diffusion model's."""

    def to_latent(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images `[N, C, H, W]` in [-1, 1] to latents `[N, z, h, w]`."""

    def from_latent(self, z: Tensor) -> Tensor:
        """Latents `[N, z, h, w]` to images in about [-1, 1]."""


class LatentDiffusion(nn.Module):
    """Everything that turns noise into images.

    Args:
        autoencoder: an `Autoencoder`.
        denoiser: works on latents times `scale_factor`.
        scale_factor: brings latents to unit deviation (Rombach et al. 2022, appendix G).
        latent_shape: `(z, h, w)` of one sample.
        image_shape: `(C, H, W)` of one sample.
    """

    autoencoder: Any
    """The module; of both types at once there is no name."""

    def __init__(
        self,
        autoencoder: nn.Module,
        denoiser: Denoiser,
        scale_factor: float,
        latent_shape: tuple[int, int, int],
        image_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        self.autoencoder, self.denoiser = autoencoder, denoiser
        self.scale_factor, self.latent_shape, self.image_shape = scale_factor, latent_shape, image_shape

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    def forward(self, x: Tensor, t: int) -> Prediction:
        return self.denoiser(x, t)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images `[N, C, H, W]` in [-1, 1] to scaled latents, float32 `[N, z, h, w]`."""
        dtype = next(self.autoencoder.parameters()).dtype
        return self.autoencoder.to_latent(images.to(dtype)).float() * self.scale_factor

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents `[N, z, h, w]` to images in about [-1, 1], float32 `[N, C, H, W]`."""
        dtype = next(self.autoencoder.parameters()).dtype
        latents = (z / self.scale_factor).to(dtype, memory_format=torch.channels_last)
        return self.autoencoder.from_latent(latents).to(torch.float32, memory_format=torch.contiguous_format)
