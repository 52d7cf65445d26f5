"""Writing files so that a reader never meets half of one, and so that a failed write leaves what was there."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from uldm_cli.errors import ConfigError
from uldm_cli.formats.whole import whole
from uldm_cli.runs.calls import signed

if TYPE_CHECKING:
    import numpy as np

    from uldm_cli.core.data import ImageSet

_LONG_TEXT = 200  # characters, from which on a picture's text is worth compressing


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces a file in one step: what `write` puts into the given binary file appears at `path` only when whole.

    Raises:
        UldmError: the disk is full, or the folder cannot be written to.
    """
    with whole(path) as file:
        write(file)


def write_png(path: Path, array: "np.ndarray", text: Mapping[str, str] | None = None, dpi: int | None = None) -> None:
    """Writes a picture, atomically.

    Args:
        path: of the file.
        array: uint8, `[H, W]` for grey or `[H, W, 3]` for RGB.
        text: stored in the file as PNG text, by keyword (Latin-1, at most 79 characters); long ones compressed. Where
            there is any, the command that runs is, too.
        dpi: pixels an inch, where the file is to say so.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    information = PngInfo()
    for keyword, value in signed(path, text).items():
        information.add_text(keyword, value, zip=len(value) > _LONG_TEXT)
    encoded = BytesIO()
    density = {} if dpi is None else {"dpi": (dpi, dpi)}
    Image.fromarray(array).save(encoded, "PNG", pnginfo=information, **density)
    atomic_write(path, lambda file: file.write(encoded.getbuffer()))


def sha256_of(path: Path) -> str:
    """The checksum of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def order_of(images: "ImageSet") -> str:
    """What tells the order of a set's images from any other: SHA-256 of their names, as far as they have names, and of
    their labels' names."""
    names = [list(getattr(images, "names", [])), list(images.classes)]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def read_picture(path: Path) -> "np.ndarray":
    """A picture as uint8: `[H, W]` where it is grey, else RGB `[H, W, 3]`."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))


def writable_folder(path: Path, *, create: bool = True) -> Path:
    """Makes sure that files can be written to a folder, before any work is done for it.

    Args:
        path: of the folder.
        create: make it; False only looks whether it could be made.

    Returns:
        The path.

    Raises:
        ConfigError: it, or a folder above it, is a file or cannot be written to.
    """
    existing = path
    while not os.path.lexists(existing) and existing.parent != existing:
        existing = existing.parent
    if not existing.is_dir():
        what = "a file" if existing.exists() else "a broken link"
        raise ConfigError(f"{existing} is {what} where a folder is needed for the output", "Give another --outdir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"the folder {existing} is not writable", "Give another --outdir")
    if create:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the folder {path} cannot be made ({error.strerror})", "Give another --outdir"
            ) from error
    return path
