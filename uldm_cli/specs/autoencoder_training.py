"""What `uldm vqvae train` is told."""

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from uldm_cli.specs.autoencoders import VQVAE, Autoencoder
from uldm_cli.specs.base import Slot, Spec, problem
from uldm_cli.specs.datasets import Dataset, Tiny
from uldm_cli.specs.training import Optim, Part, Train, misfit

if TYPE_CHECKING:
    from uldm_cli.core.autoencoding import ReconstructionWeights

LPIPS_SIDE = 32
"""Smallest images that the perceptual distance takes, in pixels."""

# Trains on the embedded pictures within minutes on two cores.
SMALL_VQVAE = VQVAE(
    in_channels=1,
    down_channels=(32, 64, 64),
    mid_channels=(64, 64),
    num_down_layers=1,
    num_up_layers=1,
    codebook_size=256,
)


class Loss(Part):
    """Factors of the terms of an autoencoder's loss. Each term is a mean over pixels, positions or images."""

    l1: float = Field(1.0, ge=0, description="Mean absolute difference.")
    l2: float = Field(1.0, ge=0, description="Mean squared difference.")
    lpips: float = Field(0.0, ge=0, description="Perceptual distance by AlexNet, for images from 32 pixels; 0: none.")
    codebook: float = Field(1.0, ge=0, description="Codes towards latents; an EMA codebook has no use for it.")
    commitment: float = Field(0.25, ge=0, description="Latents towards codes.")

    def build(self) -> "ReconstructionWeights":
        from uldm_cli.core.autoencoding import ReconstructionWeights

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
        wrong = misfit(self.autoencoder, self.data)
        if wrong is not None:
            raise wrong
        size = self.data.size
        if self.loss.lpips and size < LPIPS_SIDE:
            text = f"takes images of {LPIPS_SIDE} pixels or more, and data.size is {size}"
            raise problem(text, "Set it to 0, or take larger images", path="loss.lpips")
        return self
