"""The reference's small models, for tests that compare with its numbers."""

import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "golden"
UNET_PREFIX = "model.diffusion_model."


@dataclass(frozen=True)
class Golden:
    """A model of the reference and what it computed."""

    config: dict[str, Any]
    """The `params` of the model."""
    weights: dict[str, Tensor]
    """The whole state dict."""
    stored: dict[str, Tensor]
    """Inputs and results by name; see the README beside the files."""

    def unet_weights(self, which: str) -> dict[str, Tensor]:
        """The U-Net's state dict, "raw" or "ema". The average's names are those of the parameters, without dots."""
        raw = {k.removeprefix(UNET_PREFIX): v for k, v in self.weights.items() if k.startswith(UNET_PREFIX)}
        if which == "raw":
            return raw
        return {name: self.weights["model_ema." + f"diffusion_model.{name}".replace(".", "")] for name in raw}


@pytest.fixture(scope="session", params=["uncond-vq", "uncond-kl"])
def golden(request: pytest.FixtureRequest) -> Golden:
    family = FOLDER / "compvis" / request.param
    weights = runpy.run_path(str(FOLDER / "weights.py"))["state_dict"](family)
    config = yaml.safe_load((family / "config.yaml").read_text())["model"]["params"]
    return Golden(config, weights, load_file(family / "golden.safetensors"))
