"""What an autoencoder makes of images: reconstructions, latents, codes; and what each code draws alone."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from uldm_cli.core.autoencoders import KL, kl_divergence
from uldm_cli.core.images import to_tensor
from uldm_cli.core.vqvae import VectorQuantized


@dataclass(frozen=True)
class Look:
    """One image as an autoencoder sees it. Tensors are float32 on the host."""

    recon: Tensor
    """`[C, H, W]` in about [-1, 1], not clipped."""
    latent: Tensor
    """`[z, h, w]`: before quantizing, or the mean of a normal distribution."""
    losses: dict[str, float]
    """With a codebook `codebook` and `commitment`, mean squared distances; of a KL autoencoder `kl`, in nats: the
    divergence from a standard normal distribution, summed over the latent. Empty of any other."""
    indices: Tensor | None = None
    """Of the codes, int64 `[h, w]`; only with a codebook."""
    logvar: Tensor | None = None
    """`[z, h, w]`, logarithm of the variance; only of a KL autoencoder."""


@torch.no_grad()
def look(autoencoder: nn.Module, images: Tensor) -> list[Look]:
    """What an autoencoder makes of each image.

    Args:
        autoencoder: any, in evaluation mode.
        images: `[N, C, H, W]` in [-1, 1], H and W multiples of its factor.
    """
    if isinstance(autoencoder, VectorQuantized):
        return _quantized(autoencoder, images)
    module: Any = autoencoder
    logvars: list[Tensor | None] = [None] * len(images)
    losses: list[dict[str, float]] = [{} for _ in images]
    if isinstance(autoencoder, KL):
        latents, found = autoencoder.moments(images)
        logvars = [one.float().cpu() for one in found]
        losses = [{"kl": float(nats)} for nats in kl_divergence(latents, found)]
    else:
        latents = module.to_latent(images)
    recon = module.from_latent(latents).float().cpu()
    return [
        Look(image, latent, lost, logvar=logvar)
        for image, latent, lost, logvar in zip(recon, latents.float().cpu(), losses, logvars, strict=True)
    ]


def _quantized(autoencoder: VectorQuantized, images: Tensor) -> list[Look]:
    latents = autoencoder.to_latent(images)
    parts = [autoencoder.quantize(one[None]) for one in latents]  # one at a time: the losses are means of a batch
    recon = autoencoder.decode(torch.cat([part.z for part in parts])).float().cpu()
    return [
        Look(
            recon=recon[i],
            latent=latents[i].float().cpu(),
            losses={name: float(part.losses[f"{name}_loss"]) for name in ("codebook", "commitment")},
            indices=part.indices[0].cpu(),
        )
        for i, part in enumerate(parts)
    ]


@torch.no_grad()
def code_pictures(autoencoder: VectorQuantized, indices: Tensor, side: int) -> Tensor:
    """Images, float32 `[M, C, H, W]` in about [-1, 1], of latents that are one code everywhere.

    Args:
        autoencoder: with a codebook, in evaluation mode.
        indices: of the codes, int64 `[M]`.
        side: of the latents.
    """
    codes = autoencoder.quantize.codes[indices]
    return autoencoder.decode(codes[:, :, None, None].expand(-1, -1, side, side).contiguous()).float()


@torch.no_grad()
def blend(autoencoder: nn.Module, ends: Tensor, steps: int) -> Tensor:
    """Images `[steps, C, H, W]` in about [-1, 1], decoded on the straight line between two latents, ends included.

    With a codebook the line is that of the latents before quantizing; each point of it is then quantized.

    Args:
        autoencoder: any, in evaluation mode.
        ends: the two images, `[2, C, H, W]` in [-1, 1].
        steps: how many points, at least 2.
    """
    module: Any = autoencoder
    first, last = module.to_latent(ends)
    parts = torch.linspace(0, 1, steps).tolist()
    return torch.cat([module.from_latent(torch.lerp(first, last, part)[None]) for part in parts]).float()


def principal(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two directions in which codes differ most.

    Args:
        codes: `[K, D]`.

    Returns:
        Where each code lies along them, `[K, 2]`, and the share of the variance along each, `[2]`; zeros where codes
        have fewer dimensions.
    """
    centred = codes.astype(np.float64) - codes.mean(0, dtype=np.float64)
    _, spread, directions = np.linalg.svd(centred, full_matrices=False)
    count = min(2, len(spread))
    points, shares = np.zeros((len(codes), 2)), np.zeros(2)
    # A direction's sign is arbitrary: its largest entry is made positive, so that the same codes give the same map.
    turned = directions[:count] * np.sign(directions[np.arange(count), np.abs(directions[:count]).argmax(1)])[:, None]
    points[:, :count] = centred @ turned.T
    shares[:count] = spread[:count] ** 2 / max(float((spread**2).sum()), np.finfo(np.float64).tiny)
    return points, shares


def fit_multiple(image: Tensor, multiple: int, side: int | None, most: int) -> tuple[Tensor, tuple[int, int]]:
    """An image of which both sides are multiples of a number: scaled where needed, then the centre cut out.

    Args:
        image: uint8 `[C, H, W]`.
        multiple: what divides the sides of the result.
        side: scale the short side to this many pixels; None keeps the size.
        most: without `side`, an image of more pixels is scaled down to about as many.

    Returns:
        The image, uint8 `[C, H', W']`, and the height and width that it was scaled to before the cut. A side shorter
        than `multiple` gives an empty image.
    """
    height, width = image.shape[1:]
    ratio = side / min(height, width) if side else min(1.0, (most / (height * width)) ** 0.5)
    scaled = max(1, round(height * ratio)), max(1, round(width * ratio))
    if scaled != (height, width):
        image = to_tensor(_picture(image).resize(scaled[::-1], Image.Resampling.LANCZOS))
    kept = tuple(length - length % multiple for length in scaled)
    top, left = ((length - keep) // 2 for length, keep in zip(scaled, kept, strict=True))
    return image[:, top : top + kept[0], left : left + kept[1]], scaled


def cover(image: Tensor, size: tuple[int, int]) -> Tensor:
    """An image, uint8 `[C, H, W]`, scaled to cover a height and width, and its centre cut out."""
    if tuple(image.shape[1:]) == size:
        return image
    return to_tensor(ImageOps.fit(_picture(image), size[::-1], method=Image.Resampling.LANCZOS))


def _picture(image: Tensor) -> Image.Image:
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
