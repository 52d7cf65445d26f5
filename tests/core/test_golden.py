"""The numbers of the published latent-diffusion code, on its own small models (see tests/golden)."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from uldm_cli.core.conditioning import Condition
from uldm_cli.core.denoiser import training_target
from uldm_cli.core.quantizers import Quantizer
from uldm_cli.core.samplers import Prediction, ddim, ddpm, posterior_deviation
from uldm_cli.core.schedules import VariancePreserving, scaled_linear_betas
from uldm_cli.core.spacing import uniform_timesteps

# The aim is 1e-4; about 1e-6 is measured.
TOLERANCE = 1e-5
# Near t = 0 the squared sigma, a difference of float32 numbers near 1, has about 4e-5.
TABLE_TOLERANCE = 1e-4
STEPS = 8
CONDITIONAL = ("class-cond", "inpaint", "layout", "rdm", "semantic", "superres", "text")


def assert_close(ours: Tensor, reference: Tensor, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == reference.shape
    assert (ours - reference).norm() <= tolerance * reference.norm()


@pytest.fixture
def schedule(golden) -> VariancePreserving:
    c = golden.config
    return VariancePreserving(scaled_linear_betas(c["timesteps"], c["linear_start"], c["linear_end"]))


@pytest.fixture
def told(golden, averaged) -> Condition | None:
    return golden.condition(averaged)


@pytest.mark.parametrize("which", ["raw", "ema"])
@torch.no_grad()
def test_unet_predicts_the_noise(golden, averaged, which: str) -> None:
    stored = golden.stored
    model = averaged if which == "ema" else golden.model("raw")
    out = model.denoiser.predict(stored["x_T"], stored["t"], golden.condition(model))
    assert_close(out, stored[f"eps.{which}"])


@pytest.mark.parametrize(
    ("golden", "which"),
    [(name, "cond") for name in CONDITIONAL] + [(name, "uncond") for name in ("class-cond", "text", "layout")],
    indirect=["golden"],
)
@torch.no_grad()
def test_conditions_are_encoded(golden, averaged, which: str) -> None:
    condition = golden.condition(averaged, which)
    parts = [part for part in vars(condition).values() if part is not None]
    assert len(parts) == 1
    assert_close(parts[0], golden.stored[f"{which}.encoded"])


@pytest.mark.parametrize("eta", [0, 1])
@torch.no_grad()
def test_ddim(golden, averaged, told, schedule: VariancePreserving, eta: int) -> None:
    stored = golden.stored
    steps = list(
        ddim(
            lambda x, t: averaged(x, t, told),
            stored["x_T"],
            schedule,
            lambda step, draw: stored["ddim.noise"][step - 1],
            timesteps=uniform_timesteps(schedule.T, STEPS),
            eta=eta,
        )
    )
    assert [step.t for step in steps] == stored["ddim.timesteps"].flip(0).tolist()
    for step, x, x0 in zip(steps, stored[f"ddim.eta{eta}.x"][1:], stored[f"ddim.eta{eta}.pred_x0"][1:], strict=True):
        assert_close(step.x, x)
        assert_close(step.x0, x0)
    assert_close(steps[-1].x, stored[f"ddim.eta{eta}.sample"])


@torch.no_grad()
def test_ddpm(golden, averaged, told, schedule: VariancePreserving) -> None:
    stored = golden.stored
    *_, last = ddpm(
        lambda x, t: averaged(x, t, told),
        stored["x_T"],
        schedule,
        lambda step, draw: stored["ddpm.noise"][step - 1],
        timesteps=[2, 1, 0, -1],
        variance="posterior",
    )
    assert_close(last.x, stored["ddpm.from_t2"])


def test_schedule_has_the_buffers_of_the_checkpoint(golden, schedule: VariancePreserving) -> None:
    c = golden.config
    T = schedule.T
    alpha = torch.tensor([schedule.alpha(t) for t in range(-1, T)], dtype=torch.float64)
    sigma = torch.tensor([schedule.sigma(t) for t in range(-1, T)], dtype=torch.float64)
    variance = torch.tensor([posterior_deviation(schedule, t, t - 1) ** 2 for t in range(T)])
    ours = {
        "betas": scaled_linear_betas(c["timesteps"], c["linear_start"], c["linear_end"]),
        "alphas_cumprod": schedule.alphas_cumprod,
        "alphas_cumprod_prev": alpha[:-1] ** 2,
        "sqrt_alphas_cumprod": alpha[1:],
        "sqrt_one_minus_alphas_cumprod": sigma[1:],
        "log_one_minus_alphas_cumprod": (sigma[1:] ** 2).log(),
        "sqrt_recip_alphas_cumprod": 1 / alpha[1:],
        "sqrt_recipm1_alphas_cumprod": sigma[1:] / alpha[1:],
        "posterior_variance": variance,
        "posterior_mean_coef1": posterior_mean(schedule, x0=1.0, x=0.0),
        "posterior_mean_coef2": posterior_mean(schedule, x0=0.0, x=1.0),
    }
    for name, values in ours.items():
        assert_close(values.float(), golden.stored[f"state.{name}"], TABLE_TOLERANCE)


def posterior_mean(schedule: VariancePreserving, *, x0: float, x: float) -> Tensor:
    """Mean of q(x_{t-1} | x_t, x0) for every t, as the DDPM sampler computes it."""
    clean, noised = torch.full((1,), x0, dtype=torch.float64), torch.full((1,), x, dtype=torch.float64)
    means = []
    for t in range(schedule.T):
        (step,) = ddpm(
            lambda x, t: Prediction(clean, clean),
            noised,
            schedule,
            lambda step, draw: torch.zeros(1),
            timesteps=[t, t - 1],
            variance="posterior",
        )
        means.append(step.x)
    return torch.cat(means)


def test_tables_of_ddim(golden, schedule: VariancePreserving) -> None:
    stored = golden.stored
    rising = uniform_timesteps(schedule.T, STEPS)[::-1]
    assert rising[1:] == stored["ddim.timesteps"].tolist()
    squares = torch.tensor([schedule.alpha(t) ** 2 for t in rising], dtype=torch.float64)
    assert_close(squares[1:], stored["ddim.alphas"])
    assert_close(squares[:-1], stored["ddim.alphas_prev"])
    pairs = zip(rising[1:], rising[:-1], strict=True)
    deviations = torch.tensor([posterior_deviation(schedule, t, s) for t, s in pairs], dtype=torch.float64)
    assert_close(deviations, stored["ddim.sigmas.eta1"])


@torch.no_grad()
def test_noised_latents_and_loss(golden, schedule: VariancePreserving) -> None:
    stored = golden.stored
    latent, eps, t = stored["latent"], stored["ddim.noise"][0], stored["t"]
    alpha, sigma = schedule.factors(t)
    noised = alpha * latent + sigma * eps
    assert_close(noised, stored["x_noisy"])
    model = golden.model("raw")
    out = model.denoiser.predict(noised, t, golden.condition(model))
    loss = F.mse_loss(out, training_target("eps", latent, eps, alpha, sigma))
    assert_close(loss[None], stored["loss.simple.l2"])


@pytest.mark.parametrize("golden", ["uncond-vq"], indirect=True)
def test_quantizer(golden) -> None:
    stored = golden.stored
    codebook = golden.weights["first_stage_model.quantize.embedding.weight"]
    quantizer = Quantizer(*codebook.shape).eval()
    quantizer.embedding.data.copy_(codebook)
    quantized = quantizer(stored["latent"])
    assert torch.equal(quantized.indices, stored["codes"])
    assert_close(quantized.z, stored["quantized"])
