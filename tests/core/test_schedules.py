"""Noise schedules, against diffusers and the formulas."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from uldm_cli.core.schedules import (
    VariancePreserving,
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
)
from uldm_cli.errors import UsageError

KINDS: dict[str, Callable[[int], Tensor]] = {
    "scaled_linear": lambda T: scaled_linear_betas(T, 0.0015, 0.0195),
    "linear": lambda T: linear_betas(T, 1e-4, 0.02),
    "squaredcos_cap_v2": cosine_betas,  # diffusers' names
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize("T", [50, 1000])
def test_betas_are_those_of_diffusers(kind: str, T: int) -> None:
    from diffusers import DDPMScheduler

    start, end = (1e-4, 0.02) if kind == "linear" else (0.0015, 0.0195)
    theirs = DDPMScheduler(num_train_timesteps=T, beta_schedule=kind, beta_start=start, beta_end=end)
    betas = KINDS[kind](T)
    assert betas.dtype == torch.float64
    torch.testing.assert_close(betas.float(), theirs.betas, rtol=2e-6, atol=1e-7)
    ours = VariancePreserving(betas).alphas_cumprod
    assert ours.dtype == torch.float32
    # They multiply a thousand factors in float32.
    torch.testing.assert_close(ours, theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)


@every_kind
@given(T=st.integers(2, 2000))
@settings(deadline=None)
def test_signal_falls_and_noise_grows(kind: str, T: int) -> None:
    schedule = VariancePreserving(KINDS[kind](T))
    assert schedule.T == T
    alphas = [schedule.alpha(t) for t in range(-1, T)]
    sigmas = [schedule.sigma(t) for t in range(-1, T)]
    assert alphas[0] == 1
    assert sigmas[0] == 0
    assert all(0 < after < before <= 1 for before, after in pairwise(alphas))
    assert all(0 <= before <= after <= 1 for before, after in pairwise(sigmas))
    assert all(math.isclose(a**2 + s**2, 1, rel_tol=1e-12) for a, s in zip(alphas, sigmas, strict=True))


@every_kind
def test_factors_are_alpha_and_sigma_of_each_sample(kind: str) -> None:
    schedule = VariancePreserving(KINDS[kind](1000))
    t = torch.tensor([999, 0, 17, 17])
    alpha, sigma = schedule.factors(t)
    assert alpha.shape == sigma.shape == (4, 1, 1, 1)
    assert alpha.flatten().tolist() == pytest.approx([schedule.alpha(i) for i in t.tolist()])
    assert sigma.flatten().tolist() == pytest.approx([schedule.sigma(i) for i in t.tolist()], rel=1e-4)


def test_cosine_is_the_papers_formula() -> None:
    T = 1000
    schedule = VariancePreserving(cosine_betas(T))

    def f(t: int) -> float:
        return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

    # The last betas are clipped, so the formula holds before them. Timestep t there counts from 1.
    for t in range(0, 990, 7):
        assert schedule.alpha(t) ** 2 == pytest.approx(f(t + 1) / f(0), rel=1e-4)
    assert cosine_betas(T).max() == 0.999


def test_nothing_of_a_schedule_is_stored_with_the_weights() -> None:
    assert VariancePreserving(cosine_betas(10)).state_dict() == {}


@pytest.mark.parametrize("betas", [[0.0, 0.1], [0.1, 1.0], [-0.1, 0.1], [0.1, math.nan], [[0.1, 0.2]]])
def test_betas_out_of_range_are_refused(betas: list[float]) -> None:
    with pytest.raises(UsageError, match="betas must all lie between 0 and 1"):
        VariancePreserving(torch.tensor(betas, dtype=torch.float64))


@pytest.mark.parametrize(
    "betas",
    [
        linear_betas(1000, 1e-9, 0.02),  # the first alpha is 1 in float32, sigma 0
        linear_betas(20_000, 1e-4, 0.02),  # the last alpha is 0
        linear_betas(100_000, 1e-8, 1e-3),  # neighbours are equal
    ],
    ids=["no-noise", "no-signal", "equal-neighbours"],
)
def test_levels_that_float32_cannot_hold_are_refused(betas: Tensor) -> None:
    """Otherwise a sampler would divide by zero there."""
    with pytest.raises(UsageError, match=f"float32 cannot tell all {len(betas)} noise levels"):
        VariancePreserving(betas)
