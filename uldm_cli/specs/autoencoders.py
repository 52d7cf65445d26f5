"""Autoencoders that a config can name."""

from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from uldm_cli.specs.base import Slot, Spec, problem
from uldm_cli.specs.quantizers import EMA

if TYPE_CHECKING:
    from uldm_cli.core.vqvae import VQVAE as Module

Widths = tuple[PositiveInt, ...]


class Autoencoder(Spec):
    """What every autoencoder says of its images and latents."""

    kind: str
    in_channels: PositiveInt = Field(3, description="Channels of the images: 3 for colour, 1 for grey.")
    z_channels: PositiveInt = Field(4, description="Channels of a latent.")

    @property
    def latent_channels(self) -> int:
        """Channels of what diffusion works on."""
        return self.z_channels

    @property
    def factor(self) -> int:
        """How many times smaller than the image the latents are, in each direction."""
        raise NotImplementedError


class VQVAE(Autoencoder):
    """VQ-VAE with a residual, optionally attentive, encoder and decoder."""

    kind: Literal["vqvae"] = "vqvae"
    down_channels: Widths = Field((32, 64, 128), min_length=2, description="Widths of the encoder's levels.")
    mid_channels: Widths = Field(
        (128, 128), min_length=2, description="Widths at the bottleneck; it begins and ends with down_channels' last."
    )
    down_sample: tuple[bool, ...] = Field((True, True), description="Whether each level halves the size.")
    attn_down: tuple[bool, ...] = Field((False, False), description="Whether each level has attention.")
    num_down_layers: PositiveInt = Field(2, description="Residual blocks a level of the encoder.")
    num_mid_layers: PositiveInt = Field(1, description="Pairs of attention and residual block at the bottleneck.")
    num_up_layers: PositiveInt = Field(2, description="Residual blocks a level of the decoder.")
    num_heads: PositiveInt = Field(4, description="Attention heads.")
    norm_channels: PositiveInt = Field(32, description="Groups of the group normalisation; must divide every width.")
    z_channels: PositiveInt = Field(4, description="Channels of a latent, and length of a code.")
    codebook_size: PositiveInt = Field(1024, description="Number of codes.")
    quantizer: Annotated[Spec, Slot("quantizers")] = Field(EMA(), description="How codes are chosen and trained.")

    @model_validator(mode="after")
    def _lists_agree(self) -> Self:
        last = self.down_channels[-1]
        if (self.mid_channels[0], self.mid_channels[-1]) != (last, last):
            text = f"expected a list that begins and ends with {last}, the last of down_channels"
            raise problem(text, path="mid_channels")
        levels = len(self.down_channels) - 1
        for name in ("down_sample", "attn_down"):
            if len(getattr(self, name)) != levels:
                entries = "1 entry" if levels == 1 else f"{levels} entries"
                text = f"expected {entries}, one for each step from a width of down_channels to the next"
                raise problem(text, path=name)
        return self

    @model_validator(mode="after")
    def _widths_divide(self) -> Self:
        for width in (*self.down_channels, *self.mid_channels):
            if width % self.norm_channels:
                raise problem(f"expected a divisor of every width, so of {width} too", path="norm_channels")
        steps = zip(self.attn_down, pairwise(self.down_channels), strict=True)
        # The encoder has attention at a level's second width, the decoder at its first.
        attentive = [width for attends, widths in steps if attends for width in widths]
        for width in (*attentive, *self.mid_channels):
            if width % self.num_heads:
                text = f"expected a divisor of every width that has attention, so of {width} too"
                raise problem(text, path="num_heads")
        return self

    @property
    def factor(self) -> int:
        return int(2 ** sum(self.down_sample))

    def build(self) -> "Module":
        from uldm_cli.core.vqvae import VQVAE as Module
        from uldm_cli.core.vqvae import VQVAEConfig

        shape = {name: getattr(self, name) for name in VQVAEConfig.__dataclass_fields__}
        return Module(VQVAEConfig(**shape), self.quantizer.build(self.codebook_size, self.z_channels))
