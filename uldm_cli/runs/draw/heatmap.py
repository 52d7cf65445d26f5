"""A map of numbers with its title and the bar of its colours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from uldm_cli.runs.draw.plot import DEFAULT, Style, figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

LONGER = 3.4  # inches of the map's longer side
BESIDE, ABOVE = 0.9, 0.3  # inches for the bar, and around


def draw_heatmap(
    values: NDArray[Any], high: float, title: str, what: str, colormap: str = "gray", style: Style = DEFAULT
) -> Figure:
    """A map `[H, W]` from 0, the first colour, to `high`, the last; `what` labels the bar."""
    height, width = (LONGER * side / max(values.shape) for side in values.shape)
    head = 1.4 * style.font_size / 72 * len(title.splitlines())
    made, [[axes]] = figure(size=(max(width, 2.6) + BESIDE, max(height, 1.2) + ABOVE + head), style=style)
    with styled(style):
        drawn = axes.imshow(values, cmap=colormap, vmin=0, vmax=high, interpolation="none")
        axes.set_title(title, parse_math=False)
        axes.set_axis_off()
        bar = made.colorbar(drawn, cax=axes.inset_axes((1.03, 0, 0.15 / max(width, 1.0), 1)), label=what)
        bar.outline.set_visible(False)
    return made
