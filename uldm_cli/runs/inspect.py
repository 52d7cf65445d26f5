"""`uldm convert inspect`: what a checkpoint holds, from its headers alone. Nothing in it is run, no weight is read."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uldm_cli.formats.checkpoint import KINDS
from uldm_cli.formats.compvis import MissingConfig
from uldm_cli.formats.detect import open_tensors
from uldm_cli.runs.models import ModelFile, model_config, resolve
from uldm_cli.specs.models import AutoencoderModel, LatentDiffusionModel

if TYPE_CHECKING:
    from uldm_cli.formats.tensors import Tensors


@dataclass(frozen=True)
class Part:
    """The tensors of one part of a model."""

    name: str
    tensors: int
    values: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What is known of a checkpoint."""

    path: Path
    layout: str
    """"uldm", "compvis", "diffusers", or "tensors" where nothing says what they are of."""
    bytes: int
    parts: list[Part]
    kind: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """What the config says, by the words that people use."""
    warnings: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()


def inspect(reference: str | None, config: Path | None = None) -> Report:
    """Reports what a model reference leads to.

    A published checkpoint without its YAML is reported as the tensors that it holds.

    Raises:
        ConfigError: there is nothing, it cannot be read, or it would run something.
    """
    try:
        file = resolve(reference, "autoencoder", config)
    except MissingConfig as missing:
        tensors = open_tensors(missing.path)
        return Report(missing.path, "tensors", _size(missing.path), _parts(tensors), warnings=(str(missing),))
    checkpoint = file.checkpoint
    return Report(
        file.path,
        checkpoint.layout,
        _size(file.path),
        _parts(checkpoint.tensors),
        file.header.kind,
        _facts(file),
        checkpoint.warnings,
        checkpoint.skipped,
        checkpoint.extra,
    )


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def _parts(tensors: Tensors) -> list[Part]:
    groups: dict[str, list[str]] = {}
    for name in tensors:
        groups.setdefault(name.partition(".")[0], []).append(name)
    return [
        Part(
            group,
            len(names),
            sum(math.prod(tensors[name].shape) for name in names),
            tuple(dtype for dtype, _ in Counter(tensors[name].dtype for name in names).most_common()),
        )
        for group, names in groups.items()
    ]


def _facts(file: ModelFile) -> dict[str, Any]:
    header = file.header
    if header.kind == "autoencoder":
        model = model_config(file, AutoencoderModel)
        return _autoencoder_facts(model) | {"weights": ", ".join(header.weights), "step": header.step}
    diffusion = model_config(file, LatentDiffusionModel)
    conditioner = diffusion.conditioner
    return _autoencoder_facts(diffusion) | {
        "backbone": _described(diffusion.backbone),
        "schedule": _described(diffusion.schedule),
        "predicts": diffusion.target + (" and variance" if diffusion.learned_variance else ""),
        "scale factor": diffusion.scale_factor,
        "conditioning": f"{diffusion.conditioning}: {_described(conditioner)}" if conditioner else "none",
        "weights": f"{', '.join(header.weights)} ({KINDS[header.kind]})",
        "step": header.step,
    }


def _autoencoder_facts(model: AutoencoderModel | LatentDiffusionModel) -> dict[str, Any]:
    return {
        "images": "x".join(map(str, model.image_shape)),
        "latents": "x".join(map(str, model.latent_shape)),
        "autoencoder": _described(model.autoencoder),
    }


def _described(spec: Any) -> str:
    """A spec in one line: its kind, and every setting that is not the default."""
    given = spec.model_dump(mode="json", exclude_defaults=True, exclude={"kind"})
    return " ".join([spec.kind, *(f"{name}={_short(value)}" for name, value in given.items())])


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return (
        "(" + " ".join(f"{name}={_short(v)}" for name, v in value.items()) + ")"
        if isinstance(value, dict)
        else str(value)
    )
