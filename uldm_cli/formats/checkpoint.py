"""A model on disk, whatever its layout: what it is, and its tensors under the names that our modules have."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uldm_cli.formats.tensors import Tensors

KINDS = {"autoencoder": "model", "latent-diffusion": "backbone"}
"""Kinds of checkpoint, and which part holds the raw weights that `ema` averages."""
KEPT = "kept."
"""Tensors that no module has, under the names of their source, so that converting back gives every tensor again."""


@dataclass(frozen=True)
class Header:
    """What a checkpoint says of itself."""

    kind: str
    """"autoencoder" or "latent-diffusion"."""
    config: dict[str, Any]
    """The model, as `specs.models` describes it."""
    training: dict[str, Any] = field(default_factory=dict)
    """The config it was trained with."""
    step: int = 0
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shape of each tensor in the file."""

    @property
    def weights(self) -> tuple[str, ...]:
        """Which of "ema" and "raw" the file holds."""
        parts = {name.split(".", 1)[0] for name in self.tensors}
        return tuple(w for w, part in (("ema", "ema"), ("raw", KINDS[self.kind])) if part in parts)


@dataclass(frozen=True)
class Checkpoint:
    """A model as a file or folder has it. Nothing of its weights is read before a tensor is.

    Tensors are named `<part>.<key>`: `model.*` and `ema.*` of an autoencoder; `autoencoder.*`, `backbone.*`, `ema.*`
    (the backbone's average) and `conditioner.*` of a latent diffusion model; `kept.*` of either.
    """

    path: Path
    layout: str
    """"uldm", "compvis" or "diffusers"."""
    header: Header
    tensors: "Tensors"
    warnings: tuple[str, ...] = ()
    """What a person should know of it."""
    skipped: tuple[str, ...] = ()
    """Names of classes that were not built, because weights need none."""
    extra: tuple[str, ...] = ()
    """Names in the source that were not understood; their tensors are kept."""
