"""Reads folders that diffusers wrote: an LDMPipeline, or a first stage alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uldm_cli.errors import ConfigError
from uldm_cli.formats.checkpoint import KEPT, Checkpoint, Header
from uldm_cli.formats.compvis.shapes import shapes_of
from uldm_cli.formats.diffusers import autoencoders, unet
from uldm_cli.formats.diffusers.fields import Fields
from uldm_cli.formats.diffusers.scheduler import read_scheduler
from uldm_cli.formats.diffusers.tables import Row, autoencoder_rows, to_ours, unet_rows
from uldm_cli.formats.diffusers.weights import read_weights
from uldm_cli.specs.models import AutoencoderModel, LatentDiffusionModel, read_model

if TYPE_CHECKING:
    from uldm_cli.formats.tensors import TensorRef

PIPELINE = "LDMPipeline"
INDEX, CONFIG, SCHEDULER_CONFIG = "model_index.json", "config.json", "scheduler_config.json"
SLOTS = ("vqvae", "vae")
"""What the folder of a first stage is called; the first is what LDMPipeline takes."""
SCALE = f"{KEPT}scaling_factor"
"""The scaling factor that a first stage alone says, which only a diffusion model has a place for."""
READABLE = f"an {PIPELINE}, or the folder of a {' or an '.join(autoencoders.CLASSES)} alone"


@dataclass
class _Found:
    """What the parts of a folder add up to."""

    tensors: dict[str, "TensorRef"] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    names: dict[str, tuple[Path, tuple[str, ...]]] = field(default_factory=dict)
    """Where diffusers has each of our tensors."""

    def add(self, folder: Path, rows: Sequence[Row], part: str, name: str) -> None:
        """Maps the weights of a folder to those of one of our parts; `name` is what kept tensors are called by."""
        theirs, warnings = read_weights(folder)
        ours = to_ours(rows, theirs)
        used = {name for row in rows if row.ours in ours for name in row.theirs}
        extra = [key for key in theirs if key not in used]
        self.names |= {f"{part}.{row.ours}": (folder, row.theirs) for row in rows}
        self.tensors |= {f"{part}.{key}": ref for key, ref in ours.items()}
        self.tensors |= {f"{KEPT}{name}.{key}": theirs[key] for key in extra}
        self.extra += [f"{name}.{key}" for key in extra]
        self.warnings += warnings

    def read(self, fields: Fields) -> None:
        """Takes note of fields that nothing asked for."""
        if unknown := fields.unknown():
            self.warnings.append(f"{fields.path}: uldm does not know {', '.join(unknown)}")

    def checkpoint(self, path: Path, kind: str, config: dict[str, Any]) -> Checkpoint:
        shapes = {name: ref.shape for name, ref in self.tensors.items()}
        self._check(path, kind, config, shapes)
        header = Header(kind, config, tensors=shapes)
        return Checkpoint(path, "diffusers", header, self.tensors, tuple(self.warnings), extra=tuple(self.extra))

    def _check(self, path: Path, kind: str, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
        """Makes sure that there is every tensor that the config asks for, in its shape."""
        model = read_model(LatentDiffusionModel if kind == "latent-diffusion" else AutoencoderModel, config, str(path))
        wrong = [(name, shape) for name, shape in shapes_of(model).items() if shapes.get(name) != shape]
        if not wrong:
            return
        folder = self.names[wrong[0][0]][0]
        first = "; ".join(
            f"{' and '.join(self.names[name][1])} {_shown(shapes.get(name))}, expected {list(shape)}"
            for name, shape in wrong[:10]
        )
        count = "1 tensor differs" if len(wrong) == 1 else f"{len(wrong)} tensors differ"
        likely = f"in {folder / CONFIG}, block_out_channels, layers_per_block or the block types are wrong"
        if all(name not in shapes for name, _ in wrong):
            likely = f"the weights are incomplete, or {likely}"
        message = f"{folder} does not fit its {CONFIG}: {count}, first {first}"
        raise ConfigError(message, f"Most likely {likely}")


def _shown(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"is {list(shape)}"


def is_folder(path: Path) -> bool:
    """Whether a folder is one that diffusers, or a library like it, wrote."""
    return (path / INDEX).is_file() or (path / CONFIG).is_file()


def read(path: Path) -> Checkpoint:
    """Reads the folder of an LDMPipeline, or of a VQModel or an AutoencoderKL alone; its weights are not read yet.

    Diffusers keeps one set of weights: they are the raw ones.

    Raises:
        ConfigError: it is another model, our modules cannot be what its config says, or there are no weights.
    """
    if (path / INDEX).is_file():
        return _pipeline(path)
    fields = Fields.read(path / CONFIG)
    if fields.get("_class_name") not in tuple(autoencoders.CLASSES):
        raise fields.wrong("_class_name", READABLE)
    found = _Found()
    config, scale = _autoencoder(fields, found, "model")
    if "scaling_factor" in fields.values:
        found.tensors[SCALE] = _scalar(scale)
    return found.checkpoint(path, "autoencoder", {"autoencoder": config, "image_size": config["resolution"]})


def _pipeline(path: Path) -> Checkpoint:
    index = Fields.read(path / INDEX)
    if (kind := index.get("_class_name")) != PIPELINE:
        raise ConfigError(f"{index.path} is of {kind!r:.60}, which uldm cannot read", f"Supported: {READABLE}")
    slot = next((name for name in SLOTS if name in index.values), SLOTS[0])
    for name in ("unet", slot, "scheduler"):
        if not (path / name).is_dir():
            raise ConfigError(f"{path} has no folder {name}/", "An LDMPipeline has unet/, vqvae/ and scheduler/")
    found = _Found()
    backbone, channels, side = _unet(path / "unet", found)
    fields = Fields.read(path / slot / CONFIG)
    if fields.get("_class_name") not in tuple(autoencoders.CLASSES):
        raise fields.wrong("_class_name", " or ".join(autoencoders.CLASSES))
    autoencoder, scale = _autoencoder(fields, found, "autoencoder")
    if (latents := autoencoder["embed_dim"]) != channels:
        raise ConfigError(
            f"{path}: the U-Net's in_channels are {channels}, and {slot}'s latents have {latents}",
            "They belong to different models: fetch it again",
        )
    schedule, target, warnings = read_scheduler(Fields.read(path / "scheduler" / SCHEDULER_CONFIG))
    found.warnings += warnings
    config = {
        "autoencoder": autoencoder,
        "image_size": side * 2 ** (len(autoencoder["ch_mult"]) - 1),
        "backbone": backbone,
        "schedule": schedule,
        "target": target,
        "scale_factor": scale,
    }
    return found.checkpoint(path, "latent-diffusion", config)


def _unet(folder: Path, found: _Found) -> tuple[dict[str, Any], int, int]:
    fields = Fields.read(folder / CONFIG)
    if fields.get("_class_name") != unet.CLASS:
        raise fields.wrong("_class_name", unet.CLASS)
    config, channels, side = unet.read_unet(fields)
    found.read(fields)
    found.add(folder, unet_rows(unet.unet_shape(config)), "backbone", "unet")
    return config, channels, side


def _autoencoder(fields: Fields, found: _Found, part: str) -> tuple[dict[str, Any], float]:
    config, scale = autoencoders.read_autoencoder(fields)
    found.read(fields)
    rows = autoencoder_rows(autoencoders.autoencoder_shape(config))
    found.add(fields.path.parent, rows, part, SLOTS[0])
    return config, scale


def _scalar(value: float) -> "TensorRef":
    """A number as a tensor that holds it exactly."""
    from uldm_cli.formats.tensors import TensorRef

    def read() -> Any:
        import torch

        return torch.tensor(value, dtype=torch.float64)

    return TensorRef((), "F64", read)
