"""Noise schedules that a config can name."""

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from uldm_cli.specs.base import Spec, problem

if TYPE_CHECKING:
    from torch import Tensor

    from uldm_cli.core.schedules import VariancePreserving


class Discrete(Spec):
    """A table of betas, as in DDPM."""

    kind: str
    timesteps: int = Field(1000, ge=2, description="Number of timesteps T of training.")
    zero_terminal_snr: bool = Field(
        False, description="Shifts the schedule so that the last timestep is nothing but noise; needs target v or x0."
    )

    def betas(self) -> "Tensor":
        """Float64 `[T]`."""
        from uldm_cli.core.schedules import without_signal_at_the_end

        betas = self.plain_betas()
        return without_signal_at_the_end(betas) if self.zero_terminal_snr else betas

    def plain_betas(self) -> "Tensor":
        """As `betas`, before `zero_terminal_snr`."""
        raise NotImplementedError

    def build(self) -> "VariancePreserving":
        from uldm_cli.core.schedules import VariancePreserving

        return VariancePreserving(self.betas())


class ScaledLinear(Discrete):
    """Betas whose square root grows linearly: what the published latent-diffusion configs call "linear"."""

    kind: Literal["scaled_linear"] = "scaled_linear"
    start: float = Field(0.0015, gt=0, lt=1, description="First beta.")
    end: float = Field(0.0195, gt=0, lt=1, description="Last beta.")

    def plain_betas(self) -> "Tensor":
        from uldm_cli.core.schedules import scaled_linear_betas

        return scaled_linear_betas(self.timesteps, self.start, self.end)


class Linear(Discrete):
    """Betas that grow linearly, the default of diffusion in pixels."""

    kind: Literal["linear"] = "linear"
    start: float = Field(0.0001, gt=0, lt=1, description="First beta.")
    end: float = Field(0.02, gt=0, lt=1, description="Last beta.")

    def plain_betas(self) -> "Tensor":
        from uldm_cli.core.schedules import linear_betas

        return linear_betas(self.timesteps, self.start, self.end)


class Cosine(Discrete):
    """Alpha-bar as a squared cosine (Nichol & Dhariwal 2021)."""

    kind: Literal["cosine"] = "cosine"
    offset: float = Field(0.008, ge=0, lt=1, description="Keeps the first betas from vanishing.")

    def plain_betas(self) -> "Tensor":
        from uldm_cli.core.schedules import cosine_betas

        return cosine_betas(self.timesteps, self.offset)


class Sigmoid(Discrete):
    """Alpha-bar as a falling sigmoid (Jabri et al. 2022): more noise than the others, for large images."""

    kind: Literal["sigmoid"] = "sigmoid"
    start: float = Field(-3.0, allow_inf_nan=False, description="Where on the sigmoid the clean end lies.")
    end: float = Field(3.0, allow_inf_nan=False, description="Where on the sigmoid the noisy end lies.")
    tau: float = Field(1.0, gt=0, allow_inf_nan=False, description="Temperature: greater ones flatten the curve.")

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.start >= self.end:
            raise problem(f"expected a number greater than start ({self.start:g}), got {self.end:g}", path="end")
        return self

    def plain_betas(self) -> "Tensor":
        from uldm_cli.core.schedules import sigmoid_betas

        return sigmoid_betas(self.timesteps, self.start, self.end, self.tau)


def check_learnable(target: str, schedule: Spec) -> None:
    """Refuses a target that a network cannot learn with a schedule, as a validator does."""
    if target == "eps" and getattr(schedule, "zero_terminal_snr", False):
        text = "with schedule.zero_terminal_snr the last timestep is nothing but noise, and predicting it says nothing"
        raise problem(text, "Use target v or x0", path="target")
