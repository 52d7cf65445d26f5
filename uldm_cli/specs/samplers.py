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


class Timesteps(Protocol):
    """Chooses the timesteps that sampling takes of a schedule's T, falling, with the one that it arrives at."""

    def __call__(self, T: int, *, ends_in_noise: bool) -> list[int]: ...


def _at(choose: Timesteps, sampler: "Callable[..., Iterator[Step]]", **settings: object) -> Sampler:
    """A sampler of the core with its settings, walking through timesteps chosen for the schedule that it is given."""

    def sample(
        denoise: "Denoise", x: "Tensor", schedule: "Schedule", noise: "Noise", constrain: "Constrain | None" = None
    ) -> "Iterator[Step]":
        from uldm_cli.core.schedules import ends_in_noise

        timesteps = choose(schedule.T, ends_in_noise=ends_in_noise(schedule))
        return sampler(denoise, x, schedule, noise, constrain, timesteps=timesteps, **settings)

    return sample


def _exactly(T: int, *, steps: int, ends_in_noise: bool) -> list[int]:
    """Exactly so many timesteps, with the last where sampling must begin there."""
    from uldm_cli.core.spacing import trailing_timesteps, uniform_timesteps

    return (trailing_timesteps if ends_in_noise else uniform_timesteps)(T, steps)


class Spaced(Spec):
    """A sampler whose timesteps can be spaced in more than one way; so its number of steps depends on the schedule."""

    kind: str
    steps: int = Field(50, ge=1)
    spacing: Literal["auto", "uniform", "trailing", "compvis"] = Field(
        "auto",
        description="uniform arrives at the first timestep; trailing begins at the very last one. auto is trailing for "
        "a schedule whose last timestep holds no signal, and else uniform. compvis is the published code's spacing, "
        "which can make more steps (400 of 1000 timesteps makes 500).",
    )

    def timesteps(self, T: int, *, ends_in_noise: bool = False) -> list[int]:
        """Those taken of a schedule's T, falling, and the one that the last step arrives at.

        Args:
            T: the schedule's number of timesteps.
            ends_in_noise: whether nothing of the signal is left at its last.

        Raises:
            UsageError: there is no such number of steps.
        """
        from uldm_cli.core.spacing import compvis_timesteps

        if self.spacing == "compvis":
            return compvis_timesteps(T, self.steps)
        trailing = ends_in_noise if self.spacing == "auto" else self.spacing == "trailing"
        return _exactly(T, steps=self.steps, ends_in_noise=trailing)


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
    variance: Literal["posterior", "beta", "learned"] = Field(
        "posterior", description="Variance of the noise of a step; learned is for models that have learned it."
    )

    def build(self) -> Sampler:
        from uldm_cli.core.samplers import ddpm

        return _at(partial(_exactly, steps=self.steps), ddpm, variance=self.variance)
