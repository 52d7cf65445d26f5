"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from uldm_cli.errors import UldmError


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears at `path`, synced, when the block ends well. Until then what was there stays.

    Raises:
        UldmError: the disk is full, or the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(e, OSError):
            raise UldmError(f"{path} could not be written: {e}", "What was saved before is whole") from e
        raise
