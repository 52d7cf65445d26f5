"""What a model reference means: the only place that turns the text after `--model` into a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from uldm_cli import assets
from uldm_cli.errors import ConfigError, nearest
from uldm_cli.formats.native import KINDS, Header, load_into, read_header
from uldm_cli.runs.checkpoints import Checkpoints
from uldm_cli.specs.models import AutoencoderModel, LatentDiffusionModel, Model

if TYPE_CHECKING:
    import torch
    from torch import nn

    from uldm_cli.core.latent import LatentDiffusion

EMBEDDED = ("fruits64",)
M = TypeVar("M", bound=Model)


@dataclass(frozen=True)
class ModelFile:
    """A checkpoint that a reference led to."""

    path: Path
    header: Header
    name: str
    """What people call it: the reference itself."""


def resolve(reference: str | None, kind: str = "latent-diffusion") -> ModelFile:
    """The checkpoint that a reference means: a path to one, a run's folder, or an embedded name; None is `fruits64`.

    Needs no torch. A latent diffusion model serves as the autoencoder that it holds, too.

    Raises:
        ConfigError: there is none, it cannot be read, or it is of another kind.
    """
    name = reference or EMBEDDED[0]
    path = assets.path(f"{name}.safetensors") if name in EMBEDDED else _on_disk(name)
    header = read_header(path)
    if kind not in (header.kind, "autoencoder"):
        raise ConfigError(f"{name} is of kind {header.kind!r}, not {kind!r}", "name another model")
    return ModelFile(path, header, name)


def _on_disk(name: str) -> Path:
    path = Path(name)
    if path.is_dir():
        newest = Checkpoints(path).newest()
        if newest is None:
            raise ConfigError(f"{name} is a folder without a checkpoint", "name a training run's folder or a file")
        return newest / "model.safetensors"
    if not path.exists():
        guess = nearest(name, EMBEDDED)
        hint = f"did you mean {guess!r}?" if guess else f"name a file, a run's folder, or one of: {', '.join(EMBEDDED)}"
        raise ConfigError(f"there is no model {name!r}", hint)
    return path


def newest_autoencoder(outputs: Path) -> str | None:
    """The folder of the `uldm vqvae` run under `outputs` that saved last; None without one."""
    saved = [(newest.stat().st_mtime, run) for run in outputs.glob("vqvae-*") if (newest := Checkpoints(run).newest())]
    return str(max(saved)[1]) if saved else None


def model_config(file: ModelFile, kind: type[M]) -> M:
    """The header's config, validated. An autoencoder is also read out of a latent diffusion model's."""
    config = file.header.config
    fields: dict[str, Any] = {k: v for k, v in config.items() if k in kind.model_fields or kind is not AutoencoderModel}
    try:
        return kind.model_validate(fields)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{file.path}: its header's config is wrong at {where}: {first['msg']}") from e


def load_autoencoder(file: ModelFile, weights: str = "ema") -> "nn.Module":
    """The autoencoder of a checkpoint, float32 on the CPU, in evaluation mode."""
    module = model_config(file, AutoencoderModel).build()
    inside = file.header.kind == "latent-diffusion"
    load_into(module, file.path, "autoencoder" if inside else _part(file, weights))
    return module.float().eval()


def load_latent_diffusion(
    file: ModelFile, *, device: str = "cpu", precision: str = "fp32", weights: str = "ema"
) -> "LatentDiffusion":
    """The latent diffusion model of a checkpoint, ready to sample from.

    Args:
        file: from `resolve`.
        device: as `core.device.pick_device` takes it.
        precision: as `core.device.pick_dtype` takes it; what both networks compute in.
        weights: "ema" or "raw".
    """
    import torch

    from uldm_cli.core.device import pick_device, pick_dtype

    target = pick_device(device)
    model = model_config(file, LatentDiffusionModel).build()
    load_into(model.denoiser.backbone, file.path, _part(file, weights))
    load_into(model.autoencoder, file.path, "autoencoder")
    return _ready(model, target, pick_dtype(precision, target), torch.channels_last)


def _ready(
    model: "LatentDiffusion", device: "torch.device", dtype: "torch.dtype", memory: "torch.memory_format"
) -> "LatentDiffusion":
    model.requires_grad_(False).eval().to(device)
    model.denoiser.backbone.to(dtype=dtype, memory_format=memory)
    model.autoencoder.to(dtype=dtype, memory_format=memory)
    return model


def _part(file: ModelFile, weights: str) -> str:
    held = file.header.weights
    if weights not in held:
        raise ConfigError(f"{file.name} holds no {weights} weights", f"it has: {', '.join(held)}")
    return "ema" if weights == "ema" else KINDS[file.header.kind]
