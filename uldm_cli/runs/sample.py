"""`uldm ldm sample`: samples from a latent diffusion model, and what they looked like on the way."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from uldm_cli import console
from uldm_cli.errors import ConfigError, UsageError
from uldm_cli.runs import raw
from uldm_cli.runs.archive import join_parts, part_path, save_part
from uldm_cli.runs.draw.latents import largest
from uldm_cli.runs.files import writable_folder
from uldm_cli.runs.outdir import default_outdir, write_record
from uldm_cli.runs.plan import Plan, make_plan
from uldm_cli.runs.raw import Gatherer, save_trajectory
from uldm_cli.runs.recipe import Recipes
from uldm_cli.runs.trajectory import Frame, Trajectories
from uldm_cli.runs.writer import Writer, save_difference, save_image, save_latent, save_scales
from uldm_cli.specs.sampling import Sheet

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from uldm_cli.specs.sampling import Sampling

RECORD = "sample.yaml"


@dataclass(frozen=True)
class Result:
    """A finished run."""

    plan: Plan
    files: list[tuple[str, Path]]
    """Every file of the run with its kind, those found done included."""
    computed: int
    """How many samples were computed now; fewer than asked for when a run was resumed."""
    device: str | None
    """What computed them; None when nothing was left to compute."""
    seconds: float
    """From the first step until everything was written; loading the model is not part of it."""

    @property
    def images_per_second(self) -> float:
        """Samples finished a second; 0 when none was computed."""
        return self.computed / self.seconds if self.computed else 0.0

    @property
    def steps_per_second(self) -> float:
        """Steps a second, each sample's counted."""
        return self.images_per_second * self.plan.steps


def run(spec: Sampling, outdir: Path | None = None, *, config: Path | None = None, resume: bool = False) -> Result:
    """Samples as `spec` says, into `outdir` or the default folder (which `config`, the YAML file, names)."""
    return sample(plan_sample(spec, outdir, config), resume=resume)


def plan_sample(spec: Sampling, outdir: Path | None = None, config: Path | None = None) -> Plan:
    """What `run` would do; see `make_plan`."""
    if spec.sheet != Sheet():
        raise ConfigError("sheet: samples are written one by one, and are no sheet", "Use `uldm ldm grid` for that")
    return make_plan(spec, outdir, default_outdir("ldm", "sample", config), RECORD)


def sample(plan: Plan, *, resume: bool = False) -> Result:
    """Computes and writes what is planned.

    Args:
        plan: from `make_plan`.
        resume: keep the batches whose files are all there. The others are computed whole, so that the result is bit
            for bit that of a run which was never interrupted.
    """
    begun = resumable_since(plan) if resume else None
    archive = None if begun is not None and plan.archive and made_since(begun, plan.archive) else plan.archive
    todo = [batch for batch in plan.batches if begun is None or not is_done(plan, batch, archive, begun)]
    # Loading may still find that the weights do not fit, or no such device: nothing has to be written by then.
    trajectories = Trajectories(plan) if todo else None
    if begun is None:
        write_record(plan.folder, plan.record, plan.spec)
    start = time.perf_counter()
    if trajectories:
        _compute(plan, trajectories, todo, archive)
    if archive:
        join_parts(archive, plan.batches)
    device = str(trajectories.device) if trajectories else None
    return Result(plan, list(plan.files()), sum(map(len, todo)), device, time.perf_counter() - start)


def resumable_since(plan: Plan) -> int | None:
    """When the run in the plan's folder began, in nanoseconds as files have it; None when there is none.

    Raises:
        UsageError: the model has changed since, so going on would mix the images of two models; or the draws cannot be
            taken up in the middle.
    """
    if plan.spec.rng == "compvis":
        raise UsageError(
            "--resume: with --rng compvis a batch's draws follow those of the batch before", "Leave --resume out"
        )
    record = plan.folder / plan.record
    if not record.exists():
        return None
    begun = record.stat().st_mtime_ns
    if plan.model.path.stat().st_mtime_ns > begun:
        raise UsageError(
            f"--resume: {plan.model.path} is newer than the run in {plan.folder}", "Leave --resume out to sample anew"
        )
    return begun


def is_done(plan: Plan, batch: range, archive: Path | None, begun: int) -> bool:
    """Whether this run wrote every file of a batch already: each came to its place only when it was whole.

    `archive` is what the batch has a part in, if that is still to be made.
    """
    files = [path for index in batch for _, path in plan.sample_files(index)]
    if archive:
        files.append(part_path(archive, batch))
    return made_since(begun, *files)


def made_since(begun: int, *files: Path) -> bool:
    """Whether all these files are there, and not left by an earlier run."""
    return all(path.exists() and path.stat().st_mtime_ns >= begun for path in files)


def _compute(plan: Plan, trajectories: Trajectories, batches: list[range], archive: Path | None) -> None:
    total = sum(map(len, batches)) * plan.steps
    with console.progress(total, "sampling", "steps") as progress, Writer() as writer, trajectories.repeatable():
        for batch in batches:
            with BatchPictures(plan, batch, writer, plan.image_size) as pictures:
                for frame in trajectories.frames(batch, progress):
                    pictures.add(frame)
                last = pictures.finish()
            if archive:
                writer.submit(save_part, part_path(archive, batch), last.image)


class BatchPictures:
    """Writes the frames of one batch as they come."""

    def __init__(self, plan: Plan, batch: range, writer: Writer, size: tuple[int, int]) -> None:
        self._plan, self._batch, self._writer, self._size = plan, batch, writer, size
        self._before: Frame | None = None
        self._recipes = Recipes("ldm sample", plan.spec, plan.model)
        self._scales: dict[int, dict[str, float]] = {index: {} for index in batch}
        for index in batch:
            writable_folder(plan.sample_folder(index) if plan.spec.step_size else plan.folder)
        self._gatherer = Gatherer(plan.folder) if raw.KIND in plan.spec.save else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._gatherer:
            self._gatherer.close()

    def add(self, frame: Frame) -> None:
        """Hands the pictures of a frame to the writer, and those of its difference to the frame before."""
        if self._gatherer:
            self._gatherer.add(frame)
        for kind in self._plan.pictures:
            if not kind.endswith("-diff"):
                self._pictures(kind, frame)
            elif self._before:
                self._differences(kind, self._before, frame)
        self._before = frame

    def finish(self) -> Frame:
        """Hands over what is known only at the end of a batch; gives the last frame."""
        for index, scales in self._scales.items():
            path = self._plan.scales_path(self._plan.sample_folder(index))
            if path:
                self._writer.submit(save_scales, path, scales)
        if self._gatherer:
            gathered = self._gatherer.gathered()
            for row, index in enumerate(self._batch):
                about = {**self._plan.sampled_with, **self._plan.drawn_from(index)}
                self._writer.submit(save_trajectory, self._plan.sample_folder(index), gathered, row, about)
        assert self._before, "the last step is always logged"
        return self._before

    def _pictures(self, kind: str, frame: Frame) -> None:
        for row, index in enumerate(self._batch):
            path = self._plan.picture_path(kind, index, (frame.n,))
            about = self._about(index, kind, str(frame.n))
            if kind == "image":
                self._writer.submit(save_image, path, frame.image[row], about)
            else:
                self._writer.submit(save_latent, path, frame.latent[row], self._size, about)

    def _differences(self, kind: str, before: Frame, frame: Frame) -> None:
        for index, values in zip(self._batch, difference(kind, before, frame), strict=True):
            path = self._plan.picture_path(kind, index, (before.n, frame.n))
            scale = self._scales[index][path.name] = largest(values)
            about = self._about(index, kind, f"{frame.n} - {before.n}")
            self._writer.submit(save_difference, path, kind, values, self._size, scale, about)

    def _about(self, index: int, kind: str, step: str) -> dict[str, str]:
        return {**self._plan.drawn_from(index), "step": step, **self._recipes.of_sample(index, kind=kind, step=step)}


def difference(kind: str, before: Frame, frame: Frame) -> NDArray[np.float32]:
    """By how much a batch changed between two frames: images `[N, H, W, C]`, or latents `[N, C, h, w]`."""
    return frame.pixels - before.pixels if kind == "image-diff" else frame.latent - before.latent
