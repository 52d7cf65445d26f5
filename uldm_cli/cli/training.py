"""What `uldm vqvae train` and `uldm ldm train` show of a run."""

from typing import TYPE_CHECKING, Any

from uldm_cli import console

if TYPE_CHECKING:
    from uldm_cli.runs.train import Job, Plan, Result


def training_flags(
    batch_size: int | None, seed: int | None, device: str | None, precision: str | None
) -> dict[str, object]:
    """The flags of a training command as named overrides of its config."""
    given = {"batch_size": batch_size, "seed": seed, "device": device, "precision": precision}
    return {f"train.{name}": value for name, value in given.items()}


def show_plan(plan: "Plan", job: "Job") -> None:
    """The plan of a run, for `--dry-run`."""
    train, images = plan.train, len(job.dataset)
    rows: list[tuple[str, Any]] = [
        ("model", job.title),
        ("data", f"{images:,} images, {len(job.dataset.skipped)} skipped"),
        ("steps", f"{train.steps:,} of {train.batch_size} images: {train.steps * train.batch_size / images:.1f} epochs"),
        ("checkpoints", f"every {train.save_every} steps, in {plan.folder / 'checkpoints'}"),
        ("starts at step", plan.start),
    ]
    data = {
        "folder": plan.folder,
        "model": job.title,
        "images": images,
        "skipped": len(job.dataset.skipped),
        "steps": train.steps,
        "batch_size": train.batch_size,
        "start": plan.start,
        "dry_run": True,
    }
    console.result(data, title=f"To be trained in {plan.folder}", rows=rows, summary="nothing was written")


def show_result(result: "Result") -> None:
    """What a finished run reached."""
    values = result.values
    summary = f"{result.plan.train.steps:,} steps; this call took {result.seconds:.0f} s; model: {result.checkpoint}"
    data = {
        "folder": result.plan.folder,
        "checkpoint": result.checkpoint / "model.safetensors",
        "values": values,
        "seconds": result.seconds,
    }
    rows = list(values.items())
    console.result(data, title=f"Trained in {result.plan.folder}", columns=("value", "at the end"), rows=rows, summary=summary)
