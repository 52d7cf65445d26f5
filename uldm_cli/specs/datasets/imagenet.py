"""ImageNet (ILSVRC 2012): opened as class folders, into which its archives are extracted once."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from uldm_cli import fetch
from uldm_cli.errors import ConfigError
from uldm_cli.specs.datasets.base import CHANNELS, SIZE, Prepared
from uldm_cli.unpacking import SYNSET, extract

if TYPE_CHECKING:
    from uldm_cli.core.data import ImageSet


class ImageNet(Prepared):
    """ImageNet (Russakovsky et al. 2015): 1,281,167 images to train, 50,000 to validate, 1,000 classes.

    The archives are extracted once, to `autoencoders/data/ILSVRC2012_{split}/data` in the user's cache
    (XDG_CACHE_HOME, ~/.cache), where the published code looks for them; `.ready` beside it says that all are there.
    """

    kind: Literal["imagenet"] = "imagenet"
    root: str | None = Field(
        None,
        min_length=1,
        description="the archive, its folder, or a folder of class folders; without one, what was extracted before",
    )
    split: Literal["train", "validation"] = Field("train", description="the training or the validation images")
    size: int = Field(256, ge=8, le=4096, description=SIZE)
    channels: Literal[1, 3] = Field(3, description=CHANNELS)

    archives: ClassVar[dict[str, str]] = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}

    def build(self) -> "ImageSet":
        from uldm_cli.core.data import open_files

        folder = self._folder()
        return open_files(folder, self.preparation(), checked=False, strict=self.strict)

    def _folder(self) -> Path:
        """The class folders, after extracting them where that is still to be done."""
        target = fetch.cache_home() / "autoencoders" / "data" / f"ILSVRC2012_{self.split}"
        root = Path(self.root).expanduser() if self.root else target
        name = self.archives[self.split]
        hint = f"Give data.root=FOLDER with {name}, from image-net.org; or with the class folders, n01440764, ..."
        if self.root and not root.exists():
            raise ConfigError(f"{root} does not exist", hint)
        own = root.resolve() not in (target.resolve(), (target / "data").resolve())
        below = {"train": ("train",), "validation": ("validation", "val")}[self.split]
        for folder in (root, *(root / part for part in below)):
            if own and _is_sorted(folder):
                return folder
        places = (root / name, *([root] if root.name == name else [])) if own else (target / name,)
        archive = next((place for place in places if place.is_file()), None)
        ready = (target / ".ready").exists()
        if archive is None and (own or not ready):
            raise ConfigError(f"{root} does not hold ImageNet's {self.split} images", hint)
        if archive is not None and not ready:
            extract(archive, target, validation=self.split == "validation")
        return target / "data"


def _is_sorted(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(SYNSET.fullmatch(entry.name) and entry.is_dir() for entry in entries)
    except OSError:
        return False
