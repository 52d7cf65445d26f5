"""`uldm ldm grid`: samples as one picture a kind."""

from typing import Annotated

import typer

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
    SheetDpi,
    SheetFontSize,
    SheetFormat,
    Show,
    Spacing,
    Width,
    sampling_flags,
    sheet_flags,
    show_plan,
    show_result,
)

Save = Annotated[
    str | None,
    typer.Option(
        "--save",
        metavar="LIST",
        help="Of image,latent,image-diff,latent-diff (default: image,latent).",
        rich_help_panel="Output",
    ),
]
EXAMPLES = """
Examples:
  uldm ldm grid -n 4                                         four samples, a row each, and a column a step
  uldm ldm grid -n 8 --seed 7 --show x0 --save image         what the model expects at each step
  uldm ldm grid -n 4 --format pdf                            for print, with a title and labels that stay text
"""


def add_to(app: typer.Typer) -> None:
    """Add `grid` to the group."""
    about = "Sample images, and draw them as one picture: a column a step, a row a sample."
    app.command(cls=Command, help=about, epilog=EXAMPLES)(grid)


def grid(
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
    format: SheetFormat = None,
    dpi: SheetDpi = None,
    font_size: SheetFontSize = None,
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
    arguments, flags = sampling_flags(locals())
    from uldm_cli.runs.grid import grid as run
    from uldm_cli.runs.grid import plan_grid
    from uldm_cli.runs.plan import read_config
    from uldm_cli.specs.load import split_arguments
    from uldm_cli.specs.sampling import Sampling

    config, overrides = split_arguments(arguments)
    flags |= sheet_flags(format, dpi, font_size)
    plan = plan_grid(read_config(Sampling, config, overrides, flags), outdir, config)
    if dry_run:
        show_plan("grid", plan, list(plan.grid_files()))
    else:
        show_result("grid", run(plan, resume=resume), inline=show_inline)
