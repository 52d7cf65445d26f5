"""What the numbers of a sampling run did along its steps, as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uldm_cli.runs.draw.plot import COLORS, DEFAULT, TEXT, Style, figure, styled
from uldm_cli.runs.draw.room import enlarged, legend_below

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

WIDTH, HEIGHT = 7.0, 4.6  # inches: the width of a page's text
MANY = "#b0b0b0"  # of each line, where there are more than there are colours


@dataclass(frozen=True)
class Course:
    """One sample along its K logged steps."""

    name: str
    steps: Sequence[int]
    norm: Floats
    """`[K]`, of the state: the root of its mean square."""
    log_snr: Floats
    """`[K]`, natural logarithm of the schedule's ratio of signal to noise, where the network was called."""
    change: Floats
    """`[K - 1]`, of the difference to the state logged before: the root of its mean square."""
    lpips: Floats | None
    """`[K]`, to the last image; None where images are too small for it."""


def draw_courses(courses: Sequence[Course], title: str, style: Style = DEFAULT) -> Figure:
    """Four panels over the steps, a line a sample; of more samples than there are colours, the mean stands out."""
    from matplotlib.ticker import MaxNLocator

    made, axes = figure(2, 2, size=enlarged((WIDTH, HEIGHT), style), style=style)
    with styled(style):
        made.suptitle(title)
        norm, snr, change, lpips = axes.flat
        _panel(norm, "Norm of the state, $\\|x_t\\| / \\sqrt{d}$", [(c.steps, c.norm) for c in courses])
        _panel(snr, "Log SNR, $\\ln(\\alpha^2 / \\sigma^2)$", [(c.steps, c.log_snr) for c in courses[:1]])
        pairs = [(c.steps[1:], c.change) for c in courses]
        _panel(change, "Change between logged steps, $\\|\\Delta x_t\\| / \\sqrt{d}$", pairs)
        found = [(c.steps, c.lpips) for c in courses if c.lpips is not None]
        _panel(lpips, "LPIPS to the final image", found)
        if not found:
            lpips.text(0.5, 0.5, "the images are too small", transform=lpips.transAxes, ha="center", va="center")
            lpips.set_yticks([])
        snr.lines[0].set_color(TEXT)  # it is the schedule's, not a sample's
        for panel in axes.flat:
            panel.set_xlim(0, courses[0].steps[-1] * 1.03)
            panel.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))
        for panel in axes[1]:
            panel.set_xlabel("completed steps")
        _legend(made, norm, courses)
    return made


def _panel(axes: Any, title: str, lines: Sequence[tuple[Sequence[int], Floats]]) -> None:
    """A line each, dotted where there are so few steps that one could take the line for more."""
    import numpy as np

    axes.set_title(title, loc="left")
    many = len(lines) > len(COLORS)
    for steps, values in lines:
        marker = "o" if len(steps) <= 25 else ""
        look = {"color": MANY, "linewidth": 0.6, "alpha": 0.6} if many else {"marker": marker, "markersize": 3}
        axes.plot(steps, values, **look)
    if many:
        axes.plot(lines[0][0], np.mean([values for _, values in lines], axis=0), color=COLORS[0])


def _legend(made: Figure, axes: Any, courses: Sequence[Course]) -> None:
    """Which line is which sample, below the panels; one line needs none."""
    if len(courses) == 1:
        return
    if len(courses) > len(COLORS):
        handles, names = [axes.lines[0], axes.lines[-1]], [f"{len(courses)} samples", "their mean"]
    else:
        handles, names = list(axes.lines), [course.name for course in courses]
    legend_below(made, handles, names)
