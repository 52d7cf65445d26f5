"""What all sets of images have in common. `build()` opens the set and gives a core.data.ImageSet."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from uldm_cli.specs.base import Spec

if TYPE_CHECKING:
    from uldm_cli.core.data import ImageSet, Preparation

SIZE = "side of the square images, in pixels"
CHANNELS = "1 for grey, 3 for RGB"


class Dataset(Spec):
    """What all sets of images have in common."""

    kind: str
    size: int = Field(ge=8, le=4096, description=SIZE)
    channels: int = Field(ge=1, description=CHANNELS)
    flip: bool = Field(False, description="in training, mirror half of the images left to right")
    strict: bool = Field(False, description="stop at an image that cannot be used instead of skipping it")


class Prepared(Dataset):
    """Images of any size, of which squares are made: a part is cut out and scaled to `size`."""

    resize: Literal["lanczos", "bicubic", "bilinear", "box", "none"] = Field(
        "lanczos",
        description="Pillow's antialiased filter that scales the largest square part of an image; with none, the part "
        "has `size` pixels from the start",
    )
    crop: Literal["center", "random"] = Field(
        "center", description="where that part lies; random is for training, evaluation takes the centre"
    )

    def preparation(self, window: int | None = None) -> "Preparation":
        from uldm_cli.core.data import Preparation

        return Preparation(self.size, self.channels, self.resize, self.crop, window)


class Listed(Prepared):
    """A folder, an archive or an LMDB of images, and a list of those to use."""

    root: str = Field(min_length=1, description="the folder, .tar or .zip; or the folder of an LMDB")
    split_file: str | None = Field(
        None, min_length=1, description="text file with the names of the images to use, one a line; without one, all"
    )

    def opened(self, *, labelled: bool, checked: bool) -> "ImageSet":
        """The set; see `core.data.open_files`."""
        from uldm_cli.core.data import open_files, read_list

        only = (self.split_file, read_list(Path(self.split_file).expanduser())) if self.split_file else None
        preparation = self.preparation()
        return open_files(self.root, preparation, only=only, labelled=labelled, checked=checked, strict=self.strict)


class Published(Listed):
    """A published set without classes."""

    size: int = Field(256, ge=8, le=4096, description=SIZE)
    channels: Literal[1, 3] = Field(3, description=CHANNELS)

    def build(self) -> "ImageSet":
        return self.opened(labelled=False, checked=False)
