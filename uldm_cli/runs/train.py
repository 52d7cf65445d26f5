"""Training on disk: the run's folder, resuming, metrics, pictures, checkpoints. What is trained is a `Job`.

A run's folder holds `train.yaml` (the resolved config), `metrics.jsonl`, `checkpoints/` and `pictures/`.
"""

import json
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from uldm_cli import console
from uldm_cli.errors import ConfigError, UldmError
from uldm_cli.formats.checkpoint import KINDS, Header
from uldm_cli.formats.native import load_into, load_tensors, read_header, save
from uldm_cli.formats.tensors import write_safetensors
from uldm_cli.runs.checkpoints import MODEL, Checkpoints
from uldm_cli.runs.files import writable_folder, write_png
from uldm_cli.runs.metrics import Line, Means, append_line, forget_after, not_finite, read_lines
from uldm_cli.runs.outdir import choose_outdir, write_record
from uldm_cli.runs.signals import stop_on_signals
from uldm_cli.specs.autoencoder_training import AutoencoderTraining
from uldm_cli.specs.diffusion_training import DiffusionTraining

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from torch import Tensor, nn

    from uldm_cli.core.data import Batch, ImageSet
    from uldm_cli.core.training import Record, Trainer
    from uldm_cli.specs.datasets import Dataset
    from uldm_cli.specs.models import Model
    from uldm_cli.specs.training import Train

RECORD = "train.yaml"
METRICS = "metrics.jsonl"
STATE = "state.safetensors"
STATE_KEY = "uldm-state"
NAMED = 10
"""So many skipped images are named; the others are counted."""

C = TypeVar("C", bound=AutoencoderTraining | DiffusionTraining)


class Job(Protocol):
    """What is trained: the part that differs between an autoencoder and a diffusion model."""

    kind: str
    """Of the checkpoint, one of `formats.checkpoint.KINDS`."""
    title: str
    data: "Dataset"
    dataset: "ImageSet"
    trainer: "Trainer"
    module: "nn.Module"
    """What is trained and averaged."""

    @property
    def config(self) -> "Model":
        """What the checkpoint says of the model."""

    def untrained(self) -> "Mapping[str, Mapping[str, Tensor]]":
        """The checkpoint's parts that training leaves as they are: a state dict a part."""

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
class Plan(Generic[C]):
    """A training run whose config and folder fit together."""

    config: C
    folder: Path
    checkpoint: Path | None
    """Where it goes on from."""
    start: int
    """Steps that are done."""

    @property
    def train(self) -> "Train":
        return self.config.train

    @property
    def finished(self) -> bool:
        return self.start >= self.train.steps


@dataclass(frozen=True)
class Preview:
    """What a run would do."""

    plan: Plan[Any]
    title: str
    device: str
    parameters: int
    images: int
    skipped: int
    details: dict[str, str]
    """What else there is to know, by name."""


@dataclass(frozen=True)
class Result:
    """A finished run."""

    plan: Plan[Any]
    checkpoint: Path
    line: Line
    """The last line of metrics."""
    computed: int
    """Steps that this call made; none where the run was finished already."""
    skipped: int
    """Images that this call met and could not use."""
    seconds: float


def make_plan(config: C, outdir: Path | None, default: Path, *, resume: bool) -> Plan[C]:
    """Chooses the run's folder, and the checkpoint it goes on from, if there is one. Writes nothing.

    Raises:
        ConfigError: the folder holds a run of another config; or a damaged checkpoint; or `resume`, and no such run.
    """
    folder = choose_outdir(outdir, default, RECORD, config)
    begun = (folder / RECORD).exists()
    newest = Checkpoints(folder).newest()
    if resume and not begun:
        raise ConfigError(f"--resume: there is no run of this config in {folder}", "Leave --resume out to start one")
    if newest and not begun:
        what = f"{folder} holds checkpoints, but no {RECORD} that says what they are of"
        raise ConfigError(what, "Give another --outdir, or remove this one")
    return Plan(config, folder, newest, _steps_done(newest) if newest else 0)


def open_images(data: "Dataset") -> "ImageSet":
    """The images of a config; where there are none, the error names the key that chooses others."""
    try:
        images: ImageSet = data.build()
    except ConfigError as e:
        hint = "Other images are named by data.root=PATH" if hasattr(data, "root") else "Other images: data=KIND"
        if e.hint:
            hint = f"{e.hint}{'' if e.hint.endswith('?') else '.'} {hint}"
        raise ConfigError(e.message, hint) from e
    return images


def preview(plan: Plan[Any], what: str, module: "nn.Module", details: dict[str, str]) -> Preview:
    """What a run would do, for `--dry-run`. `module` is what it would train, and may be without memory ("meta")."""
    from uldm_cli.core.device import pick_device, pick_dtype

    images = open_images(plan.config.data)
    device = pick_device(plan.train.device)
    precision = str(pick_dtype(plan.train.precision, device)).removeprefix("torch.")
    return Preview(
        plan,
        what,
        f"{device}, {precision}",
        count_parameters(module),
        len(images),
        len(images.skipped),
        details,
    )


def count_parameters(module: "nn.Module") -> int:
    """How many numbers training adjusts or, as in an EMA codebook, follows."""
    return sum(p.numel() for p in module.parameters())


def train(plan: Plan[Any], build: Callable[[], Job]) -> Result:
    """Trains to the end, or until it is interrupted, which saves first and raises KeyboardInterrupt.

    `build` is called where something is left to do. Nothing is written before it, and reading the first images, worked.
    """
    began = time.perf_counter()
    skipped = 0
    if not plan.finished:
        run = _Run(plan, build())
        run.go()
        skipped = len(run.skipped)
    newest = Checkpoints(plan.folder).newest()
    assert newest is not None, "the last step saves"
    line = read_lines(plan.folder / METRICS)[-1:]
    computed = plan.train.steps - plan.start
    return Result(plan, newest, line[0] if line else {}, computed, skipped, time.perf_counter() - began)


class _Run:
    """What happens between the records of one run."""

    def __init__(self, plan: Plan[Any], job: Job) -> None:
        self.plan, self.job = plan, job
        self.checkpoints = Checkpoints(plan.folder)
        self.metrics = plan.folder / METRICS
        self.display: console.Training | None = None
        self.skipped: set[str] = set()
        self._means = Means()
        self._logged, self._since = plan.start, time.perf_counter()
        self._epoch: dict[str, float] = {}
        """The figures of the last whole epoch, if there has been one."""
        if plan.checkpoint:
            with _damage_named(plan.checkpoint):
                self._restore(plan.checkpoint)

    def go(self) -> None:
        """Trains from where the plan starts to the end."""
        plan = self.plan
        with ExitStack() as stack:
            stop = stack.enter_context(stop_on_signals())
            batches = stack.enter_context(closing(self._batches()))
            self._name_skipped(self.job.dataset.skipped)
            first = next(batches)  # images that cannot be read are found before anything is written
            self._begin()
            self.display = stack.enter_context(console.training(plan.train.steps, plan.start, self.job.title))
            self._logged, self._since = plan.start, time.perf_counter()
            self._seed(plan.start + 1)
            for record in self.job.trainer.fit(chain([first], batches), plan.start):
                self._after(record)
                if stop.requested and record.step < plan.train.steps:
                    self._stop(record.step)
                self._seed(record.step + 1)

    def _begin(self) -> None:
        folder = self.plan.folder
        if not (folder / RECORD).exists():
            write_record(folder, RECORD, self.plan.config)
        elif self.plan.start:
            console.note(f"going on from step {self.plan.start} of {folder}")
        else:
            console.note(f"the run in {folder} had saved no checkpoint: it starts again")
        forget_after(self.metrics, self.plan.start)

    def _batches(self) -> "Generator[Batch, None, None]":
        from uldm_cli.core.data import stream

        train = self.plan.train
        yield from stream(
            self.job.dataset,
            batch_size=train.batch_size,
            seed=train.seed,
            start=self.plan.start * train.batch_size,
            workers=train.workers,
            strict=self.job.data.strict,
            pin_memory=self.job.trainer.engine.device.type == "cuda",
        )

    def _seed(self, step: int) -> None:
        """Dropout draws from the global generator: seeded a step, it draws the same in a run that was resumed."""
        import torch

        from uldm_cli.core import rng

        torch.manual_seed(int(rng.integers(self.plan.train.seed, 0, torch.tensor([step]), 2**32)))

    def _after(self, record: "Record") -> None:
        train, step = self.plan.train, record.step
        self._means.add(record.logs)
        self._name_skipped(record.batch.skipped)
        self._end_epoch(step)
        last = step == train.steps
        log, picture, checkpoint = (
            last or step % every == 0 for every in (train.log_every, train.picture_every, train.save_every)
        )
        if log or picture or checkpoint:
            means = self._good_means(step)
        if log:
            self._log(record, means)
        if picture:
            name, pixels = self.job.picture()
            write_png(writable_folder(self.plan.folder / "pictures") / f"{name}_{step:07}.png", pixels)
        if checkpoint:
            self._save(step)

    def _log(self, record: "Record", means: Line) -> None:
        rate = (record.step - self._logged) * self.plan.train.batch_size / (time.perf_counter() - self._since)
        self._means.clear()
        self._logged, self._since = record.step, time.perf_counter()
        epoch = self._epochs(record.step)
        counted = self._epoch or self.job.epoch_logs()
        line = {"step": record.step, "epoch": epoch, **means, **counted}
        if counted:  # the figures over an epoch are those of the last whole one, in the first epoch those so far
            line["counted_epoch"] = max(int(epoch), 1)
        append_line(self.metrics, line | {"lr": record.lr, "images_per_second": round(rate, 1)})
        if self.display:
            self.display.update(record.step, means | counted, rate)

    def _good_means(self, step: int) -> Line:
        """The means since the last line of metrics; an error where the training has gone wrong.

        It is asked before everything that is shown or saved: a spoilt checkpoint must not push out a good one.
        """
        values = self._means.read()
        bad = not_finite(values)
        if bad:
            newest = self.checkpoints.newest()
            kept = f"the last good checkpoint is {newest}" if newest else "no checkpoint had been saved"
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            wider = ", or train.precision=fp32" if self.job.trainer.engine.precision != "fp32" else ""
            what = f"{bad[0]}{more} became NaN or infinite by step {step}; {kept}"
            raise UldmError(what, f"Try a smaller optim.lr{wider}")
        return values

    def _epochs(self, step: int) -> float:
        """How often the images have been through."""
        return step * self.plan.train.batch_size / len(self.job.dataset)

    def _end_epoch(self, step: int) -> None:
        """Batches run across the borders of epochs: one that does counts for the epoch that it ends."""
        if int(self._epochs(step)) > int(self._epochs(step - 1)):
            self._epoch = self.job.epoch_logs()
            self.job.start_epoch()

    def _name_skipped(self, skipped: list[tuple[str, str]]) -> None:
        for name, reason in skipped:
            if name in self.skipped:
                continue
            self.skipped.add(name)
            if len(self.skipped) <= NAMED:
                console.warn(f"skipped {name}: {reason} ({len(self.skipped)} so far)")
            elif len(self.skipped) == NAMED + 1:
                console.warn("more images are skipped; from here on they are only counted")

    def _stop(self, step: int) -> None:
        if step % self.plan.train.save_every:
            self._good_means(step)
            self._save(step)
        console.note(f"saved step {step}; the same command goes on from there")
        raise KeyboardInterrupt

    def _save(self, step: int) -> None:
        """Saves the model and everything that resuming needs, together."""
        job, trainer = self.job, self.job.trainer
        header = Header(job.kind, job.config.model_dump(mode="json"), self.plan.config.model_dump(mode="json"), step)
        parts = {KINDS[job.kind]: job.module.state_dict(), **job.untrained(), "ema": trainer.ema.state}
        state = {f"optimizer.{name}": value for name, value in trainer.state_dict().items()}
        state |= {f"job.{name}": value for name, value in job.state().items()}
        state |= {f"means.{name}": value for name, value in self._means.state().items()}
        said = {
            "step": step,
            "ema_updates": trainer.ema.updates,
            "means_count": self._means.count,
            "epoch": self._epoch,
            "images": len(job.dataset),
        }

        def write(folder: Path) -> None:
            save(folder / MODEL, header, parts)
            write_safetensors(folder / STATE, state, {STATE_KEY: json.dumps(said)})

        try:
            self.checkpoints.save(step, write)
        except (OSError, UldmError) as e:
            hint = "What was saved before is whole: the same command goes on from there"
            why = e.message if isinstance(e, UldmError) else e
            raise UldmError(f"step {step} could not be saved: {why}", hint) from e

    def _restore(self, checkpoint: Path) -> None:
        """Puts everything back as it was when the checkpoint was saved."""
        job, trainer = self.job, self.job.trainer
        model, state = checkpoint / MODEL, checkpoint / STATE
        said = _read_state(state)
        load_into(job.module, model, "ema")
        trainer.ema.load(job.module.state_dict(), said["ema_updates"])
        load_into(job.module, model, KINDS[job.kind])
        trainer.load_state_dict(load_tensors(state, "optimizer."))
        job.load_state(load_tensors(state, "job."))
        device = trainer.engine.device
        sums = {name: value.to(device) for name, value in load_tensors(state, "means.").items()}
        self._means.load_state(sums, said["means_count"])
        self._epoch = said["epoch"]
        now, then = len(job.dataset), said["images"]
        if now != then:
            console.warn(f"{checkpoint} was saved with {then} images, and there are {now} now: their order is another")


def _steps_done(checkpoint: Path) -> int:
    """The step that a checkpoint is of, after a look at what both its files say of themselves."""
    with _damage_named(checkpoint):
        step = read_header(checkpoint / MODEL).step
        other = _read_state(checkpoint / STATE)["step"]
        if other != step:
            raise ConfigError(f"{checkpoint / STATE} is of step {other}, and {MODEL} beside it of step {step}")
        return step


def _read_state(path: Path) -> dict[str, Any]:
    """What the state file beside a checkpoint says: step, updates of the average, figures of the epoch."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return dict(json.loads(file.metadata()[STATE_KEY]))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing") from None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
        raise ConfigError(f"{path} is damaged ({e})") from e


@contextmanager
def _damage_named(checkpoint: Path) -> Iterator[None]:
    """Errors of reading a checkpoint say what to do, which is another thing than for a model that was fetched."""
    try:
        yield
    except ConfigError as e:
        whole = [path for path in checkpoint.parent.glob("step-*") if path.name < checkpoint.name]
        before = max(whole).name if whole else "the beginning"
        raise ConfigError(e.message, f"Remove {checkpoint} to go on from {before}") from e
