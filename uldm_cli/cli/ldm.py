"""`uldm ldm`: latent diffusion models."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from uldm_cli import console
from uldm_cli.cli.options import (
    Arguments,
    BatchSize,
    Command,
    Deterministic,
    Device,
    DryRun,
    Eta,
    Json,
    Model,
    Num,
    Outdir,
    Precision,
    Quiet,
    Resume,
    Sampler,
    Seed,
    StepSize,
    TotalSteps,
    Weights,
)
from uldm_cli.errors import UsageError

if TYPE_CHECKING:
    from uldm_cli.runs.plan import Plan
    from uldm_cli.runs.sample import Result

app = typer.Typer()

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
        metavar="uniform|compvis",
        help="Of timesteps: exactly --total-steps, or the published code's, often more.",
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
Save = Annotated[
    str | None,
    typer.Option(
        "--save",
        metavar="LIST",
        help="Of image,latent,image-diff,latent-diff,trajectory; and npz, with --step-size 0.",
        rich_help_panel="Output",
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile", metavar="", help="Compile the network first: slow start, fast steps.", rich_help_panel="Machine"
    ),
]

SAMPLE_EXAMPLES = """
Examples:
  uldm ldm sample                                            200 steps with the embedded model, every 40th drawn
  uldm ldm sample --total-steps 50 --step-size 10 --eta 0    fewer steps, without their noise
  uldm ldm sample --show x0 --save image,image-diff          what the model expects, and how that changes
  uldm ldm sample --step-size 0 --seeds 0-9999 --save npz    ten thousand final images in one file
"""
GRID_EXAMPLES = """
Examples:
  uldm ldm grid -n 4                                         four samples, a row each, and a column a step
  uldm ldm grid -n 8 --seed 7 --show x0 --save image         what the model expects at each step
"""

TRAIN_EXAMPLES = """
Examples:
  uldm ldm train                                             on the autoencoder of the newest `uldm vqvae train`
  uldm ldm train autoencoder=outputs/vqvae-mine              on another; its data are taken, too
  uldm ldm train configs/fruits64/ldm.yaml train.steps=2000

The same command again goes on where it stopped.
"""


def _add(verb: str, about: str, examples: str) -> None:
    """`sample` and `grid` take the same flags; declared once, they stay the same."""

    def command(
        arguments: Arguments = None,
        model: Model = None,
        weights: Weights = None,
        sampler: Sampler = None,
        total_steps: TotalSteps = None,
        step_size: StepSize = None,
        eta: Eta = None,
        spacing: Spacing = None,
        height: Height = None,
        width: Width = None,
        num: Num = None,
        seed: Seed = None,
        seeds: Seeds = None,
        rng: Rng = None,
        deterministic: Deterministic = False,
        show: Show = None,
        save: Save = None,
        outdir: Outdir = None,
        resume: Resume = False,
        dry_run: DryRun = False,
        json: Json = False,
        quiet: Quiet = False,
        batch_size: BatchSize = None,
        device: Device = None,
        precision: Precision = None,
        compile: Compile = False,
    ) -> None:
        from uldm_cli.specs.load import Flag

        if seeds is not None and seed is not None:
            raise UsageError("--seed and --seeds are both given", "Give one of them")

        arguments, model = _model_among(arguments or [], model)
        flags = {
            "model": model,
            "weights": weights,
            "sampler": sampler,
            "sampler.steps": Flag("--total-steps", total_steps),
            "sampler.eta": eta,
            "sampler.spacing": spacing,
            "step_size": step_size,
            "height": height,
            "width": width,
            "num": num,
            "seed": seed,
            "seeds": seeds,
            "rng": rng,
            "deterministic": deterministic or None,
            "show": show,
            "save": save,
            "batch_size": batch_size,
            "device": device,
            "precision": precision,
            "compile": compile or None,
        }
        _run(verb, arguments, flags, outdir, resume=resume, dry_run=dry_run)

    app.command(verb, cls=Command, help=about, epilog=examples)(command)


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


def _run(
    verb: str,
    arguments: list[str],
    flags: Mapping[str, object],
    outdir: Path | None,
    *,
    resume: bool,
    dry_run: bool,
) -> None:
    from uldm_cli.runs.grid import grid, plan_grid
    from uldm_cli.runs.plan import read_config
    from uldm_cli.runs.sample import plan_sample, sample
    from uldm_cli.specs.load import split_arguments

    config, overrides = split_arguments(arguments)
    spec = read_config(config, overrides, flags)
    plan = (plan_grid if verb == "grid" else plan_sample)(spec, outdir, config)
    if dry_run:
        _show_plan(verb, plan)
    else:
        _show_result(verb, (grid if verb == "grid" else sample)(plan, resume=resume))


def _show_plan(verb: str, plan: "Plan") -> None:
    files = list(plan.grid_files() if verb == "grid" else plan.files())
    batches = f"{len(plan.batches)} batches" if len(plan.batches) > 1 else "one batch"
    console.result(
        {**_described(verb, plan, files), "dry_run": True},
        title=f"To be written to {plan.folder}",
        columns=COLUMNS,
        rows=_rows(plan, files),
        summary=f"{_samples(plan.spec.num)} of {plan.steps} steps in {batches}, "
        f"from {plan.model.name}; nothing was written",
    )


def _show_result(verb: str, result: "Result") -> None:
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


_add("sample", "Sample images, and draw what they look like on the way.", SAMPLE_EXAMPLES)
_add("grid", "Sample images, and draw them as one picture: a column a step, a row a sample.", GRID_EXAMPLES)


@app.command(cls=Command, help="Train a latent diffusion model on a trained autoencoder.", epilog=TRAIN_EXAMPLES)
def train(
    arguments: Arguments = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    outdir: Outdir = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    device: Device = None,
    precision: Precision = None,
) -> None:
    from uldm_cli.cli.training import show_preview, show_result, training_flags
    from uldm_cli.runs import ldm_train
    from uldm_cli.specs.load import load_config, split_arguments
    from uldm_cli.specs.training import DiffusionTraining

    config, overrides = split_arguments(arguments or [])
    spec = load_config(DiffusionTraining, config, overrides, training_flags(batch_size, seed, device, precision))
    plan = ldm_train.plan(spec, outdir, config, resume=resume)
    if dry_run:
        show_preview(ldm_train.preview(plan))
    else:
        show_result(ldm_train.run(plan))
