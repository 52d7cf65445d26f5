"""Noise schedules: how much signal and how much noise a timestep holds, `x_t = alpha(t) x0 + sigma(t) eps`.

All are computed in float64 and stored in float32. Timestep -1 is the clean end, where alpha is 1 and sigma 0.
"""

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from uldm_cli.errors import UsageError


class Schedule(Protocol):
    """What samplers and denoisers know of a schedule."""

    T: int
    """Number of timesteps; `t` runs from 0 (nearly clean) to `T - 1` (nearly noise)."""

    def alpha(self, t: int) -> float:
        """Factor of the clean signal at timestep t, in [0, 1]; 1 at t = -1."""

    def sigma(self, t: int) -> float:
        """Factor of the noise at timestep t, in [0, 1]; 0 at t = -1."""

    def factors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`alpha` and `sigma` of int64 timesteps `[N]`, each `[N, 1, 1, 1]`."""


class VariancePreserving(nn.Module):
    """The discrete schedule of DDPM: alpha^2 + sigma^2 = 1 (Ho et al. 2020, eq. 4).

    Args:
        betas: float64 `[T]`, each in (0, 1).
    """

    alphas_cumprod: Tensor
    """float32 `[T]`, falling: alpha(t)^2."""

    def __init__(self, betas: Tensor) -> None:
        super().__init__()
        if betas.ndim != 1 or not bool(((betas > 0) & (betas < 1)).all()):
            raise UsageError("the schedule's betas must all lie between 0 and 1", "Check its start and end")
        alphas_cumprod = torch.cumprod(1 - betas.double(), 0).float()
        if not (alphas_cumprod[-1] > 0 and alphas_cumprod[0] < 1 and bool((alphas_cumprod.diff() < 0).all())):
            raise UsageError(
                f"float32 cannot tell all {len(betas)} noise levels of this schedule apart",
                "Use fewer timesteps, or betas that are less extreme",
            )
        self.T = len(betas)
        # Kept out of the state dict: the config says it all, and a stored copy could disagree with it.
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)
        self._table: list[float] = alphas_cumprod.tolist()

    def alpha(self, t: int) -> float:
        return 1.0 if t < 0 else math.sqrt(self._table[t])

    def sigma(self, t: int) -> float:
        return 0.0 if t < 0 else math.sqrt(1 - self._table[t])

    def factors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return a.sqrt(), (1 - a).sqrt()


def linear_betas(T: int, start: float, end: float) -> Tensor:
    """Betas that grow linearly from `start` to `end` (Ho et al. 2020, section 4). float64 `[T]`."""
    return torch.linspace(start, end, T, dtype=torch.float64)


def scaled_linear_betas(T: int, start: float, end: float) -> Tensor:
    """Betas whose square root grows linearly; what the latent-diffusion code calls "linear". float64 `[T]`."""
    return torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2


def cosine_betas(T: int, offset: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """Betas that make alpha_bar a squared cosine (Nichol & Dhariwal 2021, eq. 17). float64 `[T]`."""

    def alpha_bar(u: Tensor) -> Tensor:
        return torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2

    u = torch.arange(T + 1, dtype=torch.float64) / T
    bars = alpha_bar(u)
    return (1 - bars[1:] / bars[:-1]).clamp(max=max_beta)
