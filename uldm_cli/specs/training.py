"""What every training is told: the optimizer and the loop."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from uldm_cli.errors import ConfigError
from uldm_cli.specs.autoencoders import Autoencoder
from uldm_cli.specs.base import DEVICE, problem
from uldm_cli.specs.datasets import Dataset
from uldm_cli.specs.sampling import LARGEST_SEED
from uldm_cli.specs.widths import NARROWEST, WIDEST

if TYPE_CHECKING:
    from pydantic_core import PydanticCustomError

    from uldm_cli.core.training import Optimization

Decay = Annotated[float, Field(ge=0, lt=1)]


class Part(BaseModel):
    """A group of fields that is no slot."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class Optim(Part):
    """AdamW and its learning rate."""

    lr: float = Field(5e-4, gt=0, description="Peak learning rate.")
    betas: tuple[Decay, Decay] = Field((0.9, 0.99), description="Decay of the gradient's two averages.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay.")
    warmup_steps: NonNegativeInt = Field(100, description="Steps of linear warm-up.")
    decay: Literal["cosine", "constant"] = Field("cosine", description="Learning rate after the warm-up.")
    clip_norm: float = Field(1.0, gt=0, description="Largest norm of the gradient; greater ones are scaled down.")
    spike: float | None = Field(
        20.0, gt=1, description="Skip a step whose gradient's norm is so many times its average; null: never."
    )
    max_skipped: PositiveInt = Field(20, description="Stop when so many steps in a row were skipped (NaN, spikes).")

    def build(self, steps: int) -> "Optimization":
        from uldm_cli.core.training import Optimization

        return Optimization(steps=steps, **self.model_dump(exclude={"max_skipped"}))


class Train(Part):
    """The training loop."""

    steps: PositiveInt = Field(description="Optimizer steps in all.")
    batch_size: PositiveInt = Field(64, description="Images a step, over all processes and micro-batches.")
    accumulate: PositiveInt = Field(1, description="Micro-batches that a step is computed in, to save memory.")
    seed: int = Field(
        0, ge=0, le=LARGEST_SEED, description="Of the start values, the data's order, noise and augmentation."
    )
    ema_decay: float = Field(0.999, ge=0, lt=1, description="Decay of the averaged weights, which warms up.")
    ema_profiles: tuple[Annotated[float, Field(ge=NARROWEST, le=WIDEST)], ...] = Field(
        (), description="Widths (sigma_rel) of averages kept of every save, as [0.05,0.1]: for `ema` to make others of."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = Field(
        "auto",
        description="auto: bfloat16 where the device is faster in it, with float32 weights. fp16 needs CUDA.",
    )
    device: str = Field("auto", pattern=DEVICE, description="auto, cpu, mps, cuda, or cuda:1 and so on.")
    workers: NonNegativeInt = Field(2, description="Processes that read image files; 0 reads in the training process.")
    compile: bool = Field(False, description="Compile the networks first: a slow start, then faster steps.")
    log_every: PositiveInt = Field(50, description="Steps between two lines of metrics.")
    save_every: PositiveInt = Field(200, description="Steps between two checkpoints.")
    picture_every: PositiveInt = Field(500, description="Steps between two pictures.")
    keep: int = Field(2, ge=2, description="So many checkpoints stay, the newest ones.")
    best: str | None = Field(
        None,
        min_length=1,
        description="Keep the best checkpoint by this figure of metrics.jsonl, of those saved with a line, too.",
    )
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (), description="Where the figures go besides metrics.jsonl."
    )


def misfit(autoencoder: Autoencoder, data: Dataset) -> "PydanticCustomError | None":
    """Why an autoencoder cannot take these images."""
    if data.channels != autoencoder.in_channels:
        text = f"expected {autoencoder.in_channels}, the channels of the autoencoder's images, got {data.channels}"
        hint = f"Set data.channels={autoencoder.in_channels}, or take an autoencoder with in_channels={data.channels}"
        return problem(text, hint, path="data.channels")
    if data.size % autoencoder.factor:
        text = f"expected a multiple of {autoencoder.factor}, the autoencoder's factor, got {data.size}"
        return problem(text, "Change data.size, or the autoencoder", path="data.size")
    return None


def refuse(wrong: "PydanticCustomError | None", autoencoder: str) -> None:
    """Raises what is wrong with a config for the autoencoder of this name, if anything is.

    Raises:
        ConfigError: the field to change is named.
    """
    if wrong is not None and wrong.context is not None:
        said = wrong.context
        raise ConfigError(f"{said['path']}: {said['message']} (the autoencoder is {autoencoder})", said["hint"])
