"""The plan of a training: its config, its folder, and where it goes on from."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from uldm_cli import console
from uldm_cli.errors import ConfigError
from uldm_cli.runs.begun import MAY_CHANGE, RECORD, may_differ
from uldm_cli.runs.checkpoints import Checkpoints
from uldm_cli.runs.outdir import choose_outdir, difference_from
from uldm_cli.runs.processes import processes
from uldm_cli.runs.saving import find_checkpoint
from uldm_cli.specs.autoencoder_training import AutoencoderTraining
from uldm_cli.specs.datasets import Images
from uldm_cli.specs.diffusion_training import DiffusionTraining

if TYPE_CHECKING:
    from uldm_cli.specs.encoding import LatentIndex
    from uldm_cli.specs.training import Optim, Train

C = TypeVar("C", bound=AutoencoderTraining | DiffusionTraining)


@dataclass(frozen=True)
class Plan(Generic[C]):
    """A training run whose config and folder fit together."""

    config: C
    folder: Path
    checkpoint: Path | None
    """Where it goes on from."""
    start: int
    """Steps that are done."""
    damaged: tuple[Path, ...] = ()
    """Newer checkpoints that cannot be used."""
    latents: "LatentIndex | None" = None
    """The index of the latents that are read in place of the images, if any are."""

    @property
    def train(self) -> "Train":
        return self.config.train

    @property
    def optim(self) -> "Optim":
        return self.config.optim

    @property
    def cold(self) -> str | None:
        """What is to be said of a training that ends while the learning rate still rises."""
        optim, steps = self.optim, self.train.steps
        if steps >= optim.warmup_steps:
            return None
        highest = optim.lr * steps / optim.warmup_steps
        return f"gets to {highest:.3g} of {optim.lr:.3g}: optim.warmup_steps is {optim.warmup_steps}"

    @property
    def finished(self) -> bool:
        return self.start >= self.train.steps

    @property
    def micro_batch(self) -> int:
        """Images that a process computes at a time."""
        return self.train.batch_size // (processes() * self.train.accumulate)


def make_plan(config: C, outdir: Path | None, default: Path, *, resume: bool) -> Plan[C]:
    """Chooses the run's folder, and the checkpoint it goes on from, if there is one. Writes nothing.

    Raises:
        ConfigError: the batch cannot be shared out; a tracker is not installed; the folder holds a run of another
            config or of more steps, or no whole checkpoint; or `resume`, and no such run.
    """
    _check_shares(config.train)
    _check_trackers(config.train)
    free = may_differ(config)
    folder = choose_outdir(outdir, default, RECORD, config, ignored=free, may_change=MAY_CHANGE)
    begun = (folder / RECORD).exists()
    if resume and not begun:
        raise ConfigError(f"--resume: there is no run of this config in {folder}", "Leave --resume out to start one")
    if outdir is None and folder != default and not begun:
        why = difference_from(default / RECORD, config, free)
        console.note(f"a new run in {folder}, as {default} is another training: {why}")
    checkpoints = Checkpoints(folder)
    if not begun and checkpoints.newest():
        what = f"{folder} holds checkpoints, but no {RECORD} that says what they are of"
        raise ConfigError(what, "Give another --outdir, or remove this one")
    if not begun:
        _check_place(folder, config)
    found = find_checkpoint(checkpoints)
    if found.step > config.train.steps:
        what = f"{folder} has made {found.step} steps already, and train.steps is {config.train.steps}"
        raise ConfigError(what, "Give another --outdir to train anew")
    return Plan(config, folder, found.checkpoint, found.step, found.damaged)


def _check_place(folder: Path, config: AutoencoderTraining | DiffusionTraining) -> None:
    """Pictures of a run among the images that it reads would be trained on when it goes on."""
    data = config.data
    if not isinstance(data, Images) or data.split_file or getattr(config, "latents", None):
        return  # it does not read all that lies in a folder
    if folder.resolve().is_relative_to(Path(data.root).expanduser().resolve()):
        what = f"{folder} lies in data.root={data.root}, and so the run's own pictures would be trained on"
        raise ConfigError(what, "Give an --outdir elsewhere")


def _check_shares(train: "Train") -> None:
    """The same samples whatever the number of processes: so each must have as many of them."""
    shares = processes() * train.accumulate
    if train.batch_size % shares:
        several = processes() > 1
        of = (
            f"{processes()} processes with {train.accumulate} micro-batches each"
            if several
            else f"{shares} micro-batches"
        )
        below = train.batch_size // shares * shares
        near = f"{below} or {below + shares}" if below else str(shares)
        raise ConfigError(f"train.batch_size {train.batch_size} cannot be shared out among {of}", f"Take {near}")


def _check_trackers(train: "Train") -> None:
    """Accelerate would leave out a tracker that is not installed."""
    for name in train.trackers:
        if find_spec(name) is None:
            raise ConfigError(f"train.trackers: {name} is not installed", f"pip install {name}, or leave it out")
