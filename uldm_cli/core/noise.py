"""The random draws of sampling: one generator a sample, so that an image depends on its own seed alone.

Or, to repeat what somebody drew with the published code, one generator for all.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from uldm_cli.core.samplers import Step


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


class BatchNoise:
    """Draws the noise of a batch as the latent-diffusion code does: from one generator, for all samples at once.

    A batch's draws follow those of the batch before, so a sample depends on the batch size and on all before it.
    Where that code calls `torch.manual_seed(seed)`, the generator is `torch.Generator(device).manual_seed(seed)`: the
    numbers are the same, and whoever else draws from the global generator is not disturbed. Devices of different
    types draw different numbers.

    Args:
        generator: on the device where the network computes; draws what the batch before left.
        shape: of the batch, `(N, C, h, w)`.
    """

    def __init__(self, generator: torch.Generator, shape: Sequence[int]) -> None:
        self._generator, self._shape = generator, tuple(shape)
        self._draws = 0

    def initial(self) -> Tensor:
        """x_T, standard normal, of the batch's shape. To be called first, once."""
        return self._draw()

    def __call__(self, step: int, draw: int = 0) -> Tensor:
        """Standard normal, of the batch's shape; draw 0 is the sampler's own, others are for who else needs noise."""
        self._draws += draw == 0
        return self._draw()

    def keep_pace(self, steps: Iterable[Step]) -> Iterator[Step]:
        """The same steps, after each of which so much is drawn as that code has drawn by then.

        It draws after every call of the network, also where it multiplies the noise with 0 (DDIM with eta 0, PLMS).
        """
        for step in steps:
            while self._draws < step.nfe:
                self(step.n)
            yield step

    def _draw(self) -> Tensor:
        return torch.randn(self._shape, generator=self._generator, device=self._generator.device)
