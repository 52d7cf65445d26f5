"""Noise schedules that a config can name."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from uldm_cli.specs.base import Spec

if TYPE_CHECKING:
    from uldm_cli.core.schedules import VariancePreserving


class ScaledLinear(Spec):
    """Betas whose square root grows linearly: what the published latent-diffusion configs call "linear"."""

    kind: Literal["scaled_linear"] = "scaled_linear"
    timesteps: int = Field(1000, ge=2, description="Number of timesteps T of training.")
    start: float = Field(0.0015, gt=0, lt=1, description="First beta.")
    end: float = Field(0.0195, gt=0, lt=1, description="Last beta.")

    def build(self) -> "VariancePreserving":
        from uldm_cli.core.schedules import VariancePreserving, scaled_linear_betas

        return VariancePreserving(scaled_linear_betas(self.timesteps, self.start, self.end))


class Linear(Spec):
    """Betas that grow linearly, the default of diffusion in pixels."""

    kind: Literal["linear"] = "linear"
    timesteps: int = Field(1000, ge=2, description="Number of timesteps T of training.")
    start: float = Field(0.0001, gt=0, lt=1, description="First beta.")
    end: float = Field(0.02, gt=0, lt=1, description="Last beta.")

    def build(self) -> "VariancePreserving":
        from uldm_cli.core.schedules import VariancePreserving, linear_betas

        return VariancePreserving(linear_betas(self.timesteps, self.start, self.end))


class Cosine(Spec):
    """Alpha-bar as a squared cosine (Nichol & Dhariwal 2021)."""

    kind: Literal["cosine"] = "cosine"
    timesteps: int = Field(1000, ge=2, description="Number of timesteps T of training.")
    offset: float = Field(0.008, ge=0, lt=1, description="Keeps the first betas from vanishing.")

    def build(self) -> "VariancePreserving":
        from uldm_cli.core.schedules import VariancePreserving, cosine_betas

        return VariancePreserving(cosine_betas(self.timesteps, self.offset))
