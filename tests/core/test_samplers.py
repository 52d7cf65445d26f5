"""What a sampler yields, calls and leaves alone, and the same steps as diffusers' schedulers."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from uldm_cli.core.denoiser import convert
from uldm_cli.core.noise import PerSampleNoise
from uldm_cli.core.samplers import Prediction, PredictionWithVariance, Step, ddim, ddpm
from uldm_cli.core.schedules import (
    VariancePreserving,
    cosine_betas,
    scaled_linear_betas,
    without_signal_at_the_end,
)
from uldm_cli.core.spacing import trailing_timesteps, uniform_timesteps
from uldm_cli.errors import UsageError
from uldm_cli.specs.samplers import DDIM, DDPM, PLMS

SHAPE = (3, 4, 4)
SCHEDULE = VariancePreserving(scaled_linear_betas(50, 0.0015, 0.0195))
ONE_CALL = [DDIM(steps=7, eta=0.0), DDIM(steps=7, eta=0.6), DDPM(steps=7), DDPM(steps=7, variance="beta")]
IDS = ["ddim-eta-0", "ddim-eta-0.6", "ddpm", "ddpm-beta"]
every_sampler = pytest.mark.parametrize("spec", [*ONE_CALL, PLMS(steps=7)], ids=[*IDS, "plms"])
one_call_a_step = pytest.mark.parametrize("spec", ONE_CALL, ids=IDS)


def denoise(x: Tensor, t: int) -> Prediction:
    """A network of sorts: nonlinear, and different at every timestep."""
    eps = torch.tanh(x.flip(-1) + 0.01 * t) + 0.1 * x
    return Prediction((x - SCHEDULE.sigma(t) * eps) / SCHEDULE.alpha(t), eps)


def noise(seed: int = 0, count: int = 2) -> PerSampleNoise:
    return PerSampleNoise(range(seed, seed + count), SHAPE)


def run(spec: DDIM | DDPM | PLMS, *, constrain=None, denoise=denoise) -> Iterator[Step]:
    draws = noise()
    return spec.build()(denoise, draws.initial(), SCHEDULE, draws, constrain)


@every_sampler
def test_steps_are_counted_and_belong_together(spec) -> None:
    x = noise().initial()
    for n, (step, t) in enumerate(zip(run(spec), uniform_timesteps(SCHEDULE.T, 7)[:-1], strict=True), 1):
        calls = n + 1 if isinstance(spec, PLMS) else n
        assert (step.n, step.nfe, step.t) == (n, calls, t)
        assert torch.equal(step.x_in, x)  # what the step before arrived at
        predicted = denoise(step.x_in, t)
        assert torch.equal(step.x0, predicted.x0)
        assert torch.equal(step.eps, predicted.eps)
        assert not torch.equal(step.x, x)
        x = step.x


@every_sampler
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_exactly_the_steps_asked_for(spec, data) -> None:
    steps = data.draw(st.integers(1, SCHEDULE.T))
    seen = [step.n for step in run(spec.model_copy(update={"steps": steps}))]
    assert seen == list(range(1, steps + 1))


@one_call_a_step
def test_all_timesteps_end_clean(spec) -> None:
    *_, last = run(spec.model_copy(update={"steps": SCHEDULE.T}))
    assert last.t == 0
    torch.testing.assert_close(last.x, last.x0)


@every_sampler
def test_constrain_comes_before_each_call_and_not_after_the_last(spec) -> None:
    events = []

    def constrain(x: Tensor, t: int) -> Tensor:
        events.append(("constrain", t))
        return x + 1

    def watched(x: Tensor, t: int) -> Prediction:
        events.append(("denoise", t))
        return denoise(x, t)

    before = noise().initial()
    for step in run(spec, constrain=constrain, denoise=watched):
        assert torch.equal(step.x_in, before + 1)
        before = step.x
    ts = uniform_timesteps(SCHEDULE.T, 7)[:-1]
    if isinstance(spec, PLMS):
        ts.insert(1, ts[1])  # the first step's second call, where it arrives
    assert events == [event for t in ts for event in (("constrain", t), ("denoise", t))]


@one_call_a_step
def test_a_constrained_step_goes_on_from_the_constrained_state(spec) -> None:
    """A step of a constrained run is that of a free run from the constrained state: nothing else is carried along."""
    shifted = list(run(spec, constrain=lambda x, t: x + 1))
    draws = noise()
    free = next(spec.build()(denoise, draws.initial() + 1, SCHEDULE, draws))
    assert torch.equal(shifted[0].x, free.x)


@every_sampler
def test_looking_changes_nothing(spec) -> None:
    """A listener that differentiates, calls the network and draws random numbers leaves every bit of the sample."""
    *_, unseen = run(spec)
    weight = torch.ones(1, requires_grad=True)
    for step in run(spec):
        x = step.x_in.clone().requires_grad_()
        torch.manual_seed(step.n)
        loss = (weight * denoise(x + torch.randn_like(x), step.t).x0).sum()
        loss.backward()
        assert x.grad is not None
    assert torch.equal(step.x, unseen.x)


@every_sampler
def test_no_gradients_inside_and_none_switched_off_outside(spec) -> None:
    inside = []

    def watched(x: Tensor, t: int) -> Prediction:
        inside.append(torch.is_grad_enabled())
        return denoise(x, t)

    for step in run(spec, denoise=watched):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not step.x.is_inference()  # its consumer may differentiate at it
    assert torch.is_grad_enabled()
    assert inside == [False] * (8 if isinstance(spec, PLMS) else 7)


def test_grad_mode_is_as_before_after_stopping_early() -> None:
    steps = run(DDIM(steps=7))
    next(steps)
    steps.close()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("spec", "calls"),
    [
        (PLMS(steps=7), 0),
        (DDIM(steps=7, eta=0.0), 0),
        (DDIM(steps=7), 7),
        (DDIM(steps=50), 49),
        (DDPM(steps=7), 7),
        (DDPM(steps=50), 49),
    ],
)
def test_noise_is_drawn_once_a_step_and_only_where_it_is_used(spec, calls: int) -> None:
    seen = []

    def draw(step: int, number: int) -> Tensor:
        seen.append((step, number))
        return torch.zeros(2, *SHAPE)

    list(spec.build()(denoise, noise().initial(), SCHEDULE, draw))
    assert seen == [(n, 0) for n in range(1, calls + 1)]


@pytest.mark.parametrize("betas", [scaled_linear_betas(50, 0.0015, 0.0195), cosine_betas(50)])
@pytest.mark.parametrize("steps", [1, 7, 25, 50])
def test_ddim_with_eta_1_is_ddpm(betas: Tensor, steps: int) -> None:
    schedule = VariancePreserving(betas)
    timesteps = uniform_timesteps(schedule.T, steps)
    draws = torch.randn(steps, 2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def predict(x: Tensor, t: int) -> Prediction:
        x0 = torch.tanh(x + 0.01 * t)
        return Prediction(x0, (x - schedule.alpha(t) * x0) / schedule.sigma(t))

    def replay(step: int, draw: int) -> Tensor:
        return draws[step - 1]

    x = noise().initial().double()
    pairs = zip(
        ddim(predict, x, schedule, replay, timesteps=timesteps, eta=1.0),
        ddpm(predict, x, schedule, replay, timesteps=timesteps, variance="posterior"),
        strict=True,
    )
    for implicit, ancestral in pairs:
        torch.testing.assert_close(implicit.x, ancestral.x, rtol=1e-9, atol=1e-9)


def test_steps_are_those_of_the_published_spacing() -> None:
    steps = list(run(DDIM(steps=20, spacing="compvis")))
    assert [step.t for step in steps] == [t + 1 for t in reversed(range(0, 50, 2))]


def test_a_single_step_of_plms_calls_the_network_twice_at_its_timestep() -> None:
    events = []

    def watched(x: Tensor, t: int) -> Prediction:
        events.append(t)
        return denoise(x, t)

    (step,) = run(PLMS(steps=1), denoise=watched)
    assert (events, step.nfe) == ([1, 1], 2)


# Diffusers' schedulers are compared step by step, each given the same state, prediction and noise.
THEIRS = {"num_train_timesteps": 50, "beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("steps", [1, 5, 10, 25])
def test_ddim_is_that_of_diffusers(steps: int, eta: float) -> None:
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(**THEIRS, steps_offset=1, set_alpha_to_one=False, clip_sample=False)
    theirs.set_timesteps(steps)
    draws = noise()
    ours = run(DDIM(steps=steps, eta=eta))
    draws.initial()
    for step, t in zip(ours, theirs.timesteps.tolist(), strict=True):
        given = draws(step.n) if eta else None
        result = theirs.step(step.eps, t, step.x_in, eta=eta, variance_noise=given)
        assert step.t == t
        torch.testing.assert_close(step.x0, result.pred_original_sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(step.x, result.prev_sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [2, 5, 10, 25])
def test_plms_after_its_first_step_is_that_of_diffusers(steps: int) -> None:
    """Diffusers begins with Heun's step as two of its own, and goes back to t for it: from there on all is the same."""
    from diffusers import PNDMScheduler

    theirs = PNDMScheduler(**THEIRS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    theirs.set_timesteps(steps)
    x = noise().initial()
    for t in theirs.timesteps.tolist():
        x = theirs.step(denoise(x, t).eps, t, x).prev_sample
    *_, last = run(PLMS(steps=steps))
    torch.testing.assert_close(last.x, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("variance", "name"), [("posterior", "fixed_small"), ("beta", "fixed_large")])
def test_ddpm_is_that_of_diffusers(variance: str, name: str) -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(**THEIRS, clip_sample=False, variance_type=name)
    theirs.set_timesteps(50)
    draws = noise(count=1)
    ours = DDPM(steps=50, variance=variance).build()(denoise, draws.initial(), SCHEDULE, draws)
    generator = torch.Generator().manual_seed(0)
    torch.randn(1, *SHAPE, generator=generator)  # x_T
    for step, t in zip(ours, theirs.timesteps.tolist(), strict=True):
        result = theirs.step(step.eps, t, step.x_in, generator=generator)
        assert step.t == t
        torch.testing.assert_close(step.x, result.prev_sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [5, 25, 50])
def test_a_learned_variance_is_that_of_diffusers(steps: int) -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(**THEIRS, clip_sample=False, variance_type="learned_range", timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    draws = noise(count=1)

    def says(x: Tensor, t: int) -> PredictionWithVariance:
        return PredictionWithVariance(*denoise(x, t), torch.sin(3 * x + t))

    timesteps = trailing_timesteps(50, steps)
    ours = ddpm(says, draws.initial(), SCHEDULE, draws, timesteps=timesteps, variance="learned")
    generator = torch.Generator().manual_seed(0)
    torch.randn(1, *SHAPE, generator=generator)  # x_T
    for step, t in zip(ours, theirs.timesteps.tolist(), strict=True):
        out = torch.cat([step.eps, torch.sin(3 * step.x_in + t)], dim=1)
        result = theirs.step(out, t, step.x_in, generator=generator)
        assert step.t == t
        if step.n < steps or t == 0:  # they add noise in the last step, too, unless its timestep is 0
            torch.testing.assert_close(step.x, result.prev_sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("learned", "fixed"), [(-1.0, "posterior"), (1.0, "beta")])
def test_a_learned_variance_lies_between_the_fixed_ones(learned: float, fixed) -> None:
    def says(x: Tensor, t: int) -> PredictionWithVariance:
        return PredictionWithVariance(*denoise(x, t), torch.full_like(x, learned))

    *_, ours = run(DDPM(steps=7, variance="learned"), denoise=says)
    *_, theirs = run(DDPM(steps=7, variance=fixed))
    torch.testing.assert_close(ours.x, theirs.x, rtol=1e-5, atol=1e-5)


def test_a_variance_that_was_not_learned_is_told() -> None:
    with pytest.raises(UsageError, match=r"this model has learned no variance\. Use variance=posterior"):
        next(run(DDPM(steps=7, variance="learned")))


# A schedule whose last timestep holds no signal

NO_SIGNAL = VariancePreserving(without_signal_at_the_end(scaled_linear_betas(50, 0.0015, 0.0195)))
STARTING_FROM_NOISE = [*ONE_CALL, PLMS(steps=7)]


def says(target, x: Tensor, t: int) -> Tensor:
    """A network's own answer."""
    return torch.tanh(x.flip(-1) + 0.01 * t) + 0.1 * x


@pytest.mark.parametrize("target", ["v", "x0"])
@pytest.mark.parametrize("spec", STARTING_FROM_NOISE, ids=[*IDS, "plms"])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_every_sampler_begins_without_signal_and_ends_clean(spec, target, steps: int) -> None:
    def predict(x: Tensor, t: int) -> Prediction:
        return convert(target, says(target, x, t), x, NO_SIGNAL.alpha(t), NO_SIGNAL.sigma(t))

    draws = noise()
    seen = list(spec.model_copy(update={"steps": steps}).build()(predict, draws.initial(), NO_SIGNAL, draws))
    assert [step.t for step in seen] == trailing_timesteps(50, steps)[:-1]
    assert seen[0].t == 49
    assert all(step.x.isfinite().all() and step.x.abs().max() < 10 for step in seen)
    torch.testing.assert_close(seen[0].eps, seen[0].x_in)
    if not isinstance(spec, PLMS):
        torch.testing.assert_close(seen[-1].x, seen[-1].x0)


def test_the_spacing_can_be_chosen() -> None:
    def visited(spacing, schedule: VariancePreserving) -> list[int]:
        spec, draws = DDIM(steps=10, spacing=spacing), noise()
        return [step.t for step in spec.build()(lambda x, t: Prediction(x, x), draws.initial(), schedule, draws)]

    uniform, trailing = uniform_timesteps(50, 10)[:-1], trailing_timesteps(50, 10)[:-1]
    assert visited("auto", SCHEDULE) == visited("uniform", SCHEDULE) == visited("uniform", NO_SIGNAL) == uniform
    assert visited("auto", NO_SIGNAL) == visited("trailing", SCHEDULE) == visited("trailing", NO_SIGNAL) == trailing


@pytest.mark.parametrize(("target", "name"), [("v", "v_prediction"), ("x0", "sample")])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 5, 10, 50])
def test_ddim_without_signal_at_the_end_is_that_of_diffusers(steps: int, eta: float, target, name: str) -> None:
    from diffusers import DDIMScheduler

    told = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": name}
    theirs = DDIMScheduler(**THEIRS, **told, clip_sample=False)
    theirs.set_timesteps(steps)
    draws = noise()

    def predict(x: Tensor, t: int) -> Prediction:
        return convert(target, says(target, x, t), x, NO_SIGNAL.alpha(t), NO_SIGNAL.sigma(t))

    ours = DDIM(steps=steps, eta=eta).build()(predict, draws.initial(), NO_SIGNAL, draws)
    for step, t in zip(ours, theirs.timesteps.tolist(), strict=True):
        given = draws(step.n) if eta else None
        result = theirs.step(says(target, step.x_in, t), t, step.x_in, eta=eta, variance_noise=given)
        assert step.t == t
        torch.testing.assert_close(step.x0, result.pred_original_sample, rtol=1e-4, atol=1e-4)
        if eta == 0:  # with noise, each has drawn its own
            torch.testing.assert_close(step.x, result.prev_sample, rtol=1e-4, atol=1e-4)


def test_plms_without_signal_begins_with_the_mean_of_both_clean_signals() -> None:
    """The noise in pure noise is known, whatever the network says, so that its mean would change nothing."""

    def predict(x: Tensor, t: int) -> Prediction:
        return convert("v", says("v", x, t), x, NO_SIGNAL.alpha(t), NO_SIGNAL.sigma(t))

    draws = noise()
    x = draws.initial()
    first = next(PLMS(steps=10).build()(predict, x, NO_SIGNAL, draws))
    s = trailing_timesteps(50, 10)[1]
    ahead = NO_SIGNAL.alpha(s) * first.x0 + NO_SIGNAL.sigma(s) * x
    mean = (first.x0 + predict(ahead, s).x0) / 2
    torch.testing.assert_close(first.x, NO_SIGNAL.alpha(s) * mean + NO_SIGNAL.sigma(s) * x)
