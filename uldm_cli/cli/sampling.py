"""What the commands that sample share: the flags that no other has, and what they show of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from uldm_cli import console
from uldm_cli.errors import UsageError

if TYPE_CHECKING:
    from uldm_cli.runs.plan import Plan
    from uldm_cli.runs.sample import Result

COLUMNS = ("kind", "files", "names")

Seeds = Annotated[
    str | None,
    typer.Option(
        "--seeds",
        metavar="LIST",
        help="A seed a sample: 0-49999 or 3,7,9; stands for --seed and --num.",
        rich_help_panel="Sampling",
    ),
]
Spacing = Annotated[
    str | None,
    typer.Option(
        "--spacing",
        metavar="NAME",
        help="Of timesteps: auto, uniform, trailing; or compvis, the published code's, often more steps.",
        rich_help_panel="Sampling",
    ),
]
Rng = Annotated[
    str | None,
    typer.Option(
        "--rng",
        metavar="NAME",
        help="compvis: the published code's draws; they depend on --batch-size and device.",
        rich_help_panel="Sampling",
    ),
]
Height = Annotated[
    int | None,
    typer.Option(
        "--height", metavar="N", help="Of the images, in pixels (default: the model's).", rich_help_panel="Sampling"
    ),
]
Width = Annotated[
    int | None,
    typer.Option(
        "--width", metavar="N", help="Of the images, in pixels (default: the model's).", rich_help_panel="Sampling"
    ),
]
Show = Annotated[
    str | None,
    typer.Option(
        "--show", metavar="x_t|x0", help="Draw the state, or the clean image predicted in it.", rich_help_panel="Output"
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile", metavar="", help="Compile the network first: slow start, fast steps.", rich_help_panel="Machine"
    ),
]

SheetFormat = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="png|svg|pdf",
        help="Of the sheets; in svg and pdf, text stays text (default: png).",
        rich_help_panel="Output",
    ),
]
SheetDpi = Annotated[
    int | None,
    typer.Option("--dpi", metavar="N", help="Pixels an inch of the sheets (default: 150).", rich_help_panel="Output"),
]
SheetFontSize = Annotated[
    float | None,
    typer.Option(
        "--font-size",
        metavar="X",
        help="Of the labels, in points (default: what suits the pictures).",
        rich_help_panel="Output",
    ),
]

_FLAGS = (
    *("model", "weights", "sampler", "height", "width", "num", "seed", "seeds", "rng", "deterministic", "show", "save"),
    *("step_size", "batch_size", "device", "precision", "compile"),
)


def sampling_flags(parameters: Mapping[str, Any]) -> tuple[list[str], dict[str, object]]:
    """The arguments of a command that samples, and its flags as named overrides of the config.

    Args:
        parameters: those of the command's function, by name.
    """
    from uldm_cli.specs.load import Flag

    if parameters["seeds"] is not None and parameters["seed"] is not None:
        raise UsageError("--seed and --seeds are both given", "Give one of them")
    arguments, model = _model_among(parameters["arguments"] or [], parameters["model"])
    flags: dict[str, object] = {name: parameters[name] for name in _FLAGS}
    flags |= {name: parameters[name] or None for name in ("deterministic", "compile")}
    flags |= {f"sampler.{name}": parameters[name] for name in ("eta", "spacing")}
    return arguments, {**flags, "model": model, "sampler.steps": Flag("--total-steps", parameters["total_steps"])}


def sheet_flags(form: str | None, dpi: int | None, font_size: float | None) -> dict[str, object]:
    """Those of the commands that draw sheets, as named overrides of the config."""
    from uldm_cli.specs.load import Flag

    return {
        "sheet.format": Flag("--format", form),
        "sheet.dpi": Flag("--dpi", dpi),
        "sheet.font_size": Flag("--font-size", font_size),
    }


def _model_among(arguments: list[str], model: str | None) -> tuple[list[str], str | None]:
    """A model in the place of the config, as `--config model.safetensors` or `--config FOLDER` has it, is the model."""
    models = [text for text in arguments if _is_model(text)]
    if not models:
        return arguments, model
    named = models if model is None else [model, *models]
    if len(named) > 1:
        raise UsageError(f"two models, {named[0]} and {named[1]}", "Name one")
    return [text for text in arguments if text not in models], named[0]


def _is_model(argument: str) -> bool:
    path = Path(argument)
    override = "=" in argument or argument.startswith("~")
    return not override and (path.suffix in (".safetensors", ".ckpt") or path.is_dir())


def show_plan(verb: str, plan: "Plan", files: Sequence[tuple[str, Path]]) -> None:
    """What a run is going to write, for `--dry-run`."""
    batches = f"{len(plan.batches)} batches" if len(plan.batches) > 1 else "one batch"
    console.result(
        {**_described(verb, plan, files), "dry_run": True},
        title=f"To be written to {plan.folder}",
        columns=COLUMNS,
        rows=_rows(plan, files),
        summary=f"{_samples(plan.spec.num)} of {plan.steps} steps in {batches}, "
        f"from {plan.model.name}; nothing was written",
    )


def show_result(verb: str, result: "Result", *, inline: bool = False) -> None:
    """What a finished run wrote, and how fast; `inline` shows its pictures in the terminal, too."""
    plan, seconds = result.plan, result.seconds
    data: dict[str, Any] = {
        "computed": result.computed,
        "device": result.device,
        "seconds": seconds,
        "steps_per_second": result.steps_per_second,
        "images_per_second": result.images_per_second,
    }
    if result.computed:
        summary = (
            f"{_samples(result.computed)} of {plan.steps} steps in {seconds:.1f} s on {result.device}: "
            f"{result.steps_per_second:.1f} steps/s, {result.images_per_second:.2f} images/s"
        )
    else:
        summary = "everything was there already"
    if 0 < result.computed < plan.spec.num:
        summary += f"; the other {plan.spec.num - result.computed} were there already"
    console.result(
        {**_described(verb, plan, result.files), **data},
        title=f"Written to {plan.folder}",
        columns=COLUMNS,
        rows=_rows(plan, result.files),
        summary=summary,
    )
    if inline:
        _show_pictures(verb, plan)


def _show_pictures(verb: str, plan: "Plan") -> None:
    """The sheets of a run, one a kind; of samples that lie in files of their own the first ones."""
    from uldm_cli.runs.overview import overviews

    if not console.shows_pictures():
        return
    if verb == "sample":
        for picture in overviews(plan):
            console.picture(picture)
    elif plan.spec.sheet.format != "png":
        console.note(f"--show-inline: a sheet as {plan.spec.sheet.format} cannot be shown in the terminal")
    else:
        for _, path in plan.grid_files():
            if path.suffix == ".png":
                console.picture(path)


def _described(verb: str, plan: "Plan", files: Sequence[tuple[str, Path]]) -> dict[str, Any]:
    from uldm_cli.runs.models import chosen_weights

    spec = plan.spec
    return {
        "command": f"ldm {verb}",
        "outdir": plan.folder,
        "config": plan.folder / plan.record,
        "model": {
            "name": plan.model.name,
            "path": plan.model.path,
            "weights": chosen_weights(plan.model, spec.weights),
        },
        "sampler": spec.sampler.model_dump(mode="json"),
        "steps": plan.steps,
        "logged": plan.logged,
        "seeds": [spec.seed] if spec.rng == "compvis" else list(spec.sample_seeds),
        "files": [{"kind": kind, "path": path} for kind, path in files],
    }


def _rows(plan: "Plan", files: Sequence[tuple[str, Path]]) -> list[tuple[str, int, str]]:
    """A row a kind: how many files, and the first and last of them."""
    by_kind: dict[str, list[str]] = {}
    for kind, path in files:
        by_kind.setdefault(kind, []).append(str(path.relative_to(plan.folder)))
    return [
        (kind, len(names), names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}")
        for kind, names in by_kind.items()
    ]


def _samples(count: int) -> str:
    return "1 sample" if count == 1 else f"{count} samples"
