"""Trainings that were begun: what their folders say, for a command that names what is not there any more or not at all.

A run keeps all that it began with, in its record and its checkpoints. So it goes on without the models that those were
read from, whatever their names lead to now.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uldm_cli.errors import ConfigError
from uldm_cli.runs.checkpoints import Checkpoints
from uldm_cli.runs.outdir import NOT_COMPARED, candidates, difference_from
from uldm_cli.specs.autoencoder_training import AutoencoderTraining
from uldm_cli.specs.diffusion_training import DiffusionTraining
from uldm_cli.specs.yamlfile import read_yaml

RECORD = "train.yaml"
"""The file of a run's folder that holds its resolved config."""

MAY_CHANGE = frozenset({"train.steps", "data.root"})
"""What a run that is named may change: it is made longer, or its images have moved. Of one that is found, another value
makes another training."""


@dataclass(frozen=True)
class Begun:
    """A run that has saved a checkpoint."""

    folder: Path
    said: dict[str, Any]
    """Its resolved config, as plain values."""
    finished: bool


def begun_runs(outdir: Path | None, default: Path) -> Iterator[Begun]:
    """The runs in the folder that is named, or else in those that a command takes by default."""
    for folder in candidates(default) if outdir is None else (outdir,):
        record = folder / RECORD
        if not record.is_file():
            return
        try:
            said = dict(read_yaml(record)[0])
        except ConfigError:  # whoever chooses the folder says so
            continue
        checkpoints = Checkpoints(folder)
        if newest := checkpoints.newest():
            train = said.get("train")
            steps = train.get("steps") if isinstance(train, dict) else None
            yield Begun(folder, said, isinstance(steps, int) and checkpoints.of_step(steps) == newest)


def may_differ(config: AutoencoderTraining | DiffusionTraining) -> frozenset[str]:
    """What a run may go on with another value of: see `NOT_COMPARED`.

    Micro-batches change a mean over samples by its rounding. The batch norm of a discriminator sees them singly.
    """
    alone = isinstance(config, DiffusionTraining) or config.adversarial is None
    return NOT_COMPARED | {"train.accumulate"} if alone else NOT_COMPARED


def filled(config: DiffusionTraining, run: Begun, *, named: bool) -> DiffusionTraining | None:
    """A config with the autoencoder and the data that it leaves open as in a run, if it is that run's then."""
    open_ones = {name: run.said.get(name) for name in ("autoencoder", "data") if getattr(config, name) is None}
    try:
        complete = DiffusionTraining.model_validate(config.model_dump(mode="json") | open_ones)
    except ValueError:  # of a plugin that is gone, say
        return None
    free = may_differ(complete) | (MAY_CHANGE if named else frozenset())
    return complete if difference_from(run.folder / RECORD, complete, free) is None else None


def taken_over(reference: str, outdir: Path | None, default: Path, names: tuple[str, ...]) -> dict[str, Any] | None:
    """What a run that began with this model took over from it; None if none in those folders did."""
    for run in begun_runs(outdir, default):
        if run.said.get("init_from") == reference:
            return {name: run.said[name] for name in names if name in run.said}
    return None
