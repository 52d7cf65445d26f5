"""Numbers of the published latent-diffusion code that sampling from its models does not show (see tests/golden).

Without gradients convolutions take another path; `scripts/conformance.py` compares that one.
"""

import pytest
import torch
from torch import Tensor

from uldm_cli.core.samplers import Prediction, ddpm, posterior_deviation
from uldm_cli.core.schedules import VariancePreserving

# The aim is 1e-4; about 2e-6 is measured.
TOLERANCE = 1e-5
# Near t = 0 the squared sigma, a difference of float32 numbers near 1, has about 4e-5.
TABLE_TOLERANCE = 1e-4
UNCONDITIONAL = ("uncond-kl", "uncond-vq")
VQ_FAMILIES = ("uncond-vq", "class-cond", "inpaint", "superres", "layout", "semantic")
KL_FAMILIES = ("uncond-kl", "text", "rdm")


def of_families(names: tuple[str, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("golden", names, indirect=True)


def assert_close(ours: Tensor, reference: Tensor, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == reference.shape
    assert (ours - reference).norm() <= tolerance * reference.norm()


@of_families(VQ_FAMILIES)
def test_vq_with_gradients(golden) -> None:
    model, stored = golden.model.autoencoder, golden.stored
    latent = stored["latent"] / golden.model.scale_factor
    assert_close(model.to_latent(stored["image"]), latent)
    assert_close(model.from_latent(latent), stored["decoded"])
    assert_close(model.decode(latent), stored["decoded.noquant"])
    quantized, _, codes = model.encode_with_indices(stored["image"])
    assert_close(quantized, stored["quantized"])
    assert torch.equal(codes, stored["codes"])


@of_families(KL_FAMILIES)
def test_kl_with_gradients(golden) -> None:
    model, stored = golden.model.autoencoder, golden.stored
    mean, logvar = model.moments(stored["image"])
    assert_close(mean, stored["encode.mean"])
    assert_close(logvar, stored["encode.logvar"])
    assert_close(model.from_latent(stored["latent"] / golden.model.scale_factor), stored["decoded"])


@of_families(UNCONDITIONAL)
def test_the_network_with_gradients(golden) -> None:
    stored = golden.stored
    assert_close(golden.model.denoiser.predict(stored["x_T"], stored["t"]), stored["eps.ema"])


def test_the_schedule_at_every_timestep(golden) -> None:
    schedule = golden.model.schedule
    T = schedule.T
    alpha = torch.tensor([schedule.alpha(t) for t in range(-1, T)], dtype=torch.float64)
    sigma = torch.tensor([schedule.sigma(t) for t in range(-1, T)], dtype=torch.float64)
    variance = torch.tensor([posterior_deviation(schedule, t, t - 1) ** 2 for t in range(T)])
    ours = {
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
