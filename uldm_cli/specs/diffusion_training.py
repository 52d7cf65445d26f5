"""What `uldm ldm train` is told."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from uldm_cli.errors import ConfigError
from uldm_cli.specs.autoencoders import Autoencoder
from uldm_cli.specs.backbones import Backbone, UNet
from uldm_cli.specs.base import Slot, Spec, problem
from uldm_cli.specs.complete import complete
from uldm_cli.specs.datasets import Dataset
from uldm_cli.specs.explain import Origin, explain
from uldm_cli.specs.models import Target
from uldm_cli.specs.sampling import Sampling
from uldm_cli.specs.schedules import ScaledLinear, check_learnable
from uldm_cli.specs.training import Optim, Part, Train, misfit, refuse

if TYPE_CHECKING:
    from pydantic_core import PydanticCustomError

    from uldm_cli.core.diffusing import DiffusionLoss as Loss


class DiffusionLoss(Part):
    """How what the network says is held against what it should have said."""

    norm: Literal["l2", "l1"] = Field("l2", description="Mean squared or mean absolute difference.")
    weighting: Literal["simple", "min-snr"] = Field(
        "simple", description="Of the timesteps: all alike, or by their signal-to-noise ratio, clipped (l2 only)."
    )
    gamma: float = Field(5.0, gt=0, description="Where min-snr clips the signal-to-noise ratio.")
    vlb: float = Field(0.001, gt=0, description="Factor of the variational bound that trains a learned variance.")

    @model_validator(mode="after")
    def _weighting_fits(self) -> Self:
        if self.norm == "l1" and self.weighting == "min-snr":
            raise problem("min-snr weighs squared errors, and norm is l1", "Take l2, or simple", path="weighting")
        return self

    def build(self) -> "Loss":
        from uldm_cli.core.diffusing import DiffusionLoss as Loss

        return Loss(**self.model_dump())


class DiffusionTraining(Spec):
    """Trains a latent diffusion model in the latents of a trained autoencoder."""

    kind: Literal["ldm-train"] = "ldm-train"
    init_from: str | None = Field(
        None,
        min_length=1,
        description="The latent diffusion model whose weights training begins with: a path or a name.",
    )
    autoencoder: str | None = Field(
        None, description="The autoencoder: a run, its YAML, a checkpoint or a name; null takes the newest run's."
    )
    data: Annotated[Dataset, Slot("datasets")] | None = Field(
        None, description="What it is trained on; null takes what the autoencoder was trained on."
    )
    latents: str | None = Field(
        None, min_length=1, description="A folder that `uldm vqvae encode` made: read instead of encoding images."
    )
    backbone: Annotated[Backbone, Slot("backbones")] = Field(
        UNet(channel_mult=(1, 2), attention_resolutions=(2,)), description="The network that denoises."
    )
    schedule: Annotated[Spec, Slot("schedules")] = Field(ScaledLinear(), description="The noise schedule.")
    target: Target = Field("eps", description="What the network predicts: noise, clean latent, or velocity.")
    learned_variance: bool = Field(
        False, description="The network also learns the variance of DDPM's steps, in as many channels again."
    )
    loss: DiffusionLoss = DiffusionLoss()
    scale_factor: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Brings latents to unit deviation; null measures it on the first images; a number is checked.",
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
    def _target_is_learnable(self) -> Self:
        check_learnable(self.target, self.schedule)
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
        refuse(misfit(autoencoder, self.data) or _misfit_of_latents(autoencoder, self.data, self.backbone), name)


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


def _misfit_of_latents(autoencoder: Autoencoder, data: Dataset, backbone: Backbone) -> "PydanticCustomError | None":
    """Why a backbone cannot take the latents of these images."""
    side = data.size // autoencoder.factor
    if side % backbone.factor == 0:
        return None
    text = f"its levels need latents whose side is a multiple of {backbone.factor}, and these are {side}x{side}"
    hint = f"Use fewer levels, or a data.size that {autoencoder.factor * backbone.factor} divides"
    return problem(text, hint, path="backbone")
