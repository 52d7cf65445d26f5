"""The VQ-VAE (van den Oord et al. 2017) with a residual, optionally attentive, encoder and decoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from uldm_cli.core.blocks import Conv2d, Downsample, ResnetBlock, SelfAttention, Upsample, norm
from uldm_cli.core.quantizers import Losses, Quantizer


@dataclass(frozen=True)
class VQVAEConfig:
    """Shape of a VQ-VAE; `down_sample` and `attn_down` hold one entry for each step between two `down_channels`."""

    in_channels: int
    down_channels: Sequence[int]
    mid_channels: Sequence[int]
    """First and last equal `down_channels[-1]`."""
    down_sample: Sequence[bool]
    attn_down: Sequence[bool]
    num_down_layers: int
    num_mid_layers: int
    num_up_layers: int
    num_heads: int
    norm_channels: int
    z_channels: int


class VectorQuantized(nn.Module):
    """What autoencoders with a codebook have in common: images `[N, C, H, W]` to latents to codes, and back."""

    encoder: nn.Module
    quant_conv: nn.Module
    quantize: Quantizer
    post_quant_conv: nn.Module
    decoder: nn.Module

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Losses]:
        """Reconstruction `[N, C, H, W]`, quantized latents, and the quantizer's losses."""
        quantized, losses = self.encode(x)
        return self.decode(quantized), quantized, losses

    def encode(self, x: Tensor) -> tuple[Tensor, Losses]:
        """Quantized latents `[N, z, h, w]` and the losses `codebook_loss` and `commitment_loss`, unweighted."""
        quantized, losses, _ = self.encode_with_indices(x)
        return quantized, losses

    def encode_with_indices(self, x: Tensor) -> tuple[Tensor, Losses, Tensor]:
        """As `encode`, and the code indices, int64 `[N, h, w]`."""
        quantized = self.quantize(self.to_latent(x))
        return quantized.z, quantized.losses, quantized.indices

    def decode(self, z: Tensor) -> Tensor:
        """Image in about [-1, 1] (not clipped) of quantized latents."""
        return self.decoder(self.post_quant_conv(z))

    def to_latent(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents before quantizing, `[N, z, h, w]`. `noise` is for autoencoders whose latents are drawn; unused."""
        return self.quant_conv(self.encoder(x))

    def from_latent(self, z: Tensor) -> Tensor:
        """Quantizes latents and decodes them."""
        return self.decode(self.quantize(z).z)


class VQVAE(VectorQuantized):
    """Image `[N, C, H, W]` in [-1, 1] to latents `[N, z_channels, H/f, W/f]` to codes, and back.

    H and W must be multiples of the downsampling factor f, `2 ** sum(down_sample)`.
    """

    def __init__(self, config: VQVAEConfig, quantizer: Quantizer) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = Conv2d(config.z_channels, config.z_channels, 1)
        self.quantize = quantizer
        self.post_quant_conv = Conv2d(config.z_channels, config.z_channels, 1)
        self.decoder = Decoder(config)


class Encoder(nn.Module):
    def __init__(self, c: VQVAEConfig) -> None:
        super().__init__()
        self.conv_in = Conv2d(c.in_channels, c.down_channels[0], 3, padding=1)
        layers: list[nn.Module] = []
        for i, (width, out) in enumerate(pairwise(c.down_channels)):
            layers += _level(width, out, c.num_down_layers, c.attn_down[i], c)
            if c.down_sample[i]:
                layers.append(Downsample(out))
        self.down = nn.Sequential(*layers)
        self.mid = _middle(c.mid_channels, c)
        self.norm_out = norm(c.mid_channels[-1], c.norm_channels)
        self.conv_out = Conv2d(c.mid_channels[-1], c.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, z, H/f, W/f)
        h = self.mid(self.down(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """The encoder's mirror image."""

    def __init__(self, c: VQVAEConfig) -> None:
        super().__init__()
        widths = list(reversed(c.down_channels))
        self.conv_in = Conv2d(c.z_channels, c.mid_channels[-1], 3, padding=1)
        self.mid = _middle(list(reversed(c.mid_channels)), c)
        layers: list[nn.Module] = []
        for i, (width, out) in enumerate(pairwise(widths)):
            mirrored = len(widths) - 2 - i
            if c.down_sample[mirrored]:
                layers.append(Upsample(width))
            layers += _level(width, out, c.num_up_layers, c.attn_down[mirrored], c)
        self.up = nn.Sequential(*layers)
        self.norm_out = norm(widths[-1], c.norm_channels)
        self.conv_out = Conv2d(widths[-1], c.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:  # (N, z, h, w) -> (N, C, h*f, w*f)
        h = self.up(self.mid(self.conv_in(z)))
        return self.conv_out(F.silu(self.norm_out(h)))


def _level(width: int, out: int, blocks: int, attention: bool, c: VQVAEConfig) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for i in range(blocks):
        layers.append(ResnetBlock(width if i == 0 else out, out, c.norm_channels))
        if attention:
            layers.append(SelfAttention(out, c.num_heads, c.norm_channels))
    return layers


def _middle(widths: Sequence[int], c: VQVAEConfig) -> nn.Sequential:
    """One residual block, then `num_mid_layers` pairs of attention and residual block, for each pair of widths."""
    layers: list[nn.Module] = []
    for width, out in pairwise(widths):
        layers.append(ResnetBlock(width, out, c.norm_channels))
        for _ in range(c.num_mid_layers):
            layers += [SelfAttention(out, c.num_heads, c.norm_channels), ResnetBlock(out, out, c.norm_channels)]
    return nn.Sequential(*layers)
