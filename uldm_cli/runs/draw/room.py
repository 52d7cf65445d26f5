"""Room for words: names of lines where they cover none, and figures that grow with large type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from uldm_cli.runs.draw.plot import Style

LINE = 80  # characters that fit beside each other under a figure as wide as a page's text, in the largest type
HANDLE = 8  # characters that the line in front of a name takes
LARGEST_TYPE = 11.0  # points, for which the sizes of figures are made


def enlarged(size: tuple[float, float], style: Style) -> tuple[float, float]:
    """Width and height of a figure in inches, larger where its words would else run into each other."""
    factor = max(1.0, style.font_size / LARGEST_TYPE)
    return size[0] * factor, size[1] * factor


def legend_below(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Names the lines below a figure, in as few rows as their lengths allow, which are about equally full."""
    columns = -(-len(names) // legend_rows(names))
    figure.legend(list(handles), list(names), loc="outside lower center", ncols=columns, frameon=False)


def legend_rows(names: Sequence[str]) -> int:
    """In how many rows the names stand."""
    fitting = max(1, LINE // (max(map(len, names)) + HANDLE))
    return -(-len(names) // fitting)
