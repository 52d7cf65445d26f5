"""Samplers on distributions whose score is known exactly: a mixture of two Gaussians, and a single one.

Both are one-dimensional, so the truth needs no solver: the probability-flow ODE keeps quantiles.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from uldm_cli.core.samplers import (
    Denoise,
    Prediction,
    PredictionWithVariance,
    Step,
    ddim,
    ddpm,
    forward_variance,
    plms,
    posterior_deviation,
)
from uldm_cli.core.schedules import VariancePreserving, cosine_betas, linear_betas, without_signal_at_the_end
from uldm_cli.core.spacing import trailing_timesteps, uniform_timesteps

WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
MEANS = torch.tensor([-1.0, 1.5], dtype=torch.float64)
VARIANCES = torch.tensor([0.3, 0.5], dtype=torch.float64) ** 2
FINE = 4097  # timesteps: so many that every 2^k-th one makes a grid of any number of steps up to 512
COSINE = VariancePreserving(cosine_betas(FINE))
LINEAR = VariancePreserving(linear_betas(FINE, 2.5e-5, 5e-3))
NO_SIGNAL = VariancePreserving(without_signal_at_the_end(linear_betas(FINE, 2.5e-5, 5e-3)))


def denoiser(schedule: VariancePreserving, weights=WEIGHTS, means=MEANS, variances=VARIANCES) -> Denoise:
    """E[x0 | x_t] of a mixture of Gaussians."""

    def denoise(x: Tensor, t: int) -> Prediction:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        total = alpha**2 * variances + sigma**2
        off = x[..., None] - alpha * means
        share = torch.softmax(weights.log() - 0.5 * total.log() - 0.5 * off**2 / total, dim=-1)
        x0 = (share * (means + alpha * variances / total * off)).sum(-1)
        return Prediction(x0, (x - alpha * x0) / sigma)

    return denoise


def cdf(x: Tensor, alpha: float, sigma: float) -> Tensor:
    """Of the noised mixture."""
    z = (x[..., None] - alpha * MEANS) / (alpha**2 * VARIANCES + sigma**2).sqrt()
    return (WEIGHTS * torch.special.ndtr(z)).sum(-1)


def quantile(p: Tensor, alpha: float, sigma: float) -> Tensor:
    low, high = torch.full_like(p, -20), torch.full_like(p, 20)
    for _ in range(80):
        middle = (low + high) / 2
        below = cdf(middle, alpha, sigma) < p
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


def grid(first: int, last: int, steps: int) -> list[int]:
    """Equally spaced falling timesteps, `steps + 1` of them."""
    assert (first - last) % steps == 0
    return [first - i * (first - last) // steps for i in range(steps + 1)]


def assert_halving(errors: list[float]) -> None:
    """First order: twice the steps, half the error."""
    ratios = [before / after for before, after in pairwise(errors)]
    assert all(1.9 < ratio < 2.1 for ratio in ratios), ratios


def no_noise(step: int, draw: int) -> Tensor:
    raise AssertionError("eta 0 draws nothing")


@pytest.mark.parametrize("schedule", [COSINE, LINEAR], ids=["cosine", "linear"])
def test_ddim_converges_to_the_ode_at_first_order(schedule: VariancePreserving) -> None:
    start, end = FINE - 1, 0
    x = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)
    exact = quantile(cdf(x, schedule.alpha(start), schedule.sigma(start)), schedule.alpha(end), schedule.sigma(end))
    errors = []
    for steps in (64, 128, 256, 512):
        *_, last = ddim(denoiser(schedule), x, schedule, no_noise, timesteps=grid(start, end, steps), eta=0.0)
        errors.append((last.x - exact).abs().mean().item())
    assert errors[-1] < 0.004
    assert_halving(errors)


@pytest.mark.parametrize("schedule", [COSINE, LINEAR], ids=["cosine", "linear"])
def test_plms_converges_to_the_ode_at_second_order(schedule: VariancePreserving) -> None:
    """The first step, of lower order than the others, decides. Between levels where neither signal nor noise is all."""
    start, end = FINE - 1 - FINE // 8, FINE // 8
    x = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)
    exact = quantile(cdf(x, schedule.alpha(start), schedule.sigma(start)), schedule.alpha(end), schedule.sigma(end))
    errors = []
    for steps in (32, 64, 128, 256):
        *_, last = plms(denoiser(schedule), x, schedule, no_noise, timesteps=grid(start, end, steps))
        errors.append((last.x - exact).abs().mean().item())
    assert errors[-1] < 2e-5
    ratios = [before / after for before, after in pairwise(errors)]
    assert all(3.8 < ratio < 5 for ratio in ratios), ratios


Run = Callable[[Tensor, Callable[[int, int], Tensor], list[int]], Iterator[Step]]
MEAN, VARIANCE = 0.7, 0.4**2
ANCESTRAL: dict[str, Run] = {
    "ddim-eta-1": lambda x, noise, ts: ddim(gaussian(), x, COSINE, noise, timesteps=ts, eta=1.0),
    "ddim-eta-0.5": lambda x, noise, ts: ddim(gaussian(), x, COSINE, noise, timesteps=ts, eta=0.5),
    "ddpm": lambda x, noise, ts: ddpm(gaussian(), x, COSINE, noise, timesteps=ts, variance="posterior"),
    "ddpm-beta": lambda x, noise, ts: ddpm(gaussian(), x, COSINE, noise, timesteps=ts, variance="beta"),
}


def gaussian(schedule: VariancePreserving = COSINE) -> Denoise:
    weights, means, variances = torch.tensor([[1.0], [MEAN], [VARIANCE]], dtype=torch.float64)
    return denoiser(schedule, weights, means, variances)


def moments(run: Run, timesteps: list[int], mean: float, variance: float) -> tuple[float, float]:
    """Exact mean and variance of what a sampler arrives at from a Gaussian, without drawing anything.

    The denoiser of a Gaussian is affine, so the result is affine in the start and in each step's noise. The first
    sample of this batch has zeros everywhere; each further one has a single 1, and its difference is that one's factor.
    """
    steps = len(timesteps) - 1
    units = torch.eye(steps + 2, dtype=torch.float64)
    *_, last = run(units[:, 1], lambda step, draw: units[:, step + 1], timesteps)
    base, factors = last.x[0], last.x[1:] - last.x[0]
    return float(base + factors[0] * mean), float(factors[0] ** 2 * variance + (factors[1:] ** 2).sum())


@pytest.mark.parametrize("name", ANCESTRAL)
def test_ancestral_samplers_have_weak_order_one(name: str) -> None:
    """From the exact marginal at one timestep to another, where still 3 % of the variance is noise."""
    start, end = FINE - 1, FINE // 8

    def marginal(t: int) -> tuple[float, float]:
        return COSINE.alpha(t) * MEAN, COSINE.alpha(t) ** 2 * VARIANCE + COSINE.sigma(t) ** 2

    errors = []
    for steps in (64, 128, 256, 512):
        got = moments(ANCESTRAL[name], grid(start, end, steps), *marginal(start))
        assert got[0] == pytest.approx(marginal(end)[0], abs=1e-9)  # of a Gaussian, the mean is exact
        errors.append(abs(got[1] - marginal(end)[1]))
    assert_halving(errors)


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_from_pure_noise_the_mean_of_samples_is_exact(variance, steps: int) -> None:
    """Where the schedule leaves no signal, noise is what the network was trained to begin with; else it is not."""

    def mean(schedule: VariancePreserving, timesteps: list[int]) -> float:
        def run(x: Tensor, noise: Callable[[int, int], Tensor], ts: list[int]) -> Iterator[Step]:
            return ddpm(gaussian(schedule), x, schedule, noise, timesteps=ts, variance=variance)

        return moments(run, timesteps, 0.0, 1.0)[0]

    timesteps = trailing_timesteps(FINE, steps)
    assert mean(NO_SIGNAL, timesteps) == pytest.approx(MEAN, abs=1e-9)
    some = VariancePreserving(linear_betas(FINE, 2.5e-5, 1e-3))
    assert mean(some, timesteps) < MEAN - 0.01


@pytest.mark.parametrize("schedule", [COSINE, NO_SIGNAL], ids=["cosine", "no-signal"])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_the_best_learned_variance_makes_ancestral_sampling_exact(schedule: VariancePreserving, steps: int) -> None:
    """Of a Gaussian the reverse steps are Gaussians, and their variance lies between the posterior's and beta."""
    timesteps = [*trailing_timesteps(FINE, steps)[:-1], FINE // 16]
    arrives = dict(pairwise(timesteps))

    def denoise(x: Tensor, t: int) -> Prediction:
        s = arrives[t]
        ratio, beta = schedule.alpha(t) / schedule.alpha(s), forward_variance(schedule, t, s)
        before = schedule.alpha(s) ** 2 * VARIANCE + schedule.sigma(s) ** 2
        best = torch.tensor(1 / (1 / before + ratio**2 / beta), dtype=torch.float64)
        low = 2 * torch.tensor(posterior_deviation(schedule, t, s), dtype=torch.float64).log()
        share = (best.log() - low) / (torch.tensor(beta, dtype=torch.float64).log() - low)
        assert 0 < share < 1
        return PredictionWithVariance(*gaussian(schedule)(x, t), (2 * share - 1).expand_as(x))

    def run(x: Tensor, noise: Callable[[int, int], Tensor], ts: list[int]) -> Iterator[Step]:
        return ddpm(denoise, x, schedule, noise, timesteps=ts, variance="learned")

    def marginal(t: int) -> tuple[float, float]:
        return schedule.alpha(t) * MEAN, schedule.alpha(t) ** 2 * VARIANCE + schedule.sigma(t) ** 2

    got = moments(run, timesteps, *marginal(timesteps[0]))
    assert got == pytest.approx(marginal(timesteps[-1]), abs=1e-9)


def test_plms_from_pure_noise_converges_to_the_ode() -> None:
    start, end = FINE - 1, FINE // 8
    x = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)
    exact = quantile(cdf(x, 0.0, 1.0), NO_SIGNAL.alpha(end), NO_SIGNAL.sigma(end))
    errors = []
    for steps in (32, 64, 128, 256):
        *_, last = plms(denoiser(NO_SIGNAL), x, NO_SIGNAL, no_noise, timesteps=grid(start, end, steps))
        errors.append((last.x - exact).abs().mean().item())
    assert errors[-1] < 2e-4
    ratios = [before / after for before, after in pairwise(errors)]
    assert all(ratio > 3 for ratio in ratios), ratios


@pytest.mark.parametrize("name", ["ddim-eta-0", "ddim-eta-1", "ddpm", "ddpm-beta"])
@pytest.mark.parametrize("steps", [200, 400], ids=["to-the-first-timestep", "to-the-clean-end"])
def test_samples_of_the_mixture(name: str, steps: int) -> None:
    """Share of the left mode, mean and variance of 20,000 samples: within 4 standard errors and 0.02 of bias."""
    T, count = 400, 20_000
    schedule = VariancePreserving(cosine_betas(T))
    generator = torch.Generator().manual_seed(7)
    timesteps = uniform_timesteps(T, steps)

    def noise(step: int, draw: int) -> Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    x_T = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)  # evenly over the normal
    if name.startswith("ddim"):
        run = ddim(denoiser(schedule), x_T, schedule, noise, timesteps=timesteps, eta=float(name[-1]))
    else:
        kind = "beta" if name.endswith("beta") else "posterior"
        run = ddpm(denoiser(schedule), x_T, schedule, noise, timesteps=timesteps, variance=kind)
    *_, last = run
    alpha, sigma = schedule.alpha(timesteps[-1]), schedule.sigma(timesteps[-1])

    share = cdf(torch.zeros(1, dtype=torch.float64), alpha, sigma).item()
    mean = alpha * (WEIGHTS * MEANS).sum().item()
    variance = (WEIGHTS * (alpha**2 * (VARIANCES + MEANS**2) + sigma**2)).sum().item() - mean**2
    fourth = ((last.x - mean) ** 4).mean().item()
    for got, true, deviation in (
        ((last.x < 0).double().mean(), share, (share * (1 - share)) ** 0.5),
        (last.x.mean(), mean, variance**0.5),
        (last.x.var(), variance, (fourth - variance**2) ** 0.5),
    ):
        assert got.item() == pytest.approx(true, abs=4 * deviation / count**0.5 + 0.02)
