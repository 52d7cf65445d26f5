"""Pictures and maps of several steps as one sheet for a paper: a column a step, a row a sample, a title, a scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from uldm_cli.runs.draw.overlay import color_bar, colored, tick_labels

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Scale = tuple[float, float]

# In pixels. Small pictures are enlarged to about CELL, but not so far that the sheet is wider than WIDEST, and at least
# to LEAST; beyond WIDEST it goes on below.
CELL, LEAST, WIDEST = 192, 64, 4096
FONTS = (12, 40)  # the smallest and largest; between them a twelfth of a picture's width
DPI = 150  # all these are for so many pixels an inch, and grow with finer ones
INK = (40, 40, 40)


@dataclass(frozen=True)
class Layout:
    """How the pictures of a sheet stand."""

    height: int
    width: int
    """Of one picture, enlarged."""
    factor: int
    """By how much it is enlarged."""
    across: int
    """How many stand beside each other."""
    columns: int
    font_size: int
    """Of everything that is written."""

    @property
    def gap(self) -> int:
        """Between pictures."""
        return max(2, self.font_size // 6)

    @property
    def lines(self) -> list[range]:
        """The columns of each line."""
        return [range(at, min(at + self.across, self.columns)) for at in range(0, self.columns, self.across)]

    def pixels(self, rows: int) -> int:
        """About how many the sheet has."""
        header = 3 * self.font_size
        height = len(self.lines) * (rows * (self.height + self.gap) + header) + header
        return height * (self.across * (self.width + self.gap) + 4 * self.font_size)


@dataclass(frozen=True)
class Bars:
    """The scales of a sheet of maps."""

    per: Literal["row", "step"]
    scales: Sequence[Scale]
    """One a row, whose bar stands to its right, or one a step, whose bar lies below."""
    colormap: str


def layout(size: tuple[int, int], columns: int, dpi: int = DPI, font_size: float | None = None) -> Layout:
    """How so many columns of pictures of this height and width are arranged.

    Args:
        size: height and width of a picture.
        columns: of pictures.
        dpi: pixels an inch: a finer sheet has more of them.
        font_size: in points; by default one that suits the pictures.
    """
    height, width = size
    cell, least, widest, smallest, largest = (round(side * dpi / DPI) for side in (CELL, LEAST, WIDEST, *FONTS))
    factor, least = (max(1, -(-side // min(size))) for side in (cell, least))
    while factor > least and columns * (width * factor + factor) > widest:
        factor -= 1
    lines = -(-columns // max(1, widest // (width * factor)))
    font = max(smallest, min(largest, width * factor // 12)) if font_size is None else round(font_size * dpi / 72)
    return Layout(height * factor, width * factor, factor, -(-columns // lines), columns, max(font, 4))


def enlarged(picture: Bytes, factor: int) -> Bytes:
    """`[H, W]` or `[H, W, 3]` with every pixel as a square of `factor`, in colour."""
    import numpy as np

    if picture.ndim == 2:
        picture = np.repeat(picture[:, :, None], 3, axis=2)
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def framed(picture: Bytes, box: tuple[int, int, int, int], factor: int) -> Bytes:
    """An enlarged picture with a frame around pixels of the image: `box` is their left, top, width and height."""
    import numpy as np
    from PIL import Image, ImageDraw

    x, y, w, h = (side * factor for side in box)
    drawn = Image.fromarray(picture)
    pen = ImageDraw.Draw(drawn)
    # White within black is seen on any ground.
    for away, colour, line in ((3, "black", 3), (2, "white", 1)):
        pen.rectangle([x - away, y - away, x + w + away - 1, y + h + away - 1], outline=colour, width=line)
    return np.asarray(drawn)


def draw_sheet(
    how: Layout, rows: Sequence[Sequence[Bytes]], steps: Sequence[int], title: Sequence[str], bars: Bars | None = None
) -> Bytes:
    """Pictures `[H, W, 3]` of the layout's size as one, `[H', W', 3]`.

    Args:
        how: from `layout`.
        rows: a picture a step.
        steps: the columns' labels.
        title: phrases, written above with commas between, on as many lines as they need.
        bars: scales to draw beside them.
    """
    import numpy as np

    font = _font(how)
    pad = how.font_size // 2
    body = [part for line in how.lines for part in _line(how, line, rows, steps, bars)]
    width = max(part.shape[1] for part in body)
    heading = [_written([(0, text, "lm")], width, how, font) for text in wrapped(title, width, font)]
    widest = max(part.shape[1] for part in heading + body)
    stacked = np.concatenate([_padded(part, None, widest) for part in heading + body])
    return np.pad(stacked, ((pad, pad), (pad, pad), (0, 0)), constant_values=255)


def _line(
    how: Layout, line: range, rows: Sequence[Sequence[Bytes]], steps: Sequence[int], bars: Bars | None
) -> list[Bytes]:
    """One line of a sheet from top to bottom: labels, a row a sample, bars of steps."""
    parts = [_labels(how, [steps[column] for column in line])]
    for number, row in enumerate(rows):
        cells = [_padded(row[column], how.height + how.gap, how.width + how.gap) for column in line]
        if bars and bars.per == "row":
            bar = color_bar(how.height, bars.scales[number], bars.colormap, how.font_size)
            cells.append(_padded(bar, how.height + how.gap, bar.shape[1]))
        parts.append(_beside(cells))
    if bars and bars.per == "step":
        parts.append(_beside([_lying_bar(how, bars.scales[column], bars.colormap) for column in line]))
    return parts


def _labels(how: Layout, steps: Sequence[int]) -> Bytes:
    """The step above each column, as far as there is room for it."""
    font = _font(how)
    width = len(steps) * (how.width + how.gap)
    centres = [column * (how.width + how.gap) + how.width / 2 for column in range(len(steps))]
    labels = fitting_labels([str(step) for step in steps], how, font)
    return _written([(x, label, "mm") for x, label in zip(centres, labels, strict=False)], width, how, font)


def fitting_labels(steps: Sequence[str], how: Layout, font: Any) -> list[str]:
    """`step 40`, or `40` where there is no room for more; nothing where there is none for that."""
    for form in ("step {}", "{}"):
        labels = [form.format(step) for step in steps]
        if max(font.getlength(label) for label in labels) <= how.width - how.gap:
            return labels
    return []


def _lying_bar(how: Layout, scale: Scale, colormap: str) -> Bytes:
    """A bar below a column, with the two ends of its scale under it: only the high one where there is no room."""
    import numpy as np

    font, inset = _font(how), how.font_size // 2  # or the numbers of neighbours would run together
    length = how.width - 2 * inset
    bar = np.full((how.gap + max(4, inset), how.width, 3), 255, np.uint8)
    bar[how.gap :, inset : inset + length] = colored(np.linspace(*scale, length)[None], scale, colormap)
    low, high = tick_labels(scale)
    ends = [(inset + length - 1.0, high, "rm")]
    if scale[1] > scale[0] and font.getlength(f"{low} {high}") <= length:
        ends.append((float(inset), low, "lm"))
    return _padded(np.concatenate([bar, _written(ends, how.width, how, font)]), None, how.width + how.gap)


def wrapped(phrases: Sequence[str], width: int, font: Any) -> list[str]:
    """Phrases with commas between on lines of at most `width` pixels; one that is longer alone has its own line."""
    lines = [phrases[0]]
    for phrase in phrases[1:]:
        longer = f"{lines[-1]}, {phrase}"
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines[-1] += ","
            lines.append(phrase)
    return lines


def _written(texts: Sequence[tuple[float, str, str]], width: int, how: Layout, font: Any) -> Bytes:
    """A band with texts, each at its x and anchored there; wider than `width` where a text is."""
    import numpy as np
    from PIL import Image, ImageDraw

    longest = max((int(font.getlength(text)) + 1 for _, text, anchor in texts if anchor == "lm"), default=0)
    band = Image.new("RGB", (max(width, longest), round(1.5 * how.font_size)), "white")
    pen = ImageDraw.Draw(band)
    for x, text, anchor in texts:
        pen.text((x, 0.75 * how.font_size), text, fill=INK, font=font, anchor=anchor)
    return np.asarray(band)


def _font(how: Layout) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(how.font_size)


def _beside(parts: Sequence[Bytes]) -> Bytes:
    import numpy as np

    return np.concatenate(parts, axis=1)


def _padded(picture: Bytes, height: int | None, width: int) -> Bytes:
    """With white below and to the right."""
    import numpy as np

    missing = (0 if height is None else height - picture.shape[0], width - picture.shape[1])
    return np.pad(picture, ((0, missing[0]), (0, missing[1]), (0, 0)), constant_values=255)
