"""Names of lines, where they cover none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

LINE = 100  # characters that fit beside each other under a figure as wide as a page's text
HANDLE = 8  # characters that the line in front of a name takes


def legend_below(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Names the lines below a figure, in as few rows as their lengths allow, which are about equally full."""
    columns = -(-len(names) // legend_rows(names))
    figure.legend(list(handles), list(names), loc="outside lower center", ncols=columns, frameon=False)


def legend_rows(names: Sequence[str]) -> int:
    """In how many rows the names stand."""
    fitting = max(1, LINE // (max(map(len, names)) + HANDLE))
    return -(-len(names) // fitting)
