"""`uldm convert`: models between layouts, what is in one, and the published ones."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from uldm_cli import console
from uldm_cli.cli import zoo
from uldm_cli.cli.options import Command, Json, Quiet, native_file
from uldm_cli.errors import UsageError

if TYPE_CHECKING:
    from uldm_cli.runs.convert import Converted, Layout
    from uldm_cli.runs.inspect import Report

app = typer.Typer(add_completion=False)
app.add_typer(zoo.app, name="zoo")

Source = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A .ckpt, .safetensors, folder, zoo:NAME, hf://owner/name, or embedded name."),
]
Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="YAML", help="Of a published checkpoint, where it does not lie beside it."),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar="TYPE", help="Of the weights: fp32, fp16 or bf16 (default: as they are)."),
]
Verify = Annotated[
    bool, typer.Option("--verify", metavar="", help="Run both on the same input, and show the largest difference.")
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights", metavar="ema|raw", help="Which weights to write: averaged, or as trained (default: ema, if there)."
    ),
]

EXAMPLES = {
    "to-uldm": """
Examples:
  uldm convert to-uldm model.ckpt ffhq.safetensors --config ffhq-ldm-vq-4.yaml
  uldm convert to-uldm hf://CompVis/ldm-celebahq-256 celeba.safetensors --verify
""",
    "to-compvis": """
Examples:
  uldm convert to-compvis ffhq.safetensors ffhq                writes ffhq/model.ckpt and ffhq/config.yaml
""",
    "to-diffusers": """
Examples:
  uldm convert to-diffusers model.ckpt ffhq --verify           a folder that diffusers' LDMPipeline loads
  uldm convert to-diffusers zoo:kl-f8 kl-f8                    an autoencoder alone
""",
    "inspect": """
Examples:
  uldm convert inspect model.ckpt
  uldm convert inspect fruits64 --json
""",
}


@app.command("to-uldm", cls=Command, help="Write a model as one file of uldm's own.", epilog=EXAMPLES["to-uldm"])
def to_uldm(
    model: Source,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The .safetensors file to write.")],
    config: Config = None,
    dtype: Dtype = None,
    verify: Verify = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    _convert(model, "uldm", native_file(file), config, dtype, verify=verify)


@app.command(
    "to-compvis", cls=Command, help="Write a model as the latent-diffusion code has it.", epilog=EXAMPLES["to-compvis"]
)
def to_compvis(
    model: Source,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="To be made, for model.ckpt and config.yaml.")],
    config: Config = None,
    dtype: Dtype = None,
    verify: Verify = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    _convert(model, "compvis", folder, config, dtype, verify=verify)


@app.command(
    "to-diffusers", cls=Command, help="Write a model as a folder that diffusers loads.", epilog=EXAMPLES["to-diffusers"]
)
def to_diffusers(
    model: Source,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="To be made, for the pipeline.")],
    config: Config = None,
    dtype: Dtype = None,
    weights: Weights = None,
    verify: Verify = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    _convert(model, "diffusers", folder, config, dtype, weights, verify=verify)


def _convert(
    model: str,
    layout: "Layout",
    destination: Path,
    config: Path | None,
    dtype: str | None,
    weights: str | None = None,
    *,
    verify: bool,
) -> None:
    from uldm_cli.runs.convert import FLOATS, convert

    if dtype is not None and dtype not in FLOATS:
        raise UsageError(f"--dtype {dtype} is unknown", f"It is one of: {', '.join(FLOATS)}")
    if weights not in (None, "ema", "raw"):
        raise UsageError(f"--weights {weights} is unknown", "It is ema or raw")
    done = convert(model, layout, destination, config=config, dtype=dtype, weights=weights, verify=verify)
    _show_converted(done, layout)


def _show_converted(done: "Converted", layout: str) -> None:
    from dataclasses import asdict

    data = asdict(done) | {"source": {"name": done.source.name, "path": done.source.path}, "layout": layout}
    summary = f"{done.tensors:,} tensors, {done.bytes / 1e6:,.0f} MB in {done.seconds:.1f} s: {done.path}"
    rows = [(name, f"{value:.1e}") for name, value in (done.differences or {}).items()]
    console.result(
        data,
        title="Computed by both from the same input" if rows else None,
        columns=("what", "relative difference") if rows else (),
        rows=rows,
        summary=summary,
    )
    if skipped := done.source.checkpoint.skipped:
        console.note(f"not read, since they are no tensors: {', '.join(skipped)}")
    for warning in done.source.checkpoint.warnings:
        console.warn(warning)


@app.command(
    cls=Command, help="Show what a checkpoint holds, without running anything in it.", epilog=EXAMPLES["inspect"]
)
def inspect(model: Source, config: Config = None, json: Json = False, quiet: Quiet = False) -> None:
    from dataclasses import asdict

    from uldm_cli.runs.inspect import inspect

    report = inspect(model, config)
    console.result(
        asdict(report),
        title=f"{report.path}: {report.layout}{f', {report.kind}' if report.kind else ''}",
        columns=("what", "value"),
        rows=_rows(report),
    )
    for warning in report.warnings:
        console.warn(warning)


def _rows(report: "Report") -> list[tuple[str, str]]:
    parts = [
        (part.name, f"{part.values:,} values in {part.tensors:,} tensors, {', '.join(part.dtypes)}")
        for part in report.parts
    ]
    facts = [(name, str(value)) for name, value in report.facts.items()]
    rows = [*facts, *parts, ("on disk", f"{report.bytes / 1e6:,.1f} MB")]
    if report.skipped:
        rows.append(("not read", f"no tensors: {', '.join(report.skipped)}"))
    if report.extra:
        rows.append(("not understood", f"{len(report.extra)} tensors: {', '.join(report.extra[:5])}"))
    return rows
