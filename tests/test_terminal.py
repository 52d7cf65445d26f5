"""Pictures for terminals: what is sent, read back as the terminal does."""

import re
from base64 import b64decode
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from uldm_cli.terminal import CELL, draw, protocol


@pytest.fixture
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (37, 50, 3), np.uint8)
    return Image.fromarray(pixels)


def pixels(png):
    return np.asarray(Image.open(BytesIO(png)))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "blocks"),
        ({"TERM": "xterm-256color"}, "blocks"),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm", "KITTY_WINDOW_ID": "1"}, "iterm2"),
        ({"TERM": "xterm-kitty", "TERM_PROGRAM": "WezTerm"}, "kitty"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "mlterm-256color"}, "sixel"),
        ({"TERM": "xterm-sixel"}, "sixel"),
        ({"TERM": "tmux-256color", "TMUX": "/tmp/tmux", "KITTY_WINDOW_ID": "1"}, "blocks"),
        ({"TERM": "screen.xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "blocks"),
    ],
)
def test_the_environment_says_what_a_terminal_can(environment, expected):
    assert protocol(environment) == expected


def test_kitty_gets_the_png_in_chunks(picture):
    sent = draw(picture, "kitty", 80)
    chunks = re.findall("\x1b_G([^;]*);([^\x1b]*)\x1b\\\\", sent)
    assert "".join(f"\x1b_G{keys};{data}\x1b\\" for keys, data in chunks) + "\n" == sent
    assert len(chunks) > 1
    assert chunks[0][0] == "a=T,f=100,c=7,q=2,m=1"
    assert {keys for keys, _ in chunks[1:-1]} <= {"m=1"}
    assert chunks[-1][0] == "m=0"
    assert all(len(data) <= 4096 and len(data) % 4 == 0 for _, data in chunks)
    assert (pixels(b64decode("".join(data for _, data in chunks))) == np.asarray(picture)).all()


def test_iterm2_gets_the_png_with_its_size(picture):
    match = re.fullmatch("\x1b]1337;File=([^:]*):([^\a]*)\a\n", draw(picture, "iterm2", 80))
    keys = dict(pair.split("=") for pair in match[1].split(";"))
    png = b64decode(match[2], validate=True)
    assert keys == {"inline": "1", "size": str(len(png)), "width": "7", "preserveAspectRatio": "1"}
    assert (pixels(png) == np.asarray(picture)).all()


def test_no_picture_is_wider_than_the_terminal(picture):
    wide = picture.resize((1000, 40))
    assert "c=80," in draw(wide, "kitty", 80)
    assert "width=80;" in draw(wide, "iterm2", 80)
    assert read_sixel(draw(wide, "sixel", 80)).shape == (26, 80 * CELL, 3)
    assert read_blocks(draw(wide, "blocks", 80)).shape == (4, 80, 3)


def read_blocks(sent):
    """The pixels that a terminal would show; None of the lower half where it has no colour is -1."""
    rows = []
    for line in sent.split("\n")[:-1]:
        assert line.endswith("\x1b[0m")
        colors, upper, lower = {"38": None, "48": (-1, -1, -1)}, [], []
        for code, color in re.findall("\x1b\\[([34]8);2;([0-9;]*)m|▀", line.removesuffix("\x1b[0m")):
            if code:
                colors[code] = tuple(map(int, color.split(";")))
            else:
                upper.append(colors["38"])
                lower.append(colors["48"])
        rows += [upper, lower]
    return np.array(rows)


@pytest.mark.parametrize("height", [36, 37])
def test_blocks_hold_two_pixels_each(picture, height):
    picture = picture.crop((0, 0, 50, height))
    shown = read_blocks(draw(picture, "blocks", 80))
    assert len(shown) == 2 * -(-height // 2)
    assert (shown[:height] == np.asarray(picture)).all()
    assert (shown[height:] == -1).all()


def test_blocks_are_fitted_to_the_width(picture):
    shown = read_blocks(draw(picture, "blocks", 25))
    expected = np.asarray(picture.resize((25, 18), Image.Resampling.BOX))
    assert (shown == expected).all()


def test_a_colour_is_named_once_as_long_as_it_lasts():
    sent = draw(Image.new("RGB", (30, 2), (1, 2, 3)), "blocks", 80)
    assert sent == "\x1b[38;2;1;2;3m\x1b[48;2;1;2;3m" + 30 * "▀" + "\x1b[0m\n"


def read_sixel(sent):
    """The picture that a terminal would draw of it."""
    width, height, palette, body = re.fullmatch(
        '\x1bPq"1;1;([0-9]+);([0-9]+)((?:#[0-9]+;2;[0-9]+;[0-9]+;[0-9]+)*)(.*)\x1b\\\\\n', sent
    ).groups()
    colors = {
        n: rgb for n, *rgb in (map(int, entry.split(";")) for entry in palette.replace(";2;", ";").split("#")[1:])
    }
    drawn = np.full((int(height) + 6, int(width), 3), -1)
    for at, band in enumerate(body.split("-")):
        for part in band.split("$"):
            color, bits = re.fullmatch("#([0-9]+)(.*)", part).groups()
            x = 0
            for repeat, letter in re.findall("(?:!([0-9]+))?([?-~])", bits):
                for _ in range(int(repeat or 1)):
                    for row in range(6):
                        if (ord(letter) - 63) >> row & 1:
                            drawn[6 * at + row, x] = colors[int(color)]
                    x += 1
            assert x == int(width)
    assert (drawn[int(height) :] == -1).all()
    return drawn[: int(height)]


def test_sixels_are_the_picture_in_percent():
    rng = np.random.default_rng(1)
    colors = rng.integers(0, 256, (20, 3), np.uint8)
    pixels = colors[rng.integers(0, 20, (37, 50))]
    pixels[5:9] = colors[3]
    drawn = read_sixel(draw(Image.fromarray(pixels), "sixel", 80))
    assert np.abs(drawn - pixels * (100 / 255)).max() <= 0.5


def test_grey_and_transparent_pictures():
    grey = Image.fromarray(np.array([[0, 255], [7, 9]], np.uint8))
    assert read_blocks(draw(grey, "blocks", 80))[..., 1].tolist() == [[0, 255], [7, 9]]
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert (read_blocks(draw(clear, "blocks", 80)) == 255).all()
