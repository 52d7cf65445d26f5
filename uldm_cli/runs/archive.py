"""Samples as one `.npz` file, gathered on disk: tens of thousands fit without being held in memory.

Each batch becomes a part; when all are there they are joined and removed. The joined file has the layout of
`numpy.savez`, one array `arr_0`, but a fixed date inside, so that the same samples give the same bytes.
"""

from __future__ import annotations

import shutil
import zipfile
from typing import TYPE_CHECKING, BinaryIO

from uldm_cli.runs.files import atomic_write, writable_folder

if TYPE_CHECKING:
    from collections.abc import Sequence
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


def _write_joined(file: BinaryIO, parts: Sequence[Path], count: int) -> None:
    import numpy as np

    shape = np.load(parts[0], mmap_mode="r").shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape[1:])}
    member = zipfile.ZipInfo("arr_0.npy", _FIXED_DATE)
    with zipfile.ZipFile(file, "w") as archive, archive.open(member, "w", force_zip64=True) as out:
        np.lib.format.write_array_header_1_0(out, header)
        for part in parts:
            out.write(np.ascontiguousarray(np.load(part)).data)
