"""Quantizers that a config can name. The codebook's size and width belong to the autoencoder."""

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt

from uldm_cli.specs.base import Spec, problem

if TYPE_CHECKING:
    from uldm_cli.core import quantizers

Share = Annotated[float, Field(ge=0, lt=1)]
_REVIVE = "A code used less than this share of the average use is revived; 0: never."
_SEED = "Of the draws that revive codes."


class Nearest(Spec):
    """Nearest code, trained by gradient; dead ones are revived."""

    kind: Literal["nearest"] = "nearest"
    legacy: bool = Field(
        False, description="Exchange the factors of codebook and commitment loss, as the published autoencoders do."
    )
    revive_below: Share = Field(0.03, description=_REVIVE)
    seed: int = Field(0, ge=0, description=_SEED)

    def build(self, codebook_size: int, dim: int) -> "quantizers.NearestQuantizer":
        from uldm_cli.core.quantizers import NearestQuantizer

        return NearestQuantizer(codebook_size, dim, legacy=self.legacy, revive_below=self.revive_below, seed=self.seed)


class Cosine(Spec):
    """The code of the greatest cosine, trained by gradient; dead ones are revived."""

    kind: Literal["cosine"] = "cosine"
    code_dim: PositiveInt | None = Field(
        None, description="Compare in so many dimensions, between two learned projections; by default as latents are."
    )
    revive_below: Share = Field(0.03, description=_REVIVE)
    seed: int = Field(0, ge=0, description=_SEED)

    def build(self, codebook_size: int, dim: int) -> "quantizers.CosineQuantizer":
        from uldm_cli.core.quantizers import CosineQuantizer

        return CosineQuantizer(
            codebook_size, dim, code_dim=self.code_dim, revive_below=self.revive_below, seed=self.seed
        )


class EMA(Spec):
    """Codes that follow the moving average of their latents; dead ones are revived."""

    kind: Literal["ema"] = "ema"
    decay: float = Field(0.99, ge=0, lt=1, description="Decay of the moving averages.")
    revive_below: Share = Field(0.03, description=_REVIVE)
    seed: int = Field(0, ge=0, description="Of the draws that start and revive codes.")

    def build(self, codebook_size: int, dim: int) -> "quantizers.EMAQuantizer":
        from uldm_cli.core.quantizers import EMAQuantizer

        return EMAQuantizer(codebook_size, dim, self.decay, self.revive_below, self.seed)


class FSQ(Spec):
    """Each channel of a latent rounded to a few values: no codebook is learned, and none can collapse."""

    kind: Literal["fsq"] = "fsq"
    levels: tuple[Annotated[int, Field(ge=3)], ...] = Field(
        (8, 8, 4, 4),
        min_length=1,
        description="Number of values of each of the latent's channels; their product is the codebook's size.",
    )

    def build(self, codebook_size: int, dim: int) -> "quantizers.FSQ":
        from uldm_cli.core.quantizers import FSQ as Module

        return Module(self.levels)


def check_codes(quantizer: Spec, codebook_size: int, dim: int, named: str) -> None:
    """Raises where an autoencoder's codes cannot be those of its quantizer; `named` is the field that holds `dim`."""
    if not isinstance(quantizer, FSQ):
        return
    codes, levels = math.prod(quantizer.levels), len(quantizer.levels)
    if levels != dim:
        text = f"expected a number for each of the latent's {dim} channels, got {levels}"
        raise problem(text, f"Change it, or set {named}={levels}", path="quantizer.levels")
    if codes != codebook_size:
        product = " x ".join(map(str, quantizer.levels))
        text = f"expected {codes}, which is {product} of quantizer.levels, got {codebook_size}"
        raise problem(text, f"Set it to {codes}, or take other levels", path="codebook_size")
