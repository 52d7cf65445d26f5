"""Maps of values on top of pictures: enlarged, coloured, blended, and the bar that says what a colour means."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from uldm_cli.errors import ConfigError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Floats = NDArray[Any]
    Scale = tuple[float, float]

Mode = Literal["blend", "color", "none"]

# In each of these, equal steps of the value look like equal steps, also in grey print.
COLORMAPS = ("inferno", "magma", "plasma", "viridis", "cividis", "gray")

NOT_A_NUMBER = "#7f7f7f"

FONT_SIZE = 11
BAR = 12  # pixels of width
TICK = 3
MARGIN = 4
LABEL_SPACE = 1.8  # of the font's size: what a tick label takes at least, from one to the next
MOST_DIGITS = 12
SMALLEST_PLAIN, LARGEST_PLAIN = 1e-3, 1e5  # numbers below and from there are written with an exponent


def check_colormap(name: str) -> None:
    """That there is a colormap of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in COLORMAPS:
        near = nearest(name, COLORMAPS)
        hint = f"Did you mean {near!r}?" if near else f"There are: {', '.join(COLORMAPS)}"
        raise ConfigError(f"there is no colormap {name!r}", hint)


def resized(map: Floats, size: tuple[int, int], how: Literal["bilinear", "nearest"] = "bilinear") -> Floats:
    """A map `[h, w]` at `size` (height, width), float32.

    A pixel's value belongs to its middle, so that what is bright in a corner of the map is bright in that corner of
    the picture. Values between are interpolated, or those of the nearest pixel; beyond the outermost middles they stay
    what they are there. Nothing is averaged when a map shrinks.
    """
    import numpy as np

    map = np.asarray(map, np.float32)
    if how == "nearest":
        down, across = (np.arange(new) * old // new for old, new in zip(map.shape, size, strict=True))
        return np.ascontiguousarray(map[down[:, None], across])
    return np.ascontiguousarray(_stretched(_stretched(map, size[0]).T, size[1]).T)


def _stretched(map: Floats, length: int) -> Floats:
    """The first axis linearly interpolated to `length`."""
    import numpy as np

    middles = (np.arange(length) + 0.5) * len(map) / length - 0.5
    where = np.clip(middles, 0, len(map) - 1)
    below = where.astype(int)
    above = np.minimum(below + 1, len(map) - 1)
    part = (where - below).astype(np.float32)[:, None]
    stretched: Floats = map[below] * (1 - part) + map[above] * part
    return stretched


def colored(map: Floats, scale: Scale, colormap: str = "inferno") -> Bytes:
    """A map `[H, W]` in colours, `[H, W, 3]`: the low end of `scale` is the first colour, the high end the last.

    What lies beyond is drawn as the nearer end. Where both ends are the same, everything is the first colour; what is
    not a number is grey.
    """
    import matplotlib
    import numpy as np

    check_colormap(colormap)
    low, high = scale
    values = np.asarray(map, np.float64)
    part = np.clip((values - low) / (high - low), 0.0, 1.0) if high > low else np.where(np.isnan(values), np.nan, 0.0)
    colors = matplotlib.colormaps[colormap].with_extremes(bad=NOT_A_NUMBER)
    painted: Bytes = colors(np.ma.masked_invalid(part), bytes=True)[..., :3]
    return np.ascontiguousarray(painted)


def overlaid(
    image: Bytes, map: Floats, scale: Scale, *, mode: Mode = "blend", alpha: float = 0.5, colormap: str = "inferno"
) -> Bytes:
    """A map `[H, W]` and the image `[H, W]` or `[H, W, 3]` that it is about, as one picture `[H, W, 3]`.

    Args:
        image: what the map is about.
        map: of the image's size; see `resized`.
        scale: see `colored`.
        mode: "blend" draws the map's colours over the image, "color" the map's colours alone, "none" the map alone as
            grey.
        alpha: how much of the map is in the blend, 0 to 1.
        colormap: one of COLORMAPS.
    """
    import numpy as np

    if mode != "blend":
        return colored(map, scale, colormap if mode == "color" else "gray")
    below = np.broadcast_to(image[:, :, None], (*image.shape, 3)) if image.ndim == 2 else image
    mixed = (1.0 - alpha) * below + alpha * colored(map, scale, colormap)
    return np.rint(mixed).astype(np.uint8)


def color_bar(height: int, scale: Scale, colormap: str = "inferno", font_size: float = FONT_SIZE) -> Bytes:
    """A bar of a scale's colours, the high end on top, with its numbers to the right: `[height, W, 3]` on white.

    It is made to stand to the right of pictures: there is a margin to its left.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    font_size = min(font_size, height / 2.6)  # two numbers have room
    font: Any = ImageFont.load_default(font_size)
    # The first and last number stand half above and half below the bar's ends.
    edge = min(round(font_size / 2), max((height - 2) // 2, 0))
    length = height - 2 * edge
    ticks = tick_values(scale, int(length / (LABEL_SPACE * font_size)))
    labels = tick_labels(ticks)
    text = max(int(np.ceil(font.getlength(label))) for label in labels)
    picture = Image.new("RGB", (2 * MARGIN + BAR + TICK + text + MARGIN, height), "white")
    ramp = np.linspace(scale[1], scale[0], length)[:, None].repeat(BAR, axis=1)
    picture.paste(Image.fromarray(colored(ramp, scale, colormap)), (MARGIN, edge))
    pen = ImageDraw.Draw(picture)
    low, high = scale
    for value, label in zip(ticks, labels, strict=True):
        y = edge + (length - 1) * ((high - value) / (high - low) if high > low else 0.5)
        pen.line([(MARGIN + BAR, round(y)), (MARGIN + BAR + TICK - 1, round(y))], fill=(60, 60, 60))
        pen.text((2 * MARGIN + BAR + TICK, y), label, fill=(60, 60, 60), font=font, anchor="lm")
    return np.asarray(picture)


def tick_values(scale: Scale, most: int) -> list[float]:
    """Round numbers on a scale, about as many as there is room for; its ends where no two round ones are on it."""
    from matplotlib.ticker import MaxNLocator

    low, high = scale
    if not high > low:
        return [low]
    found = MaxNLocator(nbins=max(most - 1, 1), steps=[1, 2, 2.5, 5, 10], min_n_ticks=2).tick_values(low, high)
    slack = (high - low) * 1e-9
    inside = [float(value) for value in found if low - slack <= value <= high + slack]
    return inside if len(inside) > 1 else [low, high]


def tick_labels(values: Sequence[float]) -> list[str]:
    """The numbers with as few digits as tell them apart, right to a hundredth of the step between them."""
    step = min((abs(b - a) for a, b in pairwise(values)), default=abs(values[0]))
    largest = max(map(abs, values))
    form = "f" if largest == 0 or SMALLEST_PLAIN <= largest < LARGEST_PLAIN else "e"
    for digits in range(MOST_DIGITS):
        labels = [f"{value + 0.0:.{digits}{form}}" for value in values]
        if all(abs(float(label) - value) <= step / 100 for label, value in zip(labels, values, strict=True)):
            break
    return labels
