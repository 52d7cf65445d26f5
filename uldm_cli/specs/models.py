"""What a checkpoint's header says of its model: enough to build it again, with no other file."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from uldm_cli.errors import ConfigError
from uldm_cli.specs.autoencoders import Autoencoder
from uldm_cli.specs.backbones import Backbone
from uldm_cli.specs.base import Slot, Spec
from uldm_cli.specs.explain import Origin, explain

if TYPE_CHECKING:
    from torch import nn

    from uldm_cli.core.latent import LatentDiffusion

Target = Literal["eps", "x0", "v"]


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
        return (self.autoencoder.z_channels, side, side)


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
    scale_factor: float = Field(gt=0)
    sample: dict[str, Any] = Field(default_factory=dict)

    def build(self) -> "LatentDiffusion":
        from uldm_cli.core.denoiser import Denoiser
        from uldm_cli.core.latent import LatentDiffusion

        channels = self.latent_shape[0]
        denoiser = Denoiser(self.backbone.build(channels, channels), self.schedule.build(), self.target)
        autoencoder = self.autoencoder.build()
        return LatentDiffusion(autoencoder, denoiser, self.scale_factor, self.latent_shape, self.image_shape)


M = TypeVar("M", bound=Model)


def read_model(kind: type[M], config: Mapping[str, Any], place: str) -> M:
    """The model that a header's config describes; `place` is what an error calls the file.

    Raises:
        ConfigError: it is not a config of that kind of model.
    """
    try:
        return kind.model_validate(config)
    except ValidationError as error:
        wrong = explain(error, kind, config, {(): Origin(f"{place} describes a model that cannot be built")})
        raise ConfigError(wrong.message, "A newer uldm, or one with more plugins, may have written it") from None
