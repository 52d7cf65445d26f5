"""`uldm viz recreate`: a picture again, from the picture itself."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from uldm_cli import console
from uldm_cli.cli.options import Command, Device, Json, Outdir, Quiet, ShowInline

if TYPE_CHECKING:
    from uldm_cli.runs.recreate import Recreated

EXAMPLES = """
Examples:
  uldm viz recreate outputs/ldm-sample/image_step_200.png    the same command again, for that sample
  uldm viz recreate figure3.png --model runs/old/model.safetensors --outdir again
"""

Picture = Annotated[
    Path, typer.Argument(metavar="PICTURE", help="A PNG of `uldm ldm sample`, `grid` or `explain`.", show_default=False)
]

Model = Annotated[
    str | None, typer.Option("--model", metavar="REF", help="Where the model is now, if not where it was.")
]


def add_to(app: typer.Typer) -> None:
    """The command `recreate`."""
    app.command(cls=Command, help="Make a picture again from the config that it carries.", epilog=EXAMPLES)(recreate)


def recreate(
    picture: Picture,
    model: Model = None,
    outdir: Outdir = None,
    show_inline: ShowInline = False,
    json: Json = False,
    quiet: Quiet = False,
    device: Device = None,
) -> None:
    from uldm_cli.runs import recreate as runs

    made = runs.recreate(picture, outdir, {"model": model, "device": device})
    _show(made)
    if show_inline:
        console.picture(made.file)


def _show(made: "Recreated") -> None:
    recipe = made.recipe
    data = {
        "command": "viz recreate",
        "source": made.source,
        "made_by": {"command": recipe.command, "version": recipe.version, **recipe.picture},
        "config": recipe.config,
        "file": made.file,
        "identical": made.identical,
        "psnr": None if made.identical else made.psnr,
        "model_changed": made.model_changed,
    }
    console.result(data, summary=f"{made.file}, by `uldm {recipe.command}`: {_likeness(made)} {made.source}")


def _likeness(made: "Recreated") -> str:
    if made.identical:
        return "identical to"
    return "another size than" if math.isnan(made.psnr) else f"PSNR {made.psnr:.1f} dB to"
