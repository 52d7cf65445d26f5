"""Losses of diffusion, by hand and against torch's distributions, and that a sample's draws are its number's."""

import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from uldm_cli.core import rng
from uldm_cli.core.denoiser import Denoiser, Target, convert
from uldm_cli.core.diffusing import DiffusionLoss, DiffusionTask, VariationalBound, min_snr_weight, training_latents
from uldm_cli.core.latent import LatentDiffusion
from uldm_cli.core.rng import STREAM_NOISE, STREAM_POSTERIOR, STREAM_TIMESTEP
from uldm_cli.core.samplers import forward_variance, posterior_deviation
from uldm_cli.core.schedules import (
    VariancePreserving,
    cosine_betas,
    linear_betas,
    sigmoid_betas,
    without_signal_at_the_end,
)

SCHEDULE = VariancePreserving(cosine_betas(100))
NO_SIGNAL = VariancePreserving(without_signal_at_the_end(linear_betas(100, 1e-3, 0.05)))
TARGETS: tuple[Target, ...] = ("eps", "x0", "v")
every_target = pytest.mark.parametrize("target", TARGETS)


def images(count: int = 8, size: int = 8) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Halving(nn.Module):
    """An autoencoder without parameters to learn: half the values, quarter of the size."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def to_latent(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.factor * F.avg_pool2d(x, 2)


class Wide(Halving):
    """One whose latents are distributions."""

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = super().to_latent(x)
        return mean, mean.square() - 1

    def to_latent(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        mean, logvar = self.moments(x)
        return mean if noise is None else mean + (0.5 * logvar).exp() * noise


class Backbone(nn.Module):
    def __init__(self, out: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, out, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x) + (0.01 * t.view(-1, 1, 1, 1)).to(x.dtype)


def diffusion_task(
    target: Target = "eps",
    loss: DiffusionLoss | None = None,
    *,
    learned: bool = False,
    schedule: VariancePreserving = SCHEDULE,
    autoencoder: nn.Module | None = None,
    cached: bool = False,
) -> DiffusionTask:
    torch.manual_seed(0)
    denoiser = Denoiser(Backbone(6 if learned else 3), deepcopy(schedule), target, learned_variance=learned)
    model = LatentDiffusion(autoencoder or Halving(), denoiser, 3.0, (3, 4, 4), (3, 8, 8))
    return DiffusionTask(model, 11, loss, cached=cached)


def weight(target: Target, weighting: str, gamma: float, alpha: float, sigma: float) -> float:
    """Hang et al. 2023: section 3.4 for eps and v, equation 10 for x0."""
    if weighting == "simple":
        return 1.0
    snr = alpha**2 / sigma**2
    least = min(snr, gamma)
    return {"eps": least / snr, "x0": least, "v": least / (snr + 1)}[target]


@every_target
@pytest.mark.parametrize(
    "loss",
    [
        DiffusionLoss(),
        DiffusionLoss("l1"),
        DiffusionLoss(weighting="min-snr"),
        DiffusionLoss("l2", "min-snr", 0.7),
    ],
    ids=["simple", "l1", "min-snr-5", "min-snr-0.7"],
)
def test_loss_by_hand(target: Target, loss: DiffusionLoss) -> None:
    task, x, number = diffusion_task(target, loss), images(), torch.arange(100, 108)
    found, logs = task("denoiser", x, number)
    z = 3 * 0.5 * F.avg_pool2d(x, 2)
    errors = []
    for i, n in enumerate(number):
        t = int(rng.integers(11, STREAM_TIMESTEP, n[None], 100))
        eps = rng.normal(11, STREAM_NOISE, n[None], (3, 4, 4))
        alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
        wanted = {"eps": eps, "x0": z[i : i + 1], "v": alpha * eps - sigma * z[i : i + 1]}[target]
        out = task.model.denoiser.backbone(alpha * z[i : i + 1] + sigma * eps, torch.tensor([t]))
        error = (out - wanted).abs() if loss.norm == "l1" else (out - wanted).square()
        errors.append(weight(target, loss.weighting, loss.gamma, alpha, sigma) * error.mean())
    torch.testing.assert_close(found, torch.stack(errors).mean(), rtol=1e-4, atol=1e-5)
    assert logs.keys() == {"loss"}
    assert torch.equal(logs["loss"], found.detach())


def test_a_batch_of_eight_is_eight_of_one() -> None:
    task, x, number = diffusion_task(), images(), torch.arange(40, 48)
    together = task("denoiser", x, number)[0]
    alone = [task("denoiser", x[i : i + 1], number[i : i + 1])[0] for i in range(8)]
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-5, atol=1e-6)
    assert len({round(loss.item(), 4) for loss in alone}) == 8
    assert not torch.isclose(task("denoiser", x, number + 8)[0], together, rtol=1e-3)


def test_the_autoencoder_is_not_trained() -> None:
    task = diffusion_task().train()
    assert task.training
    assert task.model.denoiser.training
    assert not task.model.autoencoder.training
    loss, _ = task("denoiser", images(), torch.arange(8))
    loss.backward()
    assert task.model.autoencoder.factor.grad is None
    assert not task.model.autoencoder.factor.requires_grad
    trained = task.trained("denoiser")
    assert {id(p) for p in trained} == {id(p) for p in task.model.denoiser.backbone.parameters()}
    assert all(p.grad is not None for p in trained)


@pytest.mark.parametrize("learned", [False, True])
def test_double_precision_goes_all_the_way(learned: bool) -> None:
    loss = DiffusionLoss(weighting="min-snr")
    single, double = (diffusion_task("v", loss, learned=learned, autoencoder=Wide()) for _ in range(2))
    double.to(torch.float64)
    found = double("denoiser", images().double(), torch.arange(8))[0]
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(single("denoiser", images(), torch.arange(8))[0].item(), rel=1e-5)
    found.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float64 for p in double.trained("denoiser"))


# Weights by the signal-to-noise ratio


def factors(schedule: VariancePreserving) -> tuple[Tensor, Tensor]:
    alpha, sigma = schedule.factors(torch.arange(schedule.T))
    return alpha.double(), sigma.double()


@every_target
@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize(
    "schedule", [SCHEDULE, VariancePreserving(sigmoid_betas(100)), NO_SIGNAL], ids=["cosine", "sigmoid", "no-signal"]
)
def test_weighted_errors_are_the_same_in_x0(target: Target, gamma: float, schedule: VariancePreserving) -> None:
    """Whatever is predicted, its weighted error is min(SNR, gamma) times that of the clean signal it amounts to."""
    alpha, sigma = factors(schedule)
    kept = slice(None, -1) if target == "eps" else slice(None)  # without signal, eps amounts to nothing
    alpha, sigma = alpha[kept], sigma[kept]
    x, out, wrong = torch.randn(3, len(alpha), 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = convert(target, out, x, alpha, sigma), convert(target, out + wrong, x, alpha, sigma)
    snr = (alpha / sigma).square()
    weighted = min_snr_weight(target, alpha, sigma, gamma) * wrong.square()
    torch.testing.assert_close(weighted, snr.clamp(max=gamma) * (a.x0 - b.x0).square(), rtol=1e-6, atol=1e-9)


def test_weights_where_no_signal_is_left() -> None:
    alpha, sigma = torch.zeros(1), torch.ones(1)
    assert [min_snr_weight(target, alpha, sigma, 5.0).item() for target in TARGETS] == [1, 0, 0]


@pytest.mark.parametrize("target", ["x0", "v"])
@pytest.mark.parametrize("loss", [DiffusionLoss(), DiffusionLoss(weighting="min-snr")], ids=["simple", "min-snr"])
@pytest.mark.parametrize("learned", [False, True])
def test_gradients_are_finite_at_every_timestep_of_a_schedule_without_signal(target, loss, learned) -> None:
    task = diffusion_task(target, loss, learned=learned, schedule=NO_SIGNAL)
    number = torch.arange(600)
    assert len(rng.integers(11, STREAM_TIMESTEP, number, 100).unique()) > 95
    assert 99 in rng.integers(11, STREAM_TIMESTEP, number, 100)
    found, _ = task("denoiser", images(600), number)
    found.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.trained("denoiser"))


# Latents


@pytest.mark.parametrize("autoencoder", [Halving(), Wide()], ids=["plain", "drawn"])
def test_cached_latents_are_those_on_the_fly(autoencoder: nn.Module) -> None:
    x, number = images(), torch.arange(30, 38)
    drawn = isinstance(autoencoder, Wide)
    with torch.no_grad():
        stored = torch.cat(autoencoder.moments(x), 1) if drawn else autoencoder.to_latent(x)
    told = {"seed": 11, "shape": (3, 4, 4)}
    found = training_latents(autoencoder, x, number, **told)
    torch.testing.assert_close(training_latents(autoencoder, stored, number, **told, cached=True), found)
    assert not found.requires_grad
    on_the_fly = diffusion_task(autoencoder=autoencoder)("denoiser", x, number)[0]
    cached = diffusion_task(autoencoder=autoencoder, cached=True)("denoiser", stored, number)[0]
    torch.testing.assert_close(cached, on_the_fly)


def test_latents_that_are_distributions_are_drawn_by_their_samples_number() -> None:
    autoencoder, x, number = Wide(), images(), torch.arange(30, 38)
    found = training_latents(autoencoder, x, number, seed=11, shape=(3, 4, 4))
    mean, logvar = autoencoder.moments(x)
    noise = rng.normal(11, STREAM_POSTERIOR, number, (3, 4, 4))
    torch.testing.assert_close(found, (mean + logvar.exp().sqrt() * noise).detach())
    again = training_latents(autoencoder, x[3:5], number[3:5], seed=11, shape=(3, 4, 4))
    torch.testing.assert_close(again, found[3:5])
    other = training_latents(autoencoder, x, number + 1, seed=11, shape=(3, 4, 4))
    assert not torch.isclose(other, found).any(1).all()


def test_the_noise_of_a_draw_is_not_that_of_the_diffusion() -> None:
    number = torch.arange(4)
    assert not torch.allclose(
        rng.normal(11, STREAM_POSTERIOR, number, (3, 4, 4)), rng.normal(11, STREAM_NOISE, number, (3, 4, 4))
    )


# Learned variance


@pytest.mark.parametrize("schedule", [SCHEDULE, NO_SIGNAL], ids=["cosine", "no-signal"])
def test_the_bound_is_that_of_torchs_distributions(schedule: VariancePreserving) -> None:
    t = torch.arange(schedule.T)
    x0, clean, share = torch.randn(3, schedule.T, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    found = VariationalBound(schedule)(x0, clean, share, t)
    x = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(1)).double()
    for i in range(schedule.T):
        beta = forward_variance(schedule, i, i - 1)
        low = math.log(posterior_deviation(schedule, max(i, 1), max(i, 1) - 1) ** 2)
        v = (share[i].double() + 1) / 2
        deviation = (v * math.log(beta) + (1 - v) * low).exp().sqrt()
        total, ratio = schedule.sigma(i) ** 2, schedule.alpha(i) / schedule.alpha(i - 1)
        means = [
            ratio * schedule.sigma(i - 1) ** 2 / total * x + schedule.alpha(i - 1) * beta / total * clear.double()
            for clear in (x0[i], clean[i])
        ]
        learned = Normal(means[1], deviation)
        if i == 0:
            nats = -learned.log_prob(x0[0].double())
        else:
            nats = kl_divergence(Normal(means[0], math.exp(0.5 * low)), learned)
        assert found[i].item() == pytest.approx(nats.mean().item() / math.log(2), rel=1e-4)


@every_target
def test_the_hybrid_loss_by_hand(target: Target) -> None:
    """The mean learns from the error alone, the variance from the bound alone (Nichol & Dhariwal 2021, eq. 16)."""
    task, x, number = diffusion_task(target, DiffusionLoss(vlb=0.02), learned=True), images(), torch.arange(60, 68)
    total, logs = task("denoiser", x, number)
    assert logs["loss"].item() == pytest.approx(logs["denoising"].item() + 0.02 * logs["vlb"].item(), rel=1e-6)
    total.backward()
    whole = task.model.denoiser.backbone.conv.weight.grad.clone()

    alone = diffusion_task(target)
    with torch.no_grad():
        alone.model.denoiser.backbone.conv.weight.copy_(task.model.denoiser.backbone.conv.weight[:3])
        alone.model.denoiser.backbone.conv.bias.copy_(task.model.denoiser.backbone.conv.bias[:3])
    error, _ = alone("denoiser", x, number)
    error.backward()
    torch.testing.assert_close(logs["denoising"], error.detach())
    torch.testing.assert_close(whole[:3], alone.model.denoiser.backbone.conv.weight.grad)
    assert whole[3:].abs().max() > 0


class Table(nn.Module):
    """The best network for a normal distribution: `x` times a number a timestep, and a number for the variance."""

    def __init__(self, T: int, learned: bool) -> None:
        super().__init__()
        self.slope, self.share = nn.Parameter(torch.zeros(T)), nn.Parameter(torch.zeros(T))
        self.learned = learned

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = self.slope[t].view(-1, 1, 1, 1) * x
        return torch.cat([out, self.share[t].view(-1, 1, 1, 1).expand_as(x)], 1) if self.learned else out


class Identity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(()))

    def to_latent(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        return x


@pytest.mark.parametrize("weighting", ["simple", "min-snr"])
@pytest.mark.parametrize(
    ("target", "schedule"),
    [("eps", VariancePreserving(cosine_betas(12))), *((t, NO_SIGNAL) for t in ("x0", "v"))],
    ids=["eps", "x0-no-signal", "v-no-signal"],
)
def test_training_finds_the_score_and_the_variances_of_a_normal_distribution(target, schedule, weighting) -> None:
    """Data of mean 0 and variance 0.25: for every timestep the best slope and variance are known."""
    if schedule is NO_SIGNAL:
        schedule = VariancePreserving(without_signal_at_the_end(cosine_betas(12)))
    T, spread = schedule.T, 0.25
    model = LatentDiffusion(
        Identity(), Denoiser(Table(T, True), schedule, target, learned_variance=True), 1.0, (1, 4, 4), (1, 4, 4)
    )
    task = DiffusionTask(model, 0, DiffusionLoss(weighting=weighting, vlb=1.0))
    table = model.denoiser.backbone
    optimizer = torch.optim.Adam(table.parameters(), 0.05)
    generator, losses = torch.Generator().manual_seed(0), []
    for step in range(250):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 250)
        x = spread**0.5 * torch.randn(192, 1, 4, 4, generator=generator)
        loss, _ = task("denoiser", x, torch.arange(step * 192, step * 192 + 192))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.95 * sum(losses[:20])
    for t in range(T):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        total = alpha**2 * spread + sigma**2
        best = {"eps": sigma, "x0": alpha * spread, "v": alpha * sigma * (1 - spread)}[target] / total
        unweighted = weighting == "min-snr" and alpha == 0
        assert table.slope[t].item() == pytest.approx(0 if unweighted else best, abs=0.03)
        if t == 0:
            variance = spread * sigma**2 / total
        else:
            before = schedule.alpha(t - 1) ** 2 * spread + schedule.sigma(t - 1) ** 2
            ratio, beta = alpha / schedule.alpha(t - 1), forward_variance(schedule, t, t - 1)
            variance = 1 / (1 / before + ratio**2 / beta)
        low, high = (table_of[t].item() for table_of in (task.bound.low, task.bound.high))
        share = (table.share[t].item() + 1) / 2
        assert share * high + (1 - share) * low == pytest.approx(math.log(variance), abs=0.05)
