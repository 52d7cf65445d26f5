"""Terms of an autoencoder's loss beside the reconstruction: the latents' divergence, and the adversarial ones."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uldm_cli.core import collectives

AdversarialLoss = Literal["hinge", "vanilla"]

LARGEST_WEIGHT = 1e4
"""Of the adaptive weight, as published."""
_RAISED = 2.0**10
"""Factor on gradients while they are computed: means over pixels are small, and float16 would lose them."""


@dataclass(frozen=True)
class Adversarial:
    """How a discriminator takes part in training an autoencoder."""

    discriminator: nn.Module
    """Images `[N, C, H, W]` to logits `[N, 1, h, w]`, high for real ones."""
    weight: float
    """Factor of the generator's term."""
    start: int
    """Steps before it takes part."""
    warmup_steps: int
    """Steps over which the generator's term then grows to its full weight."""
    loss: AdversarialLoss
    adaptive: bool
    """Multiply the weight with the `adaptive_weight`."""

    def ramp(self, step: int) -> float:
        """Share of the weight, in [0, 1], that a step has, counted from 1."""
        return min(max(step - self.start, 0) / max(self.warmup_steps, 1), 1.0)


def discriminator_loss(kind: AdversarialLoss, real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises, a scalar.

    Args:
        kind: "hinge" (Lim and Ye 2017), or "vanilla" (Goodfellow et al. 2014), the mean cross-entropy. Both are 0 where
            it is always sure and right; where it cannot tell and gives logits of 0, they are 1 and log 2.
        real: logits of images.
        fake: logits of reconstructions.
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """What the autoencoder minimises to be taken for real, of both kinds: a scalar, from logits of reconstructions."""
    return -fake.mean()


def with_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The scalar `function(x)`, whose gradient with respect to `x` is computed at once, and once.

    The adaptive weight needs the gradients of two terms by themselves, and training that of their sum: without this,
    the perceptual network and the discriminator would be walked through backwards twice. It also lets go of their
    activations before those of the autoencoder are needed.
    """
    if not x.requires_grad:
        return function(x)
    leaf = x.detach().requires_grad_()
    value = function(leaf)
    [gradient] = torch.autograd.grad(value * _RAISED, leaf)
    return value.detach() + ((x - x.detach()) * (gradient / _RAISED)).sum()


def adaptive_weight(nll: Tensor, generator: Tensor, last: Tensor, scale: float = 1.0) -> Tensor:
    """Balances the generator's term with the reconstruction at the decoder's last layer (Esser et al. 2021, eq. 7).

    Args:
        nll: the reconstruction's term, a scalar.
        generator: the generator's, a scalar.
        last: the layer's weights. Gradients there are averaged over the processes before their norms are taken.
        scale: by which the published code's reconstruction is larger. It sums that of a KL autoencoder over an image;
            this way the bounds on the ratio mean the same.

    Returns:
        The ratio of the gradients' norms, between 0 and LARGEST_WEIGHT, divided by `scale`; a scalar without gradient.
    """
    norms = []
    for term in (nll, generator):
        [gradient] = torch.autograd.grad(_RAISED * term, last, retain_graph=True)
        norms.append(torch.linalg.vector_norm(collectives.mean(gradient)) / _RAISED)
    ratio = scale * norms[0] / (norms[1] + 1e-4)
    return ratio.clamp(0, LARGEST_WEIGHT).detach() / scale
