"""Classifier-free guidance, and keeping a known region."""

import pytest
import torch
from torch import Tensor

from uldm_cli.core.conditioning import Condition
from uldm_cli.core.denoiser import convert
from uldm_cli.core.guidance import guided
from uldm_cli.core.known import known_region
from uldm_cli.core.samplers import Prediction, PredictionWithVariance
from uldm_cli.core.schedules import VariancePreserving, linear_betas
from uldm_cli.errors import UsageError
from uldm_cli.specs.samplers import DDIM

SCHEDULE = VariancePreserving(linear_betas(50, 1e-4, 0.05))
X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
CAT = Condition(context=torch.full((2, 1, 1), 0.7))
NOTHING = Condition(context=torch.zeros(2, 1, 1))


class Network:
    """A denoiser of sorts, which counts its calls and their samples."""

    def __init__(self, target: str = "eps") -> None:
        self.target, self.calls = target, []

    def __call__(self, x: Tensor, t: int, condition: Condition | None = None) -> Prediction:
        self.calls.append(len(x))
        told = 0.0 if condition is None else condition.context[..., None]
        out = torch.tanh(x * 0.3 + told)
        return convert(self.target, out, x, SCHEDULE.alpha(t), SCHEDULE.sigma(t))


@pytest.mark.parametrize("target", ["eps", "x0", "v"])
@pytest.mark.parametrize("scale", [-1.0, 0.0, 3.0])
def test_the_prediction_is_that_of_the_mixed_noise(target: str, scale: float) -> None:
    network = Network(target)
    x0, eps = guided(network, CAT, NOTHING, scale)(X, 30)
    without, given = network(X, 30, NOTHING).eps, network(X, 30, CAT).eps
    expected = without + scale * (given - without)
    torch.testing.assert_close(eps, expected)
    torch.testing.assert_close(x0, (X - SCHEDULE.sigma(30) * expected) / SCHEDULE.alpha(30), rtol=1e-5, atol=1e-5)
    assert network.calls[0] == 4  # both in one call


@pytest.mark.parametrize(("unconditional", "scale"), [(None, 3.0), (NOTHING, 1.0)])
def test_nothing_to_exaggerate_is_the_condition_alone(unconditional: Condition | None, scale: float) -> None:
    network = Network()
    ours = guided(network, CAT, unconditional, scale)(X, 30)
    assert torch.equal(ours.eps, network(X, 30, CAT).eps)
    assert network.calls[0] == 2


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (
            Condition(label=torch.zeros(2)),
            r"the unconditional context has the shape None, and the condition's \[2, 1, 1\]",
        ),
        (Condition(context=torch.zeros(2, 5, 1)), r"the unconditional context has the shape \[2, 5, 1\]"),
    ],
)
def test_conditions_that_cannot_stand_in_one_batch_are_refused(other: Condition, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        guided(Network(), CAT, other, 3.0)


def test_a_known_region_is_at_its_noised_latent_in_every_call_and_the_rest_is_free() -> None:
    latent = torch.full_like(X, 0.5)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    seen, drawn = [], []

    def noise(call: int, draw: int) -> Tensor:
        drawn.append((call, draw))
        return torch.full_like(X, float(call))

    def denoise(x: Tensor, t: int) -> Prediction:
        seen.append((t, x))
        return Network()(x, t)

    constrain = known_region(latent, mask, SCHEDULE, noise)
    before = X
    for step in DDIM(steps=4, eta=0).build()(denoise, X, SCHEDULE, noise, constrain):
        assert torch.equal(step.x_in[..., 2:], before[..., 2:])
        before = step.x
    assert drawn == [(n, 1) for n in (1, 2, 3, 4)]
    for call, (t, x) in enumerate(seen, 1):
        expected = SCHEDULE.alpha(t) * latent + SCHEDULE.sigma(t) * call
        torch.testing.assert_close(x[..., :2], expected[..., :2])


def test_a_learned_variance_is_that_of_the_condition() -> None:
    class Learned(Network):
        def __call__(self, x: Tensor, t: int, condition: Condition | None = None) -> Prediction:
            told = torch.zeros(()) if condition is None else condition.context[..., None]
            return PredictionWithVariance(*super().__call__(x, t, condition), (x + told).sin())

    found = guided(Learned(), CAT, NOTHING, 3.0)(X, 30)
    assert isinstance(found, PredictionWithVariance)
    torch.testing.assert_close(found.variance, (X + 0.7).sin())
    torch.testing.assert_close(found.eps, guided(Network(), CAT, NOTHING, 3.0)(X, 30).eps)
