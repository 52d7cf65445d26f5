"""What a model reference means: the only place that turns the text after `--model` into a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from uldm_cli import assets
from uldm_cli.errors import ConfigError, nearest
from uldm_cli.formats.checkpoint import KINDS, Header
from uldm_cli.formats.native import load_into, read_header
from uldm_cli.runs.checkpoints import MODEL, Checkpoints
from uldm_cli.specs.models import AutoencoderModel, LatentDiffusionModel, M, read_model

if TYPE_CHECKING:
    from torch import nn

    from uldm_cli.core.latent import LatentDiffusion

EMBEDDED = ("fruits64",)


@dataclass(frozen=True)
class ModelFile:
    """A checkpoint that a reference led to."""

    path: Path
    header: Header
    name: str
    """What people call it: the reference itself."""


def resolve(reference: str | None, kind: str = "latent-diffusion", config: Path | None = None) -> ModelFile:
    """The checkpoint that a reference means: a path to one, a run's folder, or an embedded name; None is `fruits64`.

    Needs no torch. A latent diffusion model serves as the autoencoder that it holds, too.

    Raises:
        ConfigError: there is none, it cannot be read, or it is of another kind.
    """
    name = EMBEDDED[0] if reference is None else reference
    path = assets.path(f"{name}.safetensors") if name in EMBEDDED else _on_disk(name)
    header = read_header(path)
    if kind == "latent-diffusion" and header.kind != kind:
        hint = f"Train one on it: uldm ldm train autoencoder={name}"
        raise ConfigError(f"{name} is an autoencoder, and a latent diffusion model is needed", hint)
    return ModelFile(path, header, name)


def _on_disk(name: str) -> Path:
    if not name:
        raise ConfigError(
            "the name of the model is empty", f"Name a file, a run's folder, or one of: {', '.join(EMBEDDED)}"
        )
    path = Path(name)
    if (path / MODEL).exists():  # one of a run's checkpoints
        return path / MODEL
    if path.is_dir():
        newest = Checkpoints(path).newest()
        if newest is None:
            raise ConfigError(f"{name} is a folder without a checkpoint", "Name a training run's folder, or a file")
        return newest / MODEL
    if not path.exists():
        guess = nearest(name, EMBEDDED)
        hint = f"Did you mean {guess!r}?" if guess else f"Name a file, a run's folder, or one of: {', '.join(EMBEDDED)}"
        raise ConfigError(f"there is no model {name!r}", hint)
    return path


def newest_autoencoder(outputs: Path) -> str | None:
    """The folder of the `uldm vqvae` run under `outputs` that saved last; None without one."""
    saved = [(newest.stat().st_mtime, run) for run in outputs.glob("vqvae-*") if (newest := Checkpoints(run).newest())]
    return str(max(saved)[1]) if saved else None


def model_config(file: ModelFile, kind: type[M]) -> M:
    """The header's config, validated. An autoencoder is also read out of a latent diffusion model's."""
    config = file.header.config
    if kind is AutoencoderModel:
        config = {name: value for name, value in config.items() if name in kind.model_fields}
    return read_model(kind, config, str(file.path))


def load_autoencoder(file: ModelFile, weights: str = "ema") -> "nn.Module":
    """The autoencoder of a checkpoint, float32 on the CPU, in evaluation mode.

    `weights` are "ema" or "raw". A latent diffusion model holds only those of its autoencoder that it was trained with.
    """
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
    dtype = pick_dtype(precision, target)
    model = model_config(file, LatentDiffusionModel).build()
    load_into(model.denoiser.backbone, file.path, _part(file, weights))
    load_into(model.autoencoder, file.path, "autoencoder")
    model.requires_grad_(False).eval().to(target)
    for network in (model.denoiser.backbone, model.autoencoder):
        network.to(dtype).to(memory_format=torch.channels_last)
    return model


def _part(file: ModelFile, weights: str) -> str:
    held = file.header.weights
    if weights not in held:
        raise ConfigError(f"{file.name} holds no {weights} weights", f"It has: {', '.join(held)}")
    return "ema" if weights == "ema" else KINDS[file.header.kind]
