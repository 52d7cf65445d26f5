"""What a network's output means: noise, clean signal or velocity."""

import pytest
import torch
from torch import Tensor, nn

from uldm_cli.core.denoiser import Denoiser, convert, training_target
from uldm_cli.core.samplers import PredictionWithVariance
from uldm_cli.core.schedules import VariancePreserving, cosine_betas, without_signal_at_the_end
from uldm_cli.errors import UsageError

SCHEDULE = VariancePreserving(cosine_betas(100))
NO_SIGNAL = VariancePreserving(without_signal_at_the_end(cosine_betas(100)))
TARGETS = ["eps", "x0", "v"]
every_target = pytest.mark.parametrize("target", TARGETS)
every_time = pytest.mark.parametrize("t", [0, 50, 98])


def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64, generator=generator)
    return x0, eps


def noised(t: int) -> Tensor:
    x0, eps = pair()
    return SCHEDULE.alpha(t) * x0 + SCHEDULE.sigma(t) * eps


def factors(t: int) -> tuple[Tensor, Tensor]:
    alpha, sigma = (torch.full((3, 1, 1, 1), f(t), dtype=torch.float64) for f in (SCHEDULE.alpha, SCHEDULE.sigma))
    return alpha, sigma


@every_target
@every_time
def test_a_network_that_says_what_training_wants_gives_the_truth(target, t: int) -> None:
    """`convert` is the inverse of `training_target`."""
    x0, eps = pair()
    said = training_target(target, x0, eps, *factors(t))
    prediction = convert(target, said, noised(t), SCHEDULE.alpha(t), SCHEDULE.sigma(t))
    torch.testing.assert_close(prediction.x0, x0)
    torch.testing.assert_close(prediction.eps, eps)


@every_target
@every_time
def test_predictions_explain_the_input(target, t: int) -> None:
    """Whatever the network says, alpha x0 + sigma eps is its input."""
    x, out = noised(t), pair()[0].flip(0)
    prediction = convert(target, out, x, SCHEDULE.alpha(t), SCHEDULE.sigma(t))
    torch.testing.assert_close(SCHEDULE.alpha(t) * prediction.x0 + SCHEDULE.sigma(t) * prediction.eps, x)


@every_target
@every_time
def test_conversions_invert_each_other(target, t: int) -> None:
    """From an output of one kind to that of every other, and back."""
    x, out = noised(t), pair()[0].flip(0)
    first = convert(target, out, x, SCHEDULE.alpha(t), SCHEDULE.sigma(t))
    for other in TARGETS:
        translated = training_target(other, first.x0, first.eps, *factors(t))
        second = convert(other, translated, x, SCHEDULE.alpha(t), SCHEDULE.sigma(t))
        torch.testing.assert_close(training_target(target, second.x0, second.eps, *factors(t)), out)


def test_velocity_is_that_of_diffusers() -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
    (x0, eps), t = (value.float() for value in pair()), torch.tensor([3, 50, 98])
    ours = training_target("v", x0, eps, *SCHEDULE.factors(t))
    torch.testing.assert_close(ours, theirs.get_velocity(x0, eps, t), rtol=1e-4, atol=1e-4)


class Backbone(nn.Module):
    """Remembers what it was given."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=dtype))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen = x, t
        return self.scale * x


@every_target
def test_denoiser_asks_its_backbone_and_converts(target) -> None:
    denoiser = Denoiser(Backbone(), SCHEDULE, target)
    x = noised(50).float()
    prediction = denoiser(x, 50)
    given, t = denoiser.backbone.seen
    assert torch.equal(given, x)
    assert t.tolist() == [50]
    expected = convert(target, 0.5 * x, x, SCHEDULE.alpha(50), SCHEDULE.sigma(50))
    torch.testing.assert_close(prediction, expected)


def test_the_networks_own_answer_at_every_samples_time() -> None:
    denoiser = Denoiser(Backbone(), SCHEDULE, "v")
    x, t = noised(50).float(), torch.tensor([3, 50, 98])
    assert torch.equal(denoiser.predict(x, t), 0.5 * x)
    assert denoiser.backbone.seen[1] is t


def test_denoiser_computes_in_the_backbones_precision_and_answers_in_float32() -> None:
    denoiser = Denoiser(Backbone(torch.bfloat16), SCHEDULE, "eps")
    prediction = denoiser(noised(50).float(), 50)
    given, _ = denoiser.backbone.seen
    assert given.dtype == torch.bfloat16
    assert given.is_contiguous(memory_format=torch.channels_last)
    for answer in prediction:
        assert answer.dtype == torch.float32
        assert answer.is_contiguous()


@pytest.mark.parametrize("target", ["x0", "v"])
def test_where_no_signal_is_left_the_noise_is_the_input(target) -> None:
    """And the clean signal is what the network takes it for, exactly."""
    x, out = noised(50), pair()[0].flip(0)
    prediction = convert(target, out, x, NO_SIGNAL.alpha(99), NO_SIGNAL.sigma(99))
    assert torch.equal(prediction.eps, x)
    assert torch.equal(prediction.x0, out if target == "x0" else -out)


def test_noise_is_no_target_where_there_is_nothing_else() -> None:
    with pytest.raises(UsageError, match=r"the schedule's last timestep holds no signal.*\. Use v or x0"):
        Denoiser(Backbone(), NO_SIGNAL, "eps")


class Both(Backbone):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([super().forward(x, t), x + t.view(-1, 1, 1, 1)], 1)


@every_target
def test_a_learned_variance_stands_beside_the_prediction(target) -> None:
    denoiser, alone = Denoiser(Both(), SCHEDULE, target, learned_variance=True), Denoiser(Backbone(), SCHEDULE, target)
    x = noised(50).float()
    prediction = denoiser(x, 50)
    assert isinstance(prediction, PredictionWithVariance)
    assert torch.equal(prediction.variance, x + 50)
    torch.testing.assert_close(tuple(prediction), tuple(alone(x, 50)))
    assert not isinstance(alone(x, 50), PredictionWithVariance)
    x0, eps = prediction  # whoever wants only these two, as any prediction gives them
    assert torch.equal(x0, prediction.x0)
    assert torch.equal(eps, prediction.eps)
