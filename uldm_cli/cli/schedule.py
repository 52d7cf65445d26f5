"""`uldm viz schedule` and `uldm viz noising`: what noise schedules do."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from uldm_cli import console
from uldm_cli.cli.options import Command, Dpi, FontSize, Json, Quiet, ShowInline

if TYPE_CHECKING:
    from uldm_cli.runs.draw.schedules import Table

SCHEDULE_EXAMPLES = """
Examples:
  uldm viz schedule                                          every kind that is installed
  uldm viz schedule linear linear end=0.03 cosine --out schedules.svg
  uldm viz schedule scaled_linear --model outputs/ldm-train  beside that of a model
"""
NOISING_EXAMPLES = """
Examples:
  uldm viz noising photo.jpg
  uldm viz noising photo.jpg --schedule scaled_linear --schedule "linear end=0.03" --steps 0,250,500,750,999
"""

Schedules = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KIND [KEY=VALUE]...",
        help="Schedules, each followed by its settings: linear end=0.03 cosine (default: all kinds).",
        show_default=False,
    ),
]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="REF", help="A model whose schedule is drawn, too; can be given several times."),
]
Image = Annotated[Path, typer.Argument(metavar="IMAGE", help="Any picture.", show_default=False)]
Chosen = Annotated[
    list[str] | None,
    typer.Option(
        "--schedule",
        metavar="KIND",
        help='A schedule, with settings as in "linear end=0.03"; several are a row each (default: scaled_linear).',
    ),
]
Steps = Annotated[
    str | None,
    typer.Option("--steps", metavar="LIST", help="Timesteps, as 0,100,250,500,999 (default: five over all)."),
]
Size = Annotated[
    int | None,
    typer.Option(
        "--size",
        metavar="N",
        min=8,
        max=4096,
        help="Pixels of the centre square (default: the image's short side, at most 256).",
    ),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of the noise (default: 0).", show_default=False)]


def _out(default: str) -> typer.models.OptionInfo:
    told = f"The picture: .png, .svg or .pdf (default: {default})."
    option: typer.models.OptionInfo = typer.Option("--out", metavar="FILE", help=told, show_default=False)
    return option


def add_to(app: typer.Typer) -> None:
    """Mounts both commands."""
    app.command("schedule", cls=Command, help="Draw noise schedules together.", epilog=SCHEDULE_EXAMPLES)(schedule)
    app.command("noising", cls=Command, help="Draw an image as it is noised.", epilog=NOISING_EXAMPLES)(noising)


def schedule(
    schedules: Schedules = None,
    model: Models = None,
    out: Annotated[Path, _out("schedules.png")] = Path("schedules.png"),
    dpi: Dpi = 150,
    font_size: FontSize = 9.0,
    show_inline: ShowInline = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    from uldm_cli.runs.draw.plot import Style
    from uldm_cli.runs.viz_schedule import run

    tables = run(schedules or [], model or [], out, Style(dpi, font_size))
    console.result(
        {"command": "viz schedule", "file": out, "schedules": [_table_data(table) for table in tables]},
        columns=("schedule", "T", "first beta", "last beta", "signal at T", "log SNR", "even at t"),
        rows=[_table_row(table) for table in tables],
        summary=f"Written to {out}",
    )
    if show_inline:
        console.picture(out)


def _table_data(table: "Table") -> dict[str, object]:
    return {
        "name": table.name,
        "timesteps": table.T,
        "even_at": table.even,
        "alphas_cumprod": table.alphas_cumprod,
        "log_snr": table.log_snr,
        "betas": table.betas,
    }


def _table_row(table: "Table") -> tuple[object, ...]:
    ends = f"{table.log_snr[0]:+.1f} to {table.log_snr[-1]:+.1f}"
    betas = (float(table.betas[0]), float(table.betas[-1]))
    return (table.name, table.T, *betas, float(table.alphas_cumprod[-1]), ends, table.even)


def noising(
    image: Image,
    schedule: Chosen = None,
    steps: Steps = None,
    size: Size = None,
    seed: Seed = 0,
    out: Annotated[Path, _out("noising.png")] = Path("noising.png"),
    dpi: Dpi = 150,
    font_size: FontSize = 9.0,
    show_inline: ShowInline = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    from uldm_cli.runs.draw.plot import Style
    from uldm_cli.runs.noising import Request, run

    chosen = tuple(schedule or ("scaled_linear",))
    rows = run(Request(image, out, chosen, steps, size, seed, Style(dpi, font_size)))
    made = [
        {"schedule": name, "steps": [{"t": noised.t, "log_snr": noised.log_snr} for noised in row]}
        for name, row in zip(chosen, rows, strict=True)
    ]
    data = {"command": "viz noising", "image": image, "file": out, "seed": seed, "schedules": made}
    console.result(data, summary=f"Written to {out}")
    if show_inline:
        console.picture(out)
