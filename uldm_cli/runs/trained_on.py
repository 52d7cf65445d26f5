"""Which autoencoder is meant where none is named, and which images go with it."""

from typing import Any

from uldm_cli import console
from uldm_cli.errors import ConfigError
from uldm_cli.runs.checkpoints import MODEL
from uldm_cli.runs.models import ModelFile, model_config, newest_autoencoder, resolve
from uldm_cli.runs.outdir import OUTPUTS
from uldm_cli.runs.train_plan import Plan
from uldm_cli.specs.base import Spec
from uldm_cli.specs.datasets import Dataset
from uldm_cli.specs.diffusion_training import DiffusionTraining, data_of
from uldm_cli.specs.models import AutoencoderModel, Model


def chosen_autoencoder(reference: str | None) -> tuple[str, ModelFile]:
    """The autoencoder that a config names, by default that of the newest run, and how it is called.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    newest = reference or newest_autoencoder(OUTPUTS)
    if newest is None:
        embedded = "autoencoder=fruits64 data=images data.root=FOLDER takes the embedded one"
        hint = f"Run `uldm vqvae train` first, or name one: autoencoder=PATH; {embedded}"
        raise ConfigError(f"there is no trained autoencoder in {OUTPUTS}", hint)
    file = resolve(newest, "autoencoder")
    if reference is None:
        of = file.header.training.get("train", {}).get("steps", "?")
        console.note(f"autoencoder: {newest}, the newest run (step {file.header.step} of {of})")
    return newest, file


def autoencoder_of(plan: Plan[DiffusionTraining]) -> str | None:
    """Where a run's autoencoder lies: one that goes on keeps the one that it began with, whatever its name leads to."""
    return str(plan.checkpoint / MODEL) if plan.checkpoint else plan.config.autoencoder


def chosen_data(data: Dataset | None, file: ModelFile) -> Dataset:
    """The images that a config names, by default those that the autoencoder was trained on.

    Raises:
        ConfigError: it does not say which those were, or they are of a kind that is not known here.
    """
    found = data or data_of(file.header.training, file.name)
    if found is None:
        what = f"{file.name} does not say which images it was trained on"
        raise ConfigError(what, "Name them, as in data=images data.root=FOLDER")
    return found


def tell_other_size(size: int, file: ModelFile) -> None:
    """Says where images are made of another size than those that the autoencoder was trained on."""
    usual = model_config(file, AutoencoderModel).image_size
    if size != usual:
        sides = f"images are made {size}x{size}, and {file.name} was trained on {usual}x{usual}"
        console.note(f"{sides}: data.size={usual} takes those")


def told_apart(theirs: Spec, ours: Spec) -> str:
    """In what one network differs from another, for people: "it has ch 64, z_channels 4"."""
    here = ours.model_dump(mode="json")
    other = [f"{name} {was}" for name, was in theirs.model_dump(mode="json").items() if here.get(name) != was]
    return f"it has {', '.join(other)}"


def images_of(file: ModelFile, model: Model) -> dict[str, Any]:
    """The images that a model was trained on, as a config; where it does not tell, a folder of such images."""
    try:
        data = data_of(file.header.training, file.name)
    except ConfigError:  # of a plugin that is not here: whoever trains names images anyhow
        data = None
    channels, size, _ = model.image_shape
    return {"kind": "images", "size": size, "channels": channels} if data is None else data.model_dump(mode="json")
