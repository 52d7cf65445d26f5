"""`uldm viz lpips`: how different images look."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from uldm_cli import console
from uldm_cli.cli.options import Command, Device, FontSize, Json, Quiet, ShowInline
from uldm_cli.errors import UsageError

if TYPE_CHECKING:
    from uldm_cli.runs.lpips import Folders, Pair
    from uldm_cli.runs.perceptual import Backbone

Net = Annotated[
    str,
    typer.Option("--net", metavar="NAME", help="alex, vgg or squeeze (default: alex).", show_default=False),
]
WeightsUrl = Annotated[
    str | None,
    typer.Option("--weights-url", metavar="FILE|URL", help="The network's weights, named as torchvision names them."),
]
AutoDownload = Annotated[
    bool,
    typer.Option("--auto-download", metavar="", help="Fetch the weights of vgg or squeeze from torchvision's address."),
]
Dummy = Annotated[
    bool,
    typer.Option(
        "--dummy", metavar="", help="A stand-in network, always the same, without weights: its numbers mean nothing."
    ),
]
First = Annotated[str | None, typer.Argument(metavar="A", help="An image, or a folder.", show_default=False)]
Second = Annotated[str | None, typer.Argument(metavar="B", help="Another.", show_default=False)]
Img0 = Annotated[str | None, typer.Option("--img0", hidden=True)]
Img1 = Annotated[str | None, typer.Option("--img1", hidden=True)]
Size = Annotated[
    int | None,
    typer.Option(
        "--size",
        metavar="N",
        min=8,
        max=4096,
        help="Compare the centre squares, scaled to N pixels (default: A as it is; random images: 256).",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="PATH",
        help="The heatmap: a bare .png, or a .svg or .pdf with title and colour bar (default: lpips_heatmap.png); of "
        "two folders, a folder for all (default: none).",
    ),
]
Colormap = Annotated[
    str,
    typer.Option(
        "--colormap", metavar="NAME", help="Of the heatmap (default: gray, white is different).", show_default=False
    ),
]
Scale = Annotated[
    float | None,
    typer.Option("--scale", metavar="X", help="The difference that is drawn white (default: the largest there is)."),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed", metavar="N", help="Of random images, where none are named (default: 0).", show_default=False
    ),
]

EXAMPLES = """
Examples:
  uldm viz lpips photo.png copy.jpg                      the distance, and lpips_heatmap.png
  uldm viz lpips photo.png copy.jpg --out difference.pdf --colormap magma
  uldm viz lpips originals reconstructions               two folders: a table of the images with the same names
  uldm viz lpips a.png b.png --net vgg --auto-download   by VGG16, 553 MB the first time
  uldm viz lpips --dummy                                 a trial run: random images, no weights

B is brought to A's size if it has another: scaled to fill it, its middle cut out.
"""


def add_to(app: typer.Typer) -> None:
    """Adds the command to a group."""
    app.command("lpips", cls=Command, help="How different two images look, and where.", epilog=EXAMPLES)(lpips)


def lpips(
    a: First = None,
    b: Second = None,
    img0: Img0 = None,
    img1: Img1 = None,
    size: Size = None,
    net: Net = "alex",
    weights_url: WeightsUrl = None,
    auto_download: AutoDownload = False,
    dummy: Dummy = False,
    seed: Seed = 0,
    colormap: Colormap = "gray",
    scale: Scale = None,
    out: Out = None,
    font_size: FontSize = 9.0,
    show_inline: ShowInline = False,
    json: Json = False,
    quiet: Quiet = False,
    device: Device = None,
) -> None:
    """How different two images look, or the images of two folders."""
    from uldm_cli.runs import lpips as run
    from uldm_cli.runs.draw.plot import Style

    if scale is not None and not 0 < scale < float("inf"):
        raise UsageError(f"--scale {scale:g} is not a difference", "Give a number above 0")
    first, second = _one("A", "--img0", a, img0), _one("B", "--img1", b, img1)
    backbone = read_backbone(net, weights_url, auto_download=auto_download, dummy=dummy)
    look = run.Look(backbone, size, colormap, scale, device or "auto", Style(font_size=font_size))
    if first is None and second is None:
        _show_pair(run.compare_random(look, out or run.HEATMAP, seed=seed), show_inline)
    elif first is None or second is None:
        raise UsageError(f"{first or second} has nothing to be compared with", "Name two images, or two folders")
    elif _both_are_folders(Path(first), Path(second)):
        _show_folders(run.compare_folders(Path(first), Path(second), look, out), Path(first), Path(second))
    else:
        _show_pair(run.compare_images(Path(first), Path(second), look, out or run.HEATMAP), show_inline)


def read_backbone(net: str, weights_url: str | None, *, auto_download: bool, dummy: bool) -> Backbone:
    """Which network the options ask for."""
    from uldm_cli.runs.perceptual import Backbone

    return Backbone(net, weights_url, auto_download, dummy)


def _one(name: str, option: str, argument: str | None, value: str | None) -> str | None:
    if argument is not None and value is not None:
        raise UsageError(f"{name} and {option} are both given", "Give one of them")
    return argument if argument is not None else value


def _both_are_folders(first: Path, second: Path) -> bool:
    folders = [path for path in (first, second) if path.is_dir()]
    if len(folders) == 1:
        [other] = {first, second} - {*folders}
        raise UsageError(f"{folders[0]} is a folder and {other} is not", "Compare two images, or two folders")
    return bool(folders)


def _show_pair(pair: Pair, inline: bool) -> None:
    one = pair.compared
    size = f"{one.size[1]}x{one.size[0]}"
    resized = ", the second resized to the first" if one.resized else ""
    console.result(
        {
            "images": one.name,
            "distance": one.distance,
            **pair.metric.facts,
            "size": one.size,
            "resized": one.resized,
            "heatmap": pair.heatmap,
            "scale": pair.scale,
        },
        title=f"{one.distance:.4f}",
        summary=f"{pair.metric.title} of {one.name} ({size}{resized}); {pair.heatmap}: brightest is {pair.scale:.4g}",
    )
    if inline:
        console.picture(pair.heatmap)


def _show_folders(folders: Folders, first: Path, second: Path) -> None:
    for name, reason in folders.unusable:
        console.warn(f"{name} is left out: {reason}")
    for folder, names in ((first, folders.only_first), (second, folders.only_second)):
        if names:
            console.note(f"{len(names)} only in {folder}: {shortened(names)}")
    distances = [distance for _, distance in folders.rows]
    mean = sum(distances) / len(distances)
    console.result(
        {
            "pairs": [{"name": name, "distance": distance} for name, distance in folders.rows],
            "mean": mean,
            **folders.metric.facts,
            "resized": folders.resized,
            "only_in_first": folders.only_first,
            "only_in_second": folders.only_second,
            "unusable": [{"name": name, "reason": reason} for name, reason in folders.unusable],
            "heatmaps": folders.heatmaps,
        },
        columns=("image", "LPIPS"),
        rows=[(name, round(distance, 4)) for name, distance in folders.rows],
        summary=_summary(folders, mean),
    )


def _summary(folders: Folders, mean: float) -> str:
    parts = [f"{folders.metric.title}: mean {mean:.4f} of {len(folders.rows)} pairs"]
    if folders.resized:
        parts.append(f"the second of {len(folders.resized)} resized to the first")
    if folders.heatmaps:
        parts.append(f"heatmaps in {folders.heatmaps}, each in its own scale")
    return "; ".join(parts)


def shortened(names: tuple[str, ...], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
