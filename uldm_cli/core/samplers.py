"""Samplers: generators that walk from noise to an image and yield what happened in each step.

Whoever looks at sampling (frames, saliency, a plugin's analysis) consumes these steps; nothing of it can change them.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from uldm_cli.core.schedules import Schedule
from uldm_cli.errors import UsageError


class Prediction(NamedTuple):
    """What a denoiser says about a noised input: both float32, shaped like it."""

    x0: Tensor
    eps: Tensor


class PredictionWithVariance(Prediction):
    """A prediction of a network that has learned how much noise an ancestral step adds, too."""

    variance: Tensor
    """Where the variance of a step lies, on a logarithmic scale, between that of the posterior (-1) and that of the
    forward step (1), `[N, C, H, W]` (Nichol & Dhariwal 2021, eq. 15)."""

    def __new__(cls, x0: Tensor, eps: Tensor, variance: Tensor) -> "PredictionWithVariance":
        made = super().__new__(cls, x0, eps)
        made.variance = variance
        return made


Denoise = Callable[[Tensor, int], Prediction]
"""`denoise(x_t, t)`: the network with its parameterisation and guidance."""
Noise = Callable[[int, int], Tensor]
"""`noise(step, draw)`: standard normal noise shaped like x, for the draw-th use in a step."""
Variance = Literal["posterior", "beta", "learned"]
"""Of the noise that an ancestral step adds."""
Constrain = Callable[[Tensor, int], Tensor]
"""`constrain(x_t, t)`: changes the state before each call of the network (a known region, say)."""


@dataclass(frozen=True)
class Step:
    """One completed sampling step."""

    n: int
    """Completed steps: 1 after the first, S after the last."""
    t: int
    """Timestep of the network's first call in this step."""
    x_in: Tensor
    """What that call saw, `[N, C, H, W]`."""
    x: Tensor
    """The state after the step."""
    x0: Tensor
    """The clean signal predicted in that call."""
    eps: Tensor
    """The noise predicted in that call."""
    nfe: int
    """Calls of the network so far."""


@torch.no_grad()
def ddim(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    noise: Noise,
    constrain: Constrain | None = None,
    *,
    timesteps: Sequence[int],
    eta: float,
) -> Iterator[Step]:
    """Denoising diffusion implicit models (Song et al. 2021, eq. 12 and 16).

    Args:
        denoise: predicts x0 and eps.
        x: initial noise, float32 `[N, C, H, W]`.
        schedule: alpha and sigma.
        noise: called once a step when eta > 0.
        constrain: applied before each call of the network.
        timesteps: falling, the last being where the last step arrives (see `core.spacing`).
        eta: 0 is deterministic, 1 has DDPM's posterior variance.
    """
    for n, (t, s) in enumerate(pairwise(timesteps), 1):
        x_in = x if constrain is None else constrain(x, t)
        x0, eps = denoise(x_in, t)
        deviation = eta * posterior_deviation(schedule, t, s)
        x = schedule.alpha(s) * x0 + max(schedule.sigma(s) ** 2 - deviation**2, 0.0) ** 0.5 * eps
        if deviation > 0:
            x = x + deviation * noise(n, 0)
        yield Step(n, t, x_in, x, x0, eps, nfe=n)


@torch.no_grad()
def ddpm(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    noise: Noise,
    constrain: Constrain | None = None,
    *,
    timesteps: Sequence[int],
    variance: Variance,
) -> Iterator[Step]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), between any two timesteps.

    Args: as in `ddim`, and
        variance: that of the added noise: the posterior's q(x_s | x_t, x0); "beta", the forward step's q(x_t | x_s); or
            "learned", which lies between the two, where the denoiser says (Nichol & Dhariwal 2021, eq. 15).

    Raises:
        UsageError: "learned", and the denoiser gives no variance.
    """
    for n, (t, s) in enumerate(pairwise(timesteps), 1):
        x_in = x if constrain is None else constrain(x, t)
        prediction = denoise(x_in, t)
        x0, eps = prediction
        ratio = schedule.alpha(t) / schedule.alpha(s)
        forward = forward_variance(schedule, t, s)
        total = schedule.sigma(t) ** 2
        x = (ratio * schedule.sigma(s) ** 2 / total) * x_in + (schedule.alpha(s) * forward / total) * x0
        if s >= 0:
            x = x + _deviation(variance, prediction, schedule, t, s) * noise(n, 0)
        yield Step(n, t, x_in, x, x0, eps, nfe=n)


def _deviation(variance: Variance, prediction: Prediction, schedule: Schedule, t: int, s: int) -> float | Tensor:
    """Of the noise that an ancestral step from t to s adds; s is not the clean end."""
    low, high = posterior_deviation(schedule, t, s), forward_variance(schedule, t, s) ** 0.5
    if variance != "learned":
        return high if variance == "beta" else low
    if not isinstance(prediction, PredictionWithVariance):
        raise UsageError("this model has learned no variance", "Use variance=posterior or variance=beta")
    share = (prediction.variance + 1) / 2
    return torch.exp(share * math.log(high) + (1 - share) * math.log(low))


# Factors of the newest prediction and those before it, by how many there are before it.
_ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@torch.no_grad()
def plms(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    noise: Noise,
    constrain: Constrain | None = None,
    *,
    timesteps: Sequence[int],
) -> Iterator[Step]:
    """Pseudo linear multistep (Liu et al. 2022), as the latent-diffusion code does it; draws no noise.

    DDIM's deterministic step, along a noise that is extrapolated from the last four predictions (Adams-Bashforth).
    The first step, which has none before it, calls the network a second time where it arrives (improved Euler; the
    paper starts with Runge-Kutta steps). With one step in all, that call is made at the same timestep. Where that first
    timestep holds no signal, its noise is known and says nothing: there the mean of both predicted x0 counts.

    Args: as in `ddim`.
    """
    before: deque[Tensor] = deque(maxlen=len(_ADAMS_BASHFORTH) - 1)  # the newest first
    for n, (t, s) in enumerate(pairwise(timesteps), 1):
        x_in = x if constrain is None else constrain(x, t)
        x0, eps = denoise(x_in, t)
        clean = x0
        if before:
            factors = _ADAMS_BASHFORTH[len(before)]
            direction = torch.stack([f * past for f, past in zip(factors, (eps, *before), strict=True)]).sum(0)
        else:
            again = s if len(timesteps) > 2 else t
            ahead = _along(eps, x0, schedule, x_in, t, s)
            ahead = ahead if constrain is None else constrain(ahead, again)
            second = denoise(ahead, again)
            direction, clean = (eps + second.eps) / 2, (x0 + second.x0) / 2
        x = _along(direction, clean, schedule, x_in, t, s)
        before.appendleft(eps)
        yield Step(n, t, x_in, x, x0, eps, nfe=n + 1)


def _along(eps: Tensor, x0: Tensor, schedule: Schedule, x: Tensor, t: int, s: int) -> Tensor:
    """The state at s if the noise in x, the one at t, is eps: DDIM's step without added noise.

    Where x is nothing but noise, its clean signal is taken to be x0.
    """
    if schedule.alpha(t) == 0:
        return schedule.alpha(s) * x0 + schedule.sigma(s) / schedule.sigma(t) * x
    return schedule.alpha(s) * ((x - schedule.sigma(t) * eps) / schedule.alpha(t)) + schedule.sigma(s) * eps


def forward_variance(schedule: Schedule, t: int, s: int) -> float:
    """Variance of q(x_t | x_s) for s < t: beta_t where they are neighbours."""
    return schedule.sigma(t) ** 2 - (schedule.alpha(t) / schedule.alpha(s)) ** 2 * schedule.sigma(s) ** 2


def posterior_deviation(schedule: Schedule, t: int, s: int) -> float:
    """Standard deviation of q(x_s | x_t, x0) for s < t (Ho et al. 2020, eq. 7)."""
    return (forward_variance(schedule, t, s) ** 0.5) * schedule.sigma(s) / schedule.sigma(t)
