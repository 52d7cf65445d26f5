"""Autoencoders that a config can name."""

from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from uldm_cli.specs.base import Slot, Spec, problem
from uldm_cli.specs.quantizers import EMA, Nearest, check_codes

if TYPE_CHECKING:
    from uldm_cli.core import autoencoders as modules
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

    @model_validator(mode="after")
    def _quantizer_fits(self) -> Self:
        check_codes(self.quantizer, self.codebook_size, self.z_channels, "z_channels")
        return self

    @property
    def factor(self) -> int:
        return int(2 ** sum(self.down_sample))

    def build(self) -> "Module":
        from uldm_cli.core.vqvae import VQVAE as Module
        from uldm_cli.core.vqvae import VQVAEConfig

        shape = {name: getattr(self, name) for name in VQVAEConfig.__dataclass_fields__}
        return Module(VQVAEConfig(**shape), self.quantizer.build(self.codebook_size, self.z_channels))


def _like_in_channels(given: dict[str, Any]) -> Any:
    return given["in_channels"]


def _like_z_channels(given: dict[str, Any]) -> Any:
    return given["z_channels"]


class Published(Autoencoder):
    """What VQ and KL have in common; fields mean what they mean in the published configs."""

    resolution: PositiveInt = Field(256, description="Side of its images in training; it places the attention.")
    ch: PositiveInt = Field(128, multiple_of=32, description="Width of the first level, a multiple of 32.")
    ch_mult: Widths = Field(
        (1, 2, 4), min_length=1, description="Width of each level, in ch; from one level to the next the size halves."
    )
    num_res_blocks: PositiveInt = Field(2, description="Residual blocks a level; the decoder has one more.")
    attn_resolutions: tuple[PositiveInt, ...] = Field((), description="Sizes of the levels that have attention.")
    attn_type: Literal["vanilla", "none"] = Field(
        "vanilla", description="none: no attention, not in the middle either."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout in the residual blocks.")
    z_channels: PositiveInt = Field(3, description="Channels that the encoder makes and the decoder takes.")
    embed_dim: PositiveInt = Field(
        default_factory=_like_z_channels, description="Channels of a latent; by default z_channels."
    )
    out_ch: PositiveInt = Field(
        default_factory=_like_in_channels, description="Channels of the decoder's images: those of the encoder's."
    )

    @model_validator(mode="after")
    def _images_fit(self) -> Self:
        if self.out_ch != self.in_channels:
            raise problem(f"expected {self.in_channels}, as in_channels", path="out_ch")
        sides = [self.resolution // 2**level for level in range(len(self.ch_mult))]
        if not set(self.attn_resolutions) <= set(sides):
            raise problem(f"expected some of the levels' sizes, {sides}", path="attn_resolutions")
        return self

    @property
    def factor(self) -> int:
        return int(2 ** (len(self.ch_mult) - 1))

    @property
    def latent_channels(self) -> int:
        return self.embed_dim

    @property
    def shape(self) -> "modules.Shape":
        from uldm_cli.core.autoencoders import Shape

        same = {name: getattr(self, name) for name in Shape.__dataclass_fields__ if name != "attention"}
        return Shape(attention=self.attn_type == "vanilla", **same)


class VQ(Published):
    """Autoencoder with a codebook, as in the published latent diffusion models."""

    kind: Literal["vq"] = "vq"
    codebook_size: PositiveInt = Field(8192, description="Number of codes.")
    quantizer: Annotated[Spec, Slot("quantizers")] = Field(Nearest(), description="How codes are chosen and trained.")

    @model_validator(mode="after")
    def _quantizer_fits(self) -> Self:
        check_codes(self.quantizer, self.codebook_size, self.embed_dim, "embed_dim")
        return self

    def build(self) -> "modules.VQ":
        from uldm_cli.core.autoencoders import VQ as Module

        return Module(self.shape, self.quantizer.build(self.codebook_size, self.embed_dim))


class KL(Published):
    """Autoencoder with normally distributed latents, as in the published latent diffusion models."""

    kind: Literal["kl"] = "kl"
    ch_mult: Widths = Field(
        (1, 2, 4, 4),
        min_length=1,
        description="Width of each level, in ch; from one level to the next the size halves.",
    )
    z_channels: PositiveInt = Field(4, description="Channels that the decoder takes; the encoder makes twice as many.")

    def build(self) -> "modules.KL":
        from uldm_cli.core.autoencoders import KL as Module

        return Module(self.shape)
