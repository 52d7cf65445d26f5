"""The training of a diffusion model in the latents of an autoencoder."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from uldm_cli.core import rng
from uldm_cli.core.autoencoders import drawn, has_posterior
from uldm_cli.core.denoiser import Target, convert, training_target
from uldm_cli.core.device import at_least_float32
from uldm_cli.core.latent import LatentDiffusion, to_latents
from uldm_cli.core.samplers import forward_variance, posterior_deviation
from uldm_cli.core.schedules import Schedule
from uldm_cli.core.training import Task


@dataclass(frozen=True)
class DiffusionLoss:
    """How what the network says is held against what it should have said."""

    norm: Literal["l2", "l1"] = "l2"
    """Mean squared (Ho et al. 2020, eq. 14) or absolute difference."""
    weighting: Literal["simple", "min-snr"] = "simple"
    """All timesteps alike, or by `min_snr_weight`, which is meant for l2."""
    gamma: float = 5.0
    """Where min-snr clips the signal-to-noise ratio."""
    vlb: float = 0.001
    """Factor of the variational bound, in bits a dimension, that trains a learned variance."""


class DiffusionTask(Task):
    """Denoising score matching in latents.

    Args:
        model: whose autoencoder stays as it is.
        seed: of timesteps, noise and drawn latents; a sample's draws depend on its number and this seed only.
        loss: what is minimised.
        cached: the data set hands out latents instead of images; see `training_latents`.
    """

    phases = ("denoiser",)

    def __init__(
        self, model: LatentDiffusion, seed: int, loss: DiffusionLoss | None = None, *, cached: bool = False
    ) -> None:
        super().__init__()
        self.model, self.seed, self.loss, self.cached = model, seed, loss or DiffusionLoss(), cached
        self.bound = VariationalBound(model.schedule) if model.denoiser.learned_variance else None
        model.autoencoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "DiffusionTask":
        super().train(mode)
        self.model.autoencoder.eval()
        return self

    def trained(self, phase: str) -> list[nn.Parameter]:
        return list(self.model.denoiser.parameters())

    def forward(self, phase: str, image: Tensor, number: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        model, denoiser, loss = self.model, self.model.denoiser, self.loss
        x0 = model.scale_factor * training_latents(
            model.autoencoder, image, number, seed=self.seed, shape=model.latent_shape, cached=self.cached
        )
        t = rng.integers(self.seed, rng.STREAM_TIMESTEP, number, denoiser.schedule.T)
        eps = rng.normal(self.seed, rng.STREAM_NOISE, number, x0.shape[1:])
        alpha, sigma = denoiser.schedule.factors(t)
        x = alpha * x0 + sigma * eps
        out = at_least_float32(denoiser.backbone(x, t))
        said, share = out.chunk(2, dim=1) if self.bound is not None else (out, None)
        error = said - training_target(denoiser.target, x0, eps, alpha, sigma)
        each = (error.square() if loss.norm == "l2" else error.abs()).mean((1, 2, 3))
        if loss.weighting == "min-snr":
            each = each * min_snr_weight(denoiser.target, alpha, sigma, loss.gamma).flatten()
        denoising = each.mean()
        if self.bound is None or share is None:
            return denoising, {"loss": denoising.detach()}
        clean = convert(denoiser.target, said.detach(), x, alpha, sigma).x0
        vlb = denoiser.schedule.T * self.bound(x0, clean, share, t).mean()
        total = denoising + loss.vlb * vlb
        return total, {"loss": total.detach(), "denoising": denoising.detach(), "vlb": vlb.detach()}


@torch.no_grad()
def training_latents(
    autoencoder: Any, image: Tensor, number: Tensor, *, seed: int, shape: tuple[int, int, int], cached: bool = False
) -> Tensor:
    """The unscaled latents that training sees. Those of a KL autoencoder are drawn, each by its sample's number.

    Args:
        autoencoder: a `core.latent.Autoencoder` and a module.
        image: `[N, C, H, W]` in [-1, 1]; if `cached`, unscaled latents `[N, z, h, w]`, or of a KL autoencoder their
            mean and the logarithm of their variance, `[N, 2 z, h, w]`.
        number: the sample numbers, int64 `[N]`.
        seed: of the draws.
        shape: `(z, h, w)`.
        cached: what `image` is.
    """
    noise = rng.normal(seed, rng.STREAM_POSTERIOR, number, shape) if has_posterior(autoencoder) else None
    if not cached:
        return to_latents(autoencoder, image, noise)
    stored = at_least_float32(image)
    if noise is None:
        return stored
    mean, logvar = stored.chunk(2, dim=1)
    return drawn(mean, logvar, noise)


def min_snr_weight(target: Target, alpha: Tensor, sigma: Tensor, gamma: float) -> Tensor:
    """Weights of squared errors, after Hang et al. 2023, eq. 10: all three make `min(SNR, gamma)` of the error in x0.

    The ratio SNR is alpha^2 / sigma^2: eps is weighted with min(SNR, gamma) / SNR, v with min(SNR, gamma) / (SNR + 1).
    Where no signal is left, that is 1 and 0.

    Args:
        target: of the network.
        alpha: factor of the signal.
        sigma: factor of the noise, above 0.
        gamma: above 0.
    """
    if target == "eps":
        return (gamma * (sigma / alpha).square()).clamp(max=1)
    snr = (alpha / sigma).square()
    return snr.clamp(max=gamma) if target == "x0" else snr.clamp(max=gamma) / (snr + 1)


class VariationalBound(nn.Module):
    """The terms of the variational bound as a function of a learned variance (Nichol & Dhariwal 2021, section 3.1).

    Args:
        schedule: whose neighbouring timesteps the terms are of.
    """

    low: Tensor
    high: Tensor
    factor: Tensor

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        pairs = [(t, t - 1) for t in range(schedule.T)]
        forward = [forward_variance(schedule, t, s) for t, s in pairs]
        # At t = 0 the posterior has no variance: it counts as that of its neighbour, as in the authors' code.
        posterior = [posterior_deviation(schedule, t, s) ** 2 for t, s in [(1, 0), *pairs[1:]]]
        factor = [schedule.alpha(t - 1) * beta / schedule.sigma(t) ** 2 for t, beta in enumerate(forward)]
        for name, values in (
            ("low", [math.log(value) for value in posterior]),
            ("high", [math.log(value) for value in forward]),
            ("factor", factor),
        ):
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def forward(self, x0: Tensor, clean: Tensor, share: Tensor, t: Tensor) -> Tensor:
        """Bits a dimension of each sample, `[N]`.

        For t > 0 it is the divergence KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)). For t = 0 it is -log p(x0 | x_0) of
        the normal density itself: latents have no steps of 8 bits, over which images integrate it.

        Args:
            x0: the clean signal, `[N, C, H, W]`.
            clean: what the network takes it for; it is to get no gradient from here.
            share: the network's word on the variance, between -1 and 1 (see `PredictionWithVariance`).
            t: int64 `[N]`.
        """
        low, high, factor = (values[t].view(-1, 1, 1, 1) for values in (self.low, self.high, self.factor))
        between = (share + 1) / 2
        logvar = between * high + (1 - between) * low
        # Of both means the part that x_t makes is the same.
        distance = (factor * (x0 - clean)).square() * torch.exp(-logvar)
        divergence = 0.5 * (logvar - low + torch.exp(low - logvar) - 1 + distance)
        surprise = 0.5 * (math.log(2 * math.pi) + logvar + distance)
        nats = torch.where((t == 0).view(-1, 1, 1, 1), surprise, divergence)
        return nats.mean((1, 2, 3)) / math.log(2)
