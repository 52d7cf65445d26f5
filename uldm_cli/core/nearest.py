"""The images of a set that are nearest to given ones: by brute force, batch after batch, in bounded memory."""

import torch
from torch import Tensor

from uldm_cli.core.lpips import LPIPS, full_precision

_EMBEDDED_AT_ONCE = 32


class Nearest:
    """The k smallest distances of each query among the candidates so far.

    Attributes:
        distance: `[Q, k]`, the smallest first; infinite where there were fewer candidates.
        index: int64 `[Q, k]`, of whom; -1 where there were fewer.
    """

    def __init__(self, queries: int, k: int, like: Tensor) -> None:
        self.distance = torch.full((queries, k), torch.inf, dtype=like.dtype, device=like.device)
        self.index = torch.full((queries, k), -1, dtype=torch.int64, device=like.device)

    def update(self, distance: Tensor, index: Tensor) -> None:
        """Takes in candidates: distances `[Q, B]`, infinite for whom does not count, and their numbers `[B]`."""
        k = self.distance.shape[1]
        distances = torch.cat([self.distance, distance], 1)
        indices = torch.cat([self.index, index.to(distance.device).expand(len(distance), -1)], 1)
        self.distance, where = distances.topk(k, largest=False)
        self.index = indices.gather(1, where).where(self.distance < torch.inf, -1)


class Search:
    """The nearest of a set by pixels and by LPIPS, for images that are all in memory.

    Args:
        queries: uint8 `[Q, 1 or 3, H, W]`.
        own: int64 `[Q]`, which image of the set each query is, or -1: that one does not count.
        lpips: on the device to compute on.
        k: how many of the nearest to keep.

    Attributes:
        pixels: root of the mean squared difference of the values, 0 to 1: the L2 distance, free of the image's size.
        perceptual: LPIPS, computed as the squared distance of vectors: right to about 1e-6.
    """

    pixels: Nearest
    perceptual: Nearest

    def __init__(self, queries: Tensor, own: Tensor, lpips: LPIPS, k: int) -> None:
        self._lpips, self._own = lpips, own
        # In float64, which holds sums of squares of 8-bit values exactly: equal images are at 0, not nearly.
        self._flat = queries.flatten(1).double()
        self._vectors = torch.cat([embed(lpips, some) for some in queries.split(_EMBEDDED_AT_ONCE)])
        self.pixels = Nearest(len(queries), k, self._flat)
        self.perceptual = Nearest(len(queries), k, self._vectors)

    def update(self, images: Tensor, index: Tensor) -> None:
        """Takes in some images of the set, uint8 `[B, C, H, W]`, and their numbers `[B]`."""
        itself = self._own[:, None] == index
        squares = _squared_distances(self._flat, images.flatten(1).double()) / self._flat.shape[1]
        self.pixels.update((squares.sqrt() / 255).masked_fill(itself, torch.inf), index)
        apart = _squared_distances(self._vectors, embed(self._lpips, images))
        self.perceptual.update(apart.masked_fill(itself.to(apart.device), torch.inf), index)


@torch.inference_mode()
def embed(lpips: LPIPS, images: Tensor) -> Tensor:
    """`LPIPS.embed` of images uint8 `[N, C, H, W]`, on the device that `lpips` is on."""
    with full_precision():
        return lpips.embed(images.to(lpips.device).float() / 127.5 - 1)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """`[A, B]` of vectors `[A, D]` and `[B, D]`, by one product of matrices."""
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)
