"""An image at timesteps of the forward process, as one figure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from uldm_cli.runs.draw.plot import DEFAULT, LINE, Style, figure, styled
from uldm_cli.runs.draw.room import enlarged

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

SMALLEST = 1.35  # inches of a picture's side, so that the labels have room
LABEL = 0.42  # inches of height for the labels of a row


@dataclass(frozen=True)
class Noised:
    """An image at a timestep."""

    t: int
    log_snr: float
    """Natural logarithm of the ratio of signal to noise."""
    picture: NDArray[np.uint8]
    """`[H, W, 3]`."""


def draw_noised(rows: Sequence[Sequence[Noised]], names: Sequence[str], style: Style = DEFAULT) -> Figure:
    """A row a schedule, with its name to the left, and a column a timestep; every pixel of a picture is kept."""
    side = max(SMALLEST, 1.08 * rows[0][0].picture.shape[0] / style.dpi)
    size = (len(rows[0]) * side + 0.3, len(rows) * (side + LABEL))
    made, axes = figure(len(rows), len(rows[0]), size=enlarged(size, style), style=style)
    with styled(style):
        for number, (panels, row, name) in enumerate(zip(axes, rows, names, strict=True)):
            told = number > 0 and [noised.t for noised in row] == [noised.t for noised in rows[0]]
            panels[0].set_ylabel(name)
            for panel, noised in zip(panels, row, strict=True):
                panel.imshow(noised.picture)
                panel.set_title("" if told else f"t = {noised.t}")
                panel.set_xlabel(f"ln SNR {_shown(noised.log_snr)}")
                panel.set(xticks=[], yticks=[])
                panel.spines[:].set(visible=True, color=LINE)
    return made


def _shown(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:+.1f}".replace("-0.0", "+0.0").replace("-", "\N{MINUS SIGN}")
