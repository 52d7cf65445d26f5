"""`uldm ldm`: latent diffusion models."""

from typing import Annotated

import typer

from uldm_cli.cli import ema, explain, grid
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

TRAIN_EXAMPLES = """
Examples:
  uldm ldm train                                             on the autoencoder of the newest `uldm vqvae train`
  uldm ldm train autoencoder=outputs/vqvae-mine              on another; its data are taken, too
  uldm ldm train configs/fruits64/ldm.yaml train.steps=2000
"""


@app.command(cls=Command, help="Sample images, and draw what they look like on the way.", epilog=SAMPLE_EXAMPLES)
def sample(
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
    from uldm_cli.runs.plan import read_config
    from uldm_cli.runs.sample import plan_sample
    from uldm_cli.runs.sample import sample as run
    from uldm_cli.specs.load import split_arguments
    from uldm_cli.specs.sampling import Sampling

    config, overrides = split_arguments(given)
    plan = plan_sample(read_config(Sampling, config, overrides, flags), outdir, config)
    if dry_run:
        show_plan("sample", plan, list(plan.files()))
    else:
        show_result("sample", run(plan, resume=resume), inline=show_inline)


grid.add_to(app)
explain.add_to(app)
add_train(
    app,
    "Train a latent diffusion model on a trained autoencoder.",
    TRAIN_EXAMPLES,
    command="ldm-train",
)
ema.add_to(app, "ldm", "latent-diffusion")
