"""Images with any number of channels: NumPy's `.npy` files, and TIFFs of more than three channels.

The array is `[H, W, C]` or `[C, H, W]`, of one channel also `[H, W]`; leading dimensions of 1 are dropped. Where both
the first and the last have C entries, the last is the channels. Values are uint8; uint16, which are scaled to 8 bits;
or floats in [0, 1].
"""

import io
from typing import IO, Any

import numpy as np
from PIL import Image

from uldm_cli.core.data.sources import optional
from uldm_cli.core.images import ImageError, check_size, from_16_bits, one_line

_MAGIC = b"\x93NUMPY"
PLANES = frozenset({".npy", ".tif", ".tiff"})


def is_npy(file: IO[bytes]) -> bool:
    """Whether a file begins as NumPy's do; it is left at its beginning."""
    start = file.read(len(_MAGIC))
    file.seek(0)
    return start == _MAGIC


def check_planes(file: IO[bytes], name: str, channels: int, least: int) -> None:
    """Reads what an array file says of itself.

    Raises:
        ImageError: it is damaged, or of the wrong size, type or number of channels.
        ConfigError: it is a TIFF, and the package tifffile is not installed.
    """
    shape, kind = _npy_header(file, name) if is_npy(file) else _tiff_header(file, name)
    height, width = _layout(shape, channels, name)[:2]
    _check_type(kind, name)
    check_size(width, height, name, least)


def read_planes(content: bytes, name: str, channels: int) -> list[Image.Image]:
    """The channels of an array file, each an image in mode L.

    Raises:
        ImageError: it cannot be decoded, or is of the wrong size, type or number of channels.
        ConfigError: it is a TIFF, and the package tifffile is not installed.
    """
    file = io.BytesIO(content)
    check_planes(file, name, channels, 0)  # before any memory is taken
    file.seek(0)
    try:
        array = np.load(file, allow_pickle=False) if is_npy(file) else _tifffile().imread(file)
    except Exception as error:  # what broken files make tifffile raise is not limited
        raise ImageError(name, f"cannot be decoded ({one_line(error)})") from error
    height, width, axis = _layout(array.shape, channels, name)
    planes = np.moveaxis(_to_8_bits(array, name).reshape(_without_ones(array.shape, channels)), axis, 0)
    return [Image.fromarray(np.ascontiguousarray(plane)) for plane in planes.reshape(channels, height, width)]


def _npy_header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = read(file)
    except Exception as error:  # a header is a Python literal, and a broken one fails in as many ways
        raise ImageError(name, f"its header cannot be read ({one_line(error)})") from error
    return shape, kind


def _tiff_header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    tifffile = _tifffile()
    try:
        # In memory: of a file on disk tifffile opens whatever others the metadata names, and for every place that it
        # seeks in a member of a .zip, that would be unpacked anew.
        with tifffile.TiffFile(io.BytesIO(file.read())) as tiff:
            return tiff.series[0].shape, tiff.series[0].dtype
    except Exception as error:  # as above
        raise ImageError(name, f"its header cannot be read ({one_line(error)})") from error


def _tifffile() -> Any:
    return optional("tifffile", "To read TIFFs of more than three channels")


def _without_ones(shape: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """An array's shape with two dimensions, or three of which one is the channels."""
    while len(shape) > 2 and shape[0] == 1 and (len(shape) > 3 or channels != 1):
        shape = shape[1:]
    return (*shape, 1) if len(shape) == 2 else shape


def _layout(shape: tuple[int, ...], channels: int, name: str) -> tuple[int, int, int]:
    """Height, width, and which dimension of three the channels are."""
    three = _without_ones(shape, channels)
    if len(three) == 3 and three[2] == channels:
        return three[0], three[1], 2
    if len(three) == 3 and three[0] == channels:
        return three[1], three[2], 0
    raise ImageError(name, f"an array {list(shape)}, expected [H, W, {channels}] or [{channels}, H, W]")


def _check_type(kind: np.dtype[Any], name: str) -> None:
    if kind not in (np.uint8, np.uint16) and kind.kind != "f":
        raise ImageError(name, f"values of type {kind}, expected uint8, uint16, or floats in [0, 1]")


def _to_8_bits(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.uint16:
        return from_16_bits(array)
    if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
        raise ImageError(name, f"floats from {array.min():.4g} to {array.max():.4g}, expected them in [0, 1]")
    return np.rint(array.astype(np.float64) * 255).astype(np.uint8)
