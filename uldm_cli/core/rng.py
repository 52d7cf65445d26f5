"""Random numbers of training, as a function of (seed, stream, sample number, element) and of nothing else.

A counter-based generator: no state to save, so a resumed run, another batch size and another number of processes
draw the same values. SplitMix64 (Steele et al. 2014) hashes the counter; Box-Muller makes normals of it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

STREAM_FLIP, STREAM_TIMESTEP, STREAM_NOISE, STREAM_CROP, STREAM_POSTERIOR = 1, 2, 3, 4, 5
"""Streams of random numbers: what a draw is for."""


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FACTORS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift right: torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _FACTORS[0]
    x = (x ^ _shift(x, 27)) * _FACTORS[1]
    return x ^ _shift(x, 31)


def bits(seed: int, stream: int, number: Tensor, count: int) -> Tensor:
    """64 random bits as int64, `[N, count]`, for the sample numbers `[N]` (int64) of a stream."""
    device = number.device
    root = _mix(torch.tensor([seed], device=device) * _GOLDEN + stream)
    key = _mix(root + number * _GOLDEN)
    return _mix(key[:, None] + torch.arange(1, count + 1, device=device) * _GOLDEN)


def integers(seed: int, stream: int, number: Tensor, high: int) -> Tensor:
    """Uniform integers in [0, high), int64 `[N]`."""
    return _shift(bits(seed, stream, number, 1)[:, 0], 1) % high


def coin(seed: int, stream: int, number: Tensor) -> Tensor:
    """True in half of the cases, bool `[N]`."""
    return bits(seed, stream, number, 1)[:, 0] < 0


def normal(seed: int, stream: int, number: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal values, float32 `[N, *shape]`."""
    count = math.prod(shape)
    raw = bits(seed, stream, number, (count + 1) // 2)
    radius = (-2 * torch.log((_shift(raw, 32).float() + 0.5) / 2**32)).clamp(min=0).sqrt()
    angle = (raw & 0xFFFFFFFF).float() * (2 * math.pi / 2**32)
    values = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    return values[:, :count].view(len(number), *shape)
