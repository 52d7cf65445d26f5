"""Codes and latents as pictures: beside their image, counted, on a map, and each code alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from uldm_cli.runs.draw.grid import GAP
from uldm_cli.runs.draw.overlay import LABEL_SPACE, colored, resized, tick_labels, tick_values
from uldm_cli.runs.draw.page import Page, Words, font, letters, title_words
from uldm_cli.runs.draw.plot import COLORS, DEFAULT, LINE, Style, figure, styled

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Floats = NDArray[Any]
    Scale = tuple[float, float]

LEAST = 1.6  # inches of width that a picture has at least where several stand side by side
NARROWEST = 2.4  # inches of a page, so that there is room for a title
TILE = 0.4  # inches of width that a code's picture has at least
STEEP = 30  # times the median: where the most used code is above, uses are drawn on a logarithmic scale
COLUMNS = 16  # of codes on a page
CELL, WIDEST = 1.5, 13.0  # inches: of a latent's channel, and of all of them
TICK_INK = 60  # grey
DEAD = "#b0b0b0"


def ending_of(name: str, most: int) -> str:
    """As much of a name's end as has at most so many characters, an ellipsis included."""
    return name if len(name) <= most else "..." + name[3 - most :]


def rgb(picture: Bytes) -> Bytes:
    """`[H, W]` or `[H, W, 1]` as `[H, W, 3]`; what has three channels stays."""
    import numpy as np

    plain = picture[..., 0] if picture.ndim == 3 and picture.shape[2] == 1 else picture
    return np.repeat(plain[:, :, None], 3, axis=2) if plain.ndim == 2 else plain


def times(picture: Bytes, factor: int) -> Bytes:
    """A picture enlarged by a whole number, each pixel a square."""
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def beside(
    pictures: Sequence[Bytes],
    labels: Sequence[str],
    title: str = "",
    *,
    least: float = LEAST,
    bar: Scale | None = None,
    style: Style = DEFAULT,
) -> Page:
    """Pictures of one size side by side, each below its label, all below a title, and the bar of a scale.

    Small ones are enlarged by a whole number until they are `least` inches wide, so that labels fit and pixels show;
    with large ones the letters grow.
    """
    enlarged = [times(rgb(picture), -(-round(least * style.dpi) // picture.shape[1])) for picture in pictures]
    height, width = enlarged[0].shape[:2]
    size = letters(style) * max(1.0, width / (2 * LEAST * style.dpi))
    gap = max(GAP, round(width / 120))
    bar_size = min(0.89 * size, height / 2.6)  # two numbers have room
    extra = 0 if bar is None else _bar_width(height, bar, bar_size)
    across = max(len(enlarged) * (width + gap) + gap + extra, round(NARROWEST * style.dpi))
    words, above = title_words(title, gap, 0.3 * size, across - 2 * gap, size)
    top = round(0.3 * size if above else 0) + above + round(1.6 * size)
    page = Page(across, top + height + max(gap, round(bar_size / 2) if extra else 0), words=words)
    for i, (picture, label) in enumerate(zip(enlarged, labels, strict=True)):
        left = gap + i * (width + gap)
        page.pictures.append((left, top, picture))
        page.words.append(Words(left + width / 2, top - 0.75 * size, label, 0.89 * size))
    if bar is not None:
        _add_bar(page, (len(enlarged) * (width + gap) + gap, top), height, bar, bar_size)
    return page


def beside_map(
    pictures: Sequence[Bytes], map: Floats, scale: Scale, labels: Sequence[str], title: str, style: Style = DEFAULT
) -> Page:
    """As `beside`, with a map `[h, w]` as the last picture, its pixels squares, and the bar of its scale."""
    size = (pictures[0].shape[0], pictures[0].shape[1])
    painted = colored(resized(map, size, "nearest"), scale, "viridis")
    return beside([*pictures, painted], labels, title, bar=scale, style=style)


def _bar_labels(height: int, scale: Scale, size: float) -> list[tuple[float, str]]:
    values = tick_values(scale, int(height / (LABEL_SPACE * size)))
    return list(zip(values, tick_labels(values), strict=True))


def _bar_width(height: int, scale: Scale, size: float) -> int:
    """What a bar takes to the right of pictures."""
    text: float = max(font(size).getlength(label) for _, label in _bar_labels(height, scale, size))
    return round(2.8 * size + text)


def _add_bar(page: Page, at: tuple[int, int], height: int, scale: Scale, size: float) -> None:
    """A bar of a scale's colours, the high end on top, with its numbers to the right; as wide as a letter is high."""
    import numpy as np

    low, high = scale
    left, top, thick = at[0] + round(0.5 * size), at[1], round(size)
    ramp = np.linspace(high, low, height)[:, None].repeat(thick, axis=1)
    page.pictures.append((left, top, colored(ramp, scale, "viridis")))
    for value, label in _bar_labels(height, scale, size):
        down = (high - value) / (high - low) if high > low else 0.5
        tick = np.full((max(1, round(size / 14)), round(0.3 * size), 3), TICK_INK, np.uint8)
        page.pictures.append((left + thick, top + round((height - len(tick)) * down), tick))
        page.words.append(Words(left + thick + 0.55 * size, top + (height - 1) * down, label, size, "l"))


def draw_usage(counts: Floats, title: str, what: str, *, dead: bool, style: Style = DEFAULT) -> Figure:
    """The uses of the codes, the most used first.

    Args:
        counts: `[K]`.
        title: above it.
        what: the label of the counts.
        dead: also draw the codes that were not used at all, and the line of equal use.
        style: how it is printed.
    """
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    ordered = np.sort(counts)[::-1]
    shown = ordered if dead else ordered[ordered > 0]
    positive = ordered[ordered > 0]
    steep = len(positive) > 0 and positive[0] > STEEP * np.median(positive)
    made, [[axes]] = figure(size=(6.0, 3.2), style=style)
    with styled(style):
        axes.stairs(shown, np.arange(len(shown) + 1) + 0.5, fill=True, color=COLORS[0])
        if dead:
            axes.axhline(counts.mean(), color=COLORS[5], linestyle="--", linewidth=1, label="if all were used equally")
            axes.legend(loc="upper right")
        axes.set(title=title, xlabel="codes, the most used first", ylabel=what, xlim=(0.5, len(shown) + 0.5))
        if steep:
            axes.set_yscale("log", nonpositive="clip")
            axes.set_ylim(bottom=0.8 * positive[-1])
        else:
            axes.set_ylim(bottom=0)
        axes.grid(False, axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if not steep and not np.mod(shown, 1).any():  # not a moving average
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return made


def draw_map(points: Floats, shares: Floats, counts: Floats | None, title: str, style: Style = DEFAULT) -> Figure:
    """Codes as dots on a plane.

    Args:
        points: `[K, 2]`.
        shares: of the variance along the two directions, `[2]`.
        counts: how often each was used, `[K]`, drawn as its colour; zero is a dead code. None: not known.
        title: above it.
        style: how it is printed.
    """
    from matplotlib.colors import LogNorm

    made, [[axes]] = figure(size=(5.6, 4.6), style=style)
    small = 26 if len(points) < 2000 else 8
    with styled(style):
        used = points if counts is None else points[counts > 0]
        if counts is None:
            axes.scatter(*used.T, s=small, color=COLORS[0], alpha=0.6, linewidths=0)
        else:
            unused = points[counts == 0]
            if len(unused):
                rings = {"facecolors": "none", "edgecolors": DEAD, "linewidths": 0.7}
                axes.scatter(*unused.T, s=small, label=f"dead: {len(unused):,}", **rings)
                axes.legend(loc="best")
            if len(used):
                dots = axes.scatter(*used.T, s=small, c=counts[counts > 0], norm=LogNorm(), linewidths=0)
                bar = made.colorbar(dots, ax=axes, label="uses", pad=0.02)
                bar.outline.set_visible(False)
        axes.set_title(title)
        axes.set_aspect("equal", adjustable="datalim")
        for name, side, share in (("first", axes.set_xlabel, shares[0]), ("second", axes.set_ylabel, shares[1])):
            side(f"{name} principal component, {100 * share:.0f} % of the variance")
    return made


def draw_tiles(
    pictures: Sequence[Bytes], labels: Sequence[str], title: str, columns: int = COLUMNS, style: Style = DEFAULT
) -> Page:
    """Small pictures of one size, `[H, W, 3]`, row by row below a title, each above its label."""
    size = letters(style)
    small = 0.89 * size
    wanted = max(TILE * style.dpi, max(font(small).getlength(label) for label in labels))
    factor = math.ceil(wanted / pictures[0].shape[1])
    height, width = (factor * side for side in pictures[0].shape[:2])
    columns = min(columns, len(pictures))
    gap, band = max(GAP, round(width / 16)), round(1.5 * small)
    rows = -(-len(pictures) // columns)
    down, across = height + band + gap, width + gap
    wide = max(columns * across + gap, round(NARROWEST * style.dpi))
    words, above = title_words(title, gap, 0.3 * size, wide - 2 * gap, size)
    start = round(0.8 * size) + above
    page = Page(wide, start + rows * down, words=words)
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        row, column = divmod(number, columns)
        left, top = gap + column * across, start + row * down
        page.pictures.append((left, top, times(picture, factor)))
        page.words.append(Words(left + width / 2, top + height + band / 2, label, small))
    return page


def draw_channels(
    images: Sequence[Bytes], latents: Sequence[Floats], names: Sequence[str], scale: float, title: str, style: Style
) -> Figure:
    """Latents channel by channel: a row an image, which stands first, and a column a channel, with the grey's scale.

    Args:
        images: `[H, W]` or `[H, W, 3]`.
        latents: `[z, h, w]` each.
        names: of the images.
        scale: the value drawn white; its negative is black, zero mid-grey.
        title: above it.
        style: how it is printed.
    """
    columns = len(latents[0]) + 1
    cell = min(CELL, WIDEST / columns)
    size = (columns * cell + 0.9, len(images) * cell + 0.6)
    made, grid = figure(len(images), columns, size=(max(size[0], 4.5), size[1]), style=style)
    with styled(style):
        made.suptitle(title)
        for image, latent, name, row in zip(images, latents, names, grid, strict=True):
            row[0].imshow(image, **({"cmap": "gray", "vmin": 0, "vmax": 255} if image.ndim == 2 else {}))
            row[0].set_ylabel(ending_of(name, max(6, int(cell * 72 / (0.62 * style.font_size)))))
            for axes, channel in zip(row[1:], latent, strict=True):
                drawn = axes.imshow(channel, cmap="gray", vmin=-scale, vmax=scale)
        for number, axes in enumerate(grid[0]):
            axes.set_title(f"channel {number - 1}" if number else "image")
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(visible=True, color=LINE)
        bar = made.colorbar(drawn, ax=grid[:, -1].tolist(), label="value", pad=0.04, aspect=12 * len(images))
        bar.outline.set_visible(False)
    return made


def draw_posterior(mean: Floats, deviation: Floats, title: str, style: Style = DEFAULT) -> Figure:
    """How the means and standard deviations of a latent, `[z, h, w]` each, are distributed, a line a channel."""
    import numpy as np

    made, [panels] = figure(1, 2, size=(7.0, 3.4), style=style)
    names = ("mean", "standard deviation, its logarithm to the base 10")
    with styled(style):
        made.suptitle(title)
        for axes, name, values in zip(panels, names, (mean, np.log10(deviation)), strict=True):
            low, high = float(values.min()), float(values.max())
            edges = np.linspace(low, high, 41) if high > low else np.array([low - 0.5, low + 0.5])
            for number, channel in enumerate(values):
                lines = axes.stairs(*np.histogram(channel, edges), label=f"channel {number}", baseline=0)
                lines.set_linewidth(1.2)
            axes.set(xlabel=name, ylim=0)
        panels[0].set_ylabel("latents")
        if len(mean) <= len(COLORS):
            made.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(mean))
    return made
