"""`uldm viz trajectory`: a sampling run as a film."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from uldm_cli import console
from uldm_cli.cli.options import Command, Device, Dpi, FontSize, Json, Quiet, ShowInline

if TYPE_CHECKING:
    from uldm_cli.runs.viz_trajectory import Result

EXAMPLES = """
Examples:
  uldm viz trajectory outputs/ldm-sample                     trajectory.gif, in the run's folder
  uldm viz trajectory outputs/ldm-sample --out dog.mp4 --what latent --fps 10
  uldm ldm sample --step-size 2 --save trajectory && uldm viz trajectory outputs/ldm-sample
                                                             and trajectory.png: norm, SNR, change, LPIPS to the end
"""

Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="The folder of `uldm ldm sample`, or of `uldm ldm explain --separate`.")
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="FILE", help="The film: .gif, .apng (or .png), .mp4 (default: trajectory.gif in the run)."
    ),
]
What = Annotated[str, typer.Option("--what", metavar="KIND", help="Its pictures: image, latent, saliency, attention.")]
Fps = Annotated[
    float | None,
    typer.Option("--fps", metavar="X", help="Pictures a second (default: 4 s for all, within 2 to 25 a second)."),
]
Sample = Annotated[
    int | None, typer.Option("--sample", metavar="I", help="Only this sample, from 0 (default: all, side by side).")
]
Zoom = Annotated[
    int | None,
    typer.Option("--zoom", metavar="N", help="Draw each pixel N by N (default: small pictures at up to 256 pixels)."),
]
Figure = Annotated[
    Path | None,
    typer.Option(
        "--figure",
        metavar="FILE",
        help="The plots: .png, .svg or .pdf (default: a .png beside the film); for runs with --save trajectory.",
    ),
]


def add_to(app: typer.Typer) -> None:
    """Mounts the command."""
    about = "Make a film of a sampling run, and plot what its numbers did."
    app.command("trajectory", cls=Command, help=about, epilog=EXAMPLES)(trajectory)


def trajectory(
    run: Run,
    out: Out = None,
    what: What = "image",
    fps: Fps = None,
    sample: Sample = None,
    zoom: Zoom = None,
    figure: Figure = None,
    dpi: Dpi = 150,
    font_size: FontSize = 9.0,
    show_inline: ShowInline = False,
    json: Json = False,
    quiet: Quiet = False,
    device: Device = None,
) -> None:
    from uldm_cli.runs.draw.plot import Style
    from uldm_cli.runs.viz_trajectory import Request
    from uldm_cli.runs.viz_trajectory import run as draw

    style = Style(dpi, font_size)
    result = draw(Request(run, out, figure, what, fps, sample, zoom, device or "auto", style))
    _show(result)
    for path in (result.film, result.figure):
        if show_inline and path:
            console.picture(path)


def _show(result: "Result") -> None:
    samples = f"{len(result.samples)} samples" if len(result.samples) > 1 else "one sample"
    data = {
        "command": "viz trajectory",
        "film": result.film,
        "figure": result.figure,
        "what": result.what,
        "samples": result.samples,
        "steps": result.steps,
        "fps": result.fps,
        "courses": [
            {
                "name": course.name,
                "steps": course.steps,
                "norm": course.norm,
                "log_snr": course.log_snr,
                "change": course.change,
                "lpips": course.lpips,
            }
            for course in result.courses
        ],
    }
    files = [path for path in (result.film, result.figure) if path]
    console.result(
        data,
        title=f"{len(result.steps)} pictures of {samples}, {result.fps:g} a second",
        columns=("file", "bytes"),
        rows=[(str(path), path.stat().st_size) for path in files],
    )
