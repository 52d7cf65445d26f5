"""Decoding latents in overlapping tiles, so that memory does not grow with the image."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from uldm_cli.errors import UsageError


@torch.no_grad()
def decode_tiled(decode: Callable[[Tensor], Tensor], z: Tensor, tile: int, overlap: int) -> Tensor:
    """Decodes square tiles of the latents, one at a time, and blends them linearly where they overlap.

    Beside the images it needs the memory of one tile. The result differs from that of `decode` alone by what a decoder
    computes of the whole image, as normalisation and attention do, and near the tiles' edges, where it lacks the
    neighbours.

    Args:
        decode: latents `[N, z, h, w]` to images `[N, C, h*f, w*f]`.
        z: latents `[N, z, h, w]`; sides up to `tile` are not divided.
        tile: side of a tile, in latents.
        overlap: latents that neighbouring tiles share at least, 0 to `tile - 1`.

    Returns:
        images `[N, C, h*f, w*f]`, of the dtype that `decode` gives.
    """
    if not 0 <= overlap < tile:
        raise UsageError(f"tiles of {tile} latents cannot overlap by {overlap}")
    height, width = z.shape[2:]

    def row(one: Tensor, top: int) -> Tensor:
        parts = [decode(one[:, :, top : top + tile, left : left + tile]) for left in _starts(width, tile, overlap)]
        return _joined(parts, width, tile, overlap, dim=3)

    def image(one: Tensor) -> Tensor:
        return _joined([row(one, top) for top in _starts(height, tile, overlap)], height, tile, overlap, dim=2)

    return torch.cat([image(one) for one in z.split(1)])


def _starts(side: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin: as few as cover the side, evenly spaced."""
    if side <= tile:
        return [0]
    last = math.ceil((side - tile) / (tile - overlap))
    return [i * (side - tile) // last for i in range(last + 1)]


def _joined(parts: list[Tensor], side: int, tile: int, overlap: int, dim: int) -> Tensor:
    """The decoded tiles along a side of the latents, each fading out over `overlap` latents where it has neighbours."""
    if len(parts) == 1:
        return parts[0]
    factor = parts[0].shape[dim] // tile
    centres = torch.arange(tile * factor, device=parts[0].device) + 0.5
    fading = torch.minimum(centres, centres.flip(0)).clamp(max=max(1, overlap * factor))
    places = [slice(start * factor, (start + tile) * factor) for start in _starts(side, tile, overlap)]
    total = fading.new_zeros(side * factor)
    for place in places:
        total[place] += fading
    shape = list(parts[0].shape)
    shape[dim] = side * factor
    image = fading.new_zeros(shape)
    for part, place in zip(parts, places, strict=True):
        weight = (fading / total[place]).view(-1, *[1] * (part.dim() - 1 - dim))
        image.narrow(dim, place.start, tile * factor).add_(weight * part)
    return image.to(parts[0].dtype)
