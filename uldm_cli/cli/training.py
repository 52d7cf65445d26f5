"""`uldm vqvae train` and `uldm ldm train`: the command that both are, and what it shows of a run."""

from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

from uldm_cli import console, registry
from uldm_cli.cli.options import (
    BatchSize,
    Device,
    DryRun,
    Json,
    Outdir,
    ParallelCommand,
    Precision,
    Quiet,
    Resume,
    Seed,
    TrainArguments,
)

if TYPE_CHECKING:
    from uldm_cli.runs.metrics import Line
    from uldm_cli.runs.preview import Preview
    from uldm_cli.runs.train import Result

InitFrom = Annotated[
    str | None,
    typer.Option(
        "--init-from", metavar="REF", help="Begin with the weights of this model; what is not given is as it says."
    ),
]
_AFTERWARDS = """
The same command again goes on where it stopped; --outdir RUN train.steps=MORE makes a run longer.
Every setting with its meaning: uldm config new {command}
"""
LABELS = {
    "denoising": "denoising loss",
    "vlb": "variational bound, bits a dimension",
    "epoch": "epochs",
    "l1": "mean absolute error",
    "l2": "mean squared error",
    "lpips": "perceptual distance",
    "codebook": "codebook loss",
    "commitment": "commitment loss",
    "kl": "divergence of the latents, nats an image",
    "nll": "negative log-likelihood",
    "logvar": "log-variance of the pixels",
    "generator": "generator's loss",
    "d_weight": "factor of the generator's loss",
    "discriminator": "discriminator's loss",
    "logits_real": "logits of images",
    "logits_fake": "logits of reconstructions",
    "psnr": "PSNR, dB",
    "entropy": "entropy of the codes, bits",
    "perplexity": "perplexity of the codes",
    "usage": "codes used, %",
    "lr": "learning rate",
    "images_per_second": "images/s",
    "data_wait": "waiting for images, %",
    "skipped_steps": "steps skipped",
}


def add_train(app: typer.Typer, about: str, examples: str, command: str) -> None:
    """Adds `train` to a group.

    Args:
        app: the group.
        about: the help.
        examples: below it.
        command: the registry's name of its config. The module of `runs` that does it is named alike; it has `plan`,
            `preview` and `run`.
    """

    def train(
        arguments: TrainArguments = None,
        batch_size: BatchSize = None,
        seed: Seed = None,
        init_from: InitFrom = None,
        outdir: Outdir = None,
        resume: Resume = False,
        dry_run: DryRun = False,
        json: Json = False,
        quiet: Quiet = False,
        device: Device = None,
        precision: Precision = None,
    ) -> None:
        from uldm_cli.specs.initial import init_reference
        from uldm_cli.specs.load import load_config, split_arguments

        runs: Any = import_module(f"uldm_cli.runs.{command.replace('-', '_')}")
        flags = {"batch_size": batch_size, "seed": seed, "device": device, "precision": precision}
        path, overrides = split_arguments(arguments or [])
        reference = init_reference(path, overrides, init_from)
        spec = load_config(
            registry.load("commands", command),
            path,
            overrides,
            {f"train.{name}": value for name, value in flags.items()} | {"init_from": init_from},
            base=runs.base_config(reference, outdir, path) if reference else {},
        )
        plan = runs.plan(spec, outdir, path, resume=resume)
        if dry_run:
            _show_preview(runs.preview(plan))
        else:
            _show_result(runs.run(plan))

    app.command(cls=ParallelCommand, help=about, epilog=f"{examples}{_AFTERWARDS.format(command=command)}")(train)


def _show_preview(preview: "Preview") -> None:
    """The plan of a run, for `--dry-run`."""
    from uldm_cli.runs.memory import in_gb
    from uldm_cli.runs.processes import processes

    plan, train = preview.plan, preview.plan.train
    shared = f"{plan.micro_batch} images at a time, {train.accumulate} times a step, in processes: {processes()}"
    epochs = train.steps * train.batch_size / preview.images
    data = {
        "outdir": plan.folder,
        "model": preview.title,
        "parameters": preview.parameters,
        "device": preview.device,
        **preview.details,
        "images": preview.images,
        "skipped": preview.skipped,
        "batch_size": train.batch_size,
        "steps": train.steps,
        "epochs": epochs,
        "processes": processes(),
        "accumulate": train.accumulate,
        "memory_bytes": {
            name: getattr(preview.memory, name) for name in ("weights", "training", "activations", "total")
        },
        "start": plan.start,
        "checkpoint": plan.checkpoint,
        "dry_run": True,
    }
    rows = [
        ("model", f"{preview.title}, {preview.parameters:,} parameters"),
        *preview.details.items(),
        ("images an epoch", f"{preview.images:,}" + (f", {preview.skipped} skipped" if preview.skipped else "")),
        ("steps", f"{train.steps:,} of {train.batch_size} images, {epochs:,.1f} epochs"),
        *([("learning rate", plan.cold)] if plan.cold else []),
        *([("shared out", shared)] if plan.micro_batch < train.batch_size else []),
        (
            "memory",
            f"about {in_gb(preview.memory.total)} a process besides PyTorch itself, "
            f"of it {in_gb(preview.memory.activations)} activations",
        ),
        ("checkpoints", f"every {train.save_every:,} steps: {plan.folder}/checkpoints"),
        ("pictures", f"every {train.picture_every:,} steps: {plan.folder}/pictures"),
        ("figures", f"every {train.log_every:,} steps: {plan.folder}/metrics.jsonl"),
        ("goes on from", f"step {plan.start:,}, {plan.checkpoint}" if plan.checkpoint else "nothing: a new run"),
        ("computed on", preview.device),
    ]
    end = "it is finished already" if plan.finished else "nothing was written"
    console.result(data, title=f"To be trained in {plan.folder}", rows=rows, summary=end)


def _show_result(result: "Result") -> None:
    """What a finished run reached."""
    plan, model = result.plan, result.checkpoint / "model.safetensors"
    data = {
        "outdir": plan.folder,
        "model": model,
        "steps": plan.train.steps,
        "computed": result.computed,
        "skipped": result.skipped,
        "values": result.line,
        "seconds": result.seconds,
    }
    if result.computed:
        summary = f"{result.computed:,} steps in {result.seconds:.0f} s; model: {model}"
        if result.skipped:
            summary += f"; {result.skipped:,} image{'s were' if result.skipped > 1 else ' was'} skipped"
    else:
        longer = f"to train longer, give --outdir {plan.folder} and more train.steps"
        summary = f"it was finished already: {model}; {longer}; to train anew, another --outdir"
    title = f"Trained in {plan.folder}"
    console.result(data, title=title, columns=("figure", "at the end"), rows=_rows(result.line), summary=summary)


def _rows(line: "Line") -> list[tuple[str, float]]:
    """The figures of a line of metrics, with names for people."""
    counted = line.get("counted_epoch", 0)
    epoch = f" (epoch {counted}" + (", so far)" if line.get("epoch", 0) < counted else ")")
    rows: list[tuple[str, float]] = []
    for name, value in line.items():
        label = LABELS.get(name, name.replace("_grad_norm", ": norm of the gradient").replace("_", " "))
        if name == "usage":
            rows.append((label + epoch, 100 * value))
        elif name == "data_wait":
            rows.append((label, 100 * value))
        elif name in ("entropy", "perplexity"):
            rows.append((label + epoch, value))
        elif name != "counted_epoch":
            rows.append((label, value))
    return rows
