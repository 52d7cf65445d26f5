"""Writes folders that diffusers loads: an LDMPipeline, or a first stage alone."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uldm_cli.errors import ConfigError, UldmError
from uldm_cli.formats.checkpoint import KEPT, KINDS, Checkpoint
from uldm_cli.formats.diffusers import autoencoders, unet
from uldm_cli.formats.diffusers.reading import CONFIG, INDEX, PIPELINE, SCALE, SCHEDULER_CONFIG, SLOTS
from uldm_cli.formats.diffusers.scheduler import write_scheduler
from uldm_cli.formats.diffusers.tables import Row, autoencoder_rows, to_theirs, unet_rows
from uldm_cli.formats.diffusers.weights import SHARD_BYTES, write_json, write_weights
from uldm_cli.specs.models import AutoencoderModel, LatentDiffusionModel, read_model

if TYPE_CHECKING:
    from uldm_cli.formats.tensors import Tensors

VERSION = {"_diffusers_version": "0.32.0"}
"""Of diffusers, whose meaning of the fields it is."""
_STATISTICS = ("quantize.cluster_size", "quantize.cluster_sum", "quantize.initialized")
"""Tensors of a quantizer that only its training needs."""


@dataclass(frozen=True)
class _Model:
    """One model of a folder."""

    config: dict[str, Any]
    tensors: "Tensors"


def write(checkpoint: Checkpoint, folder: Path, weights: str | None = None, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a folder that diffusers loads, whole or not at all.

    Args:
        checkpoint: a latent diffusion model, or an autoencoder.
        folder: must not be there yet, or be empty.
        weights: "ema" or "raw"; by default the average if there is one.
        shard_bytes: weights of more bytes are written as several files.

    Raises:
        ConfigError: diffusers cannot hold the model, it is incomplete, or the folder is in use.
        UldmError: the disk is full, or the folder cannot be written to.
    """
    if checkpoint.header.kind == "autoencoder":
        models = {"": _alone(checkpoint, weights)}
        configs: dict[str, Mapping[str, Any]] = {}
    else:
        models, configs = _pipeline(checkpoint, weights)
    with _new_folder(folder) as place:
        for name, values in configs.items():
            (place / name).parent.mkdir(exist_ok=True)
            write_json(place / name, {**values, **VERSION})
        for name, model in models.items():
            (place / name).mkdir(exist_ok=True)
            write_json(place / name / CONFIG, model.config | VERSION)
            write_weights(place / name, model.tensors, shard_bytes)


def _alone(checkpoint: Checkpoint, weights: str | None) -> _Model:
    model = read_model(AutoencoderModel, checkpoint.header.config, str(checkpoint.path))
    config = model.autoencoder.model_dump()
    said = checkpoint.tensors.get(SCALE)
    # Without a word of its own a KL autoencoder has diffusers' default; that of a VQ model would be wrong.
    unsaid = autoencoders.SCALING["vq"] if config["kind"] == "vq" else None
    scale = unsaid if said is None else float(said.read())
    return _autoencoder(checkpoint, config, scale, _part(checkpoint, weights))


def _pipeline(checkpoint: Checkpoint, weights: str | None) -> tuple[dict[str, _Model], dict[str, Mapping[str, Any]]]:
    """The models and the other configs of an LDMPipeline, by folder and by file."""
    model = read_model(LatentDiffusionModel, checkpoint.header.config, str(checkpoint.path))
    if model.conditioning is not None:
        raise ConfigError(
            f"conditioning is {model.conditioning!r}, and diffusers' {PIPELINE} is unconditional",
            "Only models without a condition can be written for diffusers",
        )
    if model.learned_variance:
        raise ConfigError(
            f"learned_variance is true, and the networks of diffusers' {PIPELINE} predict no variance",
            "uldm's own format holds it",
        )
    backbone = model.backbone.model_dump()
    channels, side, _ = model.latent_shape
    unet_config = unet.write_unet(backbone, channels, side)
    rows = unet_rows(unet.unet_shape(backbone))
    slot = SLOTS[0]
    models = {
        "unet": _Model(unet_config, _theirs(checkpoint, rows, _part(checkpoint, weights), "unet")),
        slot: _autoencoder(checkpoint, model.autoencoder.model_dump(), model.scale_factor, "autoencoder"),
    }
    scheduler = write_scheduler(model.schedule.model_dump(), model.target)
    classes = {name: one.config["_class_name"] for name, one in models.items()}
    classes["scheduler"] = scheduler["_class_name"]
    index = {"_class_name": PIPELINE, **{name: ["diffusers", kind] for name, kind in classes.items()}}
    return models, {INDEX: index, f"scheduler/{SCHEDULER_CONFIG}": scheduler}


def _autoencoder(checkpoint: Checkpoint, config: dict[str, Any], scale: float | None, part: str) -> _Model:
    written = autoencoders.write_autoencoder(config, scale)
    rows = autoencoder_rows(autoencoders.autoencoder_shape(config))
    return _Model(written, _theirs(checkpoint, rows, part, SLOTS[0]))


def _part(checkpoint: Checkpoint, weights: str | None) -> str:
    """The part that holds the weights asked for."""
    held = checkpoint.header.weights
    if weights is None and held:
        weights = held[0]
    if weights not in held:
        raise ConfigError(f"{checkpoint.path} holds no {weights or ''} weights", f"It has: {', '.join(held) or 'none'}")
    return "ema" if weights == "ema" else KINDS[checkpoint.header.kind]


def _theirs(checkpoint: Checkpoint, rows: Sequence[Row], part: str, name: str) -> "Tensors":
    """One part's tensors as diffusers calls them, with those that were kept of the same folder."""
    ours = _named(checkpoint, f"{part}.")
    theirs = to_theirs(rows, ours)
    placed = {row.ours for row in rows if row.theirs[0] in theirs}
    wrong = [row.ours for row in rows if row.ours not in placed]
    wrong += [key for key in ours if key not in placed and key not in (*_STATISTICS, *wrong)]
    if wrong:
        raise ConfigError(
            f"{checkpoint.path}: {len(wrong)} tensors of {part} are missing, too many or of other shapes than its "
            f"config says, first {part}.{wrong[0]}",
            "Use the config it was made with",
        )
    return theirs | _named(checkpoint, f"{KEPT}{name}.")


def _named(checkpoint: Checkpoint, prefix: str) -> "dict[str, Any]":
    found = checkpoint.tensors.items()
    return {name.removeprefix(prefix): ref for name, ref in found if name.startswith(prefix)}


@contextmanager
def _new_folder(destination: Path) -> Iterator[Path]:
    """A folder to write to, which takes its name only when all is in it."""
    path = destination.resolve()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{destination} is a file", "Name a new folder")
    if path.is_dir() and any(path.iterdir()):
        raise ConfigError(f"{destination} is not empty", "Name a new folder")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            path.rmdir()
        temporary.rename(path)
    except BaseException as e:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(e, OSError):
            raise UldmError(f"{destination} could not be written: {e.strerror or e}") from e
        raise
