"""CIFAR-10."""

import tarfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from uldm_cli import fetch
from uldm_cli.errors import ConfigError
from uldm_cli.specs.datasets.base import CHANNELS, Dataset

if TYPE_CHECKING:
    from uldm_cli.core.data import ImageSet

ARCHIVE = "cifar-10-binary.tar.gz"


class CIFAR10(Dataset):
    """CIFAR-10 (Krizhevsky 2009), binary version: 50,000 images to train, 10,000 to test, 32x32 in colour."""

    kind: Literal["cifar10"] = "cifar10"
    root: str | None = Field(
        None,
        min_length=1,
        description=f"folder with the .bin files, or {ARCHIVE}; without one it is downloaded to the cache",
    )
    train: bool = Field(True, description="the training images; false for the test images")
    size: int = Field(32, ge=8, le=4096, description="side of the images; other than 32, they are scaled (Lanczos)")
    channels: Literal[1, 3] = Field(3, description=CHANNELS)

    classes: ClassVar[tuple[str, ...]] = (
        *("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    )
    url: ClassVar[str] = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    md5: ClassVar[str] = "c32a1d4ab5d03f1284b67883e8d87530"  # from the author's page
    length: ClassVar[int] = 170_052_171

    def build(self) -> "ImageSet":
        from uldm_cli.core.data import ArrayImages, read_cifar

        names = [f"data_batch_{i}.bin" for i in range(1, 6)] if self.train else ["test_batch.bin"]
        images, labels = read_cifar(self._contents(names))
        return ArrayImages(images, labels, classes=self.classes, size=self.size, channels=self.channels)

    def _contents(self, names: list[str]) -> list[tuple[str, bytes]]:
        if self.root is None:
            place = fetch.cache("data") / "cifar10" / ARCHIVE
            fetch.fetch([self.url], place, description="CIFAR-10", md5=self.md5, size=self.length)
        else:
            place = self._place(Path(self.root).expanduser())
        try:
            if place.is_dir():
                return [(str(place / name), (place / name).read_bytes()) for name in names]
            return _from_archive(place, names)
        except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
            raise ConfigError(f"{place} cannot be read ({error})", "It may be truncated: fetch it again") from error

    def _place(self, root: Path) -> Path:
        """The folder of the .bin files, or the archive."""
        folders = [root / "cifar-10-batches-bin", root]
        found = next((folder for folder in folders if (folder / "test_batch.bin").is_file()), None)
        found = found or next((file for file in (root / ARCHIVE, root) if file.is_file()), None)
        if found is None:
            here = any((folder / "cifar-10-batches-py").is_dir() for folder in (root, root.parent))
            why = "it has the pickled version, and no pickle is opened" if here else "no cifar-10-batches-bin"
            hint = f"Put {ARCHIVE} there, or leave root out to have it downloaded"
            raise ConfigError(f"{root} does not hold the binary version of CIFAR-10: {why}", hint)
        return found


def _from_archive(path: Path, names: list[str]) -> list[tuple[str, bytes]]:
    """The contents of members, whatever folder they are in. Nothing is extracted."""
    found: dict[str, bytes] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            name = member.name.rpartition("/")[2]
            if name in names and member.isreg() and (file := archive.extractfile(member)):
                found[name] = file.read()
    missing = [name for name in names if name not in found]
    if missing:
        raise ConfigError(f"{path} is not CIFAR-10's binary version: it has no {missing[0]}", f"Give {ARCHIVE}")
    return [(f"{path}: {name}", found[name]) for name in names]
