"""Samplers that a config can name."""

from collections.abc import Callable, Iterator
from functools import partial
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


Timesteps = Callable[[int], list[int]]
"""Of a schedule's number of timesteps T, those that sampling takes, falling, with the one that it arrives at."""


def _at(choose: Timesteps, sampler: "Callable[..., Iterator[Step]]", **settings: object) -> Sampler:
    """A sampler of the core with its settings, walking through timesteps chosen for the schedule that it is given."""

    def sample(
        denoise: "Denoise", x: "Tensor", schedule: "Schedule", noise: "Noise", constrain: "Constrain | None" = None
    ) -> "Iterator[Step]":
        return sampler(denoise, x, schedule, noise, constrain, timesteps=choose(schedule.T), **settings)

    return sample


class Spaced(Spec):
    """A sampler whose timesteps can be spaced in more than one way; so its number of steps depends on the schedule."""

    kind: str
    steps: int = Field(50, ge=1)
    spacing: Literal["uniform", "compvis"] = Field(
        "uniform",
        description="uniform makes exactly so many steps; compvis is the published code's spacing, which can make more "
        "(400 of 1000 timesteps makes 500).",
    )

    def timesteps(self, T: int) -> list[int]:
        """Those taken of a schedule's T, falling, and the one that the last step arrives at.

        Raises:
            UsageError: there is no such number of steps.
        """
        from uldm_cli.core.spacing import compvis_timesteps, uniform_timesteps

        return (compvis_timesteps if self.spacing == "compvis" else uniform_timesteps)(T, self.steps)


class DDIM(Spaced):
    """Denoising diffusion implicit models (Song et al. 2021)."""

    kind: Literal["ddim"] = "ddim"
    steps: int = Field(200, ge=1, description="Number of sampling steps.")
    eta: float = Field(1.0, ge=0, le=1, description="Noise added in each step: 0 none, 1 as much as DDPM.")

    def build(self) -> Sampler:
        from uldm_cli.core.samplers import ddim

        return _at(self.timesteps, ddim, eta=self.eta)


class PLMS(Spaced):
    """Pseudo linear multistep (Liu et al. 2022): no noise, and the first step takes two calls of the network."""

    kind: Literal["plms"] = "plms"
    steps: int = Field(50, ge=1, description="Number of sampling steps.")

    def build(self) -> Sampler:
        from uldm_cli.core.samplers import plms

        return _at(self.timesteps, plms)


class DDPM(Spec):
    """Ancestral sampling (Ho et al. 2020)."""

    kind: Literal["ddpm"] = "ddpm"
    steps: int = Field(1000, ge=1, description="Number of sampling steps; all timesteps of the model by default.")
    variance: Literal["posterior", "beta"] = Field("posterior", description="Variance of the noise of a step.")

    def build(self) -> Sampler:
        from uldm_cli.core.samplers import ddpm
        from uldm_cli.core.spacing import uniform_timesteps

        return _at(partial(uniform_timesteps, steps=self.steps), ddpm, variance=self.variance)
