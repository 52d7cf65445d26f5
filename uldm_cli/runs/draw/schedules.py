"""Noise schedules as curves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uldm_cli.runs.draw.plot import COLORS, DEFAULT, Style, figure, styled
from uldm_cli.runs.draw.room import enlarged, legend_below

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

WIDTH, HEIGHT = 7.0, 2.7  # inches


@dataclass(frozen=True)
class Table:
    """A schedule's values at its T timesteps, each float64 `[T]`."""

    name: str
    alphas_cumprod: Floats
    log_snr: Floats
    betas: Floats

    @property
    def T(self) -> int:
        """Number of timesteps."""
        return len(self.betas)

    @property
    def even(self) -> int | None:
        """The first timestep that holds no more signal than noise; None where there is none."""
        below = (self.log_snr <= 0).nonzero()[0]
        return int(below[0]) if len(below) else None


def draw_tables(tables: Sequence[Table], style: Style = DEFAULT) -> Figure:
    """Signal, signal-to-noise ratio and betas of schedules together; over t / T where they differ in T."""
    same = len({table.T for table in tables}) == 1
    made, axes = figure(1, 3, size=enlarged((WIDTH, HEIGHT), style), style=style)
    with styled(style):
        signal, snr, betas = axes.flat
        _panel(signal, "Signal left, $\\bar\\alpha_t$", tables, "alphas_cumprod", same)
        _panel(snr, "Log SNR, $\\ln(\\alpha_t^2 / \\sigma_t^2)$", tables, "log_snr", same)
        _panel(betas, "Noise of a step, $\\beta_t$", tables, "betas", same)
        smallest = min(float(table.betas[table.betas > 0].min(initial=1.0)) for table in tables)
        if max(float(table.betas.max()) for table in tables) > 50 * smallest:
            betas.set_yscale("log")
        names = [table.name for table in tables]
        legend_below(made, list(signal.lines), names)
    return made


def _panel(axes: Any, title: str, tables: Sequence[Table], values: str, same: bool) -> None:
    import numpy as np

    axes.set_title(title, loc="left")
    axes.set_xlabel("timestep t" if same else "t / T")
    for number, table in enumerate(tables):
        t = np.arange(table.T)
        x = t if same else (t + 1) / table.T
        axes.plot(x, getattr(table, values), linestyle=_dash(tables[:number], table))


def _dash(before: Sequence[Table], table: Table) -> str:
    """Broken where the line would hide that of an equal schedule, or has the colour of another."""
    import numpy as np

    equal = any(other.T == table.T and np.allclose(other.alphas_cumprod, table.alphas_cumprod) for other in before)
    return "--" if equal or len(before) >= len(COLORS) else "-"
