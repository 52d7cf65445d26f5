"""Training curves of several runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uldm_cli.runs.draw.plot import COLORS, DEFAULT, Style, figure, styled
from uldm_cli.runs.draw.room import enlarged, legend_below, legend_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure

COLUMNS = 3
WIDTH, HEIGHT = 7.0, 2.0  # inches, of the figure and of a row
DASHES = ("-", "--", ":")  # of the first, second and third time that the colours are used
FAINT = 0.3  # opacity of what was logged, behind its average


@dataclass(frozen=True)
class Curve:
    """One figure of one run."""

    run: int
    """Number of the run."""
    steps: Sequence[float]
    values: Sequence[float]
    average: Sequence[float]
    """The values, smoothed; the values themselves where nothing is smoothed."""


def draw_curves(
    panels: Mapping[str, Sequence[Curve]], names: Sequence[str], style: Style = DEFAULT, *, log: bool = False
) -> Figure:
    """A panel a figure, by its title; a colour a run; the runs' names below.

    `log` draws a panel in a logarithmic scale where all its values are above 0, and not all the same.
    """
    columns = 2 if len(panels) == 4 else min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    size = (WIDTH * max(columns, 2) / COLUMNS, rows * HEIGHT + 0.3 + 0.2 * legend_rows(names))
    made, axes = figure(rows, columns, size=enlarged(size, style), style=style)
    with styled(style):
        for panel, (title, curves) in zip(axes.flat, panels.items(), strict=False):
            _panel(panel, title, curves, log=log)
        for panel in axes.flat[len(panels) :]:
            panel.remove()
        for panel in axes.flat[max(len(panels) - columns, 0) : len(panels)]:
            panel.set_xlabel("step")
        handles = [_line(number) for number in range(len(names))]
        legend_below(made, handles, names)
    return made


def _panel(axes: Any, title: str, curves: Sequence[Curve], *, log: bool) -> None:
    axes.set_title(title, loc="left")
    for curve in curves:
        look = _look(curve.run)
        marker = "o" if len(curve.steps) == 1 else ""
        if list(curve.average) != list(curve.values):
            axes.plot(curve.steps, curve.values, **look, alpha=FAINT, linewidth=0.8)
        axes.plot(curve.steps, curve.average, **look, marker=marker, markersize=3)
    values = [value for curve in curves for value in curve.values if math.isfinite(value)]
    if log and values and 0 < min(values) < max(values):
        _in_powers(axes)


def _in_powers(axes: Any) -> None:
    """A logarithmic scale, with numbers as elsewhere: round ones, where it spans less than a power of ten."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    few, powers = high < 10 * low, high > 1000 * low
    locator = MaxNLocator(5) if few else LogLocator(subs=(1.0,) if powers else (1.0, 2.0, 5.0))
    axes.yaxis.set(major_locator=locator, major_formatter=StrMethodFormatter("{x:g}"), minor_locator=NullLocator())


def _look(run: int) -> dict[str, str]:
    return {"color": COLORS[run % len(COLORS)], "linestyle": DASHES[run // len(COLORS) % len(DASHES)]}


def _line(run: int) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **_look(run))  # type: ignore[arg-type]
