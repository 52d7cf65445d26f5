"""A page of pictures with a title and labels: pixel by pixel in a PNG, with text that stays text in an SVG or PDF."""

from __future__ import annotations

from dataclasses import dataclass, field
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from uldm_cli.errors import ConfigError
from uldm_cli.runs.draw.plot import DEFAULT, FORMATS, TEXT, Style, picture_format, save_figure, styled
from uldm_cli.runs.files import write_png

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

POINTS = 72  # in an inch
LINE = 1.45  # of the font's size: from one line of text to the next
LETTER = 0.6  # of the font's size: about the width of a letter, rather more than less
_ANCHORS = {"l": "left", "m": "center"}


@dataclass(frozen=True)
class Words:
    """One line of text."""

    left: float
    """Where it begins, or its middle if it is centred, in pixels."""
    middle: float
    """Its height's middle."""
    text: str
    size: float
    """Of its font, in pixels."""
    anchor: str = "m"
    """`l` where it begins at `left`, `m` where it is centred there."""


@dataclass
class Page:
    """What is on a page, in pixels from its upper left corner."""

    width: int
    height: int
    pictures: list[tuple[int, int, Bytes]] = field(default_factory=list)
    """Left, top and pixels, `[H, W, 3]`."""
    words: list[Words] = field(default_factory=list)

    def raster(self) -> Bytes:
        """The page, `[height, width, 3]` on white."""
        import numpy as np
        from PIL import Image, ImageDraw

        page = Image.new("RGB", (self.width, self.height), "white")
        pen = ImageDraw.Draw(page)
        for left, top, picture in self.pictures:
            page.paste(Image.fromarray(picture), (left, top))
        for one in self.words:
            pen.text((one.left, one.middle), one.text, fill=TEXT, font=font(one.size), anchor=f"{one.anchor}m")
        return np.asarray(page)

    def figure(self, style: Style = DEFAULT) -> Figure:
        """The page as matplotlib prints it, a pixel as large as the style's dpi makes it."""
        from matplotlib.figure import Figure

        with styled(style):
            made = Figure(figsize=(self.width / style.dpi, self.height / style.dpi), dpi=style.dpi)
            axes = made.add_axes((0, 0, 1, 1))
            axes.axis("off")
            for left, top, picture in self.pictures:
                down, across = picture.shape[:2]
                axes.imshow(picture, extent=(left, left + across, top + down, top), aspect="auto")
            for one in self.words:
                size = one.size * POINTS / style.dpi
                look: dict[str, Any] = {"ha": _ANCHORS[one.anchor], "va": "center", "parse_math": False}
                axes.text(one.left, one.middle, one.text, fontsize=size, **look)
            axes.set(xlim=(0, self.width), ylim=(self.height, 0))
        return made


def check_format(form: str) -> None:
    """Raises ConfigError where a format is none of FORMATS."""
    if form not in FORMATS:
        raise ConfigError(f"--format {form}: a plot is written as png, svg or pdf", "Choose one of them")


def write_page(page: Page, path: Path, about: Mapping[str, str], style: Style = DEFAULT) -> None:
    """Writes a page, atomically, as what its ending says: .png, .svg or .pdf."""
    if picture_format(path) == "png":
        write_png(path, page.raster(), about, style.dpi)
    else:
        save_figure(page.figure(style), path, about, style)


def letters(style: Style) -> float:
    """The size of a style's labels in pixels."""
    return style.font_size * style.dpi / POINTS


def font(size: float) -> Any:
    """The letters of the plots, for Pillow; `size` in pixels."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", max(size, 1))


def title_words(title: str, left: float, top: float, width: float, size: float) -> tuple[list[Words], int]:
    """A title's lines, each broken where it is wider than `width`, and how many pixels they take."""
    room, step = max(int(width / (LETTER * size)), 8), LINE * size
    lines = [part for line in title.splitlines() for part in wrap(line, room)]
    words = [Words(left, top + (i + 0.5) * step, line, size, "l") for i, line in enumerate(lines)]
    return words, round(step * len(lines))
