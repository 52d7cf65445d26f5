"""Draws the random weights of the reference models in `compvis/`, so that only their recipe has to be stored.

`layout.json` names every tensor of a model's state dict with its shape and a rule. A tensor's values come from numpy's
RandomState, whose streams are frozen for good, seeded by the tensor's name; they are the same on every machine.
"""

import json
import shutil
import sys
import zlib
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor


def state_dict(family: Path) -> dict[str, Tensor]:
    """The model's whole state dict, float32, in the order of its layout."""
    layout = json.loads((family / "layout.json").read_text())
    stored = load_file(family / "golden.safetensors")
    tensors: dict[str, Tensor] = {}
    # What is derived from another tensor ("same:KEY", "ema:KEY") comes after all others.
    for key, (shape, rule) in sorted(layout["keys"].items(), key=lambda item: ":" in item[1][1]):
        how, _, source = rule.partition(":")
        if how == "stored":
            tensors[key] = stored[f"state.{key}"]
        elif how == "same":
            tensors[key] = tensors[source]
        elif how == "ema":
            tensors[key] = tensors[source] * (1 + 0.05 * _normal(key, shape, layout["seed"]))
        else:
            tensors[key] = _by_rule(how, _normal(key, shape, layout["seed"]))
    return {key: tensors[key] for key in layout["keys"]}


def write_checkpoint(family: Path, path: Path) -> None:
    """The model as a pickle of the kind that was published: Lightning's, with a class in it that is not installed."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": name})
    modules = {part: ModuleType(part) for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name)}
    modules[name].ModelCheckpoint = callback
    checkpoint = {
        "epoch": 3,
        "global_step": 4321,
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {callback: {"monitor": "val/loss_simple_ema", "best_model_score": torch.tensor(0.14)}},
        "optimizer_states": [],
        "lr_schedulers": [],
        "state_dict": state_dict(family),
    }
    with patch.dict(sys.modules, modules):
        torch.save(checkpoint, path)


def write_model(family: Path, folder: Path) -> Path:
    """The model as it would be published, `config.yaml` beside `model.ckpt`, whose path it gives."""
    write_checkpoint(family, folder / "model.ckpt")
    shutil.copy(family / "config.yaml", folder)
    return folder / "model.ckpt"


def _normal(key: str, shape: list[int], seed: int) -> Tensor:
    generator = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32)  # the frozen one
    return torch.from_numpy(np.asarray(generator.standard_normal(shape))).float()


def _by_rule(rule: str, x: Tensor) -> Tensor:
    """Values of the size that a trained network has there."""
    if rule == "fan_in":
        return x * (1 / x[0].numel()) ** 0.5
    if rule == "gain":
        return 1 + 0.1 * x
    return {"bias": 0.1, "code": 0.7}[rule] * x
