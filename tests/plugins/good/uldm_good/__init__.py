from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Literal

from pydantic import Field

from uldm_cli.api import Sampler, Spec


class Euler(Spec):
    """Deterministic steps along the predicted noise."""

    kind: Literal["euler"] = "euler"
    steps: int = Field(5, ge=1, description="Number of steps.")

    def build(self) -> Sampler:
        import torch

        from uldm_cli.api import Step, uniform_timesteps

        @torch.no_grad()
        def sample(denoise: Callable, x: Any, schedule: Any, noise: Callable, constrain: Any = None) -> Iterator[Step]:
            for n, (t, following) in enumerate(pairwise(uniform_timesteps(schedule.T, self.steps)), start=1):
                x_in = constrain(x, t) if constrain else x
                x0, eps = denoise(x_in, t)
                x = schedule.alpha(following) * x0 + schedule.sigma(following) * eps
                yield Step(n, t, x_in, x, x0, eps, nfe=n)

        return sample


def hello(name: str = "world") -> None:
    """Greet."""
    from uldm_cli import console

    console.text(f"hello {name}")
