"""Terms of the autoencoder's loss, against values worked out by hand and by other means."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as reference_divergence

from uldm_cli.core.autoencoders import kl_divergence
from uldm_cli.core.device import at_least_float32
from uldm_cli.core.losses import (
    Adversarial,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    with_gradient,
)

REAL, FAKE = torch.tensor([[2.0, 0.5], [-1.0, 0.0]]), torch.tensor([[-3.0, 0.0], [1.0, -0.5]])


def test_hinge_by_hand() -> None:
    """max(0, 1 - real) is 0, 0.5, 2, 1 and max(0, 1 + fake) is 0, 1, 2, 0.5."""
    assert discriminator_loss("hinge", REAL, FAKE).item() == pytest.approx(0.5 * (3.5 / 4 + 3.5 / 4))


def test_vanilla_by_hand() -> None:
    def softplus(x: float) -> float:
        return math.log(1 + math.exp(x))

    real = sum(softplus(-x) for x in (2.0, 0.5, -1.0, 0.0)) / 4
    fake = sum(softplus(x) for x in (-3.0, 0.0, 1.0, -0.5)) / 4
    assert discriminator_loss("vanilla", REAL, FAKE).item() == pytest.approx(0.5 * (real + fake))
    labels = torch.tensor([1.0, 0.0])[:, None, None].expand(2, 2, 2)
    entropy = nn.functional.binary_cross_entropy_with_logits(torch.stack([REAL, FAKE]), labels)
    torch.testing.assert_close(discriminator_loss("vanilla", REAL, FAKE), entropy)


@pytest.mark.parametrize(("kind", "undecided"), [("hinge", 1.0), ("vanilla", math.log(2))])
def test_a_discriminator_that_cannot_tell_and_one_that_is_sure(kind, undecided) -> None:
    zero = torch.zeros(3)
    assert discriminator_loss(kind, zero, zero).item() == pytest.approx(undecided)
    assert discriminator_loss(kind, zero + 50, zero - 50).item() == pytest.approx(0, abs=1e-6)
    assert discriminator_loss(kind, zero - 50, zero + 50).item() > 40


def test_the_generators_loss() -> None:
    assert generator_loss(FAKE).item() == pytest.approx(2.5 / 4)


def test_divergence_is_torchs_summed_over_a_latent() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 3, 4, 5, 6, generator=generator, dtype=torch.float64)
    expected = reference_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(kl_divergence(mean, logvar), expected)
    assert kl_divergence(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)).item() == 0


@pytest.mark.parametrize(
    ("given", "made"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_at_least_float32(given, made) -> None:
    assert at_least_float32(torch.zeros(1, dtype=given)).dtype == made


class Layers(nn.Module):
    """Two layers, and two losses of what comes out."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.last = (
            nn.Parameter(torch.randn(3, 3, generator=generator, dtype=torch.float64)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.first) @ self.last


def one(x: Tensor) -> Tensor:
    return x.square().mean()


def two(x: Tensor) -> Tensor:
    return -torch.sin(x).mean()


X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)


def test_with_gradient_is_the_function_and_its_gradient() -> None:
    plain, ours = Layers(), Layers()
    expected = one(plain(X)) + 3 * two(plain(X))
    expected.backward()
    out = ours(X)
    value = with_gradient(one, out) + 3 * with_gradient(two, out)
    value.backward()
    torch.testing.assert_close(value, expected)
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_with_gradient_calls_the_function_once_and_gives_way_where_there_are_no_gradients() -> None:
    calls = []

    def function(x: Tensor) -> Tensor:
        calls.append(x.requires_grad)
        return one(x)

    layers = Layers()
    out = layers(X)
    value = with_gradient(function, out)
    torch.autograd.grad(value, layers.last, retain_graph=True)
    value.backward()
    assert calls == [True]
    assert not with_gradient(function, out.detach()).requires_grad
    with torch.no_grad():
        assert with_gradient(function, layers(X)) == value


@pytest.mark.parametrize("factor", [1.0, 1e-9, 1e9])
def test_the_adaptive_weight_by_hand(factor) -> None:
    """For out = h W, the mean of out squared has the gradient 2 h' out / 12, and minus its sine's -h' cos(out) / 12."""
    layers = Layers()
    h = torch.tanh(X @ layers.first).detach()
    out = h @ layers.last.detach()
    ours = factor * (h.T @ (2 * out / 12)).norm()
    theirs = (h.T @ (out.cos() / 12)).norm()
    weight = adaptive_weight(factor * one(layers(X)), two(layers(X)), layers.last)
    assert weight.item() == pytest.approx(min(float(ours / (theirs + 1e-4)), 1e4))
    assert (weight.item() == 1e4) == (factor == 1e9)
    assert not weight.requires_grad


def test_the_scale_of_the_adaptive_weight_moves_its_bounds_only() -> None:
    layers = Layers()
    plain = adaptive_weight(one(layers(X)), two(layers(X)), layers.last)
    torch.testing.assert_close(adaptive_weight(one(layers(X)), two(layers(X)), layers.last, 100), plain)
    bound = adaptive_weight(1e9 * one(layers(X)), two(layers(X)), layers.last, 100)
    assert bound.item() == pytest.approx(100)


@pytest.mark.parametrize(
    ("start", "warmup", "expected"),
    [
        (0, 0, {1: 1.0, 2: 1.0}),
        (3, 0, {1: 0.0, 3: 0.0, 4: 1.0, 99: 1.0}),
        (3, 4, {3: 0.0, 4: 0.25, 5: 0.5, 7: 1.0, 8: 1.0}),
    ],
)
def test_the_ramp(start, warmup, expected) -> None:
    settings = Adversarial(nn.Identity(), 1.0, start, warmup, "hinge", adaptive=True)
    assert {step: settings.ramp(step) for step in expected} == expected
