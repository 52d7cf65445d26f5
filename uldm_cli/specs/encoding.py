"""What `uldm vqvae encode` is told, and what the index of the latents that it writes says."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from uldm_cli.errors import ConfigError
from uldm_cli.specs.base import DEVICE, Slot, Spec, problem
from uldm_cli.specs.datasets import Dataset
from uldm_cli.specs.explain import Origin, explain

DType = Literal["float32", "float16"]


class Encoding(Spec):
    """Encodes a set of images once, so that a latent diffusion model trains on the latents alone."""

    kind: Literal["vqvae-encode"] = "vqvae-encode"
    autoencoder: str | None = Field(
        None, description="The trained autoencoder: a run folder, a checkpoint or a name; null takes the newest run's."
    )
    data: Annotated[Dataset, Slot("datasets")] | None = Field(
        None, description="What is encoded, with data.flip in both orientations; null: what the autoencoder learned."
    )
    dtype: DType = Field("float32", description="float32 keeps what was computed; float16 halves the disk.")
    shard_size: PositiveInt = Field(2048, description="Images a file; a multiple of batch_size.")
    batch_size: PositiveInt = Field(16, description="Images computed at once.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="What the autoencoder computes in.")
    device: str = Field("auto", pattern=DEVICE, description="auto, cpu, mps, cuda, or cuda:1 and so on.")
    workers: NonNegativeInt = Field(2, description="Processes that read image files; 0 reads in the main process.")

    @model_validator(mode="after")
    def _batches_fill_shards(self) -> Self:
        # So a batch lies in one file, and the bytes do not depend on which process writes which.
        if self.shard_size % self.batch_size:
            raise problem(f"expected a multiple of batch_size, {self.batch_size}", path="shard_size")
        return self


class _Said(BaseModel):
    """JSON that a file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Contents(_Said):
    """What all files of one cache have in common."""

    format: Literal[1] = 1
    """Another number is another layout."""
    autoencoder: str
    """SHA-256 of the autoencoder's config and weights."""
    images: PositiveInt
    order: str
    """SHA-256 of the images' names in order, as far as they have names, and of their labels' names."""
    image_shape: tuple[int, int, int]
    """`(C, H, W)`."""
    latent_shape: tuple[int, int, int]
    """`(z, h, w)`."""
    posterior: bool
    """Whether mean and log-variance are stored, of which training draws, instead of latents."""
    flip: bool
    """Whether the mirrored images' latents are stored, too."""
    dtype: DType
    shard_size: PositiveInt

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors that make a latent."""
        return ("mean", "logvar") if self.posterior else ("z",)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of a file's tensors but the labels."""
        return (*self.parts, *(f"{part}_flipped" for part in self.parts if self.flip))

    @property
    def shards(self) -> int:
        """How many files there are."""
        return -(-self.images // self.shard_size)

    def count(self, shard: int) -> int:
        """Images in a file."""
        return min(self.shard_size, self.images - shard * self.shard_size)

    @property
    def nbytes(self) -> int:
        """Size of all latents."""
        channels, height, width = self.latent_shape
        item = {"float32": 4, "float16": 2}[self.dtype]
        return self.images * (len(self.tensors) * channels * height * width * item + 8)


class Sums(_Said):
    """What the deviation of latents follows from: sums over all their numbers, both orientations."""

    count: int
    total: float
    squares: float
    variance: float
    """Of the posteriors; 0 where there are none."""


class Shard(_Said):
    """What one file says of itself."""

    number: NonNegativeInt
    count: PositiveInt
    sha256: str
    """Of its tensors' bytes, in the order of their names."""
    sums: Sums
    skipped: tuple[tuple[str, str], ...] = ()
    """Name and reason of each image that could not be decoded: the next readable one takes its place."""


class LatentIndex(Contents):
    """`index.json` of a cache, which is written when all its files are there."""

    reference: str
    """How the autoencoder was called."""
    data: dict[str, Any]
    """The images, as the config names them."""
    classes: tuple[str, ...]
    """Names of the labels 0, 1, ..."""
    left_out: tuple[tuple[str, str], ...]
    """Name and reason of each file that is no image of the set, because its header cannot be used."""
    scale_factor: float = Field(gt=0, allow_inf_nan=False)
    """One over the standard deviation of all latents."""
    files: tuple[Shard, ...]

    @model_validator(mode="after")
    def _files_are_all(self) -> Self:
        if [(file.number, file.count) for file in self.files] != [(i, self.count(i)) for i in range(self.shards)]:
            raise problem(f"expected {self.shards} of {self.images} images in all", path="files")
        return self


Said = TypeVar("Said", bound=_Said)


def read_said(kind: type[Said], said: Mapping[str, Any], place: str, hint: str) -> Said:
    """What a file says of latents, validated; `place` is what an error calls it.

    Raises:
        ConfigError: it is not that.
    """
    try:
        return kind.model_validate(said)
    except ValidationError as error:
        wrong = explain(error, kind, said, {(): Origin(place)})
        raise ConfigError(wrong.message, hint) from None
