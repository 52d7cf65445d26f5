"""Files that are there whole or not at all."""

import errno
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

from uldm_cli.errors import UldmError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_STALE_SECONDS = 3600.0


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` in one step, when the block has ended well.

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
            yield file
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
