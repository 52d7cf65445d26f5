"""Samples as one `.npz` file, gathered on disk: tens of thousands fit without being held in memory.

Each batch becomes a part; when all are there they are joined and removed. The joined file has the layout of
`numpy.savez`, one array `arr_0`, but a fixed date inside, so that the same samples give the same bytes.
"""

from __future__ import annotations

import shutil
import zipfile
from typing import TYPE_CHECKING, BinaryIO

from uldm_cli.errors import ConfigError
from uldm_cli.runs.files import atomic_write, writable_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

_FIXED_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip file can hold


def part_path(archive: Path, batch: range) -> Path:
    """Where the samples of a batch wait for the others."""
    return archive.with_suffix(".parts") / f"{batch.start:09d}-{batch.stop:09d}.npy"


def save_part(path: Path, images: NDArray[np.uint8]) -> None:
    """The images of a batch, `[N, H, W, C]`."""
    import numpy as np

    writable_folder(path.parent)
    atomic_write(path, lambda file: np.lib.format.write_array(file, images, allow_pickle=False))


def join_parts(archive: Path, batches: Sequence[range]) -> None:
    """Joins the parts of all batches, in order, to `archive`, and removes them."""
    parts = [part_path(archive, batch) for batch in batches]
    atomic_write(archive, lambda file: _write_joined(file, parts, batches[-1].stop))
    shutil.rmtree(archive.with_suffix(".parts"))


def write_npz(path: Path, images: NDArray[np.uint8]) -> None:
    """Images `[N, H, W, C]` as such a file; they are read one after the other, so they may lie on disk."""
    atomic_write(path, lambda file: _write(file, images.shape, images))


def read_npz(path: Path) -> NDArray[np.uint8]:
    """The images `[N, H, W, C]` of such a file.

    Raises:
        ConfigError: it is missing, damaged, or holds something else.
    """
    import numpy as np

    try:
        with path.open("rb") as file, np.load(file) as archive:
            images: NDArray[np.uint8] = archive["arr_0"]
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}", "Check the path") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as e:
        raise ConfigError(f"{path} is not an archive of images, or damaged", "Write it again") from e
    if images.ndim != 4 or images.dtype != np.uint8:
        found = f"{images.dtype} {list(images.shape)}"
        raise ConfigError(f"{path}: expected images as uint8 [N, H, W, C], found {found}", "Write it again")
    return images


def _write_joined(file: BinaryIO, parts: Sequence[Path], count: int) -> None:
    import numpy as np

    shape = np.load(parts[0], mmap_mode="r").shape
    _write(file, (count, *shape[1:]), (np.load(part) for part in parts))


def _write(file: BinaryIO, shape: tuple[int, ...], pieces: Iterable[NDArray[np.uint8]]) -> None:
    """Pieces that together are an array of this shape."""
    import numpy as np

    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    member = zipfile.ZipInfo("arr_0.npy", _FIXED_DATE)
    with zipfile.ZipFile(file, "w") as archive, archive.open(member, "w", force_zip64=True) as out:
        np.lib.format.write_array_header_1_0(out, header)
        for piece in pieces:
            out.write(np.ascontiguousarray(piece).data)
