"""The autoencoders of the latent-diffusion family, VQ and KL (Esser et al. 2021; Rombach et al. 2022, appendix G).

Modules carry the names of the published code, so its checkpoints load without renaming; one name differs, that of the
codes, which is `quantize.embedding.weight` there and `quantize.embedding` here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from uldm_cli.core.blocks import Conv2d, Downsample, ResnetBlock, SelfAttention, Upsample, norm
from uldm_cli.core.quantizers import Quantizer
from uldm_cli.core.vqvae import VectorQuantized

GROUPS = 32
"""Of every group normalisation: it divides every width."""


@dataclass(frozen=True)
class Shape:
    """What VQ and KL have in common; the fields are those of the published configs."""

    in_channels: int
    out_ch: int
    resolution: int
    """Side of the images it was made for: together with `attn_resolutions` it says which levels have attention."""
    ch: int
    """Width, a multiple of 32, of the level of the images' size."""
    ch_mult: Sequence[int]
    """Width of each level, in `ch`; from one level to the next the size halves."""
    num_res_blocks: int
    attn_resolutions: Sequence[int]
    attention: bool
    """Whether there is attention at all, also in the middle."""
    dropout: float
    z_channels: int
    """Channels between encoder and `quant_conv`, and between `post_quant_conv` and decoder."""
    embed_dim: int
    """Channels of a latent."""

    @property
    def widths(self) -> list[int]:
        """Of the levels, the first being that of the images' size."""
        return [self.ch * mult for mult in self.ch_mult]

    def attends(self, level: int) -> bool:
        return self.attention and self.resolution // 2**level in self.attn_resolutions


class VQ(VectorQuantized):
    """An autoencoder with a codebook.

    Images `[N, C, H, W]` in [-1, 1] become latents `[N, embed_dim, H/f, W/f]`, where f is `2 ** (levels - 1)` and
    divides H and W. Latents are taken before the quantizer, whose work is then part of decoding.
    """

    def __init__(self, shape: Shape, quantizer: Quantizer) -> None:
        super().__init__()
        self.encoder = Encoder(shape, shape.z_channels)
        self.decoder = Decoder(shape)
        self.quantize = quantizer
        self.quant_conv = Conv2d(shape.z_channels, shape.embed_dim, 1)
        self.post_quant_conv = Conv2d(shape.embed_dim, shape.z_channels, 1)


class KL(nn.Module):
    """An autoencoder whose latents have a normal distribution each. Shapes are those of `VQ`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.encoder = Encoder(shape, 2 * shape.z_channels)
        self.decoder = Decoder(shape)
        self.quant_conv = Conv2d(2 * shape.z_channels, 2 * shape.embed_dim, 1)
        self.post_quant_conv = Conv2d(shape.embed_dim, shape.z_channels, 1)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance, within [-30, 20], of the latents of images: `[N, embed_dim, h, w]`."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def to_latent(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents `[N, embed_dim, h, w]`: their mean, or a draw by standard normal `noise` of the same shape."""
        mean, logvar = self.moments(x)
        return mean if noise is None else drawn(mean, logvar, noise)

    def from_latent(self, z: Tensor) -> Tensor:
        """Image in about [-1, 1] (not clipped) of latents."""
        return self.decoder(self.post_quant_conv(z))


def has_posterior(autoencoder: nn.Module) -> bool:
    """Whether an autoencoder's latents have a normal distribution each, as those of `KL`."""
    return hasattr(autoencoder, "moments")


def drawn(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Latents from the mean and the logarithm of the variance of each, by standard normal noise."""
    return mean + (0.5 * logvar).exp() * noise


def divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Of normal latents from the standard normal distribution, elementwise, in nats (Kingma & Welling 2014, app. B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """The same of latents `[N, z, h, w]`, summed over each: `[N]`."""
    return divergence(mean, logvar).flatten(1).sum(1)


class Encoder(nn.Module):
    def __init__(self, shape: Shape, out_channels: int) -> None:
        super().__init__()
        widths = shape.widths
        self.conv_in = Conv2d(shape.in_channels, shape.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for level, (width, out) in enumerate(zip([shape.ch, *widths[:-1]], widths, strict=True)):
            self.down.append(Down(width, out, shape, level))
        self.mid = Middle(widths[-1], shape)
        self.norm_out = norm(widths[-1], GROUPS)
        self.conv_out = Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, out, H/f, W/f)
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """The encoder's mirror image, with one residual block more a level."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        widths = shape.widths
        self.conv_in = Conv2d(shape.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], shape)
        self.up = nn.ModuleList()
        for level, (width, out) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            self.up.append(Up(width, out, shape, level))
        self.norm_out = norm(widths[0], GROUPS)
        self.conv_out = Conv2d(widths[0], shape.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:  # (N, z, h, w) -> (N, out_ch, h*f, w*f)
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Level(nn.Module):
    """Residual blocks at one size, each followed by attention or none of them."""

    def __init__(self, channels: int, out_channels: int, blocks: int, attention: bool, dropout: float) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * (blocks - 1)
        self.block = nn.ModuleList(ResnetBlock(width, out_channels, GROUPS, dropout) for width in widths)
        self.attn = nn.ModuleList(SelfAttention(out_channels, 1, GROUPS) for _ in range(blocks) if attention)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, h, w) -> (N, C', h, w)
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


class Down(Level):
    """A level of the encoder, which halves the size at its end unless it is the last."""

    def __init__(self, channels: int, out_channels: int, shape: Shape, level: int) -> None:
        super().__init__(channels, out_channels, shape.num_res_blocks, shape.attends(level), shape.dropout)
        last = level == len(shape.ch_mult) - 1
        self.downsample = nn.Identity() if last else Downsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, h, w) -> (N, C', h/2, w/2)
        return self.downsample(super().forward(x))


class Up(Level):
    """A level of the decoder, which doubles the size at its end unless that is the images'."""

    def __init__(self, channels: int, out_channels: int, shape: Shape, level: int) -> None:
        super().__init__(channels, out_channels, shape.num_res_blocks + 1, shape.attends(level), shape.dropout)
        self.upsample = nn.Identity() if level == 0 else Upsample(out_channels)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, h, w) -> (N, C', 2h, 2w)
        return self.upsample(super().forward(x))


class Middle(nn.Module):
    """Residual block, attention, residual block at the smallest size."""

    def __init__(self, channels: int, shape: Shape) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, GROUPS, shape.dropout)
        self.attn_1 = SelfAttention(channels, 1, GROUPS) if shape.attention else nn.Identity()
        self.block_2 = ResnetBlock(channels, channels, GROUPS, shape.dropout)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, h, w) -> the same
        return self.block_2(self.attn_1(self.block_1(x)))
