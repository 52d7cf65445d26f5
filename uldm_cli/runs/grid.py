"""`uldm ldm grid`: the logged steps of several samples as one picture a kind, a column a step and a row a sample."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from uldm_cli import console
from uldm_cli.errors import ConfigError
from uldm_cli.runs.draw.explain import enlarged
from uldm_cli.runs.draw.grid import FONT_SIZE, draw_grid
from uldm_cli.runs.draw.latents import draw_latent, largest
from uldm_cli.runs.files import write_png
from uldm_cli.runs.outdir import default_outdir, write_record
from uldm_cli.runs.plan import SCALES, Plan, column_label, columns, make_plan
from uldm_cli.runs.recipe import Recipes
from uldm_cli.runs.sample import Result, difference, made_since, resumable_since
from uldm_cli.runs.sheets import sheet_layout, write_print
from uldm_cli.runs.trajectory import Frame, Trajectories
from uldm_cli.runs.writer import draw_difference, drop_grey_channel, save_scales

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Any

    from numpy.typing import NDArray

    from uldm_cli.specs.sampling import Sampling

    Cell = NDArray[Any]
    Rows = dict[str, list[list[Cell]]]

RECORD = "grid.yaml"


def run_grid(spec: Sampling, outdir: Path | None = None, *, config: Path | None = None, resume: bool = False) -> Result:
    """Draws what `spec` says, into `outdir` or the default folder (which `config`, the YAML file, names)."""
    return grid(plan_grid(spec, outdir, config), resume=resume)


def plan_grid(spec: Sampling, outdir: Path | None = None, config: Path | None = None) -> Plan:
    """What `run_grid` would do; see `make_plan`."""
    for kind in ("npz", "trajectory"):
        if kind in spec.save:
            raise ConfigError(f"save={kind}: a grid is a picture, not an archive", "Use `uldm ldm sample` for that")
    plan = make_plan(spec, outdir, default_outdir("ldm", "grid", config), RECORD)
    if spec.sheet.format != "png":
        sheet_layout(plan, len(plan.logged))
    return plan


def grid(plan: Plan, *, resume: bool = False) -> Result:
    """Computes and writes what is planned; with `resume`, nothing when every file is there already."""
    files = list(plan.grid_files())
    begun = resumable_since(plan) if resume else None
    if begun is not None and made_since(begun, *(path for _, path in files)):
        return Result(plan, files, 0, None, 0.0)
    trajectories = Trajectories(plan)
    write_record(plan.folder, plan.record, plan.spec)
    start = time.perf_counter()
    _write(plan, _compute(plan, trajectories), plan.image_size)
    return Result(plan, files, plan.spec.num, str(trajectories.device), time.perf_counter() - start)


def _compute(plan: Plan, trajectories: Trajectories) -> Rows:
    """For each kind a row of cells a sample, in the order of their indices."""
    rows: Rows = {kind: [[] for _ in range(plan.spec.num)] for kind in plan.pictures}
    total = plan.spec.num * plan.steps
    with console.progress(total, "sampling", "steps") as progress, trajectories.repeatable():
        for batch in plan.batches:
            before: Frame | None = None
            for frame in trajectories.frames(batch, progress):
                for kind in plan.pictures:
                    cells = _cells(kind, before, frame, plan.image_size)
                    for index, cell in zip(batch, cells, strict=False):
                        rows[kind][index].append(cell)
                before = frame
    return rows


def _cells(kind: str, before: Frame | None, frame: Frame, size: tuple[int, int]) -> Sequence[Cell]:
    """The column of a frame, a cell a sample: a picture, or a difference still as values, for all share one scale."""
    if kind == "image":
        return [drop_grey_channel(image) for image in frame.image]
    if kind == "latent":
        return [draw_latent(latent, size) for latent in frame.latent]
    return [] if before is None else list(difference(kind, before, frame))


def _write(plan: Plan, rows: Rows, size: tuple[int, int]) -> None:
    scales: dict[str, float] = {}
    recipes = Recipes("ldm grid", plan.spec, plan.model)
    for kind, path in plan.grid_files():
        if kind == SCALES:
            save_scales(path, scales)
            continue
        pictures, about = rows[kind], {**plan.drawn_from_all, **recipes.of_all(kind=kind)}
        if kind.endswith("-diff"):
            scale = scales[path.name] = max(largest(cell) for row in pictures for cell in row)
            pictures = [[draw_difference(kind, cell, size, scale) for cell in row] for row in pictures]
            about["scale"] = f"{scale:.9g}"
        labels = [column_label(steps) for steps in columns(kind, plan.logged)]
        _write_sheet(plan, kind, pictures, labels, about)


def _write_sheet(plan: Plan, kind: str, pictures: list[list[Cell]], labels: list[str], about: dict[str, str]) -> None:
    sheet, path = plan.spec.sheet, dict(plan.grid_files())[kind]
    if sheet.format == "png":
        size = FONT_SIZE if sheet.font_size is None else round(sheet.font_size * sheet.dpi / 72)
        write_png(path, draw_grid(pictures, labels, size), about, sheet.dpi)
        return
    factor = sheet_layout(plan, len(labels)).factor
    rows = [[enlarged(picture, factor) for picture in row] for row in pictures]
    write_print(path, plan, rows, labels, [*plan.made_with, _shown(kind, plan.spec.show, about)], about)


def _shown(kind: str, show: str, about: dict[str, str]) -> str:
    """What a grid is of, for its title."""
    state = "predicted clean latent" if show == "x0" else "latent"
    image = "predicted clean image" if show == "x0" else "decoded state"
    what = image if kind.startswith("image") else state
    if not kind.endswith("-diff"):
        return f"the {what}"
    end = float(about["scale"])
    return f"differences of the {what} from -{end:.3g} to {end:.3g}"
