"""What a training run keeps on disk, and how it goes on from it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uldm_cli import console
from uldm_cli.errors import ConfigError, UldmError
from uldm_cli.formats.checkpoint import KINDS, Header
from uldm_cli.formats.native import load_into, load_tensors, read_header, save
from uldm_cli.formats.tensors import write_safetensors
from uldm_cli.runs.checkpoints import MODEL, Checkpoints, check
from uldm_cli.runs.ema import save_snapshot
from uldm_cli.runs.files import order_of
from uldm_cli.runs.metrics import Means

if TYPE_CHECKING:
    from uldm_cli.runs.train import Job
    from uldm_cli.specs.autoencoder_training import AutoencoderTraining
    from uldm_cli.specs.diffusion_training import DiffusionTraining

    Spec = AutoencoderTraining | DiffusionTraining

STATE = "state.safetensors"
STATE_KEY = "uldm-state"


@dataclass
class Progress:
    """What a run knows beside weights and optimizers; a checkpoint holds it, too."""

    means: Means = field(default_factory=Means)
    epoch: dict[str, float] = field(default_factory=dict)
    """The figures of the last whole epoch, if there has been one."""
    skipped_steps: int = 0
    in_a_row: int = 0
    """Steps skipped since the last one that was made."""
    best: float | None = None
    """The best value of the figure that `train.best` names, ..."""
    best_step: int | None = None
    """... and its step."""
    best_of: str | None = None
    """The name of that figure."""
    order: str = ""
    """Of the images, see `order_of`."""


def save_run(
    checkpoints: Checkpoints, job: "Job", config: "Spec", step: int, progress: Progress, *, snapshot: bool
) -> Path | None:
    """Saves the model and everything that resuming needs, together. Every process calls it, and the main one writes.

    `snapshot` also keeps the averages of several widths, if there are any.

    Raises:
        UldmError: it could not be written; what was saved before is whole.
    """
    from uldm_cli.core.training import below

    trainer, engine = job.trainer, job.trainer.engine
    trained = dict(engine.kept(trainer.state_dict()))
    state = {f"optimizer.{name}": value for name, value in trained.items()}
    state |= {f"means.{name}": value for name, value in progress.means.state().items()}
    weights, averaged = engine.kept(job.module.state_dict()), engine.kept(trainer.ema.state)
    if not engine.main:
        return None
    header = Header(job.kind, job.config.model_dump(mode="json"), config.model_dump(mode="json"), step)
    parts = {KINDS[job.kind]: weights, **job.untrained(), "ema": averaged}
    said = {
        "step": step,
        "ema_updates": trainer.ema.updates,
        "means_counts": progress.means.counts,
        "epoch": progress.epoch,
        "skipped_steps": progress.skipped_steps,
        "in_a_row": progress.in_a_row,
        "best": progress.best,
        "best_step": progress.best_step,
        "best_of": progress.best_of,
        "images": len(job.dataset),
        "order": progress.order,
    }

    def write(folder: Path) -> None:
        save(folder / MODEL, header, parts)
        write_safetensors(folder / STATE, state, {STATE_KEY: json.dumps(said)})

    try:
        if snapshot:
            sigmas = config.train.ema_profiles
            save_snapshot(checkpoints.folder.parent, step, below("profiles.", trained), sigmas)
        return checkpoints.save(step, write)
    except (OSError, UldmError) as e:
        hint = "What was saved before is whole: the same command goes on from there"
        if checkpoints.newest() is None:
            hint = "Nothing had been saved before: the same command starts again"
        why = e.message if isinstance(e, UldmError) else e
        raise UldmError(f"step {step} could not be saved: {why}", hint) from e


def restore_run(checkpoint: Path, job: "Job") -> Progress:
    """Puts everything back as it was when the checkpoint was saved."""
    trainer = job.trainer
    model, state = checkpoint / MODEL, checkpoint / STATE
    said = read_state(state)
    with trainer.engine.restoring():
        load_into(job.module, model, "ema")
        trainer.ema.load(job.module.state_dict(), said["ema_updates"])
        load_into(job.module, model, KINDS[job.kind])
        trainer.load_state_dict(load_tensors(state, "optimizer."))
    device = trainer.engine.device
    means = Means()
    sums = {name: value.to(device) for name, value in load_tensors(state, "means.").items()}
    means.load_state(sums, said["means_counts"])
    names = ("epoch", "skipped_steps", "in_a_row", "best", "best_step")
    # What later versions say, earlier ones did not.
    progress = Progress(means, **{name: said[name] for name in names}, best_of=said.get("best_of"))
    progress.order = order_of(job.dataset)
    now, then = len(job.dataset), said["images"]
    if now != then:
        console.warn(f"{checkpoint} was saved with {then} images, and there are {now} now: their order is another")
    elif progress.order != said.get("order", progress.order):
        console.warn(f"{checkpoint} was saved with images of other names than there are now: their order is another")
    return progress


def read_state(path: Path) -> dict[str, Any]:
    """What the state file beside a checkpoint says: step, updates of the average, figures of the epoch."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return dict(json.loads(file.metadata()[STATE_KEY]))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing") from None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
        raise ConfigError(f"{path} is damaged ({e})") from e


@dataclass(frozen=True)
class Found:
    """Where a run goes on from."""

    checkpoint: Path | None
    step: int
    damaged: tuple[Path, ...] = ()
    """Newer checkpoints that cannot be used."""


def find_checkpoint(checkpoints: Checkpoints) -> Found:
    """The newest checkpoint that is as it was saved; newer ones that are not are named in warnings.

    Raises:
        ConfigError: there are checkpoints, and none of them can be used.
    """
    faults: dict[Path, ConfigError] = {}
    for checkpoint in reversed(checkpoints.whole()):
        try:
            step = steps_done(checkpoint)
        except ConfigError as error:
            faults[checkpoint] = error
            continue
        for damaged, fault in faults.items():
            console.warn(f"{damaged} is damaged and not used: {fault.message}")
        return Found(checkpoint, step, tuple(faults))
    if faults:
        message = next(iter(faults.values())).message
        raise ConfigError(message, f"No checkpoint is whole: remove {checkpoints.folder} to start again")
    return Found(None, 0)


def steps_done(checkpoint: Path) -> int:
    """The step that a checkpoint is of, after a look at its hashes and at what both its files say of themselves.

    Raises:
        ConfigError: a file of it is damaged or missing.
    """
    step = read_header(checkpoint / MODEL).step
    other = read_state(checkpoint / STATE)["step"]
    if other != step:
        raise ConfigError(f"{checkpoint / STATE} is of step {other}, and {MODEL} beside it of step {step}")
    fault = check(checkpoint)
    if fault:
        raise ConfigError(fault)
    return step
