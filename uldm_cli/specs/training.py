"""What `uldm vqvae train` and `uldm ldm train` are told."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from uldm_cli.errors import ConfigError
from uldm_cli.specs.autoencoders import VQVAE, Autoencoder
from uldm_cli.specs.backbones import Backbone, UNet
from uldm_cli.specs.base import Slot, Spec, problem
from uldm_cli.specs.complete import complete
from uldm_cli.specs.datasets import Dataset, Tiny
from uldm_cli.specs.explain import Origin, explain
from uldm_cli.specs.models import Target
from uldm_cli.specs.sampling import LARGEST_SEED, Sampling
from uldm_cli.specs.schedules import ScaledLinear

if TYPE_CHECKING:
    from pydantic_core import PydanticCustomError

    from uldm_cli.core.tasks import ReconstructionWeights
    from uldm_cli.core.training import Optimization

LPIPS_SIDE = 32
"""Smallest images that the perceptual distance takes, in pixels."""

Decay = Annotated[float, Field(ge=0, lt=1)]


# Trains on the embedded pictures within minutes on two cores.
SMALL_VQVAE = VQVAE(
    in_channels=1,
    down_channels=(32, 64, 64),
    mid_channels=(64, 64),
    num_down_layers=1,
    num_up_layers=1,
    codebook_size=256,
)


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

    def build(self, steps: int) -> "Optimization":
        from uldm_cli.core.training import Optimization

        return Optimization(steps=steps, **self.model_dump())


class Train(Part):
    """The training loop."""

    steps: PositiveInt = Field(description="Optimizer steps in all.")
    batch_size: PositiveInt = Field(64, description="Images a step.")
    seed: int = Field(
        0, ge=0, le=LARGEST_SEED, description="Of the start values, the data's order, noise and augmentation."
    )
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
    save_every: PositiveInt = Field(200, description="Steps between two checkpoints.")
    picture_every: PositiveInt = Field(500, description="Steps between two pictures.")


class Loss(Part):
    """Factors of the terms of an autoencoder's loss. Each term is a mean over pixels, positions or images."""

    l1: float = Field(1.0, ge=0, description="Mean absolute difference.")
    l2: float = Field(1.0, ge=0, description="Mean squared difference.")
    lpips: float = Field(0.0, ge=0, description="Perceptual distance by AlexNet, for images from 32 pixels; 0: none.")
    codebook: float = Field(1.0, ge=0, description="Codes towards latents; an EMA codebook has no use for it.")
    commitment: float = Field(0.25, ge=0, description="Latents towards codes.")

    def build(self) -> "ReconstructionWeights":
        from uldm_cli.core.tasks import ReconstructionWeights

        return ReconstructionWeights(**self.model_dump())


class AutoencoderTraining(Spec):
    """Trains an autoencoder."""

    kind: Literal["vqvae-train"] = "vqvae-train"
    autoencoder: Annotated[Autoencoder, Slot("autoencoders")] = Field(SMALL_VQVAE, description="What is trained.")
    data: Annotated[Dataset, Slot("datasets")] = Field(Tiny(), description="What it is trained on.")
    loss: Loss = Loss()
    optim: Optim = Optim(lr=1e-3)
    train: Train = Train(steps=800)

    @model_validator(mode="after")
    def _data_fits(self) -> Self:
        if not self.autoencoder.trainable:
            text = f"'{self.autoencoder.kind}' cannot be trained here, only used as it was published"
            raise problem(text, "Train 'vq' or 'vqvae'", path="autoencoder")
        wrong = _misfit(self.autoencoder, self.data)
        if wrong is not None:
            raise wrong
        size = self.data.size
        if self.loss.lpips and size < LPIPS_SIDE:
            text = f"takes images of {LPIPS_SIDE} pixels or more, and data.size is {size}"
            raise problem(text, "Set it to 0, or take larger images", path="loss.lpips")
        return self


class DiffusionTraining(Spec):
    """Trains a latent diffusion model in the latents of a trained autoencoder."""

    kind: Literal["ldm-train"] = "ldm-train"
    autoencoder: str | None = Field(
        None, description="The trained autoencoder: a run folder, a checkpoint or a name; null takes the newest run's."
    )
    data: Annotated[Dataset, Slot("datasets")] | None = Field(
        None, description="What it is trained on; null takes what the autoencoder was trained on."
    )
    backbone: Annotated[Backbone, Slot("backbones")] = Field(
        UNet(channel_mult=(1, 2), attention_resolutions=(2,)), description="The network that denoises."
    )
    schedule: Annotated[Spec, Slot("schedules")] = Field(ScaledLinear(), description="The noise schedule.")
    target: Target = Field("eps", description="What the network predicts: noise, clean latent, or velocity.")
    scale_factor: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Brings latents to unit deviation; null measures it on the first images.",
    )
    optim: Optim = Optim()
    train: Train = Train(steps=2000)
    sample: dict[str, Any] = Field(
        default_factory=dict, description="What `uldm ldm sample` takes by default with this model: its fields."
    )

    @model_validator(mode="after")
    def _sample_is_known(self) -> Self:
        tree = complete(Sampling, self.sample)
        try:
            Sampling.model_validate(tree)
        except ValidationError as error:
            wrong = explain(error, Sampling, tree, {})
            raise problem(wrong.message, wrong.hint, path="sample") from None
        return self

    @model_validator(mode="after")
    def _backbone_trains(self) -> Self:
        backbone = self.backbone
        if backbone.needs:
            text = f"it takes a {backbone.needs[0]}, and training gives none yet"
            raise problem(text, "Train one without", path="backbone")
        # Published models also name factors that no level has, which changes nothing; who trains means something.
        if isinstance(backbone, UNet) and not set(backbone.attention_resolutions) <= set(backbone.factors):
            text = f"expected some of the levels' factors, {list(backbone.factors)}"
            raise problem(text, path="backbone.attention_resolutions")
        return self

    def check_fit(self, autoencoder: Autoencoder, name: str) -> None:
        """Makes sure that the autoencoder called `name` takes the images of `data`, and the backbone its latents.

        Raises:
            ConfigError: it does not; the field to change is named.
        """
        assert self.data is not None
        wrong = _misfit(autoencoder, self.data) or _misfit_of_latents(autoencoder, self.data, self.backbone)
        if wrong is not None and wrong.context is not None:
            said = wrong.context
            raise ConfigError(f"{said['path']}: {said['message']} (the autoencoder is {name})", said["hint"])


def data_of(training: Mapping[str, Any], name: str) -> Dataset | None:
    """The images that a model called `name` was trained on, by the training config in its header, if it has one.

    Raises:
        ConfigError: this version, or its plugins, cannot read them.
    """
    tree = {"data": training.get("data")}
    try:
        return DiffusionTraining.model_validate(tree).data
    except ValidationError as error:
        wrong = explain(error, DiffusionTraining, tree, {(): Origin(f"the data that {name} was trained on")})
        raise ConfigError(wrong.message, "Name the images to train on, as in data=images data.root=FOLDER") from None


def _misfit(autoencoder: Autoencoder, data: Dataset) -> "PydanticCustomError | None":
    """Why an autoencoder cannot take these images."""
    if data.channels != autoencoder.in_channels:
        text = f"expected {autoencoder.in_channels}, the channels of the autoencoder's images, got {data.channels}"
        return problem(text, "Change data.channels, or the autoencoder", path="data.channels")
    if data.size % autoencoder.factor:
        text = f"expected a multiple of {autoencoder.factor}, the autoencoder's factor, got {data.size}"
        return problem(text, "Change data.size, or the autoencoder", path="data.size")
    return None


def _misfit_of_latents(autoencoder: Autoencoder, data: Dataset, backbone: Backbone) -> "PydanticCustomError | None":
    """Why a backbone cannot take the latents of these images."""
    side = data.size // autoencoder.factor
    if side % backbone.factor == 0:
        return None
    text = f"its levels need latents whose side is a multiple of {backbone.factor}, and these are {side}x{side}"
    hint = f"Use fewer levels, or a data.size that {autoencoder.factor * backbone.factor} divides"
    return problem(text, hint, path="backbone")
