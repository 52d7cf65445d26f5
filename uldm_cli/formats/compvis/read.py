"""Reading a published checkpoint: the pickle, or the safetensors file, together with its YAML."""

from dataclasses import replace
from pathlib import Path

from uldm_cli.errors import ConfigError
from uldm_cli.formats.checkpoint import Checkpoint, Header
from uldm_cli.formats.compvis.config import Translated, read_config
from uldm_cli.formats.compvis.names import told
from uldm_cli.formats.compvis.weights import rename
from uldm_cli.formats.pickles import open_pickle, sniff
from uldm_cli.formats.tensors import Tensors, open_safetensors

ENDINGS = (".ckpt", ".safetensors", ".pth", ".pt")
USUAL = ("model.ckpt", "last.ckpt")
"""Names under which models were published, and under which training leaves them."""


class MissingConfig(ConfigError):
    """There is a checkpoint, but no YAML that says what it holds."""

    def __init__(self, path: Path, message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.path = path


def read(path: Path, config: Path | None = None) -> Checkpoint:
    """A published checkpoint under our names. No weights are read.

    Args:
        path: `.ckpt`, or a safetensors file with the same names.
        config: its YAML; by default it is looked for beside the checkpoint.

    Raises:
        MissingConfig: there is no YAML.
        ConfigError: either cannot be read, or the two do not fit; a pickle that wants to run code is refused.
    """
    if config is None:
        config = _config_beside(path)
    tensors, step, skipped = _opened(path)
    if config is None:
        hint = "Name the YAML that was published with it: --config FILE"
        raise MissingConfig(path, f"{path} holds {told(tensors)}, but no YAML beside it says which", hint)
    model = read_config(config)
    renamed = rename(tensors, model, path)
    shapes = {name: ref.shape for name, ref in renamed.tensors.items()}
    header = Header(model.kind, _with_scale_factor(model, tensors, path).config, {}, step, shapes)
    warnings = (*model.warnings, *renamed.warnings)
    return Checkpoint(path, "compvis", header, renamed.tensors, warnings, skipped, renamed.extra)


def weights_in(folder: Path) -> Path:
    """The checkpoint in the folder of a published model, or of a training run of the reference.

    Raises:
        ConfigError: there is none, or there are several and none of the usual name.
    """
    for place in (folder, folder / "checkpoints"):
        found = sorted(file for file in place.glob("*") if file.suffix in ENDINGS and file.is_file())
        usual = [place / name for name in USUAL if place / name in found]
        if usual or len(found) == 1:
            return (usual or found)[0]
        if found:
            listing = ", ".join(file.name for file in found[:5])
            raise ConfigError(f"{folder} holds several checkpoints", f"Name one of: {listing}")
    raise ConfigError(
        f"{folder} holds no model that uldm knows", "Name a checkpoint, a run's folder, or a folder of diffusers"
    )


def _config_beside(path: Path) -> Path | None:
    """The YAML that lies where it was published, or where a training run of the reference left it (the newest)."""
    for file in (path.with_suffix(".yaml"), path.with_name("config.yaml")):
        if file.is_file():
            return file
    for folder in (path.parent, path.parent / ".." / "configs"):
        runs = sorted(folder.glob("*-project.yaml"))  # their names begin with the time
        if runs:
            return runs[-1]
    return None


def _opened(path: Path) -> tuple[Tensors, int, tuple[str, ...]]:
    """Tensors, training step, and names of classes that were not built."""
    if sniff(path) == "safetensors":
        return open_safetensors(path)[1], 0, ()
    pickle = open_pickle(path)
    step = pickle.plain.get("global_step")
    return pickle.tensors, step if type(step) is int and step >= 0 else 0, tuple(pickle.skipped)


def _with_scale_factor(model: Translated, tensors: Tensors, path: Path) -> Translated:
    """The scale factor of a model that measured it in training: the checkpoint's, not the one it began with."""
    if not model.scale_by_std or "scale_factor" not in tensors:
        return model
    ref = tensors["scale_factor"]
    value = float(ref.read().item()) if ref.nbytes <= 8 else 0.0
    if not 0 < value < float("inf"):
        said = f"{model.path} has scale_by_std, and the scale_factor in {path} is no number above 0"
        raise ConfigError(said, "Save the checkpoint again, or give the config a scale_factor instead")
    return replace(model, config=model.config | {"scale_factor": value})
