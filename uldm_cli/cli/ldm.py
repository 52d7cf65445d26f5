"""`uldm ldm`: latent diffusion models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from uldm_cli.cli import explain
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
    ShowInline,
    StepSize,
    TotalSteps,
    Weights,
)
from uldm_cli.cli.sampling import (
    Compile,
    Height,
    Rng,
    Seeds,
    Show,
    Spacing,
    Width,
    sampling_flags,
    show_plan,
    show_result,
)
from uldm_cli.cli.training import add_train

app = typer.Typer()

Save = Annotated[
    str | None,
    typer.Option(
        "--save",
        metavar="LIST",
        help="Of image,latent,image-diff,latent-diff,trajectory; and npz, with --step-size 0.",
        rich_help_panel="Output",
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
        show_inline: ShowInline = False,
        json: Json = False,
        quiet: Quiet = False,
        batch_size: BatchSize = None,
        device: Device = None,
        precision: Precision = None,
        compile: Compile = False,
    ) -> None:
        given, flags = sampling_flags(locals())
        _run(verb, given, flags, outdir, resume=resume, dry_run=dry_run, inline=show_inline)

    app.command(verb, cls=Command, help=about, epilog=examples)(command)


def _run(
    verb: str,
    arguments: list[str],
    flags: Mapping[str, object],
    outdir: Path | None,
    *,
    resume: bool,
    dry_run: bool,
    inline: bool,
) -> None:
    from uldm_cli.runs.grid import grid, plan_grid
    from uldm_cli.runs.plan import read_config
    from uldm_cli.runs.sample import plan_sample, sample
    from uldm_cli.specs.load import split_arguments
    from uldm_cli.specs.sampling import Sampling

    config, overrides = split_arguments(arguments)
    spec = read_config(Sampling, config, overrides, flags)
    plan = (plan_grid if verb == "grid" else plan_sample)(spec, outdir, config)
    if dry_run:
        show_plan(verb, plan, list(plan.grid_files() if verb == "grid" else plan.files()))
    else:
        show_result(verb, (grid if verb == "grid" else sample)(plan, resume=resume), inline=inline)


_add("sample", "Sample images, and draw what they look like on the way.", SAMPLE_EXAMPLES)
_add("grid", "Sample images, and draw them as one picture: a column a step, a row a sample.", GRID_EXAMPLES)
explain.add_to(app)
add_train(
    app,
    "Train a latent diffusion model on a trained autoencoder.",
    TRAIN_EXAMPLES,
    run="ldm_train",
    config="DiffusionTraining",
)
