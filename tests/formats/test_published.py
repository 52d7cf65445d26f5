"""The configs that published checkpoints get where theirs is missing."""

from pathlib import Path

import pytest
import torch

from uldm_cli.formats.compvis.config import Translated, read_config
from uldm_cli.runs import zoo
from uldm_cli.specs.models import LatentDiffusionModel
from uldm_cli.specs.yamlfile import to_yaml

ENTRIES = zoo.entries()


def translated(name: str, folder: Path) -> Translated:
    path = folder / "config.yaml"
    path.write_text(to_yaml(zoo.config_of(name)))
    return read_config(path)


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry.name for entry in ENTRIES])
def test_each_is_understood_without_a_warning(entry: zoo.Entry, tmp_path: Path) -> None:
    config = translated(entry.name, tmp_path)
    assert (config.kind, config.warnings) == (entry.kind, ())


@pytest.mark.parametrize(
    ("name", "millions"),
    [("celeba256", 274.06), ("cin256-v2", 400.92), ("inpainting_big", 387.25), ("text2img-large", 872.30)],
)
def test_the_network_has_the_published_number_of_weights(name: str, millions: float, tmp_path: Path) -> None:
    """The published code prints it when it loads a checkpoint."""
    model = LatentDiffusionModel.model_validate(translated(name, tmp_path).config)
    channels = model.autoencoder.latent_channels
    with torch.device("meta"):
        backbone = model.backbone.build(channels + model.concat_channels, channels)
    assert sum(weight.numel() for weight in backbone.parameters()) == pytest.approx(millions * 1e6, abs=5e3)


def test_the_churches_scale_is_in_the_checkpoint(tmp_path: Path) -> None:
    assert translated("lsun_churches256", tmp_path).scale_by_std
