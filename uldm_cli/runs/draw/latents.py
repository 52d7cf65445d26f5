"""Signed values as grey: latents, and differences of latents or images. Zero is mid-grey everywhere."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Floats = NDArray[Any]

# A scaled latent has about unit deviation, and so has the pure noise that sampling starts from. One fixed scale keeps
# the pictures of different steps, samples and runs comparable; three deviations leave 0.3 % of noise clipped.
LATENT_SCALE = 3.0

MID_GREY = 128


def signed_to_bytes(values: Floats, scale: float) -> Bytes:
    """Values of any shape as uint8 of the same shape: -scale is 0, zero is 128, +scale is 255, beyond is clipped."""
    import numpy as np

    return np.rint(127.5 + 127.5 * np.clip(values / scale, -1.0, 1.0)).astype(np.uint8)


def largest(values: Floats) -> float:
    """The scale that shows every value unclipped: the largest magnitude, or 1.0 where all are zero."""
    import numpy as np

    return float(np.max(np.abs(values), initial=0.0)) or 1.0


def tile_channels(channels: Bytes) -> Bytes:
    """`[C, h, w]` as one near-square `[rows * h, columns * w]`, row by row; tiles left over are mid-grey."""
    import numpy as np

    count, height, width = channels.shape
    columns = math.isqrt(count - 1) + 1
    rows = -(-count // columns)
    tiles = np.full((rows * columns, height, width), MID_GREY, np.uint8)
    tiles[:count] = channels
    return tiles.reshape(rows, columns, height, width).swapaxes(1, 2).reshape(rows * height, columns * width)


def enlarge(picture: Bytes, size: tuple[int, int]) -> Bytes:
    """`[h, w]` at `size` (height, width) by nearest neighbour; a side that is larger already keeps its own length."""
    import numpy as np

    height, width = (max(old, new) for old, new in zip(picture.shape, size, strict=True))
    down = np.arange(height) * picture.shape[0] // height
    across = np.arange(width) * picture.shape[1] // width
    return np.ascontiguousarray(picture[down[:, None], across])


def draw_latent(latent: Floats, size: tuple[int, int], scale: float = LATENT_SCALE) -> Bytes:
    """One latent `[C, h, w]` as a grey picture of the image's size (height, width), channels tiled.

    `scale` is the value drawn white; for a latent it is the fixed one, for a difference of latents its largest.
    """
    return enlarge(tile_channels(signed_to_bytes(latent, scale)), size)
