"""From an image file to the square that a network sees. Each choice has a name, and the name says it exactly."""

import io
from dataclasses import dataclass
from typing import IO, Literal

import torch
from PIL import Image
from torch import Tensor

from uldm_cli.core.data.planes import PLANES, check_planes, is_npy, read_planes
from uldm_cli.core.images import EXTENSIONS, ImageError, Resize, check_header, cut, decode, fit, to_tensor

Crop = Literal["center", "random"]


@dataclass(frozen=True)
class Preparation:
    """How an image becomes a square.

    Attributes:
        size: side of the squares, in pixels.
        channels: 3 for RGB, 1 for grey: any image is converted. Of any other number are only arrays, see `planes`.
        resize: the antialiased filter that scales the largest square part of the image; or "none": the part has
            `size` pixels from the start.
        crop: where that part lies: in the "center"; or in training "random", drawn for the sample's number.
        window: the centre square of this side is taken first, and nothing is used of what lies around it.
    """

    size: int
    channels: int = 3
    resize: Resize = "lanczos"
    crop: Crop = "center"
    window: int | None = None

    @property
    def extensions(self) -> frozenset[str]:
        """Of the files that may hold such images."""
        return EXTENSIONS | {".npy"} if self.channels in (1, 3) else PLANES

    def check(self, file: IO[bytes], name: str) -> None:
        """Reads an image's header, no pixels.

        Raises:
            ImageError: it is damaged, or of the wrong size or number of channels.
        """
        if self._is_array(file):
            check_planes(file, name, self.channels, self._least)
        else:
            check_header(file, name, self._least)

    def __call__(self, content: bytes, name: str, bits: int | None = None) -> Tensor:
        """The image, uint8 `[channels, size, size]`.

        Args:
            content: of the file.
            name: what errors call it.
            bits: 63 random bits, by which a random crop is chosen; None for the centre.

        Raises:
            ImageError: it cannot be decoded, or is too small.
        """
        parts = self.decoded(content, name)
        width, height = parts[0].size
        if min(width, height) < self._least:
            raise ImageError(name, f"{width}x{height} pixels, smaller than {self._least} on a side")
        planes = [to_tensor(self._square(part, bits)) for part in parts]
        return planes[0] if len(planes) == 1 else torch.cat(planes)

    def decoded(self, content: bytes, name: str) -> list[Image.Image]:
        """The whole image: one in mode RGB or L, or one in mode L for each channel."""
        if self._is_array(io.BytesIO(content)):
            return read_planes(content, name, self.channels)
        return [decode(content, self.channels, name)]

    @property
    def _least(self) -> int:
        """Pixels that a side must have for the square to be cut out."""
        return self.window or (self.size if self.resize == "none" else 0)

    def _is_array(self, file: IO[bytes]) -> bool:
        return self.channels not in (1, 3) or is_npy(file)

    def _square(self, image: Image.Image, bits: int | None) -> Image.Image:
        if self.window:
            image = cut(image, self.window)
        if bits is None or self.crop == "center":
            return fit(image, self.size, self.resize)
        return fit(image, self.size, self.resize, lambda count: bits % count)
