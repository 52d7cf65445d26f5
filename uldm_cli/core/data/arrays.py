"""Sets that fit into memory: arrays, the IDX files of the MNIST family, and CIFAR's binary files."""

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
    """Images held in memory, as squares of another size where one is asked for.

    Grey images are padded with zeros (black, these sets' background), centred, where `size` is larger; where it is
    smaller, and colour images always, they are scaled with Pillow's antialiased Lanczos filter.

    Args:
        images: uint8, grey `[N, H, H]` or RGB `[N, 3, H, H]`.
        labels: int64 `[N]`.
        classes: names of the labels.
        size: of the images handed out, in pixels.
        channels: 1 for grey (ITU-R 601 luma of RGB), 3 for RGB or the grey repeated.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, *, classes: Sequence[str], size: int, channels: int
    ) -> None:
        self._images = torch.from_numpy(images if images.ndim == 4 else images[:, None])
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
        own, margin = images.shape[1], self.size - images.shape[-1]
        if own == 1 and margin >= 0:
            before, after = margin // 2, margin - margin // 2
            images = F.pad(images, (before, after, before, after))
        elif margin or own > self.channels:
            images = torch.stack([self._by_pillow(image) for image in images])
        return images.expand(-1, self.channels, -1, -1).contiguous(), self._labels[indices]

    def _by_pillow(self, image: Tensor) -> Tensor:
        picture = Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())
        return to_tensor(fit(picture.convert("L") if self.channels == 1 else picture, self.size))


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


_CIFAR_RECORD = 1 + 3 * 32 * 32  # a label, then an image's red, green and blue


def read_cifar(files: Sequence[tuple[str, bytes]]) -> tuple[np.ndarray, np.ndarray]:
    """CIFAR-10 from the contents of its binary files, each with what errors call it.

    Returns:
        The images, uint8 `[N, 3, 32, 32]`, and their labels, uint8 `[N]`.

    Raises:
        ConfigError: a file is truncated, or is none of CIFAR-10's.
    """
    records = []
    for name, content in files:
        if not content or len(content) % _CIFAR_RECORD:
            what = f"{name} is truncated or no file of CIFAR-10: {len(content)} bytes are not whole images"
            raise ConfigError(f"{what} of {_CIFAR_RECORD}", "Fetch it again")
        records.append(np.frombuffer(content, dtype=np.uint8).reshape(-1, _CIFAR_RECORD))
        if records[-1][:, 0].max() > 9:
            raise ConfigError(f"{name} is damaged or no file of CIFAR-10: it has a label above 9", "Fetch it again")
    together = np.concatenate(records)
    return together[:, 1:].reshape(-1, 3, 32, 32), together[:, 0]


def read_mosaic(path: Path, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """A grey picture made of square tiles, a row of them for each class.

    Returns:
        The tiles, uint8 `[rows, columns, tile, tile]`, and their row numbers, uint8 `[rows, columns]`.
    """
    picture = decode_image(path, channels=1)[0].numpy()
    rows, columns = picture.shape[0] // tile, picture.shape[1] // tile
    tiles = picture.reshape(rows, tile, columns, tile).transpose(0, 2, 1, 3)
    return tiles, np.repeat(np.arange(rows, dtype=np.uint8), columns).reshape(rows, columns)
