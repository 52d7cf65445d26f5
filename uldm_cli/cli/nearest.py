"""`uldm viz nearest`: the training images that samples are nearest to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from uldm_cli import console
from uldm_cli.cli.lpips import AutoDownload, Net, WeightsUrl, read_backbone, shortened
from uldm_cli.cli.options import Command, Device, Dpi, FontSize, Json, Quiet, ShowInline

if TYPE_CHECKING:
    from uldm_cli.runs.nearest import Answer, Neighbour, Sample

Samples = Annotated[
    list[Path], typer.Argument(metavar="SAMPLE", help="Image files, and folders of them.", show_default=False)
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="PATH|KIND",
        help="The training images: a folder, .tar or .zip, or a data set by its kind, such as tiny.",
    ),
]
Count = Annotated[
    int,
    typer.Option("--k", metavar="N", min=1, max=64, help="How many of the nearest (default: 4).", show_default=False),
]
Size = Annotated[
    int | None,
    typer.Option(
        "--size",
        metavar="N",
        min=8,
        max=4096,
        help="Compare squares of N pixels (default: the data's, of files that of the first, at most 256).",
    ),
]
Reference = Annotated[
    int,
    typer.Option(
        "--reference",
        metavar="N",
        min=1,
        help="Training images to learn what is usual from (default: 64).",
        show_default=False,
    ),
]
Flip = Annotated[
    bool,
    typer.Option("--flip", metavar="", help="Mirror images count, too: where training saw them (data.flip=true)."),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Of their choice (default: 0).", show_default=False)]
Rows = Annotated[
    int,
    typer.Option(
        "--rows",
        metavar="N",
        min=1,
        help="Samples in the picture; of more, those nearest by LPIPS (default: 32).",
        show_default=False,
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        "--out", metavar="FILE", help="The picture: .png, .svg or .pdf (default: nearest.png).", show_default=False
    ),
]

EXAMPLES = """
Examples:
  uldm viz nearest samples/00000.png samples/00001.png --data photos.tar
  uldm viz nearest samples --data photos --k 8 --out nearest.pdf
  uldm viz nearest sample.png --data '{"kind": "mnist", "root": "folder"}'

Every sample is compared with every training image, both as centre squares of one size. By pixels: the root of the mean
squared difference of the values, 0 to 1. By LPIPS: the distance of `uldm viz lpips`. Neither sees a copy that is
shifted or cut out, nor, without --flip, one that is mirrored. Frames of one film are near to each other, and so are
pictures of one turntable: how near training images are to their own nearest other one is stated, and what is nearer
than that is marked.
"""


def add_to(app: typer.Typer) -> None:
    """Adds the command to a group."""
    app.command("nearest", cls=Command, help="The training images that samples are nearest to.", epilog=EXAMPLES)(
        nearest
    )


def nearest(
    samples: Samples,
    data: Data,
    k: Count = 4,
    size: Size = None,
    reference: Reference = 64,
    seed: Seed = 0,
    flip: Flip = False,
    net: Net = "alex",
    weights_url: WeightsUrl = None,
    auto_download: AutoDownload = False,
    rows: Rows = 32,
    out: Out = Path("nearest.png"),
    dpi: Dpi = 150,
    font_size: FontSize = 9.0,
    show_inline: ShowInline = False,
    json: Json = False,
    quiet: Quiet = False,
    device: Device = None,
) -> None:
    """Has the nearest training images searched for, drawn and listed."""
    from uldm_cli.runs import nearest as run
    from uldm_cli.runs.draw.plot import Style, picture_format
    from uldm_cli.runs.files import writable_folder

    picture_format(out)
    backbone = read_backbone(net, weights_url, auto_download=auto_download, dummy=False)
    question = run.Question(tuple(samples), data, k, size, reference, seed, flip, backbone, device or "auto")
    writable_folder(out.parent)
    answer = run.search(question)
    drawn = run.draw(answer, question, out, rows, Style(dpi, font_size))
    _show(answer, data, out, drawn)
    if show_inline:
        console.picture(out)


def _show(answer: Answer, data: str, out: Path, drawn: int) -> None:
    if answer.skipped:
        names = tuple(name for name, _ in answer.skipped)
        many = f"{len(names):,} images of {data} cannot be read and are left out"
        one = f"1 image of {data} cannot be read and is left out"
        console.warn(f"{one if len(names) == 1 else many}: {shortened(names)}")
    console.result(
        _document(answer, data, out),
        title=_title(answer, data),
        columns=("sample", "nearest by pixels", "distance", "/ usual", "nearest by LPIPS", "distance", "/ usual"),
        rows=[_row(sample, answer) for sample in answer.samples],
        summary=_summary(answer, out, drawn),
    )


def _row(sample: Sample, answer: Answer) -> tuple[object, ...]:
    from uldm_cli.runs.nearest import figure

    usual = answer.typical
    cells: list[object] = [sample.name]
    for found, typical in ((sample.pixels, usual and usual.pixels), (sample.lpips, usual and usual.lpips)):
        ratio = found[0].distance / typical if typical else None
        name = f"{found[0].name} (mirrored)" if found[0].mirrored else found[0].name
        cells += [name, figure(found[0].distance), ratio if ratio is None else f"{ratio:#.3g}"]
    return tuple(cells)


def _title(answer: Answer, data: str) -> str:
    """What was compared, and what its numbers are to be compared with."""
    images = "image" if answer.count == 1 else "images"
    what = f"{answer.count:,} {images} of {data} at {answer.size}x{answer.size}, {answer.metric.title}"
    usual = answer.typical
    if usual is None:
        return what
    return (
        f"{what}; usual, from one of them to the nearest other: {usual.pixels:.4g} by pixels, {usual.lpips:.4g} by "
        f"LPIPS (medians of {usual.count})"
    )


def _summary(answer: Answer, out: Path, drawn: int) -> str:
    picture = f"{out}" if drawn == len(answer.samples) else f"{out}: the {drawn} nearest by LPIPS"
    if answer.typical is None:
        return picture
    counts = f"{answer.nearer('pixels')} by pixels and {answer.nearer('lpips')} by LPIPS"
    return f"nearer than usual: {counts}, of {len(answer.samples)} samples; {picture}"


def _document(answer: Answer, data: str, out: Path) -> dict[str, Any]:
    return {
        "data": data,
        "images": answer.count,
        "size": answer.size,
        **answer.metric.facts,
        "typical": answer.typical and vars(answer.typical),
        "nearer_than_typical": answer.typical and {by: answer.nearer(by) for by in ("pixels", "lpips")},
        "samples": [
            {"name": one.name, "pixels": _list(one.pixels), "lpips": _list(one.lpips)} for one in answer.samples
        ],
        "unusable": [{"name": name, "reason": reason} for name, reason in answer.skipped],
        "picture": out,
    }


def _list(found: tuple[Neighbour, ...]) -> list[dict[str, Any]]:
    return [vars(neighbour) for neighbour in found]
