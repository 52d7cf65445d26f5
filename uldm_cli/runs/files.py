"""Writing files so that a reader never meets half of one, and so that a failed write leaves what was there."""

import errno
import os
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from uldm_cli.errors import ConfigError, UldmError

if TYPE_CHECKING:
    import numpy as np

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_STALE_SECONDS = 3600.0


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces a file in one step: what `write` puts into the given binary file appears at `path` only when whole.

    It is written beside `path`, flushed to the disk and renamed. Whatever fails, what was at `path` stays as it was
    and no temporary file is left; one that a killed process left behind goes when another process writes to the folder
    an hour later.

    Raises:
        UldmError: the disk is full, or the folder cannot be written to.
    """
    _remove_stale(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _explained(path, error) from error
        raise


def write_png(path: Path, array: "np.ndarray", text: Mapping[str, str] | None = None) -> None:
    """Writes a picture, atomically.

    Args:
        path: of the file.
        array: uint8, `[H, W]` for grey or `[H, W, 3]` for RGB.
        text: stored in the file as PNG text, by keyword (Latin-1, at most 79 characters).
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    information = PngInfo()
    for keyword, value in (text or {}).items():
        information.add_text(keyword, value)
    encoded = BytesIO()
    Image.fromarray(array).save(encoded, "PNG", pnginfo=information)
    atomic_write(path, lambda file: file.write(encoded.getbuffer()))


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


@cache
def _remove_stale(folder: Path) -> None:
    """Once a folder: listing it for every file would take longer than writing many.

    Age decides, not whether the process lives: on a shared disk that may be one of another machine.
    """
    for leftover in folder.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                leftover.unlink()


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself last through a power cut; not every system lets a folder be opened for that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _explained(path: Path, error: OSError) -> UldmError:
    if error.errno in _FULL:
        return UldmError(f"disk full while writing {path}", "What was saved before is whole; free some space")
    return UldmError(f"{path} cannot be written ({error.strerror or error})")
