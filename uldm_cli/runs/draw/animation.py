"""Films of pictures: GIF, animated PNG, and MP4 where PyAV is installed."""

from __future__ import annotations

import math
from fractions import Fraction
from io import BytesIO
from itertools import chain
from typing import TYPE_CHECKING, Any

from uldm_cli.errors import ConfigError, UldmError
from uldm_cli.runs.draw.grid import GAP
from uldm_cli.runs.files import atomic_write

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

FORMATS = {".gif": "gif", ".apng": "apng", ".png": "apng", ".mp4": "mp4"}
HELD = 1000  # milliseconds that the last picture stays
MOST_BYTES = 1 << 30
LARGEST_RATE = 50.0  # pictures a second; viewers slow a GIF down that wants more

WIDEST, TALLEST = 1024, 256  # of a row and of one picture, to which small ones are enlarged
IN_A_ROW = 5

INK, PALE = (60, 60, 60), (225, 225, 225)  # greys, for a GIF may have no other colour to spare
BAR = 3  # pixels of height


def film_format(path: Path) -> str:
    """What a file's ending asks for: "gif", "apng" or "mp4"; to be called before anything is drawn.

    Raises:
        ConfigError: it is none of these, or MP4 and PyAV is missing.
    """
    found = FORMATS.get(path.suffix.lower())
    if found is None:
        raise ConfigError(
            f"--out {path}: a film is written as .gif, .apng (or .png) or .mp4", "Choose one by the file's ending"
        )
    if found == "mp4":
        try:
            import av  # noqa: F401
        except ImportError as e:
            raise ConfigError(f"--out {path}: MP4 needs PyAV", "pip install 'uldm[video]', or write .gif") from e
    return found


def write_film(path: Path, pictures: Iterator[Bytes], count: int, fps: float, about: Mapping[str, str]) -> None:
    """Writes a film, atomically. The last picture stays a second; GIF and APNG then begin anew.

    Args:
        path: of the file; its ending says the format.
        pictures: uint8 `[H, W, 3]`, all of one size, taken one after the other. MP4 needs memory for a few of them,
            GIF and APNG for all.
        count: how many there are.
        fps: pictures a second.
        about: kept in the file: as text in APNG; of MP4 "title" is the title, and of GIF the comment.

    Raises:
        ConfigError: the film would not fit into memory as GIF or APNG.
        UldmError: the disk is full, or the encoder fails.
    """
    encoded = BytesIO()
    kind = film_format(path)
    first = next(pictures)
    if kind != "mp4" and count * first.nbytes > MOST_BYTES:
        size = f"{count} pictures of {first.shape[1]}x{first.shape[0]} pixels"
        raise ConfigError(f"{path}: {size} are too many for .{kind}", "Write .mp4, choose a --sample, or --zoom 1")
    encode = {"gif": _encode_gif, "apng": _encode_apng, "mp4": _encode_mp4}[kind]
    encode(encoded, chain([first], pictures), count, fps, about)
    atomic_write(path, lambda file: file.write(encoded.getbuffer()))


def _encode_gif(file: BytesIO, pictures: Iterator[Bytes], count: int, fps: float, about: Mapping[str, str]) -> None:
    """Each picture with the 256 colours that suit it. The format counts in hundredths of a second."""
    from PIL import Image

    images = (Image.fromarray(picture).quantize(256, Image.Quantize.MEDIANCUT) for picture in pictures)
    first = next(images)
    first.save(
        file,
        "GIF",
        save_all=True,
        append_images=images,
        duration=[round(100 / fps) * 10] * (count - 1) + [HELD],
        loop=0,
        comment=about.get("title", "").encode(),
    )


def _encode_apng(file: BytesIO, pictures: Iterator[Bytes], count: int, fps: float, about: Mapping[str, str]) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    information = PngInfo()
    for keyword, text in about.items():
        information.add_itxt(keyword, text)
    first, *others = (Image.fromarray(picture) for picture in pictures)
    times = [round(1000 / fps)] * (count - 1) + [HELD]
    first.save(file, "PNG", save_all=True, append_images=others, duration=times, loop=0, pnginfo=information)


def _encode_mp4(file: BytesIO, pictures: Iterator[Bytes], count: int, fps: float, about: Mapping[str, str]) -> None:
    """H.264 in the layout of colours that every player shows; at high quality, for noise is hard to encode."""
    import av

    try:
        with av.open(file, "w", format="mp4") as container:
            container.metadata["title"] = about.get("title", "")
            rate = Fraction(fps).limit_denominator(1000)
            stream: Any = container.add_stream("libx264", rate=rate, options={"crf": "16", "preset": "slow"})
            stream.pix_fmt = "yuv420p"
            for number, picture in enumerate(map(_even, _held(pictures, max(round(fps * HELD / 1000), 1)))):
                if number == 0:
                    stream.height, stream.width = picture.shape[:2]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    except av.FFmpegError as e:
        raise UldmError(f"the MP4 could not be encoded ({e})", "Write .gif or .apng") from e


def _held(pictures: Iterable[Bytes], times: int) -> Iterator[Bytes]:
    """The same pictures, the last of them so many times."""
    for picture in pictures:
        yield picture
    yield from (picture for _ in range(times - 1))


def _even(picture: Bytes) -> Bytes:
    """With a white line at the bottom and right where a side is odd: H.264 stores colours for two by two pixels."""
    import numpy as np

    height, width = picture.shape[:2]
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), constant_values=255)


def enlargement(size: tuple[int, int], count: int) -> int:
    """How many times `count` pictures of this size (height, width) are enlarged, to be seen well beside each other."""
    columns = _columns(count)
    return max(1, min(TALLEST // size[0], (WIDEST - GAP) // columns // size[1]))


def _columns(count: int) -> int:
    return count if count <= IN_A_ROW else math.ceil(math.sqrt(count))


def draw_frame(pictures: Sequence[Bytes], zoom: int, label: str, part: float) -> Bytes:
    """One picture of a film: the samples' pictures beside each other, below them how far it is.

    Args:
        pictures: uint8 `[H, W]` or `[H, W, 3]`, all of one size.
        zoom: how many times they are enlarged; each pixel becomes a square.
        label: says where in the film this is; left out where there is no room for it.
        part: how much of the film is over, 0 to 1: the length of the bar.

    Returns:
        uint8 `[H', W', 3]`.
    """
    import numpy as np

    columns = _columns(len(pictures))
    rows = -(-len(pictures) // columns)
    height, width = (side * zoom for side in pictures[0].shape[:2])
    body = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = GAP + i // columns * (height + GAP), GAP + i % columns * (width + GAP)
        coloured = picture if picture.ndim == 3 else picture[:, :, None]
        body[top : top + height, left : left + width] = coloured.repeat(zoom, 0).repeat(zoom, 1)
    return np.concatenate([body, _caption(label, part, body.shape[1])])


def _caption(label: str, part: float, width: int) -> Bytes:
    """A bar as wide as the film, and the label under it."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    size = 11 if width < 400 else 14
    font: Any = ImageFont.load_default(size)
    room = font.getlength(label) <= width - 2 * GAP
    band = Image.new("RGB", (width, BAR + 2 * GAP + (size + 6 if room else 0)), "white")
    pen = ImageDraw.Draw(band)
    right = width - GAP - 1
    pen.rectangle((GAP, GAP, right, GAP + BAR - 1), fill=PALE)
    pen.rectangle((GAP, GAP, GAP + round((right - GAP) * part), GAP + BAR - 1), fill=INK)
    if room:
        pen.text((width / 2, BAR + 2 * GAP + size / 2 + 1), label, fill=INK, font=font, anchor="mm")
    return np.asarray(band)
