"""Plots of one look: what is drawn with matplotlib gets its figure here, and is written here."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

from uldm_cli.errors import ConfigError
from uldm_cli.runs.calls import signed
from uldm_cli.runs.files import atomic_write

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from matplotlib.figure import Figure
    from numpy.typing import NDArray

FORMATS = ("png", "svg", "pdf")

# Told apart by people of every colour vision, and in grey print by their order of brightness (Okabe and Ito, 2008).
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000")
TEXT = "#262626"
LINE = "#d9d9d9"  # of the grid


@dataclass(frozen=True)
class Style:
    """How a plot is printed."""

    dpi: int = 150
    """Pixels an inch, of a PNG."""
    font_size: float = 9.0
    """Of labels and titles, in points; the numbers at the axes and the legend are a little smaller."""


DEFAULT = Style()


def picture_format(path: Path) -> str:
    """The format that a file's ending asks for, one of FORMATS; to be called before anything is computed.

    Raises:
        ConfigError: it is none of them.
    """
    ending = path.suffix.lower().removeprefix(".")
    if ending not in FORMATS:
        raise ConfigError(f"--out {path}: a plot is written as .png, .svg or .pdf", "Choose one by the file's ending")
    return ending


@contextmanager
def styled(style: Style = DEFAULT) -> Iterator[None]:
    """To draw in: legends, titles and colour bars that are added to a figure take the look of this style."""
    import matplotlib

    with matplotlib.rc_context(_settings(style)):
        yield


def figure(
    rows: int = 1, columns: int = 1, *, size: tuple[float, float], style: Style = DEFAULT
) -> tuple[Figure, NDArray[Any]]:
    """An empty figure and its axes, laid out so that no label is cut off or covered.

    What is added to it is drawn within `styled`, too.

    Args:
        rows: of axes.
        columns: of axes.
        size: width and height in inches.
        style: how it is printed.

    Returns:
        The figure, of matplotlib's object interface (it needs no closing), and its axes, `[rows, columns]`.
    """
    from matplotlib.figure import Figure

    with styled(style):
        made = Figure(figsize=size, dpi=style.dpi, layout="constrained")
        axes: NDArray[Any] = made.subplots(rows, columns, squeeze=False)
    return made, axes


def save_figure(figure: Figure, path: Path, about: Mapping[str, str], style: Style = DEFAULT) -> None:
    """Writes a figure, atomically, as what its ending says; the same figure gives the same bytes.

    Args:
        figure: what to write.
        path: of the file, ending in .png, .svg or .pdf.
        about: kept in the file: as text by keyword in a PNG, with the command that runs; in SVG and PDF "title" as the
            title, and the others in the description.
        style: how it is printed.
    """
    kind = picture_format(path)
    if kind == "png":
        about = signed(path, about)
    encoded = BytesIO()
    with styled(style):
        figure.savefig(encoded, format=kind, dpi=style.dpi, metadata=_metadata(kind, about))
    atomic_write(path, lambda file: file.write(encoded.getbuffer()))


def _metadata(kind: str, about: Mapping[str, str]) -> dict[str, Any]:
    """What matplotlib puts into the file; without the date, which would make every file another."""
    if kind == "png":
        return {"Software": None, **about}
    described = "; ".join(f"{name}: {value}" for name, value in about.items() if name != "title")
    texts = {"Title": about.get("title", ""), "Description" if kind == "svg" else "Subject": described}
    return {"Date" if kind == "svg" else "CreationDate": None, **{name: text for name, text in texts.items() if text}}


def _settings(style: Style) -> dict[Any, Any]:
    """The look, as matplotlib's parameters."""
    from cycler import cycler

    small = round(style.font_size * 0.89, 1)
    return {
        "font.family": "DejaVu Sans",  # comes with matplotlib, so that every machine draws the same
        "font.size": style.font_size,
        "axes.titlesize": style.font_size,
        "axes.labelsize": style.font_size,
        "figure.titlesize": style.font_size,
        "xtick.labelsize": small,
        "ytick.labelsize": small,
        "legend.fontsize": small,
        "text.color": TEXT,
        "axes.labelcolor": TEXT,
        "axes.edgecolor": "#8c8c8c",
        "xtick.color": "#8c8c8c",
        "ytick.color": "#8c8c8c",
        "xtick.labelcolor": TEXT,
        "ytick.labelcolor": TEXT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.7,
        "xtick.major.width": 0.7,
        "ytick.major.width": 0.7,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": LINE,
        "grid.linewidth": 0.5,
        "lines.linewidth": 1.3,
        "legend.framealpha": 0.85,
        "legend.edgecolor": "none",
        "axes.prop_cycle": cycler(color=COLORS),
        "image.cmap": "viridis",
        "image.interpolation": "nearest",
        "pdf.fonttype": 42,  # text stays text; publishers refuse the older kind
        "svg.fonttype": "none",
        "svg.hashsalt": "uldm",
    }
