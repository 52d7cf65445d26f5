"""What `uldm vqvae train` and `uldm ldm train` show of a run."""

from typing import TYPE_CHECKING

from uldm_cli import console

if TYPE_CHECKING:
    from uldm_cli.runs.metrics import Line
    from uldm_cli.runs.train import Preview, Result

LABELS = {
    "epoch": "epochs",
    "l1": "mean absolute error",
    "l2": "mean squared error",
    "lpips": "perceptual distance",
    "codebook": "codebook loss",
    "commitment": "commitment loss",
    "psnr": "PSNR, dB",
    "perplexity": "perplexity of the codes",
    "usage": "codes used, %",
    "lr": "learning rate",
    "images_per_second": "images/s",
}


def training_flags(
    batch_size: int | None, seed: int | None, device: str | None, precision: str | None
) -> dict[str, object]:
    """The flags of a training command as named overrides of its config."""
    given = {"batch_size": batch_size, "seed": seed, "device": device, "precision": precision}
    return {f"train.{name}": value for name, value in given.items()}


def show_preview(preview: "Preview") -> None:
    """The plan of a run, for `--dry-run`."""
    plan, train = preview.plan, preview.plan.train
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
        "start": plan.start,
        "checkpoint": plan.checkpoint,
        "dry_run": True,
    }
    rows = [
        ("model", f"{preview.title}, {preview.parameters:,} parameters"),
        *preview.details.items(),
        ("images an epoch", f"{preview.images:,}" + (f", {preview.skipped} skipped" if preview.skipped else "")),
        ("steps", f"{train.steps:,} of {train.batch_size} images, {epochs:,.1f} epochs"),
        ("checkpoints", f"every {train.save_every:,} steps"),
        ("goes on from", f"step {plan.start:,}, {plan.checkpoint}" if plan.checkpoint else "nothing: a new run"),
        ("computed on", preview.device),
    ]
    end = "it is finished already" if plan.finished else "nothing was written"
    console.result(data, title=f"To be trained in {plan.folder}", rows=rows, summary=end)


def show_result(result: "Result") -> None:
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
        summary = f"it was finished already: {model}; to train anew, give another --outdir"
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
        elif name == "perplexity":
            rows.append((label + epoch, value))
        elif name != "counted_epoch":
            rows.append((label, value))
    return rows
