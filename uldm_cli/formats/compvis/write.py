"""Writing a model as it would have been published: `model.ckpt`, and `config.yaml` beside it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from uldm_cli.errors import UldmError
from uldm_cli.formats.checkpoint import KEPT, KINDS, Checkpoint
from uldm_cli.formats.compvis.buffers import average_counters, schedule_buffers
from uldm_cli.formats.compvis.emit import Has, config_of
from uldm_cli.formats.compvis.names import BUFFERS, EMA, ORIGINAL, TWIN, order, source_name
from uldm_cli.formats.compvis.pickled import write_pickle
from uldm_cli.formats.tensors import TensorRef
from uldm_cli.formats.whole import whole
from uldm_cli.specs.models import LatentDiffusionModel, read_model
from uldm_cli.specs.yamlfile import to_yaml

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, CONFIG = "model.ckpt", "config.yaml"


def write(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes a model of any layout into a folder, a tensor at a time. Each of the two files appears whole.

    Raises:
        ConfigError: the reference has no such model; the message names the field. Nothing is written.
        UldmError: the disk is full, the folder cannot be written to, or the source cannot be read.
    """
    text = to_yaml(config_of(checkpoint.header, checkpoint.path, _has(checkpoint)))
    tensors = source_tensors(checkpoint)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UldmError(f"the folder {folder} cannot be made: {e.strerror}") from e
    state: dict[str, Any] = {"state_dict": tensors, "global_step": checkpoint.header.step, "epoch": 0}
    write_pickle(folder / WEIGHTS, state)
    with whole(folder / CONFIG) as file:
        file.write(text.encode())


def source_tensors(checkpoint: Checkpoint) -> dict[str, TensorRef]:
    """The tensors of a model under the reference's names, in its order.

    What the reference stores besides, and a model that does not come from there lacks, is computed.
    """
    kind = checkpoint.header.kind
    tensors = {source_name(kind, name): ref for name, ref in _with_raw_weights(checkpoint).items()}
    if kind == "latent-diffusion":
        tensors = _completed(checkpoint, tensors)
    return {name: tensors[name] for name in sorted(tensors, key=order)}


def _with_raw_weights(checkpoint: Checkpoint) -> dict[str, TensorRef]:
    """All tensors; where there is only an average it stands for the raw weights, without which nothing loads there."""
    raw = f"{KINDS[checkpoint.header.kind]}."
    if any(name.startswith(raw) for name in checkpoint.tensors):
        return dict(checkpoint.tensors)
    return {raw + n.removeprefix("ema.") if n.startswith("ema.") else n: t for n, t in checkpoint.tensors.items()}


def _completed(checkpoint: Checkpoint, tensors: dict[str, TensorRef]) -> dict[str, TensorRef]:
    model = read_model(LatentDiffusionModel, checkpoint.header.config, str(checkpoint.path))
    added: dict[str, Tensor] = {}
    if not set(BUFFERS) <= set(tensors):
        schedule: Any = model.schedule
        added |= schedule_buffers(schedule.betas())
    if any(name.startswith(EMA) for name in tensors):
        added |= average_counters(checkpoint.header.step)
    completed = {name: TensorRef.of(value) for name, value in added.items()} | tensors
    conditioner: Any = model.conditioner
    if conditioner is not None and conditioner.kind == "first-stage":
        twins = {TWIN + n.removeprefix(ORIGINAL): ref for n, ref in tensors.items() if n.startswith(ORIGINAL)}
        completed = twins | completed
    return completed


def _has(checkpoint: Checkpoint) -> Has:
    ref = checkpoint.tensors.get(f"{KEPT}scale_factor")
    # It counts only where the config takes it from there.
    by_std = ref is not None and float(ref.read()) == checkpoint.header.config.get("scale_factor")
    parts = {name.partition(".")[0] for name in checkpoint.tensors}
    average = {"ema", KINDS[checkpoint.header.kind]} <= parts
    return Has(average, by_std, f"{KEPT}logvar" in checkpoint.tensors)
