"""`uldm viz curves`: training curves of several runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from uldm_cli import console
from uldm_cli.cli.options import Command, Dpi, FontSize, Json, Quiet, ShowInline

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from uldm_cli.runs.draw.curves import Curve

EXAMPLES = """
Examples:
  uldm viz curves outputs/vqvae-train
  uldm viz curves outputs/vqvae-a outputs/vqvae-b --log --out curves.pdf
  uldm viz curves outputs/ldm-train --terms loss,lr --smooth 0
"""

Runs = Annotated[
    list[Path],
    typer.Argument(metavar="RUN...", help="Folders of training runs, or their metrics.jsonl.", show_default=False),
]
Out = Annotated[
    Path,
    typer.Option(
        "--out", metavar="FILE", help="The picture: .png, .svg or .pdf (default: curves.png).", show_default=False
    ),
]
Terms = Annotated[
    str | None,
    typer.Option("--terms", metavar="LIST", help="Only these, as loss,lr (default: losses, perplexity and the like)."),
]
Smooth = Annotated[
    float | None,
    typer.Option(
        "--smooth",
        metavar="X",
        help="Weight of the past in the moving average; 0 for none (default: over a 50th of each curve).",
    ),
]
Log = Annotated[bool, typer.Option("--log", metavar="", help="Logarithmic scales, where all values are above 0.")]


def add_to(app: typer.Typer) -> None:
    """Mounts the command."""
    app.command("curves", cls=Command, help="Draw the training curves of runs together.", epilog=EXAMPLES)(curves)


def curves(
    runs: Runs,
    out: Out = Path("curves.png"),
    terms: Terms = None,
    smooth: Smooth = None,
    log: Log = False,
    dpi: Dpi = 150,
    font_size: FontSize = 9.0,
    show_inline: ShowInline = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    from uldm_cli.cli.training import LABELS
    from uldm_cli.runs.curves import Request, run
    from uldm_cli.runs.draw.plot import Style

    chosen = tuple(part.strip() for part in terms.split(",")) if terms is not None else None
    titles = {**LABELS, "usage": "part of the codes used"}
    _show(out, runs, run(Request(tuple(runs), out, chosen, smooth, log, titles, Style(dpi, font_size))))
    if show_inline:
        console.picture(out)


def _show(out: Path, runs: "Sequence[Path]", found: "Mapping[str, Sequence[Curve]]") -> None:
    """The last value of each curve, as logged."""
    rows = [
        (term, str(runs[curve.run]), int(curve.steps[-1]), float(curve.values[-1]), float(curve.average[-1]))
        for term, curves in found.items()
        for curve in curves
    ]
    columns = ("term", "run", "step", "last", "smoothed")
    data = {"command": "viz curves", "file": out, "last": [dict(zip(columns, row, strict=True)) for row in rows]}
    console.result(data, columns=columns, rows=rows, summary=f"Written to {out}")
