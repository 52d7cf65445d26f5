"""The U-Net of the latent-diffusion family (Dhariwal & Nichol 2021; Rombach et al. 2022).

Modules carry the names of the published code, so its checkpoints load without renaming.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uldm_cli.core.blocks import Conv2d, GroupNorm, Pointwise, Upsample, attention
from uldm_cli.errors import UsageError

Conv = TypeVar("Conv", nn.Conv1d, nn.Conv2d)
GROUPS = 32
"""Groups of every normalisation: all widths must be multiples of it."""


@dataclass(frozen=True)
class UNetConfig:
    """What a U-Net is made of. Field names and meanings are those of the published configs."""

    in_channels: int
    out_channels: int
    model_channels: int
    channel_mult: Sequence[int]
    num_res_blocks: int
    attention_resolutions: Sequence[int]
    """Downsampling factors (not sizes) at which attention is used."""
    num_heads: int | None
    num_head_channels: int | None
    """Exactly one of the two is set."""
    dropout: float
    use_scale_shift_norm: bool
    resblock_updown: bool


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding `[cos, sin]` of timesteps `[N]` to float32 `[N, dim]` (Vaswani et al. 2017, 3.5)."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(max_period) / half))
    angles = t[:, None].float() * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, H/2, W/2)
        return self.op(x)


class ResBlock(nn.Module):
    """Residual block that the time embedding shifts, or scales and shifts; `resample` -1 halves, 1 doubles the size."""

    def __init__(self, channels: int, out_channels: int, emb_channels: int, config: UNetConfig, resample: int = 0):
        super().__init__()
        self.resample = resample
        self.scale_shift = config.use_scale_shift_norm
        self.in_layers = nn.Sequential(
            GroupNorm(GROUPS, channels), nn.SiLU(), Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels if self.scale_shift else out_channels)
        )
        self.out_layers = nn.Sequential(
            GroupNorm(GROUPS, out_channels),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            _zeroed(Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # (N, C, H, W), (N or 1, E) -> (N, C', H', W')
        h = self.in_layers[1](self.in_layers[0](x))
        if self.resample:
            h, x = self._resized(h), self._resized(x)
        h = self.in_layers[2](h)
        shift = self.emb_layers(emb)[:, :, None, None]
        norm, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + shift)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h

    def _resized(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if self.resample < 0 else F.interpolate(x, scale_factor=2, mode="nearest")


class AttentionBlock(nn.Module):
    """Self-attention over all positions, residual. q, k and v lie head by head in the weights ("legacy" order)."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        name = "num_heads" if config.num_heads else "num_head_channels"
        divisor = config.num_heads or config.num_head_channels or channels
        if channels % divisor:
            raise UsageError(f"{name} is {divisor}", f"It must divide the {channels} channels that have attention")
        self.heads = config.num_heads or channels // divisor
        self.norm = GroupNorm(GROUPS, channels)
        self.qkv = Pointwise(channels, 3 * channels)
        self.proj_out = _zeroed(Pointwise(channels, channels))

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> the same
        N, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(N, H * W, self.heads, 3, C // self.heads)
        mixed = attention(*qkv.permute(3, 0, 2, 1, 4))  # each (N, heads, HW, d)
        return x + self.proj_out(mixed.transpose(1, 2).reshape(N, H, W, C).permute(0, 3, 1, 2))


class Stage(nn.Sequential):
    """Layers run in order; those that know the time embedding get it."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]  # Sequential takes one input
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNet(nn.Module):
    """Maps a noised input and its timesteps to a prediction of the same size."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        width, emb = config.model_channels, 4 * config.model_channels
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.input_blocks, skips = self._encoder(emb)
        widest = skips[-1]
        self.middle_block = Stage(
            ResBlock(widest, widest, emb, config), AttentionBlock(widest, config), ResBlock(widest, widest, emb, config)
        )
        self.output_blocks = self._decoder(emb, skips)
        last = config.channel_mult[0] * width
        self.out = nn.Sequential(
            GroupNorm(GROUPS, last), nn.SiLU(), _zeroed(Conv2d(last, config.out_channels, 3, padding=1))
        )

    def _encoder(self, emb: int) -> tuple[nn.ModuleList, list[int]]:
        """The downward half, and the width of every skip connection that it leaves."""
        c = self.config
        channels = c.model_channels
        blocks = nn.ModuleList([Stage(Conv2d(c.in_channels, channels, 3, padding=1))])
        skips = [channels]
        for level, mult in enumerate(c.channel_mult):
            for _ in range(c.num_res_blocks):
                layers: list[nn.Module] = [ResBlock(channels, mult * c.model_channels, emb, c)]
                channels = mult * c.model_channels
                if 2**level in c.attention_resolutions:
                    layers.append(AttentionBlock(channels, c))
                blocks.append(Stage(*layers))
                skips.append(channels)
            if level < len(c.channel_mult) - 1:
                down = ResBlock(channels, channels, emb, c, resample=-1) if c.resblock_updown else Downsample(channels)
                blocks.append(Stage(down))
                skips.append(channels)
        return blocks, skips

    def _decoder(self, emb: int, skips: list[int]) -> nn.ModuleList:
        c = self.config
        skips, channels = list(skips), skips[-1]
        blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(c.channel_mult))):
            for i in range(c.num_res_blocks + 1):
                layers: list[nn.Module] = [ResBlock(channels + skips.pop(), mult * c.model_channels, emb, c)]
                channels = mult * c.model_channels
                if 2**level in c.attention_resolutions:
                    layers.append(AttentionBlock(channels, c))
                if level and i == c.num_res_blocks:
                    up = ResBlock(channels, channels, emb, c, resample=1) if c.resblock_updown else Upsample(channels)
                    layers.append(up)
                blocks.append(Stage(*layers))
        return blocks

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predicts from `x` `[N, C, H, W]` at timesteps `t` `[N]`, or `[1]` where all samples share one.

        H and W must be multiples of `2 ** (levels - 1)`.
        """
        embedding = timestep_embedding(t, self.config.model_channels)
        emb = self.time_embed(embedding.to(x.dtype))
        skips = []
        for block in self.input_blocks:
            x = block(x, emb)
            skips.append(x)
        x = self.middle_block(x, emb)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb)
        return self.out(x)


def _check(config: UNetConfig) -> None:
    if (config.num_heads is None) == (config.num_head_channels is None):
        raise UsageError("a U-Net needs num_heads or num_head_channels", "Set one of the two, not both")
    if config.model_channels % GROUPS:
        raise UsageError(
            f"model_channels is {config.model_channels}", f"It must be a multiple of {GROUPS}, for group normalisation"
        )


def _zeroed(module: Conv) -> Conv:
    """Starts a residual branch at zero, so that an untrained block is the identity."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module
