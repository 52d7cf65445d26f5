"""Many pictures as one: a column a step, a row a sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

GAP = 2  # pixels of white between pictures, and around them
LABEL = 16  # pixels of height for the labels on top, in the usual size
FONT_SIZE = 11


def draw_grid(rows: Sequence[Sequence[Bytes]], labels: Sequence[str] = (), font_size: int = FONT_SIZE) -> Bytes:
    """Pictures of one size, `[H, W]` or `[H, W, 3]`, as one white-framed picture.

    Each column has its label above it, unless there are none or the pictures are too narrow for one.
    """
    import numpy as np

    first = rows[0][0]
    height, width = first.shape[:2]
    shape = (len(rows) * (height + GAP) + GAP, len(rows[0]) * (width + GAP) + GAP, *first.shape[2:])
    body = np.full(shape, 255, np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = GAP + i * (height + GAP), GAP + j * (width + GAP)
            body[top : top + height, left : left + width] = picture
    header = _header(labels, width, body.shape, font_size)
    return body if header is None else np.concatenate([header, body])


def _header(labels: Sequence[str], width: int, shape: tuple[int, ...], font_size: int) -> Bytes | None:
    """The labels centred over columns of `width` pixels, in a band as wide and of as many channels as `shape`.

    None without labels, and where one would run into its neighbour: small pictures stand better without.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    font: Any = ImageFont.load_default(font_size)
    if not labels or max(font.getlength(label) for label in labels) > width - GAP:
        return None
    high = LABEL * font_size // FONT_SIZE
    band = Image.new("L", (shape[1], high), 255)
    pen = ImageDraw.Draw(band)
    for j, label in enumerate(labels):
        centre = GAP + j * (width + GAP) + width / 2
        pen.text((centre, high / 2 + 1), label, fill=60, font=font, anchor="mm")
    grey = np.asarray(band)
    return grey if len(shape) == 2 else np.repeat(grey[:, :, None], shape[2], axis=2)


def squeezed(pictures: Bytes) -> list[Bytes]:
    """`[N, H, W, C]` as N pictures: the first three channels, or `[H, W]` of the first where there are one or two."""
    return [picture[..., 0] if picture.shape[-1] < 3 else picture[..., :3] for picture in pictures]
