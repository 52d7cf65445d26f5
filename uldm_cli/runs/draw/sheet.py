"""The sheet of `draw.explain` for print: pictures as they are, everything that is written as text that stays text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from uldm_cli.runs.draw.explain import fitting_labels, wrapped
from uldm_cli.runs.draw.overlay import BAR, LABEL_SPACE, colored, tick_labels, tick_values
from uldm_cli.runs.draw.plot import TEXT, Style, styled

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from uldm_cli.runs.draw.explain import Bars, Layout
    from uldm_cli.runs.draw.overlay import Scale

    Bytes = NDArray[np.uint8]

POINTS = 72  # in an inch
FONT = "DejaVu Sans"
BAND = 1.5  # of the font's size: the height of a line of text


def sheet_figure(
    how: Layout,
    rows: Sequence[Sequence[Bytes]],
    labels: Sequence[str],
    title: Sequence[str],
    bars: Bars | None = None,
    dpi: int = 150,
) -> Figure:
    """Pictures `[H, W]` or `[H, W, 3]` of the layout's size as a figure with so many pixels an inch.

    Args:
        how: from `layout`.
        rows: a picture a column.
        labels: of the columns.
        title: phrases, written above with commas between, on as many lines as they need.
        bars: scales to draw beside them.
        dpi: of the layout's pixels.
    """
    page = _Page(how)
    heading = wrapped(title, how.across * (how.width + how.gap) - how.gap, page)
    top = how.font_size / 2
    for text in heading:
        page.write(page.left, top + BAND * how.font_size / 2, text, "left")
        top += BAND * how.font_size
    for line in how.lines:
        top = _line(page, top, line, rows, labels, bars)
    return page.figure(top + how.font_size / 2, dpi)


@dataclass
class _Page:
    """What stands where, in pixels from the left upper corner; it measures its font as Pillow's fonts do."""

    how: Layout
    images: list[tuple[float, float, float, float, Bytes]] = field(default_factory=list)
    texts: list[tuple[float, float, str, str]] = field(default_factory=list)
    right: float = 0
    """How far what stands there reaches."""

    @property
    def left(self) -> float:
        """Of the pictures."""
        return self.how.font_size / 2

    def getlength(self, text: str) -> float:
        """How wide a text is."""
        from matplotlib.font_manager import FontProperties
        from matplotlib.textpath import TextPath

        return float(TextPath((0, 0), text, size=self.how.font_size, prop=FontProperties(family=FONT)).get_extents().x1)

    def write(self, x: float, y: float, text: str, align: str) -> None:
        """A text whose middle is at this height, and whose left or right end or middle at this x."""
        self.texts.append((x, y, text, align))
        self.right = max(self.right, x + self.getlength(text) * {"left": 1.0, "center": 0.5, "right": 0.0}[align])

    def place(self, x: float, y: float, width: float, height: float, picture: Bytes) -> None:
        """A picture, by its left upper corner and size."""
        self.images.append((x, y, width, height, picture))
        self.right = max(self.right, x + width)

    def figure(self, height: float, dpi: int) -> Figure:
        """The page, so high, in print."""
        from matplotlib.figure import Figure

        width = self.right + self.how.font_size / 2
        with styled(Style(dpi, self.how.font_size * POINTS / dpi)):
            made = Figure(figsize=(width / dpi, height / dpi), dpi=dpi)
            axes: Any = made.add_axes((0, 0, 1, 1))
            axes.axis("off")
            for x, y, across, down, picture in self.images:
                # "none" keeps the pixels as they are: others draw them anew, or several as one.
                axes.imshow(
                    picture,
                    cmap="gray",
                    vmin=0,
                    vmax=255,
                    extent=(x, x + across, y + down, y),
                    interpolation="none",
                    aspect="auto",
                )
            for x, y, text, align in self.texts:
                axes.text(x, y, text, ha=align, va="center_baseline", color=TEXT, parse_math=False)
            axes.set(xlim=(0, width), ylim=(height, 0))
        return made


def _line(
    page: _Page, top: float, line: range, rows: Sequence[Sequence[Bytes]], labels: Sequence[str], bars: Bars | None
) -> float:
    """One line of a sheet: labels, a row a sample, bars. Where it ends."""
    how = page.how
    lefts = [page.left + place * (how.width + how.gap) for place in range(len(line))]
    written = fitting_labels([labels[column] for column in line], how, page)
    for left, label in zip(lefts, written, strict=False):
        page.write(left + how.width / 2, top + BAND * how.font_size / 2, label, "center")
    top += BAND * how.font_size if written else 0
    for number, row in enumerate(rows):
        for left, column in zip(lefts, line, strict=True):
            page.place(left, top, how.width, how.height, row[column])
        if bars and bars.per == "row":
            _standing_bar(page, lefts[-1] + how.width + 2 * how.gap, top, bars.scales[number], bars.colormap)
        top += how.height + how.gap
    if bars and bars.per == "step":
        for left, column in zip(lefts, line, strict=True):
            _lying_bar(page, left, top + how.gap, bars.scales[column], bars.colormap)
        top += how.gap + how.font_size / 2 + BAND * how.font_size
    return top


def _standing_bar(page: _Page, left: float, top: float, scale: Scale, colormap: str) -> None:
    """To the right of a row, with round numbers."""
    import numpy as np

    how = page.how
    width = max(BAR, how.font_size // 2)
    edge = how.font_size / 2  # the outermost numbers stand half beyond the bar's ends
    length = how.height - 2 * edge
    low, high = scale
    page.place(left, top + edge, width, length, colored(np.linspace(high, low, 256)[:, None], scale, colormap))
    ticks = tick_values(scale, int(length / (LABEL_SPACE * how.font_size)))
    for value, label in zip(ticks, tick_labels(ticks), strict=True):
        part = (high - value) / (high - low) if high > low else 0.5
        page.write(left + width + how.font_size / 3, top + edge + length * part, label, "left")


def _lying_bar(page: _Page, left: float, top: float, scale: Scale, colormap: str) -> None:
    """Below a column, with the ends of its scale under it: only the high one where there is no room."""
    import numpy as np

    how = page.how
    inset = how.font_size / 2
    length = how.width - 2 * inset
    page.place(left + inset, top, length, inset, colored(np.linspace(*scale, 256)[None], scale, colormap))
    low, high = tick_labels(scale)
    middle = top + inset + BAND * how.font_size / 2
    page.write(left + inset + length, middle, high, "right")
    if scale[1] > scale[0] and page.getlength(f"{low} {high}") <= length:
        page.write(left + inset, middle, low, "left")
