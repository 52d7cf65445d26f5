"""Sampling around what is known: a part of the image is given, the sampler fills in the rest."""

from itertools import count

from torch import Tensor

from uldm_cli.core.samplers import Constrain, Noise
from uldm_cli.core.schedules import Schedule


def known_region(latent: Tensor, mask: Tensor, schedule: Schedule, noise: Noise) -> Constrain:
    """Keeps the known region at its own noised latent: the inpainting of the DDIM sampler of the latent-diffusion code.

    Before each call of the network at t the region is replaced by `alpha(t) latent + sigma(t) noise`. After the last
    step nothing is: what must stay exactly as it was is pasted into the image.

    Args:
        latent: scaled latent of the image, `[N, C, h, w]`.
        mask: `[N or 1, 1 or C, h, w]`, 1 where the latent is known, 0 where it is to be made.
        schedule: the sampler's.
        noise: called as `noise(i, 1)` for the i-th call of the network, from 1; draw 0 is the sampler's own.

    Returns:
        What one run of a sampler takes as `constrain`; it counts that run's calls.
    """
    calls = count(1)

    def constrain(x: Tensor, t: int) -> Tensor:
        known = schedule.alpha(t) * latent + schedule.sigma(t) * noise(next(calls), 1)
        return mask * known + (1 - mask) * x

    return constrain
