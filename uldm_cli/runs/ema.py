"""`uldm ldm ema` and `uldm vqvae ema`: averages of weights that no training tracked, made of those that it kept.

A run with `train.ema_profiles` leaves `ema/step-00000200.safetensors` at each of its saves: power-function averages of
those widths, which stay. Tensors are named `<number of the width>.<key>`.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from uldm_cli import console
from uldm_cli.errors import ConfigError
from uldm_cli.formats import native
from uldm_cli.formats.checkpoint import KINDS, Checkpoint
from uldm_cli.formats.tensors import TensorRef, Tensors, open_safetensors, write_safetensors
from uldm_cli.runs.checkpoints import MODEL, Checkpoints
from uldm_cli.runs.files import writable_folder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

FOLDER = "ema"
KEY = "uldm-ema"
TOLERATED = 0.05
"""So far from the weights that were asked for an average may be before that is told."""


@dataclass(frozen=True)
class Snapshot:
    """The averages of one step on disk."""

    path: Path
    step: int
    updates: int
    """Steps that the averages have seen: those that were not skipped."""
    sigmas: tuple[float, ...]
    tensors: Tensors


@dataclass(frozen=True)
class Made:
    """An average that was made."""

    path: Path
    step: int
    sigma_rel: float
    averages: int
    """Of how many stored ones it is the sum."""
    missed: float
    """How far its weights are from those asked for, as a share of their norm."""


def save_snapshot(run: Path, step: int, profiles: "Mapping[str, Tensor]", sigmas: "Sequence[float]") -> None:
    """Writes a run's averages of several widths, in float32, whole or not at all; nothing where there are none.

    Args:
        run: its folder.
        step: of the training.
        profiles: the state of the `Profiles`.
        sigmas: their widths.

    Raises:
        UldmError: the disk is full, or the folder cannot be written to.
    """
    import torch

    if not sigmas:
        return
    tensors = {
        name: value.to("cpu", torch.float32) if value.is_floating_point() else value
        for name, value in profiles.items()
        if name != "updates"
    }
    said = {"step": step, "updates": int(profiles["updates"][0]), "sigmas": list(sigmas)}
    write_safetensors(_path(writable_folder(run / FOLDER), step), tensors, {KEY: json.dumps(said)})


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08}.safetensors"


def snapshots(run: Path) -> list[Snapshot]:
    """What a run has kept, the first step first.

    Raises:
        ConfigError: a file is damaged.
    """
    return [_read(path) for path in sorted((run / FOLDER).glob("step-*.safetensors"))]


def _read(path: Path) -> Snapshot:
    try:
        metadata, tensors = open_safetensors(path)
        said = json.loads(metadata[KEY])
        sigmas = tuple(float(one) for one in said["sigmas"])
        return Snapshot(path, int(said["step"]), int(said["updates"]), sigmas, tensors)
    except (KeyError, TypeError, ValueError) as e:
        raise ConfigError(f"{path} holds no averages of a training", f"Remove it from {path.parent}") from e


def make(run: Path, kind: str, sigma_rel: float, step: int | None, out: Path) -> Made:
    """Writes a checkpoint whose weights are the average of a width at a step.

    Args:
        run: a training run's folder.
        kind: of its model, as a checkpoint's header says it.
        sigma_rel: the width (see `core.ema.PowerEMA`).
        step: one that was saved; None is the last.
        out: the file, which must not be there yet.

    Raises:
        ConfigError: no such run, no averages in it, none of that step, or the file is there.
        UldmError: the file cannot be written.
    """
    from uldm_cli.core.ema import post_hoc_factors

    if out.exists():
        raise ConfigError(f"{out} is there already", "Name another --out")
    model = native.read(_model(run, kind))
    found = snapshots(run)
    if not found:
        hint = "Train with train.ema_profiles=[0.05,0.1]: a run keeps what it is told at its start"
        raise ConfigError(f"{run} holds no averages of several widths", hint)
    last = _of_step(found, step, run)
    used = [(one, i) for one in found if one.updates <= last.updates for i in range(len(one.sigmas))]
    factors, missed = post_hoc_factors(
        [one.updates for one, _ in used], [one.sigmas[i] for one, i in used], last.updates, sigma_rel
    )
    parts = [_below(f"{i}.", one.tensors) for one, i in used]
    mixed = {f"ema.{key}": _mixture(key, parts, factors) for key in parts[-1]}
    trained = ("ema", KINDS[kind])
    kept = {name: ref for name, ref in model.tensors.items() if name.partition(".")[0] not in trained}
    header = replace(model.header, step=last.step)
    native.write(Checkpoint(model.path, model.layout, header, kept | mixed), out)
    if missed > TOLERATED:
        console.warn(
            f"the weights of this average are {missed:.0%} away from those of sigma_rel {sigma_rel:g}: "
            "it lies far from the widths that were kept, or between few saves"
        )
    return Made(out, last.step, sigma_rel, len(used), missed)


def _model(run: Path, kind: str) -> Path:
    """The newest model of a run; the parts that training leaves as they are, are the same in all."""
    newest = Checkpoints(run).newest()
    if newest is None:
        raise ConfigError(f"{run} is no folder of a training run with a checkpoint", "Name the --outdir of a training")
    path = newest / MODEL
    found = native.read_header(path).kind
    if found != kind:
        groups = {"autoencoder": "vqvae", "latent-diffusion": "ldm"}
        raise ConfigError(f"{run} is of kind {found}, not {kind}", f"Run `uldm {groups[found]} ema`")
    return path


def _below(prefix: str, tensors: Tensors) -> dict[str, TensorRef]:
    return {name.removeprefix(prefix): ref for name, ref in tensors.items() if name.startswith(prefix)}


def _of_step(found: list[Snapshot], step: int | None, run: Path) -> Snapshot:
    if step is None:
        return found[-1]
    by_step = {one.step: one for one in found}
    if step not in by_step:
        steps = [str(one.step) for one in found]
        listed = ", ".join(steps if len(steps) <= 8 else [*steps[:3], "...", *steps[-3:]])
        raise ConfigError(f"--step {step}: {run} holds no averages of it", f"There are those of {listed}")
    return by_step[step]


def _mixture(key: str, parts: list[dict[str, TensorRef]], factors: list[float]) -> TensorRef:
    """A tensor as the sum of those that were stored, when it is read; of whole numbers the last ones."""
    last = parts[-1][key]
    if last.dtype != "F32":
        return last

    def read() -> "Tensor":
        import torch

        total = torch.zeros(last.shape, dtype=torch.float64)
        for part, factor in zip(parts, factors, strict=True):
            total.add_(part[key].read().double(), alpha=factor)
        return total.float()

    return TensorRef(last.shape, last.dtype, read)
