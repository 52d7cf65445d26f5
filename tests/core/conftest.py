"""The reference's small models, for tests that compare with its numbers."""

import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from uldm_cli.core.conditioning import Condition, inpainting_condition
from uldm_cli.core.latent import LatentDiffusion
from uldm_cli.specs.models import LatentDiffusionModel

FOLDER = Path(__file__).parents[1] / "golden"
FAMILIES = sorted(path.name for path in (FOLDER / "compvis").iterdir())
UNET_PREFIX = "model.diffusion_model."
CONDITIONERS = {
    "ClassEmbedder": ("class", {"key": None}),
    "BERTEmbedder": ("tokens", {"use_tokenizer": "tokenizer"}),
    "SpatialRescaler": ("rescaler", {}),
    "Identity": ("identity", {}),
}
"""Our kind of each of the reference's, and the fields that have another name, or none."""
VALUES = ("class", "tokens", "lr_image", "segmentation", "embedding")
"""What conditions are made of, as the stored tensors are named."""


@dataclass(frozen=True)
class Golden:
    """A model of the reference and what it computed."""

    name: str
    config: dict[str, Any]
    """The `params` of the model."""
    weights: dict[str, Tensor]
    """The whole state dict."""
    stored: dict[str, Tensor]
    """Inputs and results by name; see the README beside the files."""

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, without it."""
        return {key.removeprefix(prefix): value for key, value in self.weights.items() if key.startswith(prefix)}

    def unet_weights(self, which: str) -> dict[str, Tensor]:
        """The U-Net's state dict, "raw" or "ema". The average's names are those of the parameters, without dots."""
        raw = self.part(UNET_PREFIX)
        if which == "raw":
            return raw
        return {name: self.weights["model_ema." + f"diffusion_model.{name}".replace(".", "")] for name in raw}

    def model(self, which: str) -> LatentDiffusion:
        """The whole model with "raw" or "ema" weights of the U-Net, to be sampled from."""
        model = LatentDiffusionModel.model_validate(header(self)).build()
        first = self.part("first_stage_model.")
        if "quantize.embedding.weight" in first:
            first["quantize.embedding"] = first.pop("quantize.embedding.weight")
        model.autoencoder.load_state_dict(first)
        model.denoiser.backbone.load_state_dict(self.unet_weights(which))
        if model.conditioner is not None and model.conditioner.state_dict():
            told = self.part("cond_stage_model.")
            unused = {"transformer.to_logits.weight", "transformer.to_logits.bias"}
            model.conditioner.load_state_dict({key: value for key, value in told.items() if key not in unused})
        return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def condition(self, model: LatentDiffusion, which: str = "cond") -> Condition | None:
        """What the model is told ("cond"), or told instead for guidance ("uncond")."""
        stored = self.stored
        if model.conditioning is None:
            return None
        if "mask" in stored:
            return inpainting_condition(model.encode_condition, stored["image"], stored["mask"])
        values = [stored[f"{which}.{name}"] for name in VALUES if f"{which}.{name}" in stored]
        # There is no value of nothing where the reference takes zeros.
        return model.condition(values[0] if values else stored[f"{which}.encoded"])


def header(golden: Golden) -> dict[str, Any]:
    """Our description of the model. Written down here, so that what reads the published configs is checked too."""
    params, unet = golden.config, dict(golden.config["unet_config"]["params"])
    wide, narrow = unet.pop("in_channels"), unet.pop("out_channels")
    for unused in ("image_size", "use_checkpoint"):
        unet.pop(unused, None)
    told = params["cond_stage_config"]
    how = params.get("conditioning_key") or ("concat" if params.get("concat_mode", True) else None)
    conditioner = None
    if isinstance(told, dict):
        kind, names = CONDITIONERS[told["target"].rsplit(".", 1)[1]]
        fields = {names.get(key, key): value for key, value in told.get("params", {}).items()}
        conditioner = {"kind": kind, **{key: value for key, value in fields.items() if key}}
    elif told == "__is_first_stage__":
        conditioner = {"kind": "first-stage"}
    else:
        how = None
    first = params["first_stage_config"]["params"]
    shape = {key: value for key, value in first["ddconfig"].items() if key != "double_z"}
    codes = {"kind": "vq", "codebook_size": first["n_embed"]} if "n_embed" in first else {"kind": "kl"}
    scale = golden.weights.get("scale_factor", torch.tensor(params.get("scale_factor", 1.0)))
    return {
        "autoencoder": {**codes, "embed_dim": first["embed_dim"], **shape},
        "image_size": params["image_size"] * 2 ** (len(shape["ch_mult"]) - 1),
        "backbone": {"kind": "unet", **unet},
        "schedule": {
            "kind": "scaled_linear",
            "timesteps": params["timesteps"],
            "start": params["linear_start"],
            "end": params["linear_end"],
        },
        "target": "eps",
        "scale_factor": float(scale),
        "conditioner": conditioner,
        "conditioning": how,
        "concat_channels": wide - narrow,
    }


@pytest.fixture(scope="session", params=FAMILIES)
def golden(request: pytest.FixtureRequest) -> Golden:
    family = FOLDER / "compvis" / request.param
    weights = runpy.run_path(str(FOLDER / "weights.py"))["state_dict"](family)
    config = yaml.safe_load((family / "config.yaml").read_text())["model"]["params"]
    return Golden(request.param, config, weights, load_file(family / "golden.safetensors"))


@pytest.fixture(scope="session")
def averaged(golden: Golden) -> LatentDiffusion:
    """The model with the averaged weights."""
    return golden.model("ema")
