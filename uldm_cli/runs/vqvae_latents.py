"""`uldm vqvae latents` and `uldm vqvae interpolate`: latents as pictures, and pictures of the latents between two."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from uldm_cli import console
from uldm_cli.errors import UsageError
from uldm_cli.runs.draw.codes import beside, draw_channels, ending_of
from uldm_cli.runs.draw.latents import largest
from uldm_cli.runs.draw.page import write_page
from uldm_cli.runs.draw.plot import DEFAULT, Style, picture_format, save_figure
from uldm_cli.runs.files import writable_folder
from uldm_cli.runs.vqvae_look import (
    VIZ_OUT,
    Autoencoder,
    Request,
    Source,
    by,
    check_out,
    looked,
)
from uldm_cli.runs.writer import drop_grey_channel

if TYPE_CHECKING:
    from uldm_cli.runs.vqvae_look import Picture

MOST_IMAGES = 32
MOST_STEPS = 64
STRIP_LEAST = 0.64  # inches of width of each picture of a strip


@dataclass(frozen=True)
class Latents:
    """What `latents` did."""

    model: Autoencoder
    file: Path
    images: list[str]
    shape: tuple[int, ...]
    """Of the first image's latent, `(z, h, w)`."""
    scale: float
    """The value drawn white."""
    source: Source


@dataclass(frozen=True)
class Interpolation:
    """What `interpolate` did."""

    model: Autoencoder
    file: Path
    steps: int
    size: tuple[int, int]
    """Height and width of each picture."""


def latents(
    paths: list[Path],
    out: Path | None,
    request: Request,
    *,
    scale: float | None = None,
    style: Style = DEFAULT,
) -> Latents:
    """Draws the latents of images: a row an image, a column a channel, all in one scale of greys.

    Args:
        paths: of files, or of folders, whose images are taken.
        out: the file, .png, .svg or .pdf; None is in `viz_out`, named after the image where there is one.
        request: which autoencoder looks, and how it is shown images.
        scale: the value drawn white; None is the largest magnitude of them all.
        style: of the plot.

    Raises:
        UsageError: no such images or model, too many images, or `out` cannot be written.
    """
    if scale is not None and not scale > 0:
        raise UsageError(f"--scale is {scale:g}", "It is a number above 0")
    source = Source.of_all(paths)
    if len(source.paths) > MOST_IMAGES:
        raise UsageError(f"{len(source.paths)} images, and at most {MOST_IMAGES} fit below each other", "Name fewer")
    [*_, stem] = source.stems.values()
    name = f"{Path(stem).name}_latents.png" if len(source.paths) == 1 else "latents.png"
    file = _chosen_file(out, VIZ_OUT / name, source)
    opened = request.open()
    found = list(looked(opened, source, request, "encoding"))
    values = [look.latent.numpy() for _, look in found]
    white = scale or max(largest(latent) for latent in values)
    pictures = [drop_grey_channel(picture.pixels.permute(1, 2, 0).numpy()) for picture, _ in found]
    names = [Path(picture.name).name for picture, _ in found]
    what = _what(opened)
    title = f"{what} of {ending_of(opened.name, 40)}; white is {white:.3g}, black {-white:.3g}"
    plot = draw_channels(pictures, values, names, white, title, style)
    about = opened.about("latents", title=what, images=", ".join(names), scale=f"{white:.9g}")
    writable_folder(file.parent)
    save_figure(plot, file, about, style)
    return Latents(opened, file, [picture.name for picture, _ in found], values[0].shape, white, source)


def interpolate(
    first: Path,
    last: Path,
    out: Path | None,
    request: Request,
    *,
    steps: int = 8,
    style: Style = DEFAULT,
) -> Interpolation:
    """Draws what lies between two images: their latents mixed linearly, and each mixture decoded.

    With a codebook it is the latents before quantizing that are mixed, and each mixture is quantized.

    Args:
        first: the image at 0.
        last: the image at 1; of another size, it is scaled to cover the first, and its centre taken.
        out: the file, .png, .svg or .pdf; None is in `viz_out`, named after both.
        request: which autoencoder looks, and how it is shown images.
        steps: how many pictures, with both ends.
        style: of the title and the labels.

    Raises:
        UsageError: no such images or model, a wrong number, or `out` cannot be written.
    """
    from uldm_cli.core.codes import blend
    from uldm_cli.core.images import to_uint8

    if not 2 <= steps <= MOST_STEPS:
        raise UsageError(f"--steps is {steps}", f"It is a number from 2, for both ends, to {MOST_STEPS}")
    for path in (first, last):
        if path.is_dir():
            raise UsageError(f"{path} is a folder, and an image is needed", "Name a file in it")
    sources = [Source.of(path) for path in (first, last)]
    both = Source({str(path): path for path in (first, last)}, [], strict=True)
    file = _chosen_file(out, VIZ_OUT / f"{first.stem}_to_{last.stem}.png", both)
    opened = request.open()
    start, end = _one_size(*(next(source.pictures(opened, request.side)) for source in sources))
    pictures = [drop_grey_channel(one) for one in to_uint8(blend(opened.module, opened.batch([start, end]), steps))]
    labels = [f"{i / (steps - 1):.2f}".rstrip("0").rstrip(".") for i in range(steps)]
    about = opened.about("interpolate", first=first.name, last=last.name, steps=str(steps))
    title = f"From {ending_of(first.name, 40)} (0) to {ending_of(last.name, 40)} (1), by {ending_of(opened.name, 40)}"
    writable_folder(file.parent)
    write_page(beside(pictures, labels, title, least=STRIP_LEAST, style=style), file, {"title": title, **about}, style)
    return Interpolation(opened, file, steps, start.size)


def _one_size(start: Picture, end: Picture) -> tuple[Picture, Picture]:
    """Two images of the first one's size; says what was done to either."""
    from uldm_cli.core.codes import cover

    for picture in (start, end):
        if picture.change:
            console.note(f"{picture.name} of {by(picture.original)} pixels: {picture.change}")
    if start.size == end.size:
        return start, end
    console.note(f"{end.name} of {by(end.size)} pixels: scaled to cover {by(start.size)}, as {start.name} has")
    return start, replace(end, pixels=cover(end.pixels, start.size))


def _chosen_file(out: Path | None, default: Path, source: Source) -> Path:
    """The file to write, found to be one that can be written.

    Raises:
        ConfigError: it cannot.
    """
    file = out or default
    picture_format(file)
    if file.is_dir():
        raise UsageError(f"--out {file} is a folder, and a file is needed", f"Give --out {file / default.name}")
    check_out(file.parent, source, [file])
    return file


def _what(model: Autoencoder) -> str:
    from uldm_cli.core.autoencoders import KL

    if model.has_codes:
        return "Latents before quantizing"
    return "Means of the latents" if isinstance(model.module, KL) else "Latents"
