"""Training on disk: the run's folder, resuming, metrics, pictures, checkpoints. What is trained is a `Job`.

A run's folder holds `train.yaml` (the resolved config), `metrics.jsonl`, `checkpoints/` and `pictures/`. Of several
processes all compute, and the main one writes.
"""

import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from uldm_cli import console
from uldm_cli.errors import ConfigError, UldmError, UsageError
from uldm_cli.fetch import alone
from uldm_cli.runs.begun import RECORD
from uldm_cli.runs.checkpoints import Checkpoints
from uldm_cli.runs.files import order_of, writable_folder, write_png
from uldm_cli.runs.metrics import Line, append_line, forget_after, is_better, not_finite, read_lines
from uldm_cli.runs.outdir import write_record
from uldm_cli.runs.processes import sharded
from uldm_cli.runs.saving import Progress, restore_run, save_run
from uldm_cli.runs.signals import Stop, stop_on_signals
from uldm_cli.runs.skipped import Skipped
from uldm_cli.runs.train_plan import Plan
from uldm_cli.specs.yamlfile import read_yaml

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from torch import Tensor, nn

    from uldm_cli.core.data import Batch, ImageSet
    from uldm_cli.core.engine import Engine
    from uldm_cli.core.training import Record, Trainer
    from uldm_cli.specs.datasets import Dataset
    from uldm_cli.specs.models import Model

METRICS = "metrics.jsonl"
IDLE = 0.2
"""Share of the time from which on it is worth saying that the network waits for images."""


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

    def epoch_logs(self) -> dict[str, float]:
        """Figures gathered since the epoch began."""

    def start_epoch(self) -> None:
        """Called when an epoch begins."""

    def warnings(self, line: Line) -> list[str]:
        """What a line of metrics gives cause to say; each is said once."""

    def picture(self) -> "tuple[str, np.ndarray] | None":
        """What the averaged weights make now: the picture's name, and uint8 `[H, W]` or `[H, W, 3]`.

        The main process asks for it; where weights are shared out, all do, and the others get None.
        """


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


def make_engine(plan: Plan[Any]) -> "Engine":
    """What a run computes with. With several processes, they meet here."""
    from uldm_cli.core.engine import Engine

    train = plan.train
    return Engine(train.device, train.precision, trackers=train.trackers, folder=plan.folder, sharded=sharded())


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
        self.plan, self.job, self.engine = plan, job, job.trainer.engine
        self.checkpoints = Checkpoints(plan.folder, plan.train.keep)
        self.metrics = plan.folder / METRICS
        self.display: console.Training | None = None
        self.skipped = Skipped("from here on they are only counted")
        self._unread: list[tuple[str, str]] = []
        self._told: set[str] = set()
        self._scheduled = self._due = self._improved = False
        self._waited = 0.0
        self._logged, self._since = plan.start, time.perf_counter()
        starts = self.engine.from_main(plan.start)
        if starts != plan.start:
            what = f"the main process found step {starts} in {plan.folder}, and another one step {plan.start}"
            raise UldmError(what, "The run's folder must lie where all processes see it")
        resumed = restore_run(plan.checkpoint, job) if plan.checkpoint else None
        self.progress = resumed or Progress(order=order_of(job.dataset))
        self._check_best()

    def _check_best(self) -> None:
        """What was the best is not where another figure counts now, or a better one pushed it out and was damaged."""
        progress, name = self.progress, self.plan.train.best
        gone = progress.best_step is not None and not self.checkpoints.of_step(progress.best_step).exists()
        if gone or progress.best_of != name:
            progress.best = progress.best_step = None
        progress.best_of = name

    def go(self) -> None:
        """Trains from where the plan starts to the end."""
        plan = self.plan
        with ExitStack() as stack:
            stop = stack.enter_context(stop_on_signals())
            batches = stack.enter_context(closing(self._batches()))
            self.skipped.add(self.job.dataset.skipped)
            first = next(batches)  # images that cannot be read are found before anything is written
            if self.engine.main:
                lock = writable_folder(plan.folder) / ".lock"
                stack.enter_context(alone(lock, f"trains in {plan.folder}", wait=False))
                if self.checkpoints.newest() not in (plan.checkpoint, *plan.damaged):
                    raise UsageError(f"another process has trained in {plan.folder} meanwhile", "Run this once more")
                self._begin()
            self.engine.begin_tracking(plan.folder, _flat(plan.config.model_dump(mode="json")))
            stack.callback(self.engine.end_tracking)
            self.display = stack.enter_context(console.training(plan.train.steps, plan.start, self.job.title))
            self._logged, self._since, self._waited = plan.start, time.perf_counter(), 0.0
            self._seed(plan.start + 1)
            for record in self.job.trainer.fit(chain([first], batches), plan.start):
                self._after(record, stop)
                self._seed(record.step + 1)

    def _begin(self) -> None:
        folder = self.plan.folder
        for checkpoint in self.plan.damaged:
            console.note(f"{checkpoint} is now {self.checkpoints.set_aside(checkpoint).name}")
        if self.plan.start:
            console.note(f"going on from step {self.plan.start} of {folder}{self._changes()}")
        elif (folder / RECORD).exists():
            console.note(f"the run in {folder} had saved no checkpoint: it starts again")
        if self.plan.cold:
            console.note(f"the learning rate {self.plan.cold}")
        write_record(folder, RECORD, self.plan.config)
        forget_after(self.metrics, self.plan.start)
        best = self.progress.best_step
        if best is not None:  # a run that was killed between saving and marking has not marked it
            self.checkpoints.mark_best(self.checkpoints.of_step(best))

    def _changes(self) -> str:
        """What is to be said where a run goes on to another number of steps than before, or with images elsewhere."""
        record, config, said = read_yaml(self.plan.folder / RECORD)[0], self.plan.config, ""
        before, now = record["data"].get("root"), getattr(config.data, "root", None)
        if before != now:
            said += f", with the images of {now} where it was {before}"
        before, now = record["train"]["steps"], config.train.steps
        if before != now:
            curve = "; the learning rate follows the cosine to there" if config.optim.decay == "cosine" else ""
            said += f", to step {now} where it was {before}{curve}"
        return said

    def _batches(self) -> "Generator[Batch, None, None]":
        from uldm_cli.core.data import stream

        train = self.plan.train
        source = stream(
            self.job.dataset,
            batch_size=self.plan.micro_batch,
            seed=train.seed,
            start=self.plan.start * train.batch_size,
            rank=self.engine.rank,
            world=self.engine.world,
            workers=train.workers,
            strict=self.job.data.strict,
            pin_memory=self.engine.device.type == "cuda",
        )
        with closing(source):
            while True:
                asked = time.perf_counter()
                try:
                    batch = next(source)
                except UsageError as e:
                    if self.engine.main:
                        raise
                    raise UldmError(e.message, e.hint) from e  # wrong input, but not the same in every process
                self._waited += time.perf_counter() - asked
                yield batch

    def _seed(self, step: int) -> None:
        """Dropout draws from the global generator: seeded a step, it draws the same in a run that was resumed."""
        import torch

        from uldm_cli.core import rng

        number = torch.tensor([step * self.engine.world + self.engine.rank])
        torch.manual_seed(int(rng.integers(self.plan.train.seed, 0, number, 2**32)))

    def _after(self, record: "Record", stop: Stop) -> None:
        train, step = self.plan.train, record.step
        last = step == train.steps
        self._take(record, last)
        self._end_epoch(step)
        save_asked, stop.save = stop.save, False  # a signal that comes from here on is for the next step
        stopping, asked, unread = self.engine.any(stop.requested and not last, save_asked, bool(self._unread))
        if unread:
            self._tell_unread()
        self._scheduled |= last or step % train.save_every == 0
        self._due |= self._scheduled or stopping or asked
        # Weights that may be spoilt must not push out a good checkpoint.
        sound = record.fault is None or not record.fault.spoilt
        log, picture = last or step % train.log_every == 0, sound and (last or step % train.picture_every == 0)
        save = sound and self._due
        means = self._good_means(step) if log or picture or save else {}
        self._improved = save and log and self._is_best(means, step)
        if log:
            self._log(record, means)
        elif self.display:
            self.display.reached(step)
        if picture and (self.engine.main or self.engine.sharded) and (drawn := self.job.picture()):
            name, pixels = drawn
            write_png(writable_folder(self.plan.folder / "pictures") / f"{name}_{step:07}.png", pixels)
        if save:
            self._save(step)
            if asked:
                console.note(f"saved step {step}")
        if stopping:
            console.note(f"saved step {step}; the same command goes on from there" if save else self._kept())
            raise KeyboardInterrupt

    def _take(self, record: "Record", last: bool) -> None:
        """Counts what a step did, or that it was skipped."""
        for batch in record.batches:
            self._unread += batch.skipped
        progress = self.progress
        fault = record.fault
        if fault is None:
            progress.means.add(record.logs)
            progress.in_a_row = 0
            return
        progress.skipped_steps += 1
        progress.in_a_row += 1
        count = f"{progress.skipped_steps} so far"
        console.warn(f"step {record.step} changed nothing: {fault.what} ({count})")
        if (last and fault.spoilt) or progress.in_a_row >= self.plan.optim.max_skipped:
            what = f"{progress.in_a_row} steps in a row were skipped, the last, {record.step}: {fault.what}"
            if progress.in_a_row == 1:
                what = f"step {record.step}, the last, was skipped: {fault.what}"
            raise UldmError(f"{what}; {self._kept()}", self._advice())

    def _tell_unread(self) -> None:
        """Names images that could not be read, whichever process met them."""
        for found in self.engine.from_all(self._unread):
            self.skipped.add(found)
        self._unread = []

    def _log(self, record: "Record", means: Line) -> None:
        elapsed = time.perf_counter() - self._since
        rate = (record.step - self._logged) * self.plan.train.batch_size / elapsed
        waiting = min(self._waited / elapsed, 1.0)
        self.progress.means.clear()
        self._logged, self._since, self._waited = record.step, time.perf_counter(), 0.0
        epoch = self._epochs(record.step)
        counted = self.progress.epoch or self.job.epoch_logs()
        line = {"step": record.step, "epoch": epoch, **means, **counted}
        if counted:  # the figures over an epoch are those of the last whole one, in the first epoch those so far
            line["counted_epoch"] = max(int(epoch), 1)
        if self.progress.skipped_steps:
            line["skipped_steps"] = self.progress.skipped_steps
        line |= {"lr": record.lr, "images_per_second": round(rate, 1), "data_wait": round(waiting, 3)}
        if self.engine.main:
            append_line(self.metrics, line)
        self.engine.track(line, record.step)
        for said in self.job.warnings(line):
            self._tell_once(said)
        self._mind_waiting(waiting, rate)
        if self.display:
            self.display.update(record.step, means | counted, rate)

    def _mind_waiting(self, share: float, rate: float) -> None:
        if share <= IDLE or self._logged <= self.plan.start + self.plan.train.log_every:
            return
        cure = f"more train.workers (now {self.plan.train.workers}), smaller files or a cache of latents would help"
        if hasattr(self.job.dataset, "gather"):  # such sets are read by the process that trains
            cure = "they are read from memory or a mapped file, which must be slow"
        wait = f"the network waited for images {share:.0%} of the time, at {rate:.0f} images/s"
        self._tell_once(f"{wait}: {cure}", "waiting")

    def _tell_once(self, text: str, key: str | None = None) -> None:
        if (key or text) not in self._told:
            self._told.add(key or text)
            console.warn(text)

    def _is_best(self, means: Line, step: int) -> bool:
        """Whether this step is the best so far, by a line of metrics; `_save` marks it then."""
        name, progress = self.plan.train.best, self.progress
        if name is None or not means:  # nothing but skipped steps since the last line
            return False
        figures = {**progress.epoch, **means}  # of the codes' use those of a whole epoch
        if name in figures:
            if is_better(name, figures[name], progress.best):
                progress.best, progress.best_step = figures[name], step
                return True
        elif name not in self.job.epoch_logs():
            known = ", ".join(sorted(figures | self.job.epoch_logs()))
            self._tell_once(
                f"train.best={name}: no checkpoint is the best, as there is no such figure yet, but {known}"
            )
        return False

    def _good_means(self, step: int) -> Line:
        """The means since the last line of metrics; an error where the training has gone wrong.

        It is asked before everything that is shown or saved: a spoilt checkpoint must not push out a good one.
        """
        values = self.progress.means.read()
        bad = not_finite(values)
        if bad:
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            raise UldmError(f"{bad[0]}{more} became NaN or infinite by step {step}; {self._kept()}", self._advice())
        return values

    def _kept(self) -> str:
        newest = self.checkpoints.newest()
        return f"the last good checkpoint is {newest}" if newest else "no checkpoint had been saved"

    def _advice(self) -> str:
        wider = ", or train.precision=fp32" if self.engine.precision in ("bf16", "fp16") else ""
        newest = self.checkpoints.newest()
        if newest is None:
            return f"Try a smaller optim.lr{wider}"
        begun = f"--init-from {newest} --outdir NEW"
        return f"The same command would meet the same; begin from there with a smaller optim.lr{wider}: {begun}"

    def _epochs(self, step: int) -> float:
        """How often the images have been through."""
        return step * self.plan.train.batch_size / len(self.job.dataset)

    def _end_epoch(self, step: int) -> None:
        """Batches run across the borders of epochs: one that does counts for the epoch that it ends."""
        if int(self._epochs(step)) > int(self._epochs(step - 1)):
            self.progress.epoch = self.job.epoch_logs()
            self.job.start_epoch()

    def _save(self, step: int) -> None:
        saved = save_run(self.checkpoints, self.job, self.plan.config, step, self.progress, snapshot=self._scheduled)
        if saved and self._improved:
            self.checkpoints.mark_best(saved)
        self._scheduled = self._due = False
        self.engine.wait()


def _flat(tree: "Mapping[str, Any]", prefix: str = "") -> dict[str, Any]:
    """A nested config as dotted names and plain values, which is all that trackers take."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat
