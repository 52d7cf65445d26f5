"""The checkpoints of a training run: folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

MODEL = "model.safetensors"
"""The file of a checkpoint that holds the model."""

KEPT = 2
"""So many checkpoints stay: the newest, and one before it should a disk damage that."""


class Checkpoints:
    """The folder `checkpoints/` of a run, with `step-00000500/` and so on in it.

    Args:
        run: the run's folder; it need not exist.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / "checkpoints"

    def newest(self) -> Path | None:
        """The newest checkpoint's folder."""
        whole = self.whole()
        return whole[-1] if whole else None

    def whole(self) -> list[Path]:
        """The folder of every checkpoint, the newest last."""
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Makes the checkpoint of a step by `write(folder)`, and drops old ones.

        A run that is killed meanwhile leaves a hidden folder, which the next save removes.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".step-*"):
            shutil.rmtree(left)
        final = self.folder / f"step-{step:08}"
        temporary = self.folder / f".{final.name}"
        temporary.mkdir()
        try:
            write(temporary)
            _sync(temporary)
            temporary.rename(final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(self.folder)
        for old in self.whole()[:-KEPT]:
            shutil.rmtree(old)
        return final


def _sync(folder: Path) -> None:
    """Makes what was written and renamed in a folder last through a power cut; Windows has no such call."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
