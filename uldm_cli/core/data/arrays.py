"""Sets that fit into memory: arrays, and the IDX files of the MNIST family."""

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from uldm_cli.core.data.streams import Draws
from uldm_cli.core.images import decode_image, fit, to_tensor
from uldm_cli.errors import ConfigError

_UNSIGNED_BYTES = 8  # the IDX code of the only element type that the MNIST family uses


class ArrayImages:
    """Grey images held in memory.

    A larger `size` pads them with zeros (black, these sets' background), centred; a smaller one scales them down.

    Args:
        images: uint8 `[N, H, H]`.
        labels: int64 `[N]`.
        classes: names of the labels.
        size: of the images handed out, in pixels.
        channels: 1, or 3 for the grey repeated.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, *, classes: Sequence[str], size: int, channels: int
    ) -> None:
        self._images = torch.from_numpy(images)
        self._labels = torch.from_numpy(labels.astype(np.int64))
        self.classes = tuple(classes)
        self.size = size
        self.channels = channels
        self.skipped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.gather(torch.tensor([index]))
        return images[0], int(labels[0])

    def gather(self, indices: Tensor, draws: Draws | None = None) -> tuple[Tensor, Tensor]:
        """Images uint8 `[N, channels, size, size]` and labels int64 `[N]` of the given indices, int64 `[N]`."""
        images = self._images[indices]
        margin = self.size - images.shape[-1]
        if margin >= 0:
            before, after = margin // 2, margin - margin // 2
            images = F.pad(images, (before, after, before, after))[:, None]
        else:
            images = torch.stack([to_tensor(fit(Image.fromarray(image.numpy()), self.size)) for image in images])
        return images.expand(-1, self.channels, -1, -1).contiguous(), self._labels[indices]


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of an IDX file, gzipped or not.

    Raises:
        ConfigError: unreadable, truncated, or not an IDX file of unsigned bytes.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} cannot be read ({error})", "It may be truncated: fetch it again") from error
    if len(content) < 4 or content[:3] != bytes((0, 0, _UNSIGNED_BYTES)):
        raise ConfigError(f"{path} is not an IDX file of unsigned bytes (it starts with {content[:4].hex()!r})")
    start = 4 + 4 * content[3]
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if len(content) != start + math.prod(shape):
        what = f"{path} is truncated or damaged: {len(content)} bytes where its header, {shape}, asks for"
        raise ConfigError(f"{what} {start + math.prod(shape)}", "Fetch it again")
    return np.frombuffer(bytearray(content), dtype=np.uint8, offset=start).reshape(shape)


def read_mosaic(path: Path, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """A grey picture made of square tiles, a row of them for each class.

    Returns:
        The tiles, uint8 `[rows, columns, tile, tile]`, and their row numbers, uint8 `[rows, columns]`.
    """
    picture = decode_image(path, channels=1)[0].numpy()
    rows, columns = picture.shape[0] // tile, picture.shape[1] // tile
    tiles = picture.reshape(rows, tile, columns, tile).transpose(0, 2, 1, 3)
    return tiles, np.repeat(np.arange(rows, dtype=np.uint8), columns).reshape(rows, columns)
