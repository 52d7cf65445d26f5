"""`uldm vqvae encode`: the latents of a set of images, for training."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from uldm_cli import console, registry
from uldm_cli.cli.options import Arguments, BatchSize, Device, DryRun, Json, Outdir, ParallelCommand, Quiet

if TYPE_CHECKING:
    from uldm_cli.runs.vqvae_encode import Plan, Preview, Result
    from uldm_cli.specs.encoding import Contents

EXAMPLES = """
Examples:
  uldm vqvae encode                                          the newest autoencoder's images: outputs/vqvae-encode
  uldm vqvae encode --model fruits64 data=images data.root=photos data.flip=true --outdir latents
                                                             one's own, in both orientations
  uldm ldm train latents=latents                             trains on them

The same command again goes on where it stopped, and makes damaged files anew.
"""

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="REF",
        help="The autoencoder: a file, a run's folder, zoo:NAME, hf://owner/name or an embedded model (default: the "
        "newest `uldm vqvae train` run).",
        show_default=False,
    ),
]
Precision = Annotated[
    str | None,
    typer.Option("--precision", metavar="NAME", help="fp32 or bf16 (default: fp32).", rich_help_panel="Machine"),
]


def add_to(app: typer.Typer) -> None:
    """Mounts the command."""
    about = "Encode images once, so that diffusion trains on the latents alone."
    app.command(cls=ParallelCommand, help=about, epilog=EXAMPLES)(encode)


def encode(
    arguments: Arguments = None,
    model: Model = None,
    batch_size: BatchSize = None,
    outdir: Outdir = None,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    device: Device = None,
    precision: Precision = None,
) -> None:
    from uldm_cli.runs import vqvae_encode as runs
    from uldm_cli.specs.load import Flag, load_config, split_arguments

    path, overrides = split_arguments(arguments or [])
    flags = {
        "autoencoder": Flag("--model", model),
        "batch_size": batch_size,
        "device": device,
        "precision": precision,
    }
    spec = load_config(registry.load("commands", "vqvae-encode"), path, overrides, flags)
    plan = runs.plan(spec, outdir)
    if dry_run:
        _show_preview(runs.preview(plan))
    else:
        _show_result(runs.run(plan))


def _show_preview(preview: "Preview") -> None:
    plan, contents = preview.plan, preview.contents
    data = _data(plan, contents, preview.skipped) | {
        "files_there": preview.there,
        "device": preview.device,
        "dry_run": True,
    }
    rows = [
        ("autoencoder", str(plan.config.autoencoder)),
        *_rows(contents, preview.skipped),
        ("files", f"{contents.shards:,} of {plan.config.shard_size:,} images, {preview.there:,} are there"),
        ("computed on", f"{preview.device}, {plan.config.precision}"),
    ]
    console.result(data, title=f"To be encoded in {plan.folder}", rows=rows, summary="nothing was written")


def _show_result(result: "Result") -> None:
    plan, index = result.plan, result.index
    data = _data(plan, index, result.skipped) | {
        "sha256": index.autoencoder,
        "encoded": result.encoded,
        "scale_factor": index.scale_factor,
        "seconds": result.seconds,
    }
    rows = [*_rows(index, result.skipped), ("scale factor", f"{index.scale_factor:.5f}")]
    if result.encoded:
        done = f"encoded {result.encoded:,} images in {result.seconds:.0f} s"
    else:
        done = "it was finished already, and every file is intact"
    summary = f"{done}; to train on them: uldm ldm train latents={plan.folder}"
    console.result(data, title=f"Latents in {plan.folder}", rows=rows, summary=summary)


def _data(plan: "Plan", contents: "Contents", skipped: int) -> dict[str, Any]:
    """What is told of a cache as JSON, be it there or to be made."""
    return {
        "outdir": plan.folder,
        "autoencoder": plan.config.autoencoder,
        "images": contents.images,
        "skipped": skipped,
        "latent_shape": contents.latent_shape,
        "posterior": contents.posterior,
        "flip": contents.flip,
        "dtype": contents.dtype,
        "bytes": contents.nbytes,
        "files": contents.shards,
    }


def _rows(contents: "Contents", skipped: int) -> list[tuple[str, str]]:
    """The same for people."""
    channels, height, width = contents.latent_shape
    kind = "mean and log-variance" if contents.posterior else "latents"
    both = ", both orientations" if contents.flip else ""
    latents = f"{kind} of {channels}x{height}x{width}, {contents.dtype}{both}"
    return [
        ("images", f"{contents.images:,}" + (f", {skipped} skipped" if skipped else "")),
        ("latents", f"{latents}: {_size(contents.nbytes)}"),
    ]


def _size(number: int) -> str:
    """Bytes for people."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if number >= factor:
            return f"{number / factor:,.1f} {unit}"
    return f"{number / 1e3:,.1f} kB"
