"""What `uldm ldm explain` is told besides what every sampling is: which maps to make of a step, how to draw them."""

from collections.abc import Callable
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from uldm_cli.specs.base import problem
from uldm_cli.specs.sampling import Walk, names_among

Product = Literal["image", "saliency", "attention"]
ScalePer = Literal["row", "step"]
Target = Literal["x0", "eps", "box"]
PRODUCTS: tuple[Product, ...] = get_args(Product)
MAPS: tuple[Product, ...] = ("saliency", "attention")


def _numbers_as_text(count: int) -> Callable[[object], object]:
    """`16,20` as the command line writes it, as numbers; a list stays what it is."""

    def read(value: object) -> object:
        if not isinstance(value, str):
            return value
        parts = [part.strip() for part in value.split(",")]
        if any(part.startswith("-") and part[1:].isdecimal() for part in parts):
            raise ValueError(f"expected {count} whole numbers with commas between, and they count from 0")
        if len(parts) != count or not all(part.isdecimal() for part in parts):
            raise ValueError(f"expected {count} whole numbers with commas between, got {value!r}")
        return [int(part) for part in parts]

    return read


class Part(BaseModel):
    """One group of settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Saliency(Part):
    """Of which number of the prediction the gradient is taken, and how."""

    box: Annotated[tuple[int, int, int, int] | None, BeforeValidator(_numbers_as_text(4))] = Field(
        None, description="x,y,w,h in pixels: left, top, width and height of the part of the image that is meant."
    )
    target: Target | None = Field(
        None,
        description="x0 or eps, the energy of the predicted clean latent or noise, or box, the mean of that part of "
        "the decoded image; null is box where one is given, and else x0.",
    )
    method: Literal["gradient", "smoothgrad", "integrated"] = Field(
        "gradient",
        description="The gradient itself, its mean over noised inputs, or the integrated one on the way from zero.",
    )
    samples: int = Field(16, ge=1, le=10_000, description="Gradients a map, for smoothgrad and integrated.")
    sigma: float = Field(
        0.15, gt=0, allow_inf_nan=False, description="Deviation of smoothgrad's noise, in deviations of the input."
    )

    @field_validator("target")
    @classmethod
    def _target_fits(cls, target: str | None, info: ValidationInfo) -> str | None:
        box = info.data.get("box", ())  # not there: the box itself is wrong
        if target == "box" and box is None:
            raise problem("it is not said which box", "Give it as --saliency-box x,y,w,h")
        if target in ("x0", "eps") and box:
            raise problem(f"a box is given too, and the target is {target}", "Leave one of the two out")
        return target

    @property
    def meant(self) -> Target:
        """The target, also where it is not named."""
        return self.target or ("x0" if self.box is None else "box")

    @field_validator("box")
    @classmethod
    def _box_has_pixels(cls, box: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if box and (min(box) < 0 or 0 in box[2:]):
            raise problem("a box begins inside the image, and is at least one pixel wide and high")
        return box


class Attention(Part):
    """Which of the attention is looked at; by default the mean over all layers and heads of self-attention."""

    query: Annotated[tuple[int, int] | None, BeforeValidator(_numbers_as_text(2))] = Field(
        None, description="x,y of a pixel: where its position looks; null is what each position receives from all."
    )
    resolution: Annotated[str | None, BeforeValidator(lambda value: str(value) if type(value) is int else value)] = (
        Field(
            None,
            pattern=r"^[1-9]\d*(x[1-9]\d*)?$",
            description="Only layers whose maps are so many positions high: 8, or 8x16 for height and width.",
        )
    )
    layer: str | None = Field(None, description="Only this layer, by its name in the network.")
    head: int | None = Field(None, ge=0, description="Only this head of each layer, from 0.")
    rollout: bool = Field(
        False, description="Follow the attention through the layers of one resolution, instead of their mean."
    )

    @field_validator("query")
    @classmethod
    def _query_counts_from_0(cls, query: tuple[int, int] | None) -> tuple[int, int] | None:
        if query and min(query) < 0:
            raise problem("pixels count from 0")
        return query

    @model_validator(mode="after")
    def _rollout_fits(self) -> Self:
        if self.rollout and self.layer is not None:
            raise problem("it follows the attention through all layers, and one is named", path="rollout")
        return self


class Overlay(Part):
    """How a map is drawn."""

    mode: Literal["blend", "color", "none"] = Field(
        "blend", description="The map's colours over the image, the colours alone, or the map alone in grey."
    )
    alpha: float = Field(0.5, ge=0, le=1, description="How much of the map is in the blend.")
    colormap: Literal["inferno", "magma", "plasma", "viridis", "cividis", "gray"] = Field(
        "inferno", description="What colours it has."
    )
    scale_per: ScalePer | None = Field(
        None,
        description="One scale for all steps of a sample, or one for all samples at a step. By default row for "
        "attention, and step for saliency, whose size changes with the noise by far more than over an image.",
    )

    @field_validator("colormap", mode="before")
    @classmethod
    def _spelt_either_way(cls, name: object) -> object:
        return "gray" if name == "grey" else name

    def scale_of(self, kind: str) -> ScalePer:
        """What shares a scale in the maps of a kind."""
        return self.scale_per or ("step" if kind == "saliency" else "row")


class Explaining(Walk):
    """Samples from a latent diffusion model, and where it looks at chosen steps."""

    kind: Literal["ldm-explain"] = "ldm-explain"
    save: Annotated[tuple[Product, ...], BeforeValidator(names_among(PRODUCTS))] = Field(
        default_factory=lambda data: PRODUCTS,
        min_length=1,
        description="What to draw: image, saliency, attention. By default all that the model has.",
    )
    saliency: Saliency = Field(default_factory=Saliency, description="Which number's gradient, and how it is taken.")
    attention: Attention = Field(default_factory=Attention, description="Which attention.")
    overlay: Overlay = Field(default_factory=Overlay, description="How maps are drawn.")
    separate: bool = Field(False, description="Also a file a step and sample.")
    save_arrays: bool = Field(False, description="Also the maps themselves, as .safetensors named step/sample.")

    @field_validator("save_arrays")
    @classmethod
    def _arrays_of_maps(cls, save_arrays: bool, info: ValidationInfo) -> bool:
        if save_arrays and not set(MAPS) & set(info.data.get("save", MAPS)):
            raise problem("there are no arrays of images alone", "Save saliency or attention, too")
        return save_arrays

    @property
    def maps(self) -> tuple[Product, ...]:
        """The kinds that are maps."""
        return tuple(kind for kind in self.save if kind in MAPS)
