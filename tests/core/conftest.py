"""The reference's small models (see tests/golden), for what `scripts/conformance.py` does not compare."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from uldm_cli.core.latent import LatentDiffusion
from uldm_cli.runs.models import load_latent_diffusion, resolve

FOLDER = Path(__file__).parents[1] / "golden" / "compvis"


@dataclass(frozen=True)
class Golden:
    """A model of the reference and what it computed."""

    model: LatentDiffusion
    """With the averaged weights."""
    stored: dict[str, Tensor]
    """Inputs and results by name; see the README beside the files."""


@pytest.fixture(scope="session", params=sorted(path.name for path in FOLDER.iterdir()))
def golden(request: pytest.FixtureRequest, golden_checkpoint: Callable[[str], Path]) -> Golden:
    model = load_latent_diffusion(resolve(str(golden_checkpoint(request.param))))
    return Golden(model, load_file(FOLDER / request.param / "golden.safetensors"))
