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
    ends_in_noise,
    linear_betas,
    scaled_linear_betas,
    sigmoid_betas,
    without_signal_at_the_end,
)
from uldm_cli.errors import UsageError

KINDS: dict[str, Callable[[int], Tensor]] = {
    "scaled_linear": lambda T: scaled_linear_betas(T, 0.0015, 0.0195),
    "linear": lambda T: linear_betas(T, 1e-4, 0.02),
    "squaredcos_cap_v2": cosine_betas,  # diffusers' names
}
every_kind = pytest.mark.parametrize("kind", KINDS)
OURS = KINDS | {
    "sigmoid": sigmoid_betas,  # diffusers' schedule of this name is another: there the betas are a sigmoid
    **{f"{kind}, no signal": lambda T, make=make: without_signal_at_the_end(make(T)) for kind, make in KINDS.items()},
    "sigmoid, no signal": lambda T: without_signal_at_the_end(sigmoid_betas(T)),
}
every_one_of_ours = pytest.mark.parametrize("kind", OURS)


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
@pytest.mark.parametrize("T", [50, 1000])
def test_a_last_timestep_without_signal_is_that_of_diffusers(kind: str, T: int) -> None:
    from diffusers import DDIMScheduler

    start, end = (1e-4, 0.02) if kind == "linear" else (0.0015, 0.0195)
    theirs = DDIMScheduler(
        num_train_timesteps=T, beta_schedule=kind, beta_start=start, beta_end=end, rescale_betas_zero_snr=True
    )
    ours = VariancePreserving(without_signal_at_the_end(KINDS[kind](T)))
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-4, atol=2e-7)
    assert (ours.alpha(T - 1), ours.sigma(T - 1)) == (0, 1)
    assert ends_in_noise(ours)
    assert not ends_in_noise(VariancePreserving(KINDS[kind](T)))


@every_kind
def test_a_last_timestep_without_signal_keeps_the_first_and_shifts_the_root_linearly(kind: str) -> None:
    """By the sentence of the paper, not by its algorithm."""
    before = VariancePreserving(KINDS[kind](100))
    after = VariancePreserving(without_signal_at_the_end(KINDS[kind](100)))
    assert after.alpha(0) == pytest.approx(before.alpha(0), rel=1e-6)
    slopes = [(after.alpha(t) - after.alpha(0)) / (before.alpha(t) - before.alpha(0)) for t in range(1, 100)]
    assert slopes == pytest.approx([before.alpha(0) / (before.alpha(0) - before.alpha(99))] * 99, rel=1e-4)


@pytest.mark.parametrize(("start", "end", "tau"), [(-3, 3, 1.0), (0, 3, 0.3), (-3, 3, 1.1)])
def test_sigmoid_is_the_papers_formula(start: float, end: float, tau: float) -> None:
    T = 1000
    schedule = VariancePreserving(sigmoid_betas(T, start, end, tau))

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x / tau))

    for t in range(0, 999, 7):  # the last beta is clipped
        at = sigmoid(start + (t + 1) / T * (end - start))
        expected = (sigmoid(end) - at) / (sigmoid(end) - sigmoid(start))
        assert schedule.alpha(t) ** 2 == pytest.approx(expected, rel=1e-5)
    assert sigmoid_betas(T, start, end, tau).max() == 0.999


@every_one_of_ours
@given(T=st.integers(2, 2000))
@settings(deadline=None, max_examples=50)
def test_signal_falls_and_noise_grows(kind: str, T: int) -> None:
    schedule = VariancePreserving(OURS[kind](T))
    assert schedule.T == T
    alphas = [schedule.alpha(t) for t in range(-1, T)]
    sigmas = [schedule.sigma(t) for t in range(-1, T)]
    assert alphas[0] == 1
    assert sigmas[0] == 0
    assert all(0 <= after < before <= 1 for before, after in pairwise(alphas))
    assert (alphas[-1] == 0) == ends_in_noise(schedule) == ("no signal" in kind)
    assert all(0 <= before <= after <= 1 for before, after in pairwise(sigmas))
    assert all(math.isclose(a**2 + s**2, 1, rel_tol=1e-12) for a, s in zip(alphas, sigmas, strict=True))


@every_one_of_ours
def test_factors_are_alpha_and_sigma_of_each_sample(kind: str) -> None:
    schedule = VariancePreserving(OURS[kind](1000))
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


@pytest.mark.parametrize("betas", [[0.0, 0.1], [1.0, 0.1], [0.1, 1.01], [-0.1, 0.1], [0.1, math.nan], [[0.1, 0.2]]])
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
