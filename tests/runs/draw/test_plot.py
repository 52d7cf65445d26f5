"""Figures: their look, and what is kept in their files."""

import re

import matplotlib
import numpy as np
import pytest
from PIL import Image

from uldm_cli.errors import ConfigError
from uldm_cli.runs.draw.plot import COLORS, DEFAULT, Style, figure, picture_format, save_figure, styled


def drawn(style=DEFAULT):
    made, axes = figure(1, 2, size=(4, 2), style=style)
    with styled(style):
        axes[0, 0].plot([1, 2, 3], label="a line")
        axes[0, 0].set_title("left")
        axes[0, 0].legend()
    return made, axes


def test_axes_come_as_rows_and_columns_and_take_our_colours():
    made, axes = figure(2, 3, size=(4, 2))
    assert axes.shape == (2, 3)
    assert list(made.get_size_inches()) == [4, 2]
    assert [axes[1, 2].plot([0, n])[0].get_color() for n in range(3)] == list(COLORS[:3])


def test_fonts_follow_the_style_and_nothing_global_changes():
    before = dict(matplotlib.rcParams)
    _, axes = drawn(Style(font_size=14))
    assert axes[0, 0].title.get_fontsize() == 14
    assert axes[0, 1].xaxis.label.get_fontsize() == 14
    assert axes[0, 0].get_legend().get_texts()[0].get_fontsize() == pytest.approx(12.5, abs=0.1)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("dpi", [72, 150])
def test_a_png_is_as_large_as_asked_and_tells_what_it_is_about(tmp_path, dpi):
    style = Style(dpi=dpi)
    save_figure(drawn(style)[0], tmp_path / "a.png", {"title": "A plot", "seed": "7"}, style)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (4 * dpi, 2 * dpi)
        assert image.text == {"title": "A plot", "seed": "7"}
        assert len(np.unique(np.asarray(image))) > 10


@pytest.mark.parametrize("ending", ["svg", "pdf"])
def test_vector_formats_keep_the_title(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    save_figure(drawn()[0], path, {"title": "Of two models", "seed": "7"})
    content = path.read_bytes()
    assert content.startswith(b"<?xml" if ending == "svg" else b"%PDF")
    assert re.search(rb"(?s)Of two models.*seed: 7|seed: 7.*Of two models", content)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_same_figure_gives_the_same_bytes(tmp_path, ending):
    for name in ("a", "b"):
        save_figure(drawn()[0], tmp_path / f"{name}.{ending}", {})
    assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.png.txt"])
def test_another_ending_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=r"\.png, \.svg or \.pdf"):
        save_figure(figure(size=(2, 2))[0], tmp_path / name, {})
    assert not list(tmp_path.iterdir())
    assert picture_format(tmp_path / "a.SVG") == "svg"
