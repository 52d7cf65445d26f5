"""Quantizers that a config can name. The codebook's size and width belong to the autoencoder."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from uldm_cli.specs.base import Spec

if TYPE_CHECKING:
    from uldm_cli.core.quantizers import Quantizer


class Nearest(Spec):
    """Nearest code, trained by gradient. Its codebook collapses easily: watch the perplexity."""

    kind: Literal["nearest"] = "nearest"
    legacy: bool = Field(
        False, description="Exchange the factors of codebook and commitment loss, as the published autoencoders do."
    )

    def build(self, codebook_size: int, dim: int) -> "Quantizer":
        from uldm_cli.core.quantizers import Quantizer

        return Quantizer(codebook_size, dim, self.legacy)


class EMA(Spec):
    """Codes that follow the moving average of their latents; dead ones are revived."""

    kind: Literal["ema"] = "ema"
    decay: float = Field(0.99, ge=0, lt=1, description="Decay of the moving averages.")
    revive_below: float = Field(
        0.03, ge=0, lt=1, description="A code used less than this share of the average use is revived; 0: never."
    )
    seed: int = Field(0, ge=0, description="Of the draws that start and revive codes.")

    def build(self, codebook_size: int, dim: int) -> "Quantizer":
        from uldm_cli.core.quantizers import EMAQuantizer

        return EMAQuantizer(codebook_size, dim, self.decay, self.revive_below, self.seed)
