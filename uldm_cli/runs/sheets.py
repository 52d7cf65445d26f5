"""Sheets of several pictures, written as the config says: as pixels, or for print."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uldm_cli.errors import ConfigError
from uldm_cli.runs.draw.explain import layout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from uldm_cli.runs.draw.explain import Bars, Layout
    from uldm_cli.runs.plan import Plan

LARGEST_FONT = 1 / 3  # of a picture's width


def sheet_layout(plan: Plan, columns: int) -> Layout:
    """How the pictures of a run stand in a sheet.

    Raises:
        ConfigError: `--font-size` is too large for them.
    """
    sheet = plan.spec.sheet
    how = layout(plan.image_size, columns, sheet.dpi, sheet.font_size)
    most = min(how.width, how.height) * LARGEST_FONT
    if sheet.font_size is not None and how.font_size > most:
        raise ConfigError(
            f"--font-size {sheet.font_size:g}: too large for pictures that are {how.width / sheet.dpi:.2g} inches wide",
            f"It can be {int(most * 72 / sheet.dpi)} at most",
        )
    return how


def write_print(
    path: Path,
    plan: Plan,
    rows: Sequence[Sequence[NDArray[np.uint8]]],
    labels: Sequence[str],
    title: Sequence[str],
    about: Mapping[str, str],
    bars: Bars | None = None,
) -> None:
    """Writes a sheet as SVG or PDF; its pictures are of the layout's size. Not in a thread: matplotlib's look is
    one for all."""
    from uldm_cli.runs.draw.plot import Style, save_figure
    from uldm_cli.runs.draw.sheet import sheet_figure

    dpi, how = plan.spec.sheet.dpi, sheet_layout(plan, len(labels))
    figure = sheet_figure(how, rows, labels, title, bars, dpi)
    save_figure(figure, path, {**about, "title": ", ".join(title)}, Style(dpi, how.font_size * 72 / dpi))
