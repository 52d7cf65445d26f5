"""What `uldm ldm sample` and `uldm ldm grid` are told: a model, a sampler, which samples, and what of them to write."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from uldm_cli.errors import nearest
from uldm_cli.specs.base import DEVICE, Slot, Spec, problem, spec_class
from uldm_cli.specs.load import load_config, parse_override
from uldm_cli.specs.samplers import Spaced

Product = Literal["image", "latent", "image-diff", "latent-diff", "trajectory", "npz"]
PRODUCTS: tuple[str, ...] = get_args(Product)

DEFAULT_STEP_SIZE = 40
LARGEST_SEED = 2**63 - 1  # what a generator takes
MOST_SAMPLES = 10_000_000  # seeds are listed, a mistyped range must not fill the memory


def parse_seeds(text: str) -> Sequence[int]:
    """Seeds written as `0-49999`, `3,7,9` or both, in that order.

    Raises:
        ValueError: it is not that, or a seed is named twice, or there are more than MOST_SAMPLES.
    """
    ranges = [_seed_range(part.strip()) for part in text.split(",")]
    if sum(len(part) for part in ranges) > MOST_SAMPLES:
        raise ValueError(f"these are more than {MOST_SAMPLES} seeds")
    if len(ranges) == 1:
        return ranges[0]
    seeds = [seed for part in ranges for seed in part]
    if len(set(seeds)) < len(seeds):
        raise ValueError("a seed is named twice, which would give the same picture twice")
    return seeds


def _seed_range(part: str) -> range:
    first, dash, last = part.partition("-")
    if not (first.strip().isdecimal() and (last.strip().isdecimal() or not dash)):
        raise ValueError(f"{part!r} is neither a seed nor a range; write 0-49999 or 3,7,9")
    start = int(first)
    stop = int(last) if dash else start
    if stop < start:
        raise ValueError(f"{part!r} runs backwards")
    if stop > LARGEST_SEED:
        raise ValueError(f"{part!r} is beyond the largest seed, {LARGEST_SEED}")
    if stop - start >= MOST_SAMPLES:
        raise ValueError(f"{part!r} names more than {MOST_SAMPLES} seeds")
    return range(start, stop + 1)


def _seeds_as_text(value: object) -> object:
    """`seeds=5` and `seeds: [3, 7]` come in as a number and a list; one way of writing keeps configs comparable."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, (list, tuple)):
        return ",".join(str(item) for item in value)
    return value


def names_among(products: Sequence[str]) -> Callable[[object], object]:
    """Reads `image,latent` as the command line writes it, a list as it is, and refuses what is no product."""

    def split(value: object) -> object:
        if isinstance(value, str):
            value = [name.strip() for name in value.split(",")]
        if isinstance(value, (list, tuple)):
            for name in value:
                _check_product(name, products)
        return value

    return split


def _check_product(name: object, products: Sequence[str]) -> None:
    if name not in products:
        guess = nearest(str(name), products)
        meant = f"; did you mean {guess!r}?" if guess else ""
        raise ValueError(f"{name!r} is none of {', '.join(products)}{meant}")


def _default_sampler() -> Spec:
    return spec_class("samplers", "ddim")()


def _default_num(data: dict[str, Any]) -> int:
    return len(parse_seeds(data["seeds"])) if data.get("seeds") else 1


def _default_step_size(data: dict[str, Any]) -> int:
    return min(DEFAULT_STEP_SIZE, getattr(data.get("sampler"), "steps", DEFAULT_STEP_SIZE))


def _default_save(data: dict[str, Any]) -> tuple[Product, ...]:
    return ("image", "latent") if data.get("step_size") else ("image",)


def _known_steps(info: ValidationInfo) -> int | None:
    """How many steps the sampler makes, where its own fields say that and no schedule has to be asked."""
    sampler = info.data.get("sampler")
    if isinstance(sampler, Spaced) and sampler.spacing == "compvis":
        return None
    return getattr(sampler, "steps", None)


class Sheet(BaseModel):
    """How the sheets of `uldm ldm grid` and `uldm ldm explain` are printed."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    format: Literal["png", "svg", "pdf"] = Field("png", description="png, or svg or pdf, where text stays text.")
    dpi: int = Field(150, ge=20, le=1200, description="Pixels an inch.")
    font_size: float | None = Field(
        None, ge=3, le=48, allow_inf_nan=False, description="Of the labels, in points; null is what suits the pictures."
    )


class Walk(Spec):
    """A way from noise to images: the model, the sampler, which samples, and the steps that are logged.

    What every command is told that samples; each adds what it can `save`.
    """

    kind: str
    model: str | None = Field(None, description="The model: a path or a name; null is the embedded fruits64.")
    checkpoint_config: str | None = Field(
        None, description="YAML of the model, a published checkpoint, where it does not lie beside it."
    )
    weights: Literal["ema", "raw"] | None = Field(
        None, description="ema or raw: averaged, or as last trained; by default ema, where the model has them."
    )
    sampler: Annotated[Spec, Slot("samplers")] = Field(
        default_factory=_default_sampler,
        description="The sampler and its settings; DDIM with 200 steps and eta 1 by default.",
    )
    step_size: int = Field(
        default_factory=_default_step_size,
        ge=0,
        description="Log every so many steps, and the last; 0 writes final images only. "
        "By default 40, or the number of steps where that is smaller.",
    )
    seed: int = Field(1125, ge=0, le=LARGEST_SEED, description="The first sample's seed; sample i has seed + i.")
    seeds: Annotated[str | None, BeforeValidator(_seeds_as_text)] = Field(
        None, description="Each sample's seed, as 0-49999 or 3,7,9, in place of seed and num."
    )
    num: int = Field(default_factory=_default_num, ge=1, le=MOST_SAMPLES, description="How many samples; 1 by default.")
    batch_size: int = Field(16, ge=1, description="How many samples the network sees at once.")
    height: int | None = Field(None, ge=1, description="Of the images, in pixels; null is what the model was made for.")
    width: int | None = Field(None, ge=1, description="Of the images, in pixels; null is what the model was made for.")
    show: Literal["x_t", "x0"] = Field(
        "x_t", description="What is drawn at a step: the state, or the clean image predicted from it."
    )
    save: tuple[str, ...]
    sheet: Sheet = Field(default_factory=Sheet, description="How sheets of several pictures are printed.")
    device: str = Field(
        "auto",
        pattern=DEVICE,
        description="auto, cpu, mps, cuda, or cuda:1 and so on.",
    )
    precision: Literal["fp32", "bf16", "auto"] = Field("fp32", description="What the network computes in.")
    deterministic: bool = Field(
        False, description="One sample at a time, so that every batch size gives the same bytes."
    )
    rng: Literal["per-sample", "compvis"] = Field(
        "per-sample",
        description="per-sample draws a sample's noise from its own seed; compvis repeats the published code's draws "
        "from one seed, which depend on the batch size and the type of the device.",
    )
    compile: bool = Field(False, description="Compile the network first: a slow start, then faster steps.")

    @field_validator("sampler")
    @classmethod
    def _sampler_has_steps(cls, sampler: Spec) -> Spec:
        if not isinstance(getattr(sampler, "steps", None), int):
            raise problem("this sampler has no number of `steps`, so it cannot be used here")
        return sampler

    @field_validator("step_size")
    @classmethod
    def _step_size_fits(cls, step_size: int, info: ValidationInfo) -> int:
        steps = _known_steps(info)
        if steps is not None and step_size > steps:
            raise problem(f"a step size of {step_size} is greater than the total of {steps} steps")
        return step_size

    @field_validator("seeds")
    @classmethod
    def _seeds_parse(cls, seeds: str | None) -> str | None:
        if seeds is not None:
            parse_seeds(seeds)
        return seeds

    @field_validator("num")
    @classmethod
    def _num_fits(cls, num: int, info: ValidationInfo) -> int:
        seeds = info.data.get("seeds")
        if seeds and len(parse_seeds(seeds)) != num:
            named = len(parse_seeds(seeds))
            raise problem(f"{num} samples are asked for here, and `seeds` names {named}", "Give only one of the two")
        if not seeds and info.data.get("seed", 0) + num - 1 > LARGEST_SEED:
            raise problem(f"the last sample's seed would be beyond the largest, {LARGEST_SEED}")
        return num

    @field_validator("save")
    @classmethod
    def _saved_once(cls, save: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(save)) < len(save):
            raise problem("something is named twice")
        return save

    @field_validator("rng")
    @classmethod
    def _rng_fits(cls, rng: str, info: ValidationInfo) -> str:
        if rng == "compvis":
            for name in ("seeds", "deterministic"):
                if info.data.get(name):
                    said = "draws for a whole batch at once, so it cannot go with"
                    raise problem(f"compvis {said} --{name}", f"Leave --{name} out")
        return rng

    @cached_property
    def sample_seeds(self) -> Sequence[int]:
        """Each sample's own seed, in order."""
        return parse_seeds(self.seeds) if self.seeds else range(self.seed, self.seed + self.num)


class Sampling(Walk):
    """Samples from a latent diffusion model, logged at chosen steps."""

    kind: Literal["ldm-sample"] = "ldm-sample"
    save: Annotated[tuple[Product, ...], BeforeValidator(names_among(PRODUCTS))] = Field(
        default_factory=_default_save,
        min_length=1,
        description="What to write: image, latent, image-diff, latent-diff; trajectory, the numbers behind them; npz "
        "with step_size 0. "
        "By default image and latent, and only image with step_size 0.",
    )

    @field_validator("save")
    @classmethod
    def _save_fits(cls, save: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        final_only = info.data.get("step_size") == 0
        for name in save:
            if final_only and name not in ("image", "npz"):
                raise problem(f"{name!r} needs logged steps, and step_size 0 writes final images only")
            if not final_only and name == "npz":
                raise problem("'npz' holds final images only and needs step_size 0")
        steps = _known_steps(info)
        if steps is not None and info.data.get("step_size") == steps and all(name.endswith("-diff") for name in save):
            raise problem(f"a difference needs two logged steps, and a step size of {steps} logs only the last")
        return save


class Reference(BaseModel):
    """The fields of the config that have to be known first: a model can bring defaults for the others."""

    model: str | None = None
    checkpoint_config: str | None = None


def model_reference(path: Path | None, overrides: Sequence[str], flags: Mapping[str, object]) -> Reference:
    """The model that a command line names, found before the rest of it is read."""
    names = Reference.model_fields
    about_model = [text for text in overrides if parse_override(text).path in {(name,) for name in names}]
    return load_config(Reference, path, about_model, {name: flags.get(name) for name in names})
