"""Pictures as text for a terminal: by its graphics protocol where the environment says that it has one, else blocks.

The terminal is never asked: a question that it does not understand would hang, or leave its answer on the screen.

Kitty's protocol: https://sw.kovidgoyal.net/kitty/graphics-protocol; iTerm2's: https://iterm2.com/documentation-images;
sixel is that of DEC's VT300, https://vt100.net/docs/vt3xx-gp/chapter14.html.
"""

from base64 import b64encode
from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

Protocol = Literal["kitty", "iterm2", "sixel", "blocks"]

CELL = 8  # pixels of width that a picture is given a column for, and at most
_ESCAPE, _END = "\x1b", "\x1b\\"
_CHUNK = 4096  # characters; what Kitty takes at once
_COLORS = 255  # of a sixel picture
_HALF = "▀"


def protocol(environment: Mapping[str, str]) -> Protocol:
    """How a terminal with these variables shows pictures."""
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if "TMUX" in environment or term.startswith(("screen", "tmux")):
        return "blocks"  # it stands between, whatever the terminal behind it could do
    if term in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    if "sixel" in term or term.startswith(("foot", "mlterm", "yaft")):
        return "sixel"
    # Variables after TERM: a terminal that is started from another one inherits them.
    if program in ("WezTerm", "mintty", "iTerm.app") or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    return "kitty" if "KITTY_WINDOW_ID" in environment or program == "ghostty" else "blocks"


def draw(picture: "Image", how: Protocol, columns: int) -> str:
    """A picture as what a terminal of so many columns has to be sent; ends with a line break.

    It is a column wide for every CELL pixels, in blocks for every pixel, and never wider than the terminal.
    """
    picture = _opaque(picture)
    if how == "blocks":
        return _blocks(_narrowed(picture, columns))
    if how == "sixel":
        return _sixel(_narrowed(picture, columns * CELL)) + "\n"
    width = min(-(-picture.width // CELL), columns)
    return (_kitty if how == "kitty" else _iterm2)(_png(picture), width) + "\n"


def _opaque(picture: "Image") -> "Image":
    """RGB, over white where it is transparent."""
    from PIL import Image

    if not picture.has_transparency_data:
        return picture.convert("RGB")
    full = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", full.size, "white"), full).convert("RGB")


def _narrowed(picture: "Image", width: int) -> "Image":
    from PIL import Image

    if picture.width <= width:
        return picture
    height = max(round(picture.height * width / picture.width), 1)
    return picture.resize((width, height), Image.Resampling.BOX)


def _png(picture: "Image") -> bytes:
    encoded = BytesIO()
    picture.save(encoded, "PNG")
    return encoded.getvalue()


def _kitty(png: bytes, columns: int) -> str:
    """Transmit and show (a=T) a PNG (f=100) over some columns, without an answer (q=2), in chunks."""
    text = b64encode(png).decode()
    chunks = [text[at : at + _CHUNK] for at in range(0, len(text), _CHUNK)]
    sent = []
    for number, chunk in enumerate(chunks):
        first = f"a=T,f=100,c={columns},q=2," if number == 0 else ""
        sent.append(f"{_ESCAPE}_G{first}m={int(number < len(chunks) - 1)};{chunk}{_END}")
    return "".join(sent)


def _iterm2(png: bytes, columns: int) -> str:
    about = f"inline=1;size={len(png)};width={columns};preserveAspectRatio=1"
    return f"{_ESCAPE}]1337;File={about}:{b64encode(png).decode()}\a"


def _blocks(picture: "Image") -> str:
    """Two rows of pixels a line: the upper half of each cell in the text's colour, the lower as its background."""
    import numpy as np

    pixels = np.asarray(picture)
    lines = []
    for top in range(0, len(pixels), 2):
        lower = pixels[top + 1] if top + 1 < len(pixels) else None
        lines.append("".join(_cells(pixels[top], lower)) + f"{_ESCAPE}[0m\n")
    return "".join(lines)


def _cells(upper: "NDArray[np.uint8]", lower: "NDArray[np.uint8] | None") -> Iterator[str]:
    """The cells of a line. Colours are named only where they change."""
    before: tuple[Any, Any] = (None, None)
    for column in range(len(upper)):
        now = (upper[column].tolist(), None if lower is None else lower[column].tolist())
        for code, old, new in zip((38, 48), before, now, strict=True):
            if new is not None and new != old:
                yield f"{_ESCAPE}[{code};2;{new[0]};{new[1]};{new[2]}m"
        before = now
        yield _HALF


def _sixel(picture: "Image") -> str:
    """Bands of six rows; of each band the pixels of one colour after the other, as runs of columns."""
    import numpy as np

    small = picture.quantize(_COLORS)
    indices = np.asarray(small)
    palette = np.asarray(small.getpalette()).reshape(-1, 3)[: int(indices.max()) + 1]
    percent = np.rint(palette * 100 / 255).astype(int)
    named = "".join(f"#{number};2;{r};{g};{b}" for number, (r, g, b) in enumerate(percent))
    bands = (indices[top : top + 6] for top in range(0, len(indices), 6))
    body = "-".join("$".join(_band_of(color, band) for color in np.unique(band)) for band in bands)
    return f'{_ESCAPE}Pq"1;1;{picture.width};{picture.height}{named}{body}{_END}'


def _band_of(color: int, band: "NDArray[np.uint8]") -> str:
    """The columns of a band, each as six bits that say which of its pixels have the colour."""
    import numpy as np

    bits = ((band == color) << np.arange(len(band))[:, None]).sum(axis=0)
    starts = np.flatnonzero(np.diff(bits, prepend=-1))
    lengths = np.diff(starts, append=len(bits))
    runs = (
        f"!{n}{chr(63 + bits[at])}" if n > 3 else chr(63 + bits[at]) * n for at, n in zip(starts, lengths, strict=True)
    )
    return f"#{color}" + "".join(runs)
