"""What a checkpoint's header says of its model: enough to build it again, with no other file."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from uldm_cli.errors import ConfigError
from uldm_cli.specs.autoencoders import Autoencoder
from uldm_cli.specs.backbones import Backbone
from uldm_cli.specs.base import Slot, Spec, problem
from uldm_cli.specs.explain import Origin, explain
from uldm_cli.specs.schedules import check_learnable

if TYPE_CHECKING:
    from torch import nn

    from uldm_cli.core.latent import LatentDiffusion

Target = Literal["eps", "x0", "v"]
Conditioning = Literal["concat", "crossattn", "hybrid", "adm"]


class Model(BaseModel):
    """A model and the images that it was made for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    autoencoder: Annotated[Autoencoder, Slot("autoencoders")]
    image_size: PositiveInt

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)`."""
        return (self.autoencoder.in_channels, self.image_size, self.image_size)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """`(z, h, w)`."""
        side = self.image_size // self.autoencoder.factor
        return (self.autoencoder.latent_channels, side, side)


class AutoencoderModel(Model):
    """Header of a checkpoint of kind "autoencoder"."""

    def build(self) -> "nn.Module":
        module: nn.Module = self.autoencoder.build()
        return module


class LatentDiffusionModel(Model):
    """Header of a checkpoint of kind "latent-diffusion"."""

    backbone: Annotated[Backbone, Slot("backbones")]
    schedule: Annotated[Spec, Slot("schedules")]
    target: Target
    learned_variance: bool = False
    """Whether the backbone has twice the latent's channels, the other half telling the variance of ancestral steps."""
    scale_factor: float = Field(gt=0)
    conditioner: Annotated[Spec, Slot("conditioners")] | None = None
    conditioning: Conditioning | None = None
    """Where the backbone takes the condition: beside its input's channels, as a context, both, or as a label."""
    concat_channels: NonNegativeInt = 0
    """Channels of the condition that stand beside the latent's."""
    sample: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _target_is_learnable(self) -> Self:
        check_learnable(self.target, self.schedule)
        return self

    @model_validator(mode="after")
    def _conditioning_fits(self) -> Self:
        how = self.conditioning or "no"
        if (self.conditioner is None) != (self.conditioning is None):
            raise problem(f"does not go with {how} conditioning", path="conditioner")
        if (self.concat_channels > 0) != (how in ("concat", "hybrid")):
            raise problem(f"{self.concat_channels} does not go with {how} conditioning", path="concat_channels")
        needs = {"crossattn": ("context",), "hybrid": ("context",), "adm": ("label",)}.get(how, ())
        if self.backbone.needs != needs:
            said = " and ".join(f"a {need}" for need in self.backbone.needs) or "neither a context nor a label"
            raise problem(f"with {how} conditioning it cannot be one that takes {said}", path="backbone")
        return self

    @property
    def predicted_channels(self) -> int:
        """Channels of what the backbone gives."""
        return self.latent_shape[0] * (2 if self.learned_variance else 1)

    def build(self) -> "LatentDiffusion":
        from uldm_cli.core.denoiser import Denoiser
        from uldm_cli.core.latent import LatentDiffusion

        channels = self.latent_shape[0]
        backbone = self.backbone.build(channels + self.concat_channels, self.predicted_channels)
        return LatentDiffusion(
            self.autoencoder.build(),
            Denoiser(backbone, self.schedule.build(), self.target, learned_variance=self.learned_variance),
            self.scale_factor,
            self.latent_shape,
            self.image_shape,
            self.conditioner.build() if self.conditioner else None,
            self.conditioning,
        )


M = TypeVar("M", bound=Model)


_NEWER = "A newer uldm, or one with more plugins, may have written it"


def read_model(kind: type[M], config: Mapping[str, Any], place: str, hint: str = _NEWER) -> M:
    """The model that a header's config describes; `place` is what an error calls the file, `hint` what to do.

    Raises:
        ConfigError: it is not a config of that kind of model.
    """
    try:
        return kind.model_validate(config)
    except ValidationError as error:
        wrong = explain(error, kind, config, {(): Origin(f"{place} describes a model that cannot be built")})
        raise ConfigError(wrong.message, hint) from None
