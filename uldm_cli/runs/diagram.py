"""`uldm vqvae diagram`: pictures of the networks that a config or a model describes. No weights are read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uldm_cli import console
from uldm_cli.errors import ConfigError
from uldm_cli.formats.compvis import Translated, read_config
from uldm_cli.runs import zoo
from uldm_cli.runs.architecture import Architecture, UnknownKind, autoencoder_of, backbone_of
from uldm_cli.runs.configs import resolve_config
from uldm_cli.runs.draw.plot import DEFAULT, FORMATS, Style, picture_format, save_figure
from uldm_cli.runs.files import writable_folder
from uldm_cli.runs.models import known_autoencoder, model_config, newest_autoencoder, resolve
from uldm_cli.runs.outdir import OUTPUTS
from uldm_cli.specs.autoencoder_training import AutoencoderTraining
from uldm_cli.specs.diffusion_training import DiffusionTraining
from uldm_cli.specs.load import SUFFIXES
from uldm_cli.specs.models import AutoencoderModel, LatentDiffusionModel, read_model
from uldm_cli.specs.sampling import Sampling
from uldm_cli.specs.yamlfile import read_yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from uldm_cli.specs.base import Spec
    from uldm_cli.specs.models import Model

FOLDER = Path("viz_out")
PARTS = ("autoencoder", "unet")
_FILES = {"autoencoder": "vqvae_architecture", "unet": "unet_architecture"}
_NO_PLOT = (".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".eps", ".ps")


@dataclass(frozen=True)
class Described:
    """A model that is drawn."""

    name: str
    """What people call it, or its config."""
    model: Model


@dataclass(frozen=True)
class Picture:
    """A network and its file."""

    part: str
    architecture: Architecture
    path: Path
    config: dict[str, Any]
    """Of the network."""

    def as_json(self) -> dict[str, Any]:
        """For people's scripts."""
        stages = [asdict(stage) | {"parameters": stage.parameters} for stage in self.architecture.stages]
        known = {"part": self.part, "path": self.path, "parameters": self.architecture.parameters}
        return known | asdict(self.architecture) | {"stages": stages}


def read(config: Path | None, overrides: Sequence[str] = (), model: str | None = None) -> Described:
    """What there is to draw; with nothing given, the embedded model.

    Args:
        config: a YAML of `uldm vqvae train`, `uldm ldm train` or `uldm ldm sample`, or of a published model.
        overrides: of the first three, as `a.b=3`.
        model: a reference, as `runs.models.resolve` takes it; of the zoo, it need not have been pulled.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    if config is not None and config.suffix not in SUFFIXES:
        raise ConfigError(f"{config} is no YAML file", "A model is named by --model")
    if overrides and (config is None or model is not None):
        raise ConfigError(f"{overrides[0]} changes a config, and none is drawn", "Name a YAML file before it")
    if config is None or model is not None:
        return _of_reference(model, config)
    if "kind" not in read_yaml(config, targets=True)[0]:
        if overrides:
            raise ConfigError(f"{overrides[0]} cannot change {config}, the config of a published model", "Edit it")
        return _published(read_config(config), config.name)
    return _of_command(resolve_config(str(config), overrides), config)


def _of_reference(reference: str | None, config: Path | None) -> Described:
    if reference is not None and reference.startswith("zoo:") and config is None:
        name = reference.removeprefix("zoo:")
        return _published(zoo.described(name), name)
    file = resolve(reference, "autoencoder", config)
    kind = LatentDiffusionModel if file.header.kind == "latent-diffusion" else AutoencoderModel
    return Described(file.name, model_config(file, kind))


def _published(known: Translated, name: str) -> Described:
    kind = LatentDiffusionModel if known.kind == "latent-diffusion" else AutoencoderModel
    return Described(name, read_model(kind, known.config, str(known.path)))


def _of_command(spec: Spec, config: Path) -> Described:
    name = config.name
    if isinstance(spec, AutoencoderTraining):
        return Described(name, AutoencoderModel(autoencoder=spec.autoencoder, image_size=spec.data.size))
    if isinstance(spec, DiffusionTraining):
        return Described(name, _to_be_trained(spec))
    reference = getattr(spec, "model", None)
    if not isinstance(spec, Sampling):
        raise ConfigError(f"{config} is a config of another command", "Give one of a training, or a model by --model")
    return _of_reference(reference, None)


def _to_be_trained(spec: DiffusionTraining) -> LatentDiffusionModel:
    """The model that a training would make; only its scale factor, which is not drawn, is measured then."""
    reference = spec.autoencoder or newest_autoencoder(OUTPUTS)
    if reference is None:
        hint = "Name one, as in autoencoder=fruits64, or run `uldm vqvae train` first"
        raise ConfigError(f"there is no trained autoencoder in {OUTPUTS}", hint)
    held = known_autoencoder(reference)
    if spec.data is not None:
        spec.check_fit(held.autoencoder, reference)
    return LatentDiffusionModel(
        autoencoder=held.autoencoder,
        image_size=spec.data.size if spec.data else held.image_size,
        backbone=spec.backbone,
        schedule=spec.schedule,
        target=spec.target,
        learned_variance=spec.learned_variance,
        scale_factor=spec.scale_factor or 1.0,
    )


def draw(
    described: Described,
    out: Path | None = None,
    part: str | None = None,
    *,
    title: str | None = None,
    style: Style = DEFAULT,
) -> list[Picture]:
    """Writes a picture of the autoencoder, and of the U-Net where there is one.

    Args:
        described: by `read`.
        out: a folder, or a file that ends in .png, .svg or .pdf; of two pictures, each adds its part's name to it.
        part: one of PARTS, to draw it alone.
        title: above the pictures; by default the name.
        style: how they are printed.

    Raises:
        ConfigError: nothing of it can be drawn, or nothing can be written there.
    """
    from uldm_cli.runs.draw.diagram import architecture_figure

    found = _architectures(described, part)
    paths = _paths(out, [part for part, _ in found])
    pictures = []
    for (name, architecture), path in zip(found, paths, strict=True):
        spec: Any = getattr(described.model, "backbone" if name == "unet" else "autoencoder")
        picture = Picture(name, architecture, path, spec.model_dump(mode="json"))
        about = {"title": f"{name} of {described.name}", "config": json.dumps(picture.config)}
        titled = architecture if title is None else replace(architecture, name=title)
        save_figure(architecture_figure(titled, style), path, about, style)
        pictures.append(picture)
    return pictures


def _architectures(described: Described, part: str | None) -> list[tuple[str, Architecture]]:
    """The networks to draw. One that is of a kind which is not known is left out, and named."""
    if part not in (None, *PARTS):
        raise ConfigError(f"--part {part}: there is no such part", f"Choose one of: {', '.join(PARTS)}")
    model = described.model
    ways: dict[str, Callable[[], Architecture]] = {"autoencoder": partial(autoencoder_of, model, described.name)}
    if isinstance(model, LatentDiffusionModel):
        ways["unet"] = partial(backbone_of, model, described.name)
    if part is not None and part not in ways:
        raise ConfigError(f"{described.name} is an autoencoder, and has no U-Net", "Leave --part out")
    found: list[tuple[str, Architecture]] = []
    unknown: list[UnknownKind] = []
    for name in ways if part is None else [part]:
        try:
            found.append((name, ways[name]()))
        except UnknownKind as error:
            unknown.append(error)
    if not found:
        raise unknown[0]
    for left_out in unknown:
        console.warn(f"{left_out.message}, so no picture of it is drawn")
    return found


def _paths(out: Path | None, parts: Sequence[str]) -> list[Path]:
    """A file for each part, in a folder that can be written to."""
    folder = FOLDER if out is None else out
    ending = folder.suffix.lower()
    if folder.is_dir() or ending.removeprefix(".") not in FORMATS:
        if ending in _NO_PLOT and not folder.is_dir():
            picture_format(folder)
        return [writable_folder(folder) / f"{_FILES[part]}.png" for part in parts]
    writable_folder(folder.parent)
    return [folder if len(parts) == 1 else folder.with_stem(f"{folder.stem}_{part}") for part in parts]
