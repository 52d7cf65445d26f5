"""What a backbone is told besides its noised input."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from uldm_cli.errors import UsageError

Conditioning = Literal["concat", "crossattn", "hybrid", "adm"]
"""Where a condition goes: beside the input's channels, into cross-attention, both, or to the time embedding."""


@dataclass(frozen=True)
class Condition:
    """A condition of N samples, encoded, in the places where the backbone takes it."""

    concat: Tensor | None = None
    """`[N, C', h, w]`, channels that follow those of the noised input."""
    context: Tensor | None = None
    """`[N, L, D]`, tokens that cross-attention reads."""
    label: Tensor | None = None
    """int64 `[N]`, a class whose embedding is added to that of the time."""


def place(conditioning: Conditioning, encoded: Tensor, concat: Tensor | None = None) -> Condition:
    """Puts an encoded condition where the backbone takes it.

    Args:
        conditioning: where that is.
        encoded: the conditioner's result.
        concat: what a hybrid model takes beside its input; only there.

    Raises:
        UsageError: `concat` is missing, or not wanted.
    """
    if (concat is None) == (conditioning == "hybrid"):
        said = "missing" if concat is None else f"not taken by a model with {conditioning} conditioning"
        raise UsageError(f"the concatenated part of the condition is {said}", "Hybrid conditioning alone has two parts")
    if conditioning == "concat":
        return Condition(concat=encoded)
    if conditioning == "adm":
        return Condition(label=encoded)
    return Condition(concat=concat, context=encoded)


def inpainting_condition(encode: Callable[[Tensor], Tensor], image: Tensor, mask: Tensor) -> Condition:
    """What an inpainting model is told: the latents of the image with its hole black, and the mask.

    Args:
        encode: images to latents, as `LatentDiffusion.encode_condition` of a first-stage conditioner does.
        image: `[N, C, H, W]` in [-1, 1].
        mask: `[N, 1, H, W]` in [0, 1]; from 0.5 on a pixel belongs to the hole.

    Raises:
        UsageError: the mask has another shape.
    """
    expected = (len(image), 1, *image.shape[2:])
    if mask.shape != expected:
        raise UsageError(f"the mask has the shape {list(mask.shape)}", f"These images need {list(expected)}")
    hole = (mask >= 0.5).to(image.dtype)
    latents = encode((1 - hole) * (image + 1) - 1)
    small = F.interpolate(2 * hole - 1, latents.shape[2:], mode="nearest")
    return Condition(concat=torch.cat([latents, small], dim=1))
