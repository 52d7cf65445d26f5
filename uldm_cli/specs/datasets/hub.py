"""Data sets of Hugging Face."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from uldm_cli import fetch
from uldm_cli.specs.datasets.base import CHANNELS, SIZE, Prepared

if TYPE_CHECKING:
    from uldm_cli.core.data import ImageSet


class HuggingFace(Prepared):
    """A Hugging Face data set, by the package `datasets`: from the hub, or a local folder of parquet or arrow files."""

    kind: Literal["hf"] = "hf"
    name: str = Field(min_length=1, description="owner/name on the hub, or a local folder")
    split: str = Field("train", min_length=1, description="train, test and so on; or a part, as train[:10%]")
    subset: str | None = Field(None, min_length=1, description="which of the data set's configurations")
    image: str | None = Field(None, min_length=1, description="column of the images; may be left out if it is the only")
    label: str | None = Field(None, min_length=1, description="column of the labels; without one, there are none")
    size: int = Field(64, ge=8, le=4096, description=SIZE)
    channels: Literal[1, 3] = Field(3, description=CHANNELS)

    def build(self) -> "ImageSet":
        from uldm_cli.core.data.hub import open_hub

        return open_hub(
            self.name,
            self.preparation(),
            split=self.split,
            image=self.image,
            label=self.label,
            subset=self.subset,
            offline=fetch.offline(),
        )
