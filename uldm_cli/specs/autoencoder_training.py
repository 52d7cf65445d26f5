"""What `uldm vqvae train` is told."""

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from uldm_cli.specs.autoencoders import VQVAE, Autoencoder
from uldm_cli.specs.base import Slot, Spec, problem
from uldm_cli.specs.datasets import Dataset, Tiny
from uldm_cli.specs.training import Optim, Part, Train, misfit

if TYPE_CHECKING:
    from uldm_cli.core.autoencoding import ReconstructionWeights
    from uldm_cli.core.discriminator import PatchGAN
    from uldm_cli.core.losses import Adversarial as Settings

LPIPS_SIDES = {"alex": 31, "vgg": 16, "squeeze": 17}
"""Side of the smallest images that the perceptual distance takes, by network."""

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
    lpips: float = Field(0.0, ge=0, description="Perceptual distance, for grey and colour images; 0: none.")
    lpips_net: Literal["alex", "vgg", "squeeze"] = Field(
        "alex", description="Its network. AlexNet is embedded, and takes images from 31 pixels."
    )
    lpips_weights: str | None = Field(
        None, min_length=1, description="Its weights: a file, or a folder that holds torchvision's under their name."
    )
    lpips_auto_download: bool = Field(False, description="Fetch weights that are not here from torchvision's address.")
    codebook: float = Field(1.0, ge=0, description="Codes towards latents; an EMA codebook has no use for it.")
    commitment: float = Field(0.25, ge=0, description="Latents towards codes.")
    kl: float = Field(
        1e-6,
        ge=0,
        description="Divergence of a KL autoencoder's latents, summed over a latent, as the reconstruction over an "
        "image: the published meaning. Both are then divided by the number of an image's values.",
    )
    logvar: float | None = Field(
        None, ge=-30, le=20, description="Initial log-variance by which the reconstruction is weighed; null: none."
    )

    def build(self) -> "ReconstructionWeights":
        from uldm_cli.core.autoencoding import ReconstructionWeights

        return ReconstructionWeights(**{name: getattr(self, name) for name in ReconstructionWeights.__annotations__})


class Discriminator(Part):
    """A PatchGAN, by default one that sees 46 pixels a patch.

    Channels [64, 128, 256, 512] give the published one, which sees 70.
    """

    channels: tuple[PositiveInt, ...] = Field(
        (64, 128, 256), min_length=1, description="Widths between the image and the logits."
    )
    kernels: tuple[PositiveInt, ...] | None = Field(
        None, description="Side of each convolution's kernel, one more than channels; null: 4."
    )
    strides: tuple[PositiveInt, ...] | None = Field(
        None, description="Stride of each; null: 2 for the first three except the last of all, else 1."
    )
    paddings: tuple[NonNegativeInt, ...] | None = Field(None, description="Zeros around each one's input; null: 1.")

    @model_validator(mode="after")
    def _lists_agree(self) -> Self:
        layers = len(self.channels) + 1
        for name in ("kernels", "strides", "paddings"):
            if len(getattr(self, name) or range(layers)) != layers:
                text = f"expected {layers} entries, one a convolution and so one more than channels"
                raise problem(text, path=name)
        return self

    @property
    def convolutions(self) -> list[tuple[int, int, int]]:
        """Kernel, stride and padding of each."""
        layers = len(self.channels) + 1
        strides = self.strides or [2 if i < min(3, layers - 1) else 1 for i in range(layers)]
        return list(zip(self.kernels or [4] * layers, strides, self.paddings or [1] * layers, strict=True))

    def sides(self, side: int) -> list[int]:
        """Of what each convolution makes of images of `side` pixels; 0 where it can make nothing."""
        made = []
        for kernel, stride, padding in self.convolutions:
            side = max((side + 2 * padding - kernel) // stride + 1, 0)
            made.append(side)
        return made

    def build(self, in_channels: int) -> "PatchGAN":
        from uldm_cli.core.discriminator import PatchGAN

        return PatchGAN(in_channels, self.channels, *zip(*self.convolutions, strict=True))


class Adversarial(Part):
    """A discriminator that the autoencoder is trained against."""

    weight: float = Field(0.5, ge=0, description="Factor of the generator's term.")
    adaptive: bool = Field(
        True, description="Multiply it with the ratio of the reconstruction's gradient to its own at the last layer."
    )
    start: NonNegativeInt = Field(1000, description="Steps before the discriminator takes part.")
    warmup_steps: NonNegativeInt = Field(1000, description="Steps in which the generator's term then grows; 0: none.")
    loss: Literal["hinge", "vanilla"] = Field("hinge", description="The discriminator's loss.")
    discriminator: Discriminator = Discriminator()

    def build(self, in_channels: int) -> "Settings":
        from uldm_cli.core.losses import Adversarial as Settings

        same = {name: getattr(self, name) for name in Settings.__annotations__ if name != "discriminator"}
        return Settings(discriminator=self.discriminator.build(in_channels), **same)


class AutoencoderTraining(Spec):
    """Trains an autoencoder."""

    kind: Literal["vqvae-train"] = "vqvae-train"
    autoencoder: Annotated[Autoencoder, Slot("autoencoders")] = Field(SMALL_VQVAE, description="What is trained.")
    init_from: str | None = Field(
        None, min_length=1, description="A trained model whose autoencoder, of the same config, it begins with."
    )
    freeze: Literal["encoder"] | None = Field(
        None,
        description="encoder: train only the decoder, so that latents and codes, and the models trained on them, stay.",
    )
    data: Annotated[Dataset, Slot("datasets")] = Field(Tiny(), description="What it is trained on.")
    loss: Loss = Loss()
    adversarial: Adversarial | None = Field(None, description="Off by default; {} turns it on.")
    optim: Optim = Optim(lr=1e-3)
    train: Train = Train(steps=800)

    @model_validator(mode="after")
    def _data_fits(self) -> Self:
        wrong = misfit(self.autoencoder, self.data)
        if wrong is not None:
            raise wrong
        if self.loss.lpips:
            least = LPIPS_SIDES[self.loss.lpips_net]
            if self.data.size < least:
                text = f"takes images of {least} pixels or more, and data.size is {self.data.size}"
                raise problem(text, "Set it to 0, or take larger images", path="loss.lpips")
            if self.data.channels not in (1, 3):
                text = f"compares grey or colour images, and data.channels is {self.data.channels}"
                raise problem(text, "Set it to 0", path="loss.lpips")
        return self

    @model_validator(mode="after")
    def _discriminator_fits(self) -> Self:
        if self.adversarial is None:
            return self
        sides = self.adversarial.discriminator.sides(self.data.size)
        # Batch statistics of a single position would be those of nothing.
        if sides[-1] < 1 or min(sides[:-1]) < 2:
            made = ", ".join(map(str, sides))
            text = f"it is too deep for images of {self.data.size} pixels: its layers would make sides of {made}"
            raise problem(text, "Give it fewer channels, or take larger images", path="adversarial.discriminator")
        return self

    @model_validator(mode="after")
    def _frozen_is_trained(self) -> Self:
        if self.freeze and self.init_from is None:
            text = "there is no trained encoder to leave as it is"
            raise problem(text, "Name a model: init_from=PATH", path="freeze")
        return self
