"""`uldm vqvae diagram`: pictures of what networks are made of."""

from pathlib import Path
from typing import Annotated

import typer

from uldm_cli import console
from uldm_cli.cli.options import Arguments, Command, Dpi, FontSize, Json, Quiet, ShowInline

EXAMPLES = """
Examples:
  uldm vqvae diagram                                         the embedded model: its autoencoder and its U-Net
  uldm vqvae diagram configs/fruits64/vqvae.yaml autoencoder.attn_down=[false,true]
  uldm vqvae diagram --model zoo:cin256 --out cin.svg        cin_autoencoder.svg and cin_unet.svg; needs no download
  uldm vqvae diagram --config cin256.yaml --part unet --out unet.pdf

A config is one of `uldm vqvae train`, `uldm ldm train` or `uldm ldm sample`, or the YAML of a published model. No
weights are read.
"""

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="REF",
        help="A file or folder of any layout, a run's folder, zoo:NAME, hf://owner/name, or an embedded model "
        "(default: fruits64).",
        show_default=False,
    ),
]
Part = Annotated[
    str | None,
    typer.Option("--part", metavar="autoencoder|unet", help="Draw this one only (default: what there is)."),
]
Title = Annotated[
    str | None,
    typer.Option("--title", metavar="TEXT", help="Above the pictures (default: the model's name, or the config's)."),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "--outdir",
        metavar="PATH",
        help="A folder, or a file that ends in .png, .svg or .pdf (default: viz_out).",
        rich_help_panel="Output",
        show_default=False,
    ),
]


def add_to(app: typer.Typer) -> None:
    """Mounts the command."""
    about = "Draw what the autoencoder and the U-Net of a config or model are made of."
    app.command(cls=Command, help=about, epilog=EXAMPLES)(diagram)


def diagram(
    arguments: Arguments = None,
    model: Model = None,
    part: Part = None,
    title: Title = None,
    out: Out = None,
    dpi: Dpi = 150,
    font_size: FontSize = 9.0,
    show_inline: ShowInline = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Mounted by `add_to`."""
    from uldm_cli.runs.diagram import draw, read
    from uldm_cli.runs.draw.plot import Style
    from uldm_cli.specs.load import split_arguments

    config, overrides = split_arguments(arguments or [])
    described = read(config, overrides, model)
    pictures = draw(described, out, part, title=title, style=Style(dpi, font_size))
    console.result(
        {"command": "vqvae diagram", "model": described.name, "pictures": [one.as_json() for one in pictures]},
        columns=("picture", "shows", "parameters"),
        rows=[(one.path, ", ".join(one.architecture.facts), f"{one.architecture.parameters:,}") for one in pictures],
    )
    if show_inline:
        for one in pictures:
            console.picture(one.path)
