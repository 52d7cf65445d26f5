"""What `uldm vqvae train` and `uldm ldm train` are told."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from uldm_cli.specs.autoencoders import VQVAE
from uldm_cli.specs.backbones import UNet
from uldm_cli.specs.base import Slot, Spec
from uldm_cli.specs.datasets import Tiny
from uldm_cli.specs.models import Target
from uldm_cli.specs.schedules import ScaledLinear

if TYPE_CHECKING:
    from uldm_cli.core.tasks import ReconstructionWeights
    from uldm_cli.core.training import Optimization


class Part(BaseModel):
    """A group of fields that is no slot."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Optim(Part):
    """AdamW and its learning rate."""

    lr: float = Field(5e-4, gt=0, description="Peak learning rate.")
    betas: tuple[float, float] = Field((0.9, 0.99), description="Decay of the gradient's two averages.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay.")
    warmup_steps: NonNegativeInt = Field(100, description="Steps of linear warm-up.")
    decay: Literal["cosine", "constant"] = Field("cosine", description="Learning rate after the warm-up.")
    clip_norm: float = Field(1.0, gt=0, description="Largest norm of the gradient; greater ones are scaled down.")

    def build(self, steps: int) -> "Optimization":
        from uldm_cli.core.training import Optimization

        return Optimization(steps=steps, **self.model_dump())


class Train(Part):
    """The training loop."""

    steps: PositiveInt = Field(description="Optimizer steps in all.")
    batch_size: PositiveInt = Field(64, description="Images a step.")
    seed: NonNegativeInt = Field(0, description="Of the start values, the data's order, noise and augmentation.")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="Decay of the averaged weights, which warms up.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto computes in bfloat16 where the device does so natively; weights stay float32."
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda, or cuda:1 and so on."
    )
    workers: NonNegativeInt = Field(2, description="Processes that read image files; 0 reads in the training process.")
    compile: bool = Field(False, description="Compile the networks first: a slow start, then faster steps.")
    log_every: PositiveInt = Field(50, description="Steps between two lines of metrics.")
    save_every: PositiveInt = Field(500, description="Steps between two checkpoints.")
    picture_every: PositiveInt = Field(500, description="Steps between two pictures.")


class Loss(Part):
    """Factors of the terms of an autoencoder's loss. Each term is a mean over pixels, positions or images."""

    l1: float = Field(1.0, ge=0, description="Mean absolute difference.")
    l2: float = Field(1.0, ge=0, description="Mean squared difference.")
    lpips: float = Field(0.0, ge=0, description="Perceptual distance, AlexNet; 0 leaves it out. Images of 32 pixels or more.")
    codebook: float = Field(1.0, ge=0, description="Codes towards latents; an EMA codebook has no use for it.")
    commitment: float = Field(0.25, ge=0, description="Latents towards codes.")

    def build(self) -> "ReconstructionWeights":
        from uldm_cli.core.tasks import ReconstructionWeights

        return ReconstructionWeights(**self.model_dump())


class AutoencoderTraining(Spec):
    """Trains an autoencoder."""

    kind: Literal["vqvae-train"] = "vqvae-train"
    autoencoder: Annotated[Spec, Slot("autoencoders")] = Field(
        VQVAE(in_channels=1, num_down_layers=1, num_up_layers=1, codebook_size=256),
        description="What is trained.",
    )
    data: Annotated[Spec, Slot("datasets")] = Field(Tiny(), description="What it is trained on.")
    loss: Loss = Loss()
    optim: Optim = Optim(lr=1e-3)
    train: Train = Train(steps=1000)

    @model_validator(mode="after")
    def _data_fits(self) -> Self:
        data: Any = self.data
        check_images_fit(self.autoencoder, data.channels, data.size)
        if self.loss.lpips and data.size < 32:
            raise ValueError(f"loss.lpips needs images of 32 pixels or more, and data.size is {data.size}")
        return self


class DiffusionTraining(Spec):
    """Trains a latent diffusion model in the latents of a trained autoencoder."""

    kind: Literal["ldm-train"] = "ldm-train"
    autoencoder: str | None = Field(
        None, description="The trained autoencoder: a run folder, a checkpoint or a name; null takes the newest run's."
    )
    data: Annotated[Spec, Slot("datasets")] | None = Field(
        None, description="What it is trained on; null takes what the autoencoder was trained on."
    )
    backbone: Annotated[Spec, Slot("backbones")] = Field(
        UNet(channel_mult=(1, 2), attention_resolutions=(2,)), description="The network that denoises."
    )
    schedule: Annotated[Spec, Slot("schedules")] = Field(ScaledLinear(), description="The noise schedule.")
    target: Target = Field("eps", description="What the network predicts: noise, clean latent, or velocity.")
    scale_factor: float | None = Field(
        None, gt=0, description="Brings latents to unit deviation; null measures it on the first images."
    )
    optim: Optim = Optim()
    train: Train = Train(steps=4000)
    sample: dict[str, Any] = Field(
        default_factory=dict, description="What `uldm ldm sample` takes by default with this model: its fields."
    )


def check_images_fit(autoencoder: Any, channels: int, size: int) -> None:
    """ValueError where an autoencoder cannot take images of this form."""
    if channels != autoencoder.in_channels:
        raise ValueError(f"data.channels is {channels}, but the autoencoder takes {autoencoder.in_channels}")
    if size % autoencoder.factor:
        raise ValueError(f"data.size {size} is not a multiple of the autoencoder's factor {autoencoder.factor}")
