"""Training on disk: the run's folder, resuming, metrics, pictures, checkpoints. What is trained is a `Job`.

A run's folder holds `train.yaml` (the resolved config), `metrics.jsonl`, `checkpoints/` and `pictures/`.
"""

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from uldm_cli import console
from uldm_cli.errors import ConfigError, UldmError
from uldm_cli.formats.native import Header, load_tensors, read_header, save, save_tensors
from uldm_cli.runs.checkpoints import Checkpoints
from uldm_cli.runs.files import atomic_write, write_png
from uldm_cli.runs.outdir import choose_outdir, write_record

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from torch import Tensor

    from uldm_cli.core.data import Batch, ImageSet
    from uldm_cli.core.training import Record, Trainer
    from uldm_cli.specs.base import Spec
    from uldm_cli.specs.training import Train

RECORD = "train.yaml"
METRICS = "metrics.jsonl"
_STATE_KEY = "uldm-state"


class Job(Protocol):
    """What is trained: the part that differs between an autoencoder and a diffusion model."""

    trainer: "Trainer"
    dataset: "ImageSet"
    title: str

    def header(self, step: int) -> Header:
        """What the checkpoint of a step says of itself."""

    def parts(self) -> "Mapping[str, Mapping[str, Tensor]]":
        """The checkpoint's tensors: a state dict a part."""

    def load(self, checkpoint: Path) -> None:
        """Puts a checkpoint's raw weights into the modules."""

    def state(self) -> "dict[str, Tensor]":
        """What resuming needs beside weights, average and optimizers."""

    def load_state(self, state: "dict[str, Tensor]") -> None:
        """The inverse of `state`."""

    def epoch_logs(self) -> dict[str, float]:
        """Figures gathered since the epoch began."""

    def start_epoch(self) -> None:
        """Called when an epoch begins."""

    def picture(self) -> "tuple[str, np.ndarray]":
        """What the averaged weights make now: the picture's name, and uint8 `[H, W]` or `[H, W, 3]`."""


@dataclass(frozen=True)
class Plan:
    """A training run whose config and folder fit together."""

    config: "Spec"
    train: "Train"
    folder: Path
    checkpoint: Path | None
    """Where it goes on from."""

    @property
    def start(self) -> int:
        """Steps that are done."""
        return 0 if self.checkpoint is None else read_header(self.checkpoint / "model.safetensors").step


@dataclass(frozen=True)
class Result:
    """A finished run."""

    plan: Plan
    checkpoint: Path
    values: dict[str, float]
    """The last line of metrics."""
    seconds: float


def make_plan(config: Any, outdir: Path | None, default: Path, *, resume: bool) -> Plan:
    """Chooses the run's folder, and the checkpoint it goes on from, if there is one. Writes nothing.

    Raises:
        ConfigError: the folder holds a run of another config; or `resume`, and there is no such run.
    """
    folder = choose_outdir(outdir, default, RECORD, config)
    if resume and not (folder / RECORD).exists():
        raise ConfigError(f"--resume: there is no run of this config in {folder}", "leave --resume out to start one")
    return Plan(config, config.train, folder, Checkpoints(folder).newest())


def train(plan: Plan, job: Job) -> Result:
    """Trains to the end, or until it is interrupted, which saves first and raises KeyboardInterrupt."""
    write_record(plan.folder, RECORD, plan.config)
    start = plan.start
    began = time.perf_counter()
    run = _Run(plan, job, start)
    if plan.checkpoint:
        run.restore(plan.checkpoint)
        if start < plan.train.steps:
            console.note(f"going on from step {start} of {plan.folder}")
    if start < plan.train.steps:
        with ExitStack() as stack:
            stop = stack.enter_context(_stop_on_signals())
            run.display = stack.enter_context(console.training(plan.train.steps, start, job.title))
            for record in job.trainer.fit(run.batches(), start):
                run.after(record)
                if stop.requested and record.step < plan.train.steps:
                    run.save(record.step)
                    console.note(f"saved step {record.step}; the same command goes on from there")
                    raise KeyboardInterrupt
    newest = Checkpoints(plan.folder).newest()
    assert newest is not None, "the last step saves"
    return Result(plan, newest, run.last_values(), time.perf_counter() - began)


class _Run:
    """What happens between the records of one run."""

    def __init__(self, plan: Plan, job: Job, start: int) -> None:
        self.plan, self.job, self.start = plan, job, start
        self.display: console.Training | None = None
        self.checkpoints = Checkpoints(plan.folder)
        self.metrics = plan.folder / METRICS
        self._sums: dict[str, Tensor] = {}
        self._count, self._since = 0, time.perf_counter()
        self._epoch_values: dict[str, float] = {}
        self._named: set[str] = set()
        _forget_after(self.metrics, start)

    def batches(self) -> "Iterator[Batch]":
        from uldm_cli.core.data import stream

        train, data = self.plan.train, self.job.dataset
        return stream(
            data,
            batch_size=train.batch_size,
            seed=train.seed,
            start=self.start * train.batch_size,
            workers=train.workers,
            strict=self.plan.config.model_dump().get("data", {}).get("strict", False),
            pin_memory=self.job.trainer.engine.device.type == "cuda",
        )

    def after(self, record: "Record") -> None:
        train, step = self.plan.train, record.step
        self._add(record)
        self._name_skipped(record.batch)
        last = step == train.steps
        self._end_epoch(step)
        if step % train.log_every == 0 or last:
            self._log(record)
        if step % train.picture_every == 0 or last:
            name, picture = self.job.picture()
            (self.plan.folder / "pictures").mkdir(exist_ok=True)
            write_png(self.plan.folder / "pictures" / f"{name}_{step:07}.png", picture)
        if step % train.save_every == 0 or last:
            self.save(step)

    def _add(self, record: "Record") -> None:
        """Sums on the device: reading each step's figures would wait for it."""
        for name, value in record.logs.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def _log(self, record: "Record") -> None:
        values = {name: float(total) / self._count for name, total in self._sums.items()}
        rate = self._count * self.plan.train.batch_size / (time.perf_counter() - self._since)
        self._sums, self._count, self._since = {}, 0, time.perf_counter()
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            newest = self.checkpoints.newest()
            kept = f"the last good checkpoint is {newest}" if newest else "no checkpoint had been saved"
            raise UldmError(
                f"{', '.join(bad)} became NaN or infinite before step {record.step}; {kept}",
                "try a smaller optim.lr, or train.precision=fp32",
            )
        values |= self._epoch_values or self.job.epoch_logs()
        line = {"step": record.step, **values, "lr": record.lr, "images_per_second": round(rate, 1)}
        with self.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.display:
            self.display.update(record.step, values, rate)

    def _end_epoch(self, step: int) -> None:
        batch, length = self.plan.train.batch_size, len(self.job.dataset)
        if step * batch // length > (step - 1) * batch // length:
            self._epoch_values = self.job.epoch_logs()
            self.job.start_epoch()

    def _name_skipped(self, batch: "Batch") -> None:
        for name, reason in batch.skipped:
            if name not in self._named:
                self._named.add(name)
                console.warn(f"skipped {name}: {reason} ({len(self._named)} so far)")

    def save(self, step: int) -> None:
        """Saves the model and everything that resuming needs, together."""
        trainer = self.job.trainer
        said = {"step": step, "ema_updates": trainer.ema.updates, "epoch_values": self._epoch_values}

        def write(folder: Path) -> None:
            save(folder / "model.safetensors", self.job.header(step), {**self.job.parts(), "ema": trainer.ema.state})
            state = {f"optimizer.{name}": value for name, value in trainer.state_dict().items()}
            state |= {f"job.{name}": value for name, value in self.job.state().items()}
            save_tensors(folder / "state.safetensors", state, {_STATE_KEY: json.dumps(said)})

        self.checkpoints.save(step, write)

    def restore(self, checkpoint: Path) -> None:
        """Puts everything back as it was when the checkpoint was saved."""
        model, state = checkpoint / "model.safetensors", checkpoint / "state.safetensors"
        said = read_state(state)
        self.job.load(model)
        self.job.trainer.ema.load(load_tensors(model, "ema."), said["ema_updates"])
        self.job.trainer.load_state_dict(load_tensors(state, "optimizer."))
        self.job.load_state(load_tensors(state, "job."))
        self._epoch_values = said["epoch_values"]

    def last_values(self) -> dict[str, float]:
        """The last line of metrics."""
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        return dict(json.loads(lines[-1])) if lines else {}


def read_state(path: Path) -> dict[str, Any]:
    """What the state file beside a checkpoint says: step, updates of the average, the last epoch's figures."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return dict(json.loads(file.metadata()[_STATE_KEY]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
        raise ConfigError(f"{path} cannot be resumed from: {e}", "remove its folder to go on from the one before") from e


def _forget_after(metrics: Path, step: int) -> None:
    """Drops the lines of steps that are going to be made again."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):  # half a line, of a run that was killed
            continue
    atomic_write(metrics, lambda file: file.write("".join(kept).encode()))


@dataclass
class _Stop:
    requested: bool = False


@contextmanager
def _stop_on_signals() -> Iterator[_Stop]:
    """Ctrl-C and SIGTERM ask to stop after the step; a second one stops at once."""
    stop = _Stop()

    def ask(number: int, frame: object) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
