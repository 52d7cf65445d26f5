"""What a model reference means: the only place that turns the text after `--model` into a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uldm_cli import assets
from uldm_cli.errors import ConfigError, nearest, nearest_file
from uldm_cli.formats import compvis, diffusers
from uldm_cli.formats.checkpoint import KINDS, Checkpoint, Header
from uldm_cli.formats.detect import open_checkpoint
from uldm_cli.formats.native import fitting_part, load_part
from uldm_cli.runs import zoo
from uldm_cli.runs.checkpoints import MODEL, Checkpoints
from uldm_cli.runs.outdir import OUTPUTS, default_outdir
from uldm_cli.specs.autoencoder_training import AutoencoderTraining
from uldm_cli.specs.load import SUFFIXES, load_config
from uldm_cli.specs.models import AutoencoderModel, LatentDiffusionModel, M, read_model
from uldm_cli.specs.yamlfile import read_yaml

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from uldm_cli.core.latent import LatentDiffusion

EMBEDDED = ("fruits64",)
_KNOWN = f"Name a file, a folder, zoo:NAME, hf://owner/name, or one of: {', '.join(EMBEDDED)}"


@dataclass(frozen=True)
class ModelFile:
    """A checkpoint that a reference led to."""

    checkpoint: Checkpoint
    name: str
    """What people call it: the reference itself."""

    @property
    def path(self) -> Path:
        """The file or folder that it lies in."""
        return self.checkpoint.path

    @property
    def header(self) -> Header:
        """What it says of itself."""
        return self.checkpoint.header


def resolve(reference: str | None, kind: str = "latent-diffusion", config: Path | None = None) -> ModelFile:
    """The checkpoint that a reference means; None is `fruits64`, unless `config` holds a model itself.

    A latent diffusion model serves as the autoencoder that it holds, too.

    Args:
        reference: a path to a file or folder of any layout, a training run's folder or its YAML, an embedded name,
            `zoo:NAME`, or `hf://owner/name`.
        kind: "latent-diffusion" or "autoencoder".
        config: the YAML of a published checkpoint, where it does not lie beside it.

    Raises:
        ConfigError: there is none, it cannot be read, or it is of another kind.
    """
    if reference is None and config is not None:
        reference, config = str(config), None
    name = EMBEDDED[0] if reference is None else reference
    checkpoint = open_checkpoint(_located(name), config)
    if kind == "latent-diffusion" and checkpoint.header.kind != kind:
        hint = f"Train one on it: uldm ldm train autoencoder={name}"
        raise ConfigError(f"{name} is an autoencoder, and a latent diffusion model is needed", hint)
    return ModelFile(checkpoint, name)


def _located(name: str) -> Path:
    """The file or folder that a reference names."""
    if not name:
        raise ConfigError("the name of the model is empty", _KNOWN)
    if name in EMBEDDED:
        return assets.path(f"{name}.safetensors")
    if name.startswith("zoo:"):
        return zoo.resolve(name.removeprefix("zoo:"))
    if name.startswith("hf://"):
        return diffusers.local_folder(name)
    path = Path(name)
    if (path / MODEL).exists():  # one of a run's checkpoints
        return path / MODEL
    if path.is_dir():
        newest = Checkpoints(path).newest()
        return newest / MODEL if newest else path
    if not path.exists():
        to_be_trained = path.parts[:1] == OUTPUTS.parts  # no typing mistake, most of the time
        guess = nearest(name, EMBEDDED) or (None if to_be_trained else nearest_file(path))
        hint = f"Train it first. {_KNOWN}" if to_be_trained else _KNOWN
        raise ConfigError(f"there is no model {name!r}", f"Did you mean {guess!r}?" if guess else hint)
    if not (group := _trained_group(path)):
        return path
    run = default_outdir(group, "train", path)
    if not (newest := Checkpoints(run).newest()):
        what = f"{name} has not been trained: {run} holds no checkpoint"
        raise ConfigError(what, f"Run: uldm {group} train {name}")
    return newest / MODEL


def newest_autoencoder(outputs: Path) -> str | None:
    """The folder of the `uldm vqvae` run under `outputs` that saved last; None without one."""
    saved = [(newest.stat().st_mtime, run) for run in outputs.glob("vqvae-*") if (newest := Checkpoints(run).newest())]
    return str(max(saved)[1]) if saved else None


def model_config(file: ModelFile, kind: type[M]) -> M:
    """The header's config, validated. An autoencoder is also read out of a latent diffusion model's."""
    return _read_config(file.header.config, kind, str(file.path))


def _read_config(config: "Mapping[str, Any]", kind: type[M], place: str) -> M:
    if kind is AutoencoderModel:
        config = {name: value for name, value in config.items() if name in kind.model_fields}
    return read_model(kind, config, place)


@dataclass(frozen=True)
class Planned:
    """An autoencoder that is not on this machine yet."""

    model: AutoencoderModel
    command: str
    """What brings it here."""


def planned_autoencoder(reference: str | None) -> Planned | None:
    """What is known of an autoencoder of the zoo before it is pulled, and of a YAML's before it is trained.

    None for every other reference, and for what is here already.

    Raises:
        ConfigError: the zoo has no such model, or the YAML is wrong.
    """
    if reference and reference.startswith("zoo:"):
        name = reference.removeprefix("zoo:")
        if zoo.folder(zoo.entry(name).name).exists():
            return None
        model = _read_config(zoo.described(name).config, AutoencoderModel, reference)
        return Planned(model, f"uldm convert zoo pull {name}")
    if reference and _trained_group(path := Path(reference)) == "vqvae":
        if Checkpoints(default_outdir("vqvae", "train", path)).newest():
            return None
        spec = load_config(AutoencoderTraining, path)
        model = AutoencoderModel(autoencoder=spec.autoencoder, image_size=spec.data.size)
        return Planned(model, f"uldm vqvae train {reference}")
    return None


def known_autoencoder(reference: str | None) -> AutoencoderModel:
    """The config of the autoencoder that a reference means, also of one that is not here yet."""
    planned = planned_autoencoder(reference)
    return planned.model if planned else model_config(resolve(reference, "autoencoder"), AutoencoderModel)


def _trained_group(path: Path) -> str | None:
    """The group whose `train` a path is a YAML of, such as "vqvae"; None for every other file."""
    if path.suffix not in SUFFIXES or not path.is_file():
        return None
    group, _, verb = str(read_yaml(path, targets=True)[0].get("kind")).partition("-")
    return group if verb == "train" else None


def load_autoencoder(file: ModelFile, weights: str | None = None) -> "nn.Module":
    """The autoencoder of a checkpoint, float32 on the CPU, in evaluation mode.

    `weights` are "ema" or "raw", by default "ema" where there are any. A latent diffusion model holds only those of
    its autoencoder that it was trained with.
    """
    from uldm_cli.core.loading import Undrawn

    with Undrawn():
        module = model_config(file, AutoencoderModel).build()
    inside = file.header.kind == "latent-diffusion"
    _load(module, file, "autoencoder" if inside else _part(file, weights))
    return module.float().eval()


def load_backbone(backbone: "nn.Module", file: ModelFile, weights: str | None = None) -> None:
    """Loads the weights of a latent diffusion model's denoising network; `weights` as in `load_latent_diffusion`.

    Raises:
        ConfigError: it is another network; the tensors that differ are named.
    """
    compvis.check_schedule(file.checkpoint)
    _load(backbone, file, _part(file, weights))


def check_backbone(backbone: "nn.Module", file: ModelFile) -> None:
    """Makes sure that `load_backbone` would work, and reads no weights: the network may be without memory.

    Raises:
        ConfigError: as `load_backbone`.
    """
    fitting_part(backbone, file.checkpoint.tensors, _part(file, None), file.path)


def load_latent_diffusion(
    file: ModelFile, *, device: str = "cpu", precision: str = "fp32", weights: str | None = None
) -> "LatentDiffusion":
    """The latent diffusion model of a checkpoint, ready to sample from.

    Args:
        file: from `resolve`.
        device: as `core.device.pick_device` takes it.
        precision: as `core.device.pick_dtype` takes it; what all networks compute in.
        weights: "ema" or "raw"; by default "ema" where there are any.
    """
    import torch

    from uldm_cli.core.device import pick_device, pick_dtype
    from uldm_cli.core.loading import Undrawn

    compvis.check_schedule(file.checkpoint)
    target = pick_device(device)
    dtype = pick_dtype(precision, target)
    with Undrawn():
        model = model_config(file, LatentDiffusionModel).build()
    _load(model.denoiser.backbone, file, _part(file, weights))
    _load(model.autoencoder, file, "autoencoder")
    networks = [model.denoiser.backbone, model.autoencoder]
    if model.conditioner is not None:
        _load(model.conditioner, file, "conditioner")
        networks.append(model.conditioner)
    model.requires_grad_(False).eval().to(target)
    for network in networks:
        network.to(dtype)
        if target.type != "cpu":  # there, convolutions bring their weights into a layout of their own
            network.to(memory_format=torch.channels_last)
    return model


def _load(module: "nn.Module", file: ModelFile, part: str) -> None:
    load_part(module, file.checkpoint.tensors, part, file.path)


def chosen_weights(file: ModelFile, weights: str | None) -> str:
    """Which weights are meant, "ema" or "raw"; by default the averaged ones where the model has them.

    Raises:
        ConfigError: the model does not hold those.
    """
    held = file.header.weights
    if not held or weights not in (None, *held):
        hint = f"It has: {', '.join(held)}" if held else None
        raise ConfigError(f"{file.name} holds no {weights or 'such'} weights", hint)
    return weights or held[0]


def _part(file: ModelFile, weights: str | None) -> str:
    return "ema" if chosen_weights(file, weights) == "ema" else KINDS[file.header.kind]
