"""Classifier-free guidance: what a condition changes in a prediction, exaggerated."""

from dataclasses import fields

import torch
from torch import Tensor

from uldm_cli.core.conditioning import Condition
from uldm_cli.core.denoiser import Denoiser
from uldm_cli.core.samplers import Denoise, Prediction, PredictionWithVariance
from uldm_cli.errors import UsageError


def guided(
    denoiser: Denoiser, condition: Condition, unconditional: Condition | None = None, scale: float = 1.0
) -> Denoise:
    """A denoiser that is told a condition, for a sampler.

    With an unconditional condition and a scale other than 1, `eps = eps_u + scale (eps_c - eps_u)` (Ho & Salimans 2022,
    in the latent-diffusion code's notation). Both come of one call of the network, with the unconditional half first.
    A learned variance is that of the condition.

    Args:
        denoiser: takes a condition as its third argument.
        condition: of the samples, `[N, ...]`.
        unconditional: of nothing, in the same shapes.
        scale: 1 is the condition alone, 0 no condition.

    Raises:
        UsageError: the two conditions cannot stand in one batch.
    """
    if unconditional is None or scale == 1:
        return lambda x, t: denoiser(x, t, condition)
    both = _batch(unconditional, condition)

    def denoise(x: Tensor, t: int) -> Prediction:
        prediction = denoiser(torch.cat([x, x]), t, both)
        x0, eps = prediction
        # x0 is affine in eps at a given x, so mixing it in the same way gives the x0 of the mixed eps.
        mixed = Prediction(_mixed(x0, scale), _mixed(eps, scale))
        if not isinstance(prediction, PredictionWithVariance):
            return mixed
        return PredictionWithVariance(*mixed, prediction.variance.chunk(2)[1])

    return denoise


def _mixed(halves: Tensor, scale: float) -> Tensor:
    without, given = halves.chunk(2)
    return without + scale * (given - without)


def _batch(first: Condition, second: Condition) -> Condition:
    """Both conditions in one batch."""
    parts = [field.name for field in fields(Condition)]
    return Condition(**{part: _joined(part, getattr(first, part), getattr(second, part)) for part in parts})


def _joined(name: str, first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None and second is None:
        return None
    if first is None or second is None or first.shape != second.shape:
        shapes = [None if part is None else list(part.shape) for part in (first, second)]
        raise UsageError(
            f"the unconditional {name} has the shape {shapes[0]}, and the condition's {shapes[1]}",
            "Guidance needs both in the same shape",
        )
    return torch.cat([first, second])
