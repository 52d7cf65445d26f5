"""Image files to 8-bit tensors, and the model's [-1, 1] tensors back to 8 bits: the only place that does either."""

import io
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from uldm_cli.errors import UldmError, UsageError

MIN_SIDE, MAX_SIDE, MAX_PIXELS = 8, 16_384, 100_000_000

UNREAD = frozenset({".heic", ".heif", ".jp2", ".jxl", ".svg", ".psd", ".dng", ".cr2", ".nef", ".arw"})
"""Of images that are not read, and that whoever has some in a folder will miss."""
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"})
# Only these decoders are tried, whatever the file calls itself: Pillow's EPS decoder, for one, starts Ghostscript.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")

Rounding = Literal["round", "truncate"]
Resize = Literal["lanczos", "bicubic", "bilinear", "box", "none"]
"""Pillow's filters, antialiased: they widen with the factor by which an image shrinks. Or no scaling at all."""

_FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}


class ImageError(UsageError):
    """An image that cannot be used. `name` is the file or archive member, `reason` what is wrong with it."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return type(self), (self.name, self.reason)  # it crosses from a reading worker to the main process


def to_uint8(x: Tensor, rule: Rounding = "round") -> np.ndarray:
    """Images as 8-bit arrays.

    Args:
        x: `[N, C, H, W]` float in [-1, 1]; values outside are clamped.
        rule: "round" to the nearest of the 256 values, or "truncate" towards zero as the CompVis scripts do.

    Returns:
        uint8 `[N, H, W, C]`, on the host.

    Raises:
        UldmError: x holds NaN, which would otherwise turn into a plausible black.
    """
    if torch.isnan(x).any():
        raise UldmError("the images contain NaN", "Try --precision fp32, or an earlier checkpoint")
    scaled = (x.detach().float() + 1).mul(127.5).clamp(0, 255)
    if rule == "round":
        scaled = scaled.round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def check_header(file: IO[bytes], name: str, least: int = MIN_SIDE) -> None:
    """Reads an image's header, no pixels.

    Args:
        file: where the image begins.
        name: what errors call it.
        least: pixels that both sides must have; never fewer than MIN_SIDE.

    Raises:
        ImageError: not an image, a broken header, or a size outside of `least`, MAX_SIDE, MAX_PIXELS.
    """
    with _no_warnings():
        width, height = _open(file, name).size
    check_size(width, height, name, least)


def check_size(width: int, height: int, name: str, least: int = MIN_SIDE) -> None:
    """Raises ImageError where an image is too small or too large; see `check_header`."""
    least = max(least, MIN_SIDE)
    if min(width, height) < least:
        raise ImageError(name, f"{width}x{height} pixels, smaller than {least} on a side")
    if max(width, height) > MAX_SIDE:
        raise ImageError(name, f"{width}x{height} pixels, larger than {MAX_SIDE} on a side")
    if width * height > MAX_PIXELS:
        raise ImageError(name, f"{width}x{height}, more than {MAX_PIXELS // 10**6} million pixels")


def decode_image(
    source: bytes | str | Path, channels: int = 3, size: int | None = None, name: str | None = None
) -> Tensor:
    """An encoded image as a tensor: see `decode`.

    Args:
        source: the file's content, or its path.
        channels: 3 for RGB, 1 for grey (ITU-R 601 luma).
        size: cut out the centre square and scale it to this many pixels; None keeps the image's size.
        name: what errors call it; the path unless given.

    Returns:
        uint8 `[channels, H, W]`.

    Raises:
        ImageError: it does not exist, is no image, is truncated, or has more than MAX_PIXELS pixels.
    """
    name = name or ("the image" if isinstance(source, bytes) else str(source))
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise ImageError(name, f"cannot be read ({error.strerror})") from error
    image = decode(content, channels, name)
    return to_tensor(image if size is None else fit(image, size))


def decode(content: bytes, channels: int, name: str) -> Image.Image:
    """An encoded image in mode L (1 channel) or RGB (3): upright (EXIF), first frame, transparency over white, 16 bits
    scaled to 8.

    Raises:
        ImageError: it is no image, is truncated, or has more than MAX_PIXELS pixels.
    """
    with _no_warnings():
        image = _open(io.BytesIO(content), name)
        try:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _convert(image, channels)
        except Exception as error:  # what a broken file makes Pillow's decoders raise is not limited to OSError
            raise ImageError(name, f"cannot be decoded ({one_line(error)})") from error


def fit(
    image: Image.Image, size: int, resize: Resize = "lanczos", pick: Callable[[int], int] | None = None
) -> Image.Image:
    """A square part of an image, `size` pixels on a side.

    It is as large as the image allows, and scaled; with "none" it has its `size` from the start. Its place is the
    centre, or the one of all n possible places that `pick(n)` names.
    """
    square = cut(image, size if resize == "none" else min(image.size), pick)
    return square if square.width == size else square.resize((size, size), _FILTERS[resize])


def cut(image: Image.Image, side: int, pick: Callable[[int], int] | None = None) -> Image.Image:
    """A square of whole pixels of an image that has as many: the centre (half a pixel up and left of it where it must
    be), or the one that `pick(n)` chooses of all n, counted row by row."""
    columns, rows = image.width - side + 1, image.height - side + 1
    if columns == rows == 1:
        return image
    top, left = divmod(pick(rows * columns), columns) if pick else ((rows - 1) // 2, (columns - 1) // 2)
    return image.crop((left, top, left + side, top + side))


def from_16_bits(values: np.ndarray) -> np.ndarray:
    """Integers from 0 to 65,535 as uint8, scaled and rounded to the nearest."""
    return ((values.astype(np.uint32) * 255 + 32_767) // 65_535).astype(np.uint8)


def to_tensor(image: Image.Image) -> Tensor:
    """An L or RGB image as uint8 `[C, H, W]`."""
    array = np.array(image)  # a copy: torch wants memory that it may write to
    return torch.from_numpy(array if array.ndim == 3 else array[:, :, None]).permute(2, 0, 1)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Pillow's are about sizes, which are checked here, and about damaged metadata, of which none is used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open(file: IO[bytes], name: str) -> Image.Image:
    try:
        image = Image.open(file, formats=_decoders())
    except Image.DecompressionBombError as error:
        raise ImageError(name, f"more than {MAX_PIXELS // 10**6} million pixels") from error
    except UnidentifiedImageError as error:
        raise ImageError(name, "not an image, or its header is damaged") from error
    except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:
        raise ImageError(name, f"its header cannot be read ({one_line(error)})") from error
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(name, f"{image.width}x{image.height}, more than {MAX_PIXELS // 10**6} million pixels")
    return image


@cache
def _decoders() -> tuple[str, ...]:
    """Those of the wanted formats that this build of Pillow has."""
    Image.init()
    return tuple(format for format in _FORMATS if format in Image.OPEN)


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """Any mode to L (1 channel) or RGB (3 channels), 8 bits."""
    if image.mode.startswith("I"):
        image = _without_clipping(image)
    elif image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    elif image.has_transparency_data:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, "white")
        image = Image.alpha_composite(white, coloured).convert("RGB")
    mode = "L" if channels == 1 else "RGB"
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")  # CMYK, YCbCr and palettes reach grey through their colours
    return image if image.mode == mode else image.convert(mode)


def _without_clipping(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey to 8: Pillow's own conversion would clip everything above 255 to white."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65_535:
        raise ValueError("grey values outside of 16 bits")
    return Image.fromarray(from_16_bits(values))


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
