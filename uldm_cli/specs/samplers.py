"""Samplers that a config can name."""

from collections.abc import Callable, Iterator
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
        self,
        denoise: "Denoise",
        x: "Tensor",
        schedule: "Schedule",
        noise: "Noise",
        constrain: "Constrain | None" = None,
    ) -> "Iterator[Step]": ...


def _at_uniform_timesteps(sampler: "Callable[..., Iterator[Step]]", steps: int, **settings: object) -> Sampler:
    """A sampler of the core with its settings, walking through so many timesteps of whatever schedule it is given."""
    from uldm_cli.core.schedules import uniform_timesteps

    def sample(
        denoise: "Denoise", x: "Tensor", schedule: "Schedule", noise: "Noise", constrain: "Constrain | None" = None
    ) -> "Iterator[Step]":
        timesteps = uniform_timesteps(schedule.T, steps)
        return sampler(denoise, x, schedule, noise, constrain, timesteps=timesteps, **settings)

    return sample


class DDIM(Spec):
    """Denoising diffusion implicit models (Song et al. 2021)."""

    kind: Literal["ddim"] = "ddim"
    steps: int = Field(200, ge=1, description="Number of sampling steps; exactly as many are made.")
    eta: float = Field(1.0, ge=0, le=1, description="Noise added in each step: 0 none, 1 as much as DDPM.")

    def build(self) -> Sampler:
        from uldm_cli.core.samplers import ddim

        return _at_uniform_timesteps(ddim, self.steps, eta=self.eta)


class DDPM(Spec):
    """Ancestral sampling (Ho et al. 2020)."""

    kind: Literal["ddpm"] = "ddpm"
    steps: int = Field(1000, ge=1, description="Number of sampling steps; all timesteps of the model by default.")
    variance: Literal["posterior", "beta"] = Field("posterior", description="Variance of the noise of a step.")

    def build(self) -> Sampler:
        from uldm_cli.core.samplers import ddpm

        return _at_uniform_timesteps(ddpm, self.steps, variance=self.variance)
