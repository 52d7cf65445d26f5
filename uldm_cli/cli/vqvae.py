"""`uldm vqvae`: autoencoders."""

import typer

from uldm_cli.cli import diagram, vqvae_look
from uldm_cli.cli.options import (
    Arguments,
    BatchSize,
    Command,
    Device,
    DryRun,
    Json,
    Outdir,
    Precision,
    Quiet,
    Resume,
    Seed,
)
from uldm_cli.cli.training import show_preview, show_result, training_flags

app = typer.Typer()

EXAMPLES = """
Examples:
  uldm vqvae train                                           the embedded pictures of clothes, some minutes on a CPU
  uldm vqvae train autoencoder=vqvae data=images data.root=photos
                                                             one's own, in colour: a folder, .tar or .zip
  uldm vqvae train configs/fruits64/vqvae.yaml train.steps=2000

The same command again goes on where it stopped.
"""


@app.command(cls=Command, help="Train a VQ-VAE.", epilog=EXAMPLES)
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
    from uldm_cli.runs import vqvae_train
    from uldm_cli.specs.load import load_config, split_arguments
    from uldm_cli.specs.training import AutoencoderTraining

    config, overrides = split_arguments(arguments or [])
    spec = load_config(AutoencoderTraining, config, overrides, training_flags(batch_size, seed, device, precision))
    plan = vqvae_train.plan(spec, outdir, config, resume=resume)
    if dry_run:
        show_preview(vqvae_train.preview(plan))
    else:
        show_result(vqvae_train.run(plan))


vqvae_look.add_to(app)
diagram.add_to(app)
