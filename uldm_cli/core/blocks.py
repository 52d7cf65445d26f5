"""Layers of the autoencoders, named as in the published code, and what the U-Net shares with them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uldm_cli.errors import UsageError


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions and a skip connection."""

    def __init__(self, channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = norm(channels, groups)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C', H, W)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class SelfAttention(nn.Module):
    """Multi-head self-attention over all positions, residual."""

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        if channels % heads:
            raise UsageError(f"num_heads is {heads}", f"It must divide the {channels} channels that have attention")
        self.heads = heads
        self.norm = norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> the same
        N, C, H, W = x.shape
        h = self.norm(x)

        def heads(y: Tensor) -> Tensor:  # (N, heads, HW, d)
            return y.permute(0, 2, 3, 1).reshape(N, H * W, self.heads, C // self.heads).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(heads(self.q(h)), heads(self.k(h)), heads(self.v(h)))
        return x + self.proj_out(mixed.transpose(1, 2).reshape(N, H, W, C).permute(0, 3, 1, 2))


class Downsample(nn.Module):
    """Halves height and width by a strided convolution, padded at the bottom and the right only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, H/2, W/2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, 2H, 2W)
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class GroupNorm(nn.GroupNorm):
    """Group normalisation; a CPU computes it in float32, its bfloat16 kernel for channels-last being far slower."""

    def forward(self, x: Tensor) -> Tensor:  # (N, C, ...) -> the same
        if x.dtype != torch.bfloat16 or x.device.type != "cpu":
            return super().forward(x)
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


def norm(channels: int, groups: int) -> GroupNorm:
    """Group normalisation with the autoencoders' epsilon of 1e-6."""
    if channels % groups:
        raise UsageError(f"norm_channels is {groups}", f"It must divide every width, and {channels} is one of them")
    return GroupNorm(groups, channels, eps=1e-6)
