"""Latent diffusion: a denoiser in the latents of an autoencoder."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from uldm_cli.core.conditioners import FirstStage
from uldm_cli.core.conditioning import Condition, Conditioning, place
from uldm_cli.core.denoiser import Denoiser
from uldm_cli.core.device import at_least_float32
from uldm_cli.core.samplers import Prediction
from uldm_cli.core.schedules import Schedule
from uldm_cli.core.tiling import decode_tiled
from uldm_cli.errors import UsageError

LARGEST_WHOLE = 768 * 768
"""Pixels of the largest images that are decoded whole; published models make no larger ones."""
TILE, OVERLAP = 576, 128
"""Side of the tiles of larger images, and what neighbours share, in pixels."""


class Autoencoder(Protocol):
    """What latent diffusion asks of an autoencoder. Latents are unscaled: the scale factor is the diffusion model's."""

    def to_latent(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images `[N, C, H, W]` in [-1, 1] to latents `[N, z, h, w]`."""

    def from_latent(self, z: Tensor) -> Tensor:
        """Latents `[N, z, h, w]` to images in about [-1, 1]."""


@torch.no_grad()
def to_latents(autoencoder: Any, images: Tensor, noise: Tensor | None = None) -> Tensor:
    """Images `[N, C, H, W]` in [-1, 1] to unscaled latents `[N, z, h, w]`, float32, or float64 where the weights are.

    Args:
        autoencoder: an `Autoencoder` and a module.
        images: in any floating type.
        noise: standard normal `[N, z, h, w]`, by which a KL autoencoder's latents are drawn; else they are the means.
    """
    dtype = next(autoencoder.parameters()).dtype
    return at_least_float32(autoencoder.to_latent(images.to(dtype), None if noise is None else noise.to(dtype)))


class LatentDiffusion(nn.Module):
    """Everything that turns noise into images.

    Args:
        autoencoder: an `Autoencoder`.
        denoiser: works on latents times `scale_factor`.
        scale_factor: brings latents to unit deviation (Rombach et al. 2022, appendix G).
        latent_shape: `(z, h, w)` of one sample.
        image_shape: `(C, H, W)` of one sample.
        conditioner: what the model is told, as a tensor, to what the denoiser takes; None of an unconditional model.
        conditioning: where the denoiser takes it; None exactly where there is no conditioner.
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
        conditioner: nn.Module | None = None,
        conditioning: Conditioning | None = None,
    ) -> None:
        super().__init__()
        self.autoencoder, self.denoiser = autoencoder, denoiser
        self.conditioner, self.conditioning = conditioner, conditioning
        self.scale_factor, self.latent_shape, self.image_shape = scale_factor, latent_shape, image_shape

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    def forward(self, x: Tensor, t: int, condition: Condition | None = None) -> Prediction:
        return self.denoiser(x, t, condition)

    def condition(self, value: Tensor, concat: Tensor | None = None) -> Condition:
        """Encodes what the model is told, and puts it where the denoiser takes it.

        Args:
            value: what the conditioner takes: class labels, token ids, an image in [-1, 1], ...
            concat: `[N, C', h, w]`, what a hybrid model takes beside its input; only there.

        Raises:
            UsageError: the model is unconditional, or the value not one that it takes.
        """
        if self.conditioning is None:
            raise UsageError("this model takes no condition", "It was trained without")
        return place(self.conditioning, self.encode_condition(value), concat)

    def encode_condition(self, value: Tensor) -> Tensor:
        """The conditioner's result, float32 unless it is a label. A first stage's latents are not scaled.

        Raises:
            UsageError: as `condition`.
        """
        if self.conditioner is None:
            raise UsageError("this model takes no condition", "It was trained without")
        if isinstance(self.conditioner, FirstStage):
            return to_latents(self.autoencoder, value)
        if value.is_floating_point():
            value = value.to(next((p.dtype for p in self.conditioner.parameters()), value.dtype))
        encoded = self.conditioner(value)
        return encoded.float() if encoded.is_floating_point() else encoded

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images `[N, C, H, W]` in [-1, 1] to scaled latents `[N, z, h, w]`; see `to_latents`."""
        return to_latents(self.autoencoder, images, noise) * self.scale_factor

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents `[N, z, h, w]` to images in about [-1, 1], float32 `[N, C, H, W]`.

        Images of more than LARGEST_WHOLE pixels are decoded in tiles, so that memory does not grow with their size.
        """
        dtype = next(self.autoencoder.parameters()).dtype
        latents = (z / self.scale_factor).to(dtype, memory_format=torch.channels_last)
        factor = self.image_shape[1] // self.latent_shape[1]
        if latents.shape[2:].numel() * factor**2 > LARGEST_WHOLE:
            images = decode_tiled(self.autoencoder.from_latent, latents, TILE // factor, OVERLAP // factor)
        else:
            images = self.autoencoder.from_latent(latents)
        return images.to(torch.float32, memory_format=torch.contiguous_format)
