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

from uldm_cli.core.blocks import Attends, Conv2d, GroupNorm, Pointwise, Upsample
from uldm_cli.core.transformer import SpatialTransformer
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
    conv_resample: bool = True
    """Whether a convolution is part of changing the size; without effect where `resblock_updown`."""
    use_new_attention_order: bool = False
    """Weights of self-attention hold all of q, then k, then v; otherwise the three of each head in turn."""
    use_spatial_transformer: bool = False
    """Transformer blocks, which read a context, instead of self-attention."""
    transformer_depth: int = 1
    context_dim: int | None = None
    """Width of the context's tokens; set exactly where there are transformer blocks."""
    num_classes: int | None = None
    """Classes, whose embedding is added to that of the time."""


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding `[cos, sin]` of timesteps `[N]` to float32 `[N, dim]` (Vaswani et al. 2017, 3.5)."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(max_period) / half))
    angles = t[:, None].float() * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


class Downsample(nn.Module):
    def __init__(self, channels: int, *, conv: bool) -> None:
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1) if conv else nn.AvgPool2d(2)

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


class AttentionBlock(Attends):
    """Self-attention over all positions, residual."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.heads = _heads(channels, config)
        self.new_order = config.use_new_attention_order
        self.norm = GroupNorm(GROUPS, channels)
        self.qkv = Pointwise(channels, 3 * channels)
        self.proj_out = _zeroed(Pointwise(channels, channels))

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> the same
        N, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1)
        if self.new_order:
            parts = qkv.reshape(N, H * W, 3, self.heads, C // self.heads).unbind(2)
        else:
            parts = qkv.reshape(N, H * W, self.heads, 3, C // self.heads).unbind(3)
        mixed = self.attend(*(part.transpose(1, 2) for part in parts))  # each (N, heads, HW, d)
        return x + self.proj_out(mixed.transpose(1, 2).reshape(N, H, W, C).permute(0, 3, 1, 2))


class Stage(nn.Sequential):
    """Layers run in order; those that know the time embedding or the context get it."""

    def forward(  # type: ignore[override]  # Sequential takes one input
        self, x: Tensor, emb: Tensor, context: Tensor | None = None
    ) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """Maps a noised input and its timesteps to a prediction of the same size."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        width, emb = config.model_channels, 4 * config.model_channels
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        if config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_classes, emb)
        self.input_blocks, skips = self._encoder(emb)
        widest = skips[-1]
        self.middle_block = Stage(
            ResBlock(widest, widest, emb, config), _attention(widest, config), ResBlock(widest, widest, emb, config)
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
                    layers.append(_attention(channels, c))
                blocks.append(Stage(*layers))
                skips.append(channels)
            if level < len(c.channel_mult) - 1:
                blocks.append(Stage(_resampling(channels, emb, c, -1)))
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
                    layers.append(_attention(channels, c))
                if level and i == c.num_res_blocks:
                    layers.append(_resampling(channels, emb, c, 1))
                blocks.append(Stage(*layers))
        return blocks

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Predicts from `x` `[N, C, H, W]` at timesteps `t` `[N]`, or `[1]` where all samples share one.

        H and W must be multiples of `2 ** (levels - 1)`. A U-Net with transformer blocks needs a `context`
        `[N, L, context_dim]`, one with classes the labels `y`, int64 `[N]`; any other takes neither.

        Raises:
            UsageError: context, labels or the input's channels are not those that it was made for.
        """
        self._check_inputs(x, context, y)
        embedding = timestep_embedding(t, self.config.model_channels)
        emb = self.time_embed(embedding.to(x.dtype))
        if y is not None:
            emb = emb + self.label_emb(y)
        skips = []
        for block in self.input_blocks:
            x = block(x, emb, context)
            skips.append(x)
        x = self.middle_block(x, emb, context)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb, context)
        return self.out(x)

    def _check_inputs(self, x: Tensor, context: Tensor | None, y: Tensor | None) -> None:
        c, (N, channels, *_) = self.config, x.shape
        if channels != c.in_channels:
            hint = f"It takes {c.in_channels}, of which a condition may be a part"
            raise UsageError(f"the U-Net's input has {channels} channels", hint)
        if (context is None) != (c.context_dim is None):
            raise UsageError(*_amiss("a context", c.context_dim, f"[N, L, {c.context_dim}]"))
        if (y is None) != (c.num_classes is None):
            raise UsageError(*_amiss("class labels", c.num_classes, "[N]"))
        if context is not None and (context.ndim != 3 or (len(context), context.shape[2]) != (N, c.context_dim)):
            expected = f"Expected [{N}, L, {c.context_dim}]: samples, tokens, the U-Net's context_dim"
            raise UsageError(f"the context has the shape {list(context.shape)}", expected)
        if y is not None and y.shape != (N,):
            raise UsageError(f"the class labels have the shape {list(y.shape)}", f"Expected [{N}], one a sample")


def _amiss(what: str, needed: int | None, shape: str) -> tuple[str, str]:
    """Message and hint where an argument is missing, or given to a U-Net that has no place for it."""
    if needed is None:
        return f"{what} cannot be given to this U-Net", "It was made without"
    return f"this U-Net needs {what}", f"Give it a tensor of the shape {shape}"


def _attention(channels: int, config: UNetConfig) -> nn.Module:
    """What mixes the positions where there is attention."""
    if config.context_dim is None:
        return AttentionBlock(channels, config)
    return SpatialTransformer(channels, config.context_dim, _heads(channels, config), config.transformer_depth)


def _heads(channels: int, config: UNetConfig) -> int:
    """Attention heads of a layer of that width."""
    name = "num_heads" if config.num_heads else "num_head_channels"
    divisor = config.num_heads or config.num_head_channels or channels
    if channels % divisor:
        raise UsageError(f"{name} is {divisor}", f"It must divide the {channels} channels that have attention")
    return config.num_heads or channels // divisor


def _resampling(channels: int, emb: int, config: UNetConfig, resample: int) -> nn.Module:
    """What halves (-1) or doubles (1) the size between two levels."""
    if config.resblock_updown:
        return ResBlock(channels, channels, emb, config, resample)
    if resample < 0:
        return Downsample(channels, conv=config.conv_resample)
    return Upsample(channels) if config.conv_resample else nn.Upsample(scale_factor=2, mode="nearest")


def _check(config: UNetConfig) -> None:
    if (config.num_heads is None) == (config.num_head_channels is None):
        raise UsageError("a U-Net needs num_heads or num_head_channels", "Set one of the two, not both")
    if config.use_spatial_transformer != (config.context_dim is not None):
        hint = "Set both, or neither"
        raise UsageError("in a U-Net, use_spatial_transformer goes together with context_dim", hint)
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
