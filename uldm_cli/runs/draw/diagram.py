"""A network as a picture: its stages from left to right, and below them a table of what they are."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from uldm_cli.runs.draw.diagram_plan import (
    BETWEEN,
    LAYER_GAP,
    MARGIN,
    PATCH,
    SHEET,
    SHIFT,
    SKIP,
    Column,
    Plan,
    Ruler,
    make_plan,
    sheets,
)
from uldm_cli.runs.draw.plot import COLORS, DEFAULT, TEXT, Style, styled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from uldm_cli.runs.architecture import Architecture

    Points = Sequence[tuple[float, float]]

BLOCK = "block"
"""What the shapes of the stages are called (`get_gid`)."""

_BLUE, _ORANGE, _GREEN, _PURPLE, _, _RED, _ = COLORS
_GREY, _PALE, _RULE = "#6b7280", "#dee4eb", "#c5cad1"


def _lighter(color: str, white: float) -> str:
    """A colour mixed with this share of white."""
    channels = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(c + (255 - c) * white):02x}" for c in channels)


_INK = {
    "convolution": "#a3abb6",
    "residual": _lighter(_BLUE, 0.3),
    "attention": _lighter(_ORANGE, 0.1),
    "transformer": _lighter(_RED, 0.2),
    "condition": _lighter(_PURPLE, 0.15),
}
_SIGNAL_INK = {"time": "#4a4a4a", "context": _PURPLE}
_LATENT = _lighter(_GREEN, 0.35)
_RGB = ("#e08a84", "#8fc08a", "#86a9d6")


def architecture_figure(architecture: Architecture, style: Style = DEFAULT) -> Figure:
    """Draws a network.

    Args:
        architecture: what it is made of.
        style: how it is printed. The figure is as large as its texts need.

    Returns:
        The figure, whose size is not to be changed.
    """
    with styled(style):
        ruler = Ruler(style)
        plan = make_plan(architecture, ruler)
        pen = _Pen(plan, ruler)
        pen.head()
        pen.joints()
        for column in plan.columns:
            pen.stage(column)
        pen.skips()
        pen.signals()
        pen.table()
        pen.legend()
    return pen.figure


class _Pen:
    """Draws a plan."""

    def __init__(self, plan: Plan, ruler: Ruler) -> None:
        from matplotlib.figure import Figure

        self.plan, self.ruler = plan, ruler
        self.figure = Figure(figsize=(plan.width, plan.height), dpi=ruler.dpi)
        self._axes = self.figure.add_axes((0, 0, 1, 1))
        self._axes.set(xlim=(0, plan.width), ylim=(plan.height, 0))
        self._axes.set_axis_off()

    def head(self) -> None:
        """The name, and what there is to say of the whole."""
        ruler, y = self.ruler, MARGIN + self.ruler.line
        self._text(MARGIN, y, self.plan.title, size=ruler.large, weight="bold")
        for line in self.plan.facts:
            y += ruler.line * 1.1
            self._text(MARGIN, y, line, color=_GREY)

    def joints(self) -> None:
        """What goes from each stage to the next; it narrows where the size halves."""
        for one, other in pairwise(self.plan.columns):
            self._polygon([*self._edge(one, one.right), *reversed(self._edge(other, other.left))], _PALE)

    def _edge(self, column: Column, x: float) -> Points:
        """Where a joint ends at a stage, from top to bottom; behind sheets, whose corners would be left open."""
        top, bottom = self.plan.centre - column.flow / 2, self.plan.centre + column.flow / 2
        if column.stage.kind == "maps":
            return [(column.right - SHEET / 2, top), (column.left + SHEET / 2, bottom)]
        return [(x, top), (x, bottom)]

    def stage(self, column: Column) -> None:
        """What stands for a stage, and its caption."""
        draw = {"maps": self._maps, "codebook": self._codebook, "posterior": self._posterior}
        draw.get(column.stage.kind, self._layers)(column)
        y = self.plan.centre - column.height / 2 - 0.03 - 0.2 * self.ruler.line
        for line in reversed(column.caption):
            self._text(column.x, y, line, size=self.ruler.small, ha="center")
            y -= self.ruler.line

    def _layers(self, column: Column) -> None:
        """A bar a layer."""
        layers = [layer.kind for layer in column.stage.layers if layer.kind != "resampling"]
        pitch = (column.body + LAYER_GAP) / len(layers)
        gap = min(LAYER_GAP, pitch / 3)
        for i, kind in enumerate(layers):
            self._block(column.left + i * pitch, column.height, pitch - gap, _INK[kind])

    def _maps(self, column: Column) -> None:
        """A sheet a channel, the first in front."""
        stage = column.stage
        own, beside = sheets(stage.channels), sheets(stage.beside)
        colors = [_LATENT] * own + [_INK["condition"]] * beside
        if stage.part == "image":
            colors = list(_RGB) if stage.channels == 3 else [_RULE] * own
        more = len(colors) - 1
        height = column.height - more * SHIFT
        top = self.plan.centre - column.height / 2
        for i, color in reversed(list(enumerate(colors))):
            self._rectangle(column.left + i * SHIFT, top + (more - i) * SHIFT, SHEET, height, color, edge="white")

    def _codebook(self, column: Column) -> None:
        """Cells of different shades."""
        rows, columns = 5, 3
        width, height = column.body / columns, column.height / rows
        for i in range(rows * columns):
            x, y = column.left + i % columns * width, self.plan.centre - column.height / 2 + i // columns * height
            self._rectangle(x, y, width, height, _lighter(_GREEN, 0.2 + 0.6 * (i * 7 % 15) / 15), edge="white")

    def _posterior(self, column: Column) -> None:
        """The density of a normal distribution."""
        import numpy as np

        x = np.linspace(-3, 3, 61)
        base = self.plan.centre + column.height / 2 - 0.05
        curve = base - np.exp(-(x**2) / 2) * (column.height - 0.12)
        self._block(column.left, column.height, column.body, "white", edge=_GREEN)
        across = column.x + x / 6 * (column.body - 0.08)
        self._polygon([*zip(across, curve, strict=True), (across[-1], base), (across[0], base)], _LATENT)

    def skips(self) -> None:
        """Lines over all that is between two stages."""
        plan = self.plan
        for skip in plan.architecture.skips:
            start, end = plan.columns[skip.start], plan.columns[skip.end]
            top = plan.centre - start.height / 2
            self._arch(start.x, end.x, top - SKIP, top - 0.03)

    def _arch(self, start: float, end: float, top: float, foot: float) -> None:
        from matplotlib.patches import FancyArrowPatch
        from matplotlib.path import Path

        r = min(0.12, foot - top)
        points = [(start, foot), (start, top + r), (start, top), (start + r, top)]
        points += [(end - r, top), (end, top), (end, top + r), (end, foot)]
        codes = [Path.MOVETO, *(Path.LINETO, Path.CURVE3, Path.CURVE3) * 2, Path.LINETO]
        arrow = FancyArrowPatch(path=Path(points, codes), arrowstyle="-|>", mutation_scale=6, color=_GREY, lw=0.8)
        self._axes.add_patch(arrow)

    def signals(self) -> None:
        """A line below the stages for each, from which an arrow goes up to every stage that takes it."""
        plan, count = self.plan, len(self.plan.signals)
        for i, (signal, words) in enumerate(zip(plan.architecture.signals, plan.signals, strict=True)):
            y = plan.bottom + 0.24 + i * self.ruler.line * 1.2
            color = _SIGNAL_INK[signal.kind]
            self._text(
                plan.left - 0.25, y + self.ruler.line * 0.25, words, color=color, size=self.ruler.small, ha="right"
            )
            takers = [plan.columns[number] for number in signal.stages]
            shift = 0.07 * (i - (count - 1) / 2)
            self._line([(plan.left - 0.18, y), (takers[-1].x + shift, y)], color)
            for column in takers:
                self._arrow(column.x + shift, y, plan.centre + column.height / 2 + 0.03, color)

    def _arrow(self, x: float, start: float, end: float, color: str) -> None:
        from matplotlib.patches import FancyArrowPatch

        self._axes.add_patch(
            FancyArrowPatch(
                (x, start), (x, end), arrowstyle="-|>", mutation_scale=5, color=color, lw=0.8, shrinkA=0, shrinkB=0
            )
        )

    def table(self) -> None:
        """A column of figures below each stage."""
        plan, ruler = self.plan, self.ruler
        y = plan.table + 0.05
        lines = max(len(part.lines) for part in plan.parts)
        for part in plan.parts:
            first, last = plan.columns[part.first], plan.columns[part.last]
            left, right = first.x - first.width / 2, last.x + last.width / 2
            for i, line in enumerate(part.lines):
                row = y + (lines - len(part.lines) + i + 0.75) * ruler.line
                self._text((left + right) / 2, row, line, ha="center", weight="bold")
            self._line([(left, y + (lines + 0.1) * ruler.line), (right, y + (lines + 0.1) * ruler.line)], _RULE, 0.9)
        y += (lines + 0.1) * ruler.line
        for i, head in enumerate(plan.heads):
            y += ruler.line
            self._text(plan.left - 0.25, y, head, color=_GREY, size=ruler.small, ha="right")
            for column in plan.columns:
                self._text(column.x, y, column.cells[i], size=ruler.small, ha="center")

    def legend(self) -> None:
        """What the shapes mean."""
        ruler, y = self.ruler, self.plan.under + self.ruler.line * 0.75
        for line in self.plan.legend:
            x = MARGIN
            for entry in line:
                self._sign(entry.sign, x, y)
                self._text(x + PATCH + 0.07, y, entry.words, size=ruler.small)
                x += entry.width + BETWEEN
            y += ruler.line
        words = "Height follows the size, a bar's width the channels, both as logarithms."
        self._text(MARGIN, y, words, size=ruler.small, color=_GREY)

    def _sign(self, sign: str, x: float, y: float) -> None:
        height = 0.6 * self.ruler.line
        top = y - height * 0.9
        if sign == "resampling":
            inset = height * 0.3
            points = [(x, top), (x + PATCH, top + inset), (x + PATCH, top + height - inset), (x, top + height)]
            self._polygon(points, _PALE)
        elif sign == "skip":
            self._line([(x, top + height / 2), (x + PATCH, top + height / 2)], _GREY)
        else:
            self._rectangle(x, top, PATCH, height, _INK[sign])

    def _text(self, x: float, y: float, words: str, **how: Any) -> None:
        """A line whose letters stand on `y`."""
        given: dict[str, Any] = {"size": self.ruler.size, "color": TEXT, "ha": "left", "va": "baseline"} | how
        if words:
            self._axes.text(x, y, words, parse_math=False, **given)

    def _block(self, x: float, height: float, width: float, color: str, edge: str = "none") -> None:
        """A rectangle around the middle of the stages."""
        self._rectangle(x, self.plan.centre - height / 2, width, height, color, edge=edge)

    def _rectangle(self, x: float, y: float, width: float, height: float, color: str, *, edge: str = "none") -> None:
        from matplotlib.patches import Rectangle

        shape = Rectangle((x, y), width, height, facecolor=color, edgecolor=edge, linewidth=0.8, gid=BLOCK)
        self._axes.add_patch(shape)

    def _polygon(self, points: Points, color: str) -> None:
        from matplotlib.patches import Polygon

        self._axes.add_patch(Polygon(points, closed=True, facecolor=color, edgecolor="none"))

    def _line(self, points: Points, color: str, width: float = 0.8) -> None:
        from matplotlib.lines import Line2D

        self._axes.add_line(Line2D(*zip(*points, strict=True), color=color, linewidth=width))
