"""Sets that are files: one's own, and the published ones that are not downloaded but given by their folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from uldm_cli.errors import ConfigError
from uldm_cli.specs.base import problem
from uldm_cli.specs.datasets.base import CHANNELS, SIZE, Listed, Prepared, Published

if TYPE_CHECKING:
    from uldm_cli.core.data import ImageSet


class Images(Listed):
    """A folder, .tar or .zip of images, searched recursively; the sub-folders of its root are the classes."""

    kind: Literal["images"] = "images"
    size: int = Field(64, ge=8, le=4096, description=SIZE)
    channels: int = Field(
        3, ge=1, le=64, description="1 for grey, 3 for RGB; of another number, .npy and .tif files with as many"
    )

    def build(self) -> "ImageSet":
        return self.opened(labelled=True, checked=True)


class CelebAHQ(Published):
    """CelebA-HQ (Karras et al. 2018): 30,000 faces of 1024x1024, as image files or as the `.npy` of their making."""

    kind: Literal["celebahq"] = "celebahq"


class FFHQ(Published):
    """Flickr-Faces-HQ (Karras et al. 2019): 70,000 faces of 1024x1024."""

    kind: Literal["ffhq"] = "ffhq"


class LSUN(Published):
    """A category of LSUN (Yu et al. 2015): its LMDB, such as `bedroom_train_lmdb`, or a folder of its images."""

    kind: Literal["lsun"] = "lsun"
    resize: Literal["lanczos", "bicubic", "bilinear", "box", "none"] = Field(
        "bicubic", description="as for images; bicubic is what the published models saw"
    )

    def build(self) -> "ImageSet":
        inside = sorted(Path(self.root).expanduser().glob("*_lmdb/data.mdb"))
        if inside:
            hint = f"Give one of them, such as {inside[0].parent}"
            raise ConfigError(f"{self.root} holds the LMDBs of several parts of LSUN", hint)
        return super().build()


class CelebA(Prepared):
    """CelebA (Liu et al. 2015), aligned and cropped: 202,599 faces of 178x218, in three published splits."""

    kind: Literal["celeba"] = "celeba"
    root: str = Field(
        min_length=1, description="folder with img_align_celeba, a folder or .zip, and list_eval_partition.txt"
    )
    split: Literal["train", "valid", "test", "all"] = Field("train", description="which of the published splits")
    window: int = Field(
        140, ge=8, le=178, description="side of the centre square that is taken first; 178 is the whole width"
    )
    size: int = Field(64, ge=8, le=4096, description=SIZE)
    channels: Literal[1, 3] = Field(3, description=CHANNELS)

    @model_validator(mode="after")
    def _window_has_room(self) -> "CelebA":
        if self.resize == "none" and self.size > self.window:
            text = f"expected at most {self.window}, the window, as resize=none does not enlarge it; got {self.size}"
            raise problem(text, "Choose a filter, such as resize=lanczos, or a larger window", path="size")
        if self.crop == "random" and (self.resize != "none" or self.size == self.window):
            text = "expected center: the square is the whole window, which has one place"
            raise problem(text, "For random places take resize=none and a size below the window", path="crop")
        return self

    def build(self) -> "ImageSet":
        from uldm_cli.core.data import open_files

        root = Path(self.root).expanduser()
        places = (folder / name for folder in (root, root / "celeba") for name in _CELEBA)
        pictures = next((place for place in places if place.exists()), None)
        if pictures is None:
            hint = "Fetch it from the authors' page; it cannot be downloaded without a browser"
            raise ConfigError(f"{root} does not hold CelebA: no {' or '.join(_CELEBA)}", hint)
        only = None
        if self.split != "all":
            partition = pictures.parent / "list_eval_partition.txt"
            only = (f"split {self.split}", _part_of_celeba(partition, self.split))
        preparation = self.preparation(self.window)
        return open_files(pictures, preparation, only=only, labelled=False, checked=False, strict=self.strict)


_CELEBA = ("img_align_celeba", "img_align_celeba.zip")


def _part_of_celeba(partition: Path, split: str) -> list[str]:
    """The names of a split, from lines such as `000001.jpg 0`."""
    from uldm_cli.core.data import read_list

    number = str(("train", "valid", "test").index(split))
    lines = [line.split() for line in read_list(partition)]
    wrong = next((i for i, line in enumerate(lines, 1) if len(line) != 2 or line[1] not in ("0", "1", "2")), None)
    if wrong:
        raise ConfigError(f"{partition} line {wrong}: expected a name and 0, 1 or 2", "Fetch it again")
    names = [name for name, part in lines if part == number]
    if not names:
        raise ConfigError(f"{partition} has no images of split {split}", "Fetch it again")
    return names
