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
        betas: float64 `[T]`, each in (0, 1); the last may be 1, so that nothing of the signal is left there.
    """

    alphas_cumprod: Tensor
    """float32 `[T]`, falling: alpha(t)^2."""

    def __init__(self, betas: Tensor) -> None:
        super().__init__()
        if betas.ndim != 1 or not bool(((betas > 0) & (betas <= 1)).all() and (betas[:-1] < 1).all()):
            raise UsageError("the schedule's betas must all lie between 0 and 1", "Check its start and end")
        alphas_cumprod = torch.cumprod(1 - betas.double(), 0).float()
        vanished = alphas_cumprod[-1] == 0 and betas[-1] < 1
        if vanished or not (alphas_cumprod[0] < 1 and bool((alphas_cumprod.diff() < 0).all())):
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


def ends_in_noise(schedule: Schedule) -> bool:
    """Whether nothing of the signal is left at the last timestep (zero terminal signal-to-noise ratio)."""
    return schedule.alpha(schedule.T - 1) == 0


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


def sigmoid_betas(T: int, start: float = -3, end: float = 3, tau: float = 1, max_beta: float = 0.999) -> Tensor:
    """Betas that make alpha_bar a falling sigmoid (Jabri et al. 2022, algorithm 1). float64 `[T]`.

    Args:
        T: number of timesteps.
        start: where on the sigmoid the clean end lies.
        end: where the noisy end lies, greater than start.
        tau: temperature; greater ones flatten the curve.
        max_beta: the formula alone would leave nothing of the signal at the last timestep.
    """
    u = torch.arange(T + 1, dtype=torch.float64) / T
    curve = torch.sigmoid((start + u * (end - start)) / tau)
    bars = curve[-1] - curve
    return (1 - bars[1:] / bars[:-1]).clamp(max=max_beta)


def without_signal_at_the_end(betas: Tensor) -> Tensor:
    """Betas whose last alpha_bar is 0 and whose first is as before (Lin et al. 2023, algorithm 1).

    In between, sqrt(alpha_bar) is shifted and scaled.

    Args:
        betas: float64 `[T]`, T at least 2.
    """
    roots = torch.cumprod(1 - betas, 0).sqrt()
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    bars = torch.cat([torch.ones(1, dtype=roots.dtype), roots**2])
    return 1 - bars[1:] / bars[:-1]
