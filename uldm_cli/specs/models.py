"""What a checkpoint's header says of its model: enough to build it again, with no other file."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from uldm_cli.specs.base import Slot, Spec

if TYPE_CHECKING:
    from torch import nn

    from uldm_cli.core.latent import LatentDiffusion

Target = Literal["eps", "x0", "v"]


class Model(BaseModel):
    """A model and the images that it was made for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    autoencoder: Annotated[Spec, Slot("autoencoders")]
    image_size: PositiveInt

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)`."""
        return (self._autoencoder.in_channels, self.image_size, self.image_size)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """`(z, h, w)`."""
        side = self.image_size // self._autoencoder.factor
        return (self._autoencoder.z_channels, side, side)

    @property
    def _autoencoder(self) -> Any:
        """Every autoencoder's spec has in_channels, z_channels and factor."""
        return self.autoencoder


class AutoencoderModel(Model):
    """Header of a checkpoint of kind "autoencoder"."""

    def build(self) -> "nn.Module":
        module: nn.Module = self.autoencoder.build()
        return module


class LatentDiffusionModel(Model):
    """Header of a checkpoint of kind "latent-diffusion"."""

    backbone: Annotated[Spec, Slot("backbones")]
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
