"""Backbones, the networks that denoise, that a config can name."""

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from uldm_cli.specs.base import Spec, problem

if TYPE_CHECKING:
    from uldm_cli.core.unet import UNet as Module


Need = Literal["context", "label"]


class Backbone(Spec):
    """What every backbone says of its input."""

    kind: str

    @property
    def factor(self) -> int:
        """How many times smaller than its input the lowest level is: the input's sides must be multiples of it."""
        return 1

    @property
    def needs(self) -> tuple[Need, ...]:
        """What it must be told besides the time, in arguments of their own."""
        return ()


class UNet(Backbone):
    """The U-Net of the latent-diffusion family; fields mean what they mean in the published configs."""

    kind: Literal["unet"] = "unet"
    model_channels: PositiveInt = Field(64, multiple_of=32, description="Width of the first level, a multiple of 32.")
    channel_mult: tuple[PositiveInt, ...] = Field(
        (1, 2, 4), min_length=1, description="Width of each level, in model_channels; each level halves the size."
    )
    num_res_blocks: PositiveInt = Field(2, description="Residual blocks a level.")
    attention_resolutions: tuple[PositiveInt, ...] = Field(
        (2, 4), description="Downsampling factors (not sizes) at which there is attention."
    )
    num_heads: PositiveInt | None = Field(None, description="Attention heads; this or num_head_channels.")
    num_head_channels: PositiveInt | None = Field(
        None, description="Channels a head, 32 if num_heads is not given either."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout in the residual blocks.")
    use_scale_shift_norm: bool = Field(False, description="The time embedding scales and shifts, instead of shifting.")
    resblock_updown: bool = Field(False, description="Residual blocks, not convolutions, change the size.")
    conv_resample: bool = Field(
        True, description="Where no residual block changes the size, a convolution is part of it."
    )
    use_new_attention_order: bool = Field(
        False, description="Weights of attention hold all of q, then k, then v; otherwise all three head by head."
    )
    use_spatial_transformer: bool = Field(
        False, description="Transformer blocks that read a context take the place of self-attention."
    )
    transformer_depth: PositiveInt = Field(1, description="Transformer blocks a place.")
    context_dim: PositiveInt | None = Field(None, description="Width of the context's tokens.")
    num_classes: PositiveInt | None = Field(None, description="Classes whose embedding is added to that of the time.")

    @model_validator(mode="after")
    def _context_fits(self) -> Self:
        if self.use_spatial_transformer and self.context_dim is None:
            raise problem("use_spatial_transformer needs a number here", path="context_dim")
        if self.context_dim is not None and not self.use_spatial_transformer:
            raise problem(
                "only use_spatial_transformer has a use for it", "Set one, or not the other", path="context_dim"
            )
        return self

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.num_heads and self.num_head_channels:
            raise problem("num_heads is given too", "Set one of them, and the other to null", path="num_head_channels")
        for level, mult in enumerate(self.channel_mult):
            width = mult * self.model_channels
            divisor = self.num_heads or self.num_head_channels or 32
            attends = 2**level in self.attention_resolutions or level == len(self.channel_mult) - 1
            if attends and width % divisor:
                name = "num_heads" if self.num_heads else "num_head_channels"
                raise problem(f"{divisor} does not divide the width {width}, which has attention", path=name)
        return self

    @property
    def factors(self) -> tuple[int, ...]:
        """Downsampling factor of each level."""
        return tuple(2**level for level in range(len(self.channel_mult)))

    @property
    def factor(self) -> int:
        return self.factors[-1]

    @property
    def needs(self) -> tuple[Need, ...]:
        context: tuple[Need, ...] = ("context",) if self.context_dim else ()
        label: tuple[Need, ...] = ("label",) if self.num_classes else ()
        return context + label

    def build(self, in_channels: int, out_channels: int) -> "Module":
        from uldm_cli.core.unet import UNet as Module
        from uldm_cli.core.unet import UNetConfig

        heads = self.num_head_channels if self.num_heads or self.num_head_channels else 32
        return Module(
            UNetConfig(
                in_channels=in_channels,
                out_channels=out_channels,
                num_head_channels=heads,
                **self.model_dump(exclude={"kind", "num_head_channels"}),
            )
        )
