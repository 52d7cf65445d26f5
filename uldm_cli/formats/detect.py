"""Opens a model by what lies there, not by its name's ending."""

from pathlib import Path

from uldm_cli.errors import ConfigError
from uldm_cli.formats import compvis, diffusers, native
from uldm_cli.formats.checkpoint import Checkpoint
from uldm_cli.formats.pickles import open_pickle, sniff
from uldm_cli.formats.tensors import Tensors, open_safetensors


def open_checkpoint(path: Path, config: Path | None = None) -> Checkpoint:
    """The model in a file or folder of any layout; reads headers, and no weights.

    Args:
        path: our own `.safetensors`; a published `.ckpt` or `.safetensors`, with its YAML beside it; a folder with
            one; a folder of diffusers.
        config: the YAML of a published checkpoint, where it does not lie beside it.

    Raises:
        ConfigError: there is nothing, it cannot be read, or it is no model.
    """
    if path.is_dir():
        if diffusers.is_folder(path):
            return _alone(diffusers.read(path), config)
        path = compvis.weights_in(path)
    if not path.exists():
        raise ConfigError(f"there is no checkpoint {path}", "Check the path")
    if sniff(path) == "safetensors" and native.KEY in open_safetensors(path)[0]:
        return _alone(native.read(path), config)
    return compvis.read(path, config)


def open_tensors(path: Path) -> Tensors:
    """The tensors of a single file under their own names, whatever they are of."""
    return open_safetensors(path)[1] if sniff(path) == "safetensors" else open_pickle(path).tensors


def _alone(checkpoint: Checkpoint, config: Path | None) -> Checkpoint:
    if config is not None:
        raise ConfigError(f"{config} is not needed: {checkpoint.path} says what it is itself", "Leave --config out")
    return checkpoint
