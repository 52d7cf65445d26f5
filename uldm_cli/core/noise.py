"""The random draws of sampling: one generator a sample, so that an image depends on its own seed alone."""

from collections.abc import Sequence

import torch
from torch import Tensor


class PerSampleNoise:
    """Draws the noise of a batch, each sample's from its own generator.

    A sample's first draw is its initial noise, the following ones are those of the steps that use noise, in order.
    They are made on the CPU in float32, so a seed means the same noise on every device, at every batch size and in
    every position of a batch. `diffusers`' pipelines make the same draws from a list of CPU generators.

    Args:
        seeds: one seed a sample, each in [0, 2^63).
        shape: of one sample, without the batch dimension.
        device: where the draws are put.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._shape = tuple(shape)
        self._device = device

    def initial(self) -> Tensor:
        """x_T, standard normal, `[N, *shape]`. To be called first, once."""
        return self._draw()

    def __call__(self, step: int, draw: int = 0) -> Tensor:
        """Standard normal `[N, *shape]` for the given draw of a step (both only name it: draws come in order)."""
        return self._draw()

    def _draw(self) -> Tensor:
        return torch.stack([torch.randn(self._shape, generator=g) for g in self._generators]).to(self._device)
