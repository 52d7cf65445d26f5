"""Samples beside what is nearest to them: a row a sample, each picture with its distance below."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from uldm_cli.runs.draw.plot import DEFAULT, TEXT, Style, styled

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

CELL = 0.8  # inches of a picture's side, or a little more, so that each of its pixels gets as many of the print's
GAP = 0.06
LETTER = 0.6  # of the font's size: about the width of a letter, rather more than less
NEAR = "#b34700"  # of the distances that are nearer than usual: dark enough to be read as text
PALE = "#8c8c8c"


@dataclass(frozen=True)
class Cell:
    """A picture `[H, W, 3 or 1]` and what is written below it."""

    image: Bytes
    label: str
    near: bool = False


@dataclass(frozen=True)
class Row:
    """A sample, and groups of pictures that are near to it."""

    sample: Cell
    groups: Sequence[Sequence[Cell]]


def draw_nearest(
    rows: Sequence[Row], headings: Sequence[str], title: str, notes: Sequence[str], style: Style = DEFAULT
) -> Figure:
    """The rows below each other.

    Args:
        rows: all of one size, and with as many groups as there are headings after the first.
        headings: above the samples, then above each group.
        title: on top.
        notes: lines below.
        style: how it is printed.
    """
    from matplotlib.figure import Figure

    place = _Places(rows, headings, title, style)
    lines = [(note, line) for note in notes for line in wrap(note, int(place.width / place.letter))]
    height = place.bottom + round((len(lines) + 0.3) * place.line)
    figure = Figure(figsize=(place.width / style.dpi, height / style.dpi), dpi=style.dpi)
    with styled(style):
        axes: Any = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        _text(axes, place.gap, place.line * 0.8, title, style.font_size, ha="left")
        for start, count, heading in zip(place.starts, place.counts, headings, strict=True):
            _heading(axes, place, start, count, heading, style)
        for i, row in enumerate(rows):
            for start, cells in zip(place.starts, ([row.sample], *row.groups), strict=True):
                for j, cell in enumerate(cells):
                    _cell(axes, place, start + j * place.step, place.top + i * place.row, cell, style)
        for i, (note, line) in enumerate(lines):
            y, color = place.bottom + (i + 0.5) * place.line, NEAR if note.startswith("bold") else TEXT
            _text(axes, place.gap, y, line, 0.89 * style.font_size, "left", color=color)
        axes.set(xlim=(0, place.width), ylim=(height, 0))
    return figure


class _Places:
    """Where things go, in pixels of the print from its upper left corner: whole ones, so that pictures stay sharp."""

    def __init__(self, rows: Sequence[Row], headings: Sequence[str], title: str, style: Style) -> None:
        side = rows[0].sample.image.shape[0]
        wanted = CELL * style.dpi
        self.cell = side * max(round(wanted / side), 1) if side <= wanted * 1.25 else round(wanted)
        self.gap = max(round(GAP * style.dpi), 1)
        self.letter = LETTER * style.font_size * style.dpi / 72
        self.line = round(style.font_size * 1.6 * style.dpi / 72)
        self.step = self.cell + self.gap
        self.row = self.cell + self.line + self.gap
        self.top = round(2.9 * self.line)
        self.counts = [1, *(max(len(row.groups[i]) for row in rows) for i in range(len(rows[0].groups)))]
        self.starts = [self.gap]
        for count, heading in zip(self.counts, headings, strict=True):
            taken = max(count * self.step, round(len(heading) * self.letter))
            self.starts.append(self.starts[-1] + taken + 2 * self.gap)
        self.width = max(self.starts.pop() - self.gap, round(len(title) * self.letter) + 2 * self.gap)
        self.bottom = self.top + len(rows) * self.row


def _heading(axes: Axes, place: _Places, start: int, count: int, heading: str, style: Style) -> None:
    """A name over a group, and a line as wide as it."""
    width = max(count * place.step - place.gap, round(len(heading) * place.letter))
    y = place.top - 0.35 * place.line
    axes.plot([start, start + width], [y, y], color=PALE, linewidth=0.7, solid_capstyle="butt")
    _text(axes, start, y - 0.55 * place.line, heading, style.font_size, "left")


def _cell(axes: Axes, place: _Places, left: int, top: int, cell: Cell, style: Style) -> None:
    image = cell.image[..., 0] if cell.image.shape[-1] == 1 else cell.image
    axes.imshow(
        image,
        extent=(left, left + place.cell, top + place.cell, top),
        cmap="gray",
        vmin=0,
        vmax=255,
        interpolation="nearest" if place.cell % len(image) == 0 else "antialiased",
        aspect="auto",
    )
    label = shortened(cell.label, place.cell / style.dpi * 72 / (LETTER * style.font_size))
    at = left + place.cell / 2, top + place.cell + 0.5 * place.line
    _text(
        axes, *at, label, style.font_size * 0.89, color=NEAR if cell.near else TEXT, weight="bold" if cell.near else 400
    )


def _text(axes: Axes, x: float, y: float, text: str, size: float, ha: str = "center", **look: Any) -> None:
    axes.text(x, y, text, ha=ha, va="center", fontsize=size, parse_math=False, **look)


def shortened(text: str, room: float) -> str:
    """A name of at most `room` characters: of a longer one the end, which tells names apart more often."""
    most = max(int(room), 2)
    return text if len(text) <= most else "…" + text[-(most - 1) :]
