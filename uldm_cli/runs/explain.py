"""`uldm ldm explain`: where a model looks at the logged steps of its samples, as pictures and as numbers."""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from uldm_cli import console
from uldm_cli.runs.draw.explain import Bars, draw_sheet, enlarged, framed
from uldm_cli.runs.draw.overlay import overlaid, resized
from uldm_cli.runs.explain_plan import ExplainPlan, plan_explain
from uldm_cli.runs.files import writable_folder, write_png
from uldm_cli.runs.outdir import write_record
from uldm_cli.runs.recipe import Recipes
from uldm_cli.runs.sample import Result, made_since, resumable_since
from uldm_cli.runs.sheets import sheet_layout, write_print
from uldm_cli.runs.trajectory import Trajectories
from uldm_cli.runs.writer import Writer, drop_grey_channel

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from uldm_cli.console import Progress
    from uldm_cli.core.latent import LatentDiffusion
    from uldm_cli.core.samplers import Step
    from uldm_cli.runs.draw.overlay import Scale
    from uldm_cli.specs.explaining import Explaining

    Picture = NDArray[np.uint8]
    Map = NDArray[np.float32]


@dataclass
class Seen:
    """What was seen in a run, of each sample in the order of the steps."""

    images: dict[int, list[Picture]]
    maps: dict[str, dict[int, list[Map]]]

    @classmethod
    def nothing(cls) -> Seen:
        """To begin with."""
        return cls(defaultdict(list), defaultdict(lambda: defaultdict(list)))


def run_explain(
    spec: Explaining, outdir: Path | None = None, *, config: Path | None = None, resume: bool = False
) -> Result:
    """Looks as `spec` says, into `outdir` or the default folder (which `config`, the YAML file, names)."""
    return explain(plan_explain(spec, outdir, config), resume=resume)


def explain(plan: ExplainPlan, *, resume: bool = False) -> Result:
    """Computes and writes what is planned; with `resume`, nothing when every file is there already."""
    files = list(plan.explain_files())
    begun = resumable_since(plan) if resume else None
    if begun is not None and made_since(begun, *(path for _, path in files)):
        return Result(plan, files, 0, None, 0.0)
    trajectories = Trajectories(plan)
    write_record(plan.folder, plan.record, plan.spec)
    start = time.perf_counter()
    seen = _compute(plan, trajectories)
    _write(plan, seen)
    return Result(plan, files, plan.spec.num, str(trajectories.device), time.perf_counter() - start)


def _compute(plan: ExplainPlan, trajectories: Trajectories) -> Seen:
    eye, seen = Eye(plan, trajectories.model), Seen.nothing()
    total = plan.spec.num * (plan.steps + len(plan.logged) * plan.looks)
    with console.progress(total, "sampling and looking", "calls") as progress, trajectories.repeatable():
        for batch in plan.batches:
            for frame in trajectories.frames(batch, progress):
                for index, image in zip(batch, frame.image, strict=True):
                    seen.images[index].append(drop_grey_channel(image))
                for kind in plan.spec.maps:
                    maps = eye.saliency(frame.step, batch, progress) if kind == "saliency" else None
                    maps = eye.attention(frame.step, progress) if maps is None else maps
                    for index, found in zip(batch, maps, strict=True):
                        seen.maps[kind][index].append(found)
    return seen


class Eye:
    """Looks at steps, with the network in float32. The steps, and the network that makes them, stay as they are."""

    def __init__(self, plan: ExplainPlan, model: LatentDiffusion) -> None:
        self._plan, self._model = plan, _in_float32(model, plan.spec.compile)

    def saliency(self, step: Step, batch: range, progress: Progress) -> Map:
        """Of the samples with these indices: `[N, h, w]`."""
        from uldm_cli.core.saliency import saliency

        asked = self._plan.spec.saliency
        values = saliency(
            self._model.denoiser,
            step.x_in,
            step.t,
            self._scalar,
            method=asked.method,
            samples=asked.samples,
            sigma=asked.sigma,
            seed=[self._seed(index) for index in batch],
        )
        progress.advance(len(batch) * (1 if asked.method == "gradient" else asked.samples))
        found: Map = values.cpu().numpy()
        return found

    def attention(self, step: Step, progress: Progress) -> Map:
        """Of all samples of a batch: `[N, h, w]`, as multiples of what each position had if all were alike."""
        import torch

        from uldm_cli.core.attention_maps import layer_maps, mean_map

        def call() -> None:
            self._model.denoiser(step.x_in, step.t)

        with torch.no_grad():
            shares = mean_map(layer_maps(self._model.denoiser.backbone, call, self._plan.latent_size, self._plan.view))
        progress.advance(len(step.x_in))
        found: Map = (shares * shares.shape[1:].numel()).cpu().numpy()
        return found

    @cached_property
    def _scalar(self) -> Any:
        from uldm_cli.core.saliency import box_mean, decoder, eps_energy, x0_energy

        asked = self._plan.spec.saliency
        if asked.box is not None:
            return box_mean(decoder(self._model), asked.box, self._plan.image_size)
        return x0_energy if asked.meant == "x0" else eps_energy

    def _seed(self, index: int) -> int:
        spec = self._plan.spec
        return spec.seed + index if spec.rng == "compvis" else spec.sample_seeds[index]


def _in_float32(model: LatentDiffusion, compiled: bool) -> LatentDiffusion:
    """The model as it is, or a copy that is neither rounded nor compiled: compiled code does not show its attention."""
    import torch

    if next(model.denoiser.backbone.parameters()).dtype != torch.float32:
        return copy.deepcopy(model).float()
    if not compiled:
        return model
    # Copies of a module share its weights, and leave behind what it was compiled to.
    twin = copy.copy(model)
    twin._modules = {**model._modules, "denoiser": copy.copy(model.denoiser)}
    twin.denoiser._modules = {**model.denoiser._modules, "backbone": copy.copy(model.denoiser.backbone)}
    return twin


def _write(plan: ExplainPlan, seen: Seen) -> None:
    recipes = Recipes("ldm explain", plan.spec, plan.model)
    with Writer() as writer:
        for kind in plan.spec.save:
            pictures = Pictures(plan, kind, seen)
            about = _about(plan, kind)
            pictures.write(writer, about | recipes.of_all(kind=kind))
            for index in range(plan.spec.num if plan.spec.separate else 0):
                writable_folder(plan.sample_folder(index))
                for column, step in enumerate(plan.logged):
                    path = plan.picture_path(kind, index, (step,))
                    own = {**about, **plan.drawn_from(index), "step": str(step), **pictures.scale_text(index, column)}
                    # In a scale that is one for all samples, they are all needed to make it again.
                    whose = (
                        partial(recipes.of_all, sample=index)
                        if pictures.per_step
                        else partial(recipes.of_sample, index)
                    )
                    own |= whose(kind=kind, step=str(step))
                    writer.submit(write_png, path, pictures.alone(index, column), own)
        if plan.spec.save_arrays:
            for kind in plan.spec.maps:
                _write_arrays(plan, kind, seen.maps[kind])


class Pictures:
    """The pictures of a kind: images, or maps laid over them."""

    def __init__(self, plan: ExplainPlan, kind: str, seen: Seen) -> None:
        self._plan, self._kind, self._images = plan, kind, seen.images
        self._maps: Mapping[int, Sequence[Map]] = seen.maps.get(kind, {})
        self._layout = sheet_layout(plan, len(plan.logged))
        self._per = plan.spec.overlay.scale_of(kind)
        self._scales = _scales(self._maps, per_step=self._per == "step")

    @property
    def per_step(self) -> bool:
        """Whether a scale is that of all samples at a step."""
        return bool(self._maps) and self._per == "step"

    def alone(self, index: int, column: int) -> Picture:
        """One, as large as the image."""
        return self._drawn(index, column, 1)

    def sheet(self, title: Sequence[str]) -> Picture:
        """All in one."""
        return draw_sheet(self._layout, self._rows, self._plan.logged, title, self._bars)

    def write(self, writer: Writer, about: Mapping[str, str]) -> None:
        """All in one, to its file."""
        plan, title = self._plan, self._plan.title(self._kind)
        path, sheet = plan.sheet_path(self._kind), plan.spec.sheet
        if sheet.format == "png":
            writer.submit(write_png, path, self.sheet(title), about, sheet.dpi)
        else:
            labels = [str(step) for step in plan.logged]
            write_print(path, plan, self._rows, labels, title, about, self._bars)

    @property
    def _rows(self) -> list[list[Picture]]:
        columns = range(len(self._plan.logged))
        return [[self._in_sheet(index, column) for column in columns] for index in range(self._plan.spec.num)]

    @property
    def _bars(self) -> Bars | None:
        overlay = self._plan.spec.overlay
        colormap = "gray" if overlay.mode == "none" else overlay.colormap
        return Bars(self._per, self._scales, colormap) if self._scales else None

    def _in_sheet(self, index: int, column: int) -> Picture:
        picture = self._drawn(index, column, self._layout.factor)
        box = self._plan.marked(self._kind)
        return picture if box is None else framed(picture, box, self._layout.factor)

    def scale_text(self, index: int, column: int) -> dict[str, str]:
        """What the colours of a picture mean, if it has any."""
        return {"scale": "{:.9g} to {:.9g}".format(*self._scale(index, column))} if self._scales else {}

    def _drawn(self, index: int, column: int, factor: int) -> Picture:
        image = enlarged(self._images[index][column], factor)
        if not self._maps:
            return image
        overlay = self._plan.spec.overlay
        values = resized(self._maps[index][column], image.shape[:2])
        scale = self._scale(index, column)
        return overlaid(image, values, scale, mode=overlay.mode, alpha=overlay.alpha, colormap=overlay.colormap)

    def _scale(self, index: int, column: int) -> Scale:
        return self._scales[column if self._per == "step" else index]


def _scales(maps: Mapping[int, Sequence[Map]], *, per_step: bool) -> list[Scale]:
    """The smallest and largest value of each sample, or of each step."""
    import numpy as np

    if not maps:
        return []
    values = np.stack([np.stack(maps[index]) for index in range(len(maps))])  # samples, steps, h, w
    over = (0, 2, 3) if per_step else (1, 2, 3)
    return [(float(low), float(high)) for low, high in zip(values.min(over), values.max(over), strict=True)]


def _about(plan: ExplainPlan, kind: str) -> dict[str, str]:
    """What a picture or an array says of how it was made."""
    return {**plan.sampled_with, **plan.drawn_from_all, "title": ", ".join(plan.title(kind))}


def _write_arrays(plan: ExplainPlan, kind: str, maps: Mapping[int, Sequence[Map]]) -> None:
    """Every map of a kind, by the names STEP/SAMPLE."""
    import torch

    from uldm_cli.formats.tensors import write_safetensors

    tensors = {
        f"{step}/{index}": torch.from_numpy(values)
        for index, steps in maps.items()
        for step, values in zip(plan.logged, steps, strict=True)
    }
    write_safetensors(plan.arrays_path(kind), tensors, {**_about(plan, kind), "names": "step/sample"})
