"""The checkpoints of a training run: folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from uldm_cli.runs.files import sha256_of

MODEL = "model.safetensors"
"""The file of a checkpoint that holds the model."""

SUMS = "SHA256SUMS"
"""The file with the hashes of the others, as `sha256sum --check` reads it."""
BEST = "best"
"""A link to the checkpoint that was best by some figure."""


class Checkpoints:
    """The folder `checkpoints/` of a run, with `step-00000500/` and so on in it.

    Args:
        run: the run's folder; it need not exist.
        keep: so many stay, the newest ones; a run keeps two at least, should a disk damage the newest.
    """

    def __init__(self, run: Path, keep: int = 2) -> None:
        self.folder, self.keep = run / "checkpoints", keep

    def newest(self) -> Path | None:
        """The newest checkpoint's folder."""
        whole = self.whole()
        return whole[-1] if whole else None

    def whole(self) -> list[Path]:
        """The folder of every checkpoint, the newest last."""
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def of_step(self, step: int) -> Path:
        """The folder of a step's checkpoint, whether or not there is one."""
        return self.folder / f"step-{step:08}"

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Makes the checkpoint of a step by `write(folder)`, and drops old ones.

        A run that is killed meanwhile leaves a hidden folder, which the next save removes.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".step-*"):
            shutil.rmtree(left)
        final = self.of_step(step)
        temporary = self.folder / f".{final.name}"
        temporary.mkdir()
        try:
            write(temporary)
            _write_sums(temporary)
            _sync(temporary)
            temporary.rename(final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(self.folder)
        best = self.best()
        for old in self.whole()[: -self.keep]:
            if old != best:
                shutil.rmtree(old)
        return final

    def best(self) -> Path | None:
        """The checkpoint that was marked as the best."""
        link = self.folder / BEST
        return self.folder / os.readlink(link) if link.is_symlink() else None

    def mark_best(self, checkpoint: Path) -> None:
        """Makes `checkpoints/best` a link to a checkpoint, which then stays until another one is better."""
        before = self.best()
        if before == checkpoint or not checkpoint.exists():
            return
        link = self.folder / f".{BEST}"
        link.unlink(missing_ok=True)
        link.symlink_to(checkpoint.name)
        link.replace(self.folder / BEST)
        if before and before.exists() and before not in self.whole()[-self.keep :]:
            shutil.rmtree(before)

    def set_aside(self, checkpoint: Path) -> Path:
        """Renames a damaged checkpoint, so that nothing takes it for one; its new path."""
        aside = self.folder / f"damaged-{checkpoint.name}"
        if aside.exists():
            shutil.rmtree(aside)
        if self.best() == checkpoint:
            (self.folder / BEST).unlink()
        return checkpoint.rename(aside)


def check(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files by their hashes: a sentence that names the file; None if all is well."""
    try:
        lines = (checkpoint / SUMS).read_text().splitlines()
    except OSError as error:
        return f"{checkpoint / SUMS} cannot be read ({error.strerror})"
    for line in lines:
        digest, _, name = line.partition("  ")
        try:
            if sha256_of(checkpoint / name) != digest:
                return f"{checkpoint / name} is not what was saved: its hash differs"
        except OSError as error:
            return f"{checkpoint / name} cannot be read ({error.strerror})"
    return None if lines else f"{checkpoint / SUMS} is empty"


def _write_sums(folder: Path) -> None:
    lines = [f"{sha256_of(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    with (folder / SUMS).open("w") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Makes what was written and renamed in a folder last through a power cut; Windows has no such call."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
