"""Samplers that a config can name."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, Protocol

from pydantic import Field

from uldm_cli.specs.base import Spec

if TYPE_CHECKING:
    from torch import Tensor

    from uldm_cli.core.samplers import Constrain, Denoise, Noise, Step
    from uldm_cli.core.schedules import Schedule


class Sampler(Protocol):
    """What a sampler's `build()` gives: from initial noise x, a step at a time."""

    def __call__(
        self, denoise: "Denoise", x: "Tensor", schedule: "Schedule", noise: "Noise", constrain: "Constrain | None" = None
    ) -> "Iterator[Step]": ...


class DDIM(Spec):
    """Denoising diffusion implicit models (Song et al. 2021)."""

    kind: Literal["ddim"] = "ddim"
    steps: int = Field(200, ge=1, description="Number of sampling steps; exactly as many are made.")
    eta: float = Field(1.0, ge=0, le=1, description="Noise added in each step: 0 none, 1 as much as DDPM.")

    def build(self) -> Sampler:
        from uldm_cli.core.samplers import ddim
        from uldm_cli.core.schedules import uniform_timesteps

        def sample(
            denoise: "Denoise",
            x: "Tensor",
            schedule: "Schedule",
            noise: "Noise",
            constrain: "Constrain | None" = None,
        ) -> "Iterator[Step]":
            timesteps = uniform_timesteps(schedule.T, self.steps)
            return ddim(denoise, x, schedule, noise, constrain, timesteps=timesteps, eta=self.eta)

        return sample


class DDPM(Spec):
    """Ancestral sampling (Ho et al. 2020)."""

    kind: Literal["ddpm"] = "ddpm"
    steps: int = Field(1000, ge=1, description="Number of sampling steps; all timesteps of the model by default.")
    variance: Literal["posterior", "beta"] = Field("posterior", description="Variance of the noise of a step.")

    def build(self) -> Sampler:
        from uldm_cli.core.samplers import ddpm
        from uldm_cli.core.schedules import uniform_timesteps

        def sample(
            denoise: "Denoise",
            x: "Tensor",
            schedule: "Schedule",
            noise: "Noise",
            constrain: "Constrain | None" = None,
        ) -> "Iterator[Step]":
            timesteps = uniform_timesteps(schedule.T, self.steps)
            return ddpm(denoise, x, schedule, noise, constrain, timesteps=timesteps, variance=self.variance)

        return sample
