"""Maps on pictures: each value on its pixels, and in its colour."""

import matplotlib
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from uldm_cli.errors import ConfigError
from uldm_cli.runs.draw.overlay import (
    COLORMAPS,
    color_bar,
    colored,
    overlaid,
    resized,
    tick_labels,
    tick_values,
)


@pytest.mark.parametrize("size", [(64, 48), (10, 10), (7, 5), (3, 3), (1, 9)])
def test_bilinear_is_that_of_torch(size):
    map = np.random.default_rng(0).normal(size=(10, 12)).astype(np.float32)
    expected = interpolate(torch.from_numpy(map)[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    enlarged = resized(map, size)
    assert enlarged.dtype == np.float32
    np.testing.assert_allclose(enlarged, expected, atol=1e-5)


def test_nearest_repeats_pixels():
    assert (
        resized(np.array([[1, 2], [3, 4]]), (4, 6), "nearest").tolist()
        == [[1, 1, 1, 2, 2, 2]] * 2 + [[3, 3, 3, 4, 4, 4]] * 2
    )


@pytest.mark.parametrize("how", ["bilinear", "nearest"])
def test_a_bright_corner_stays_in_that_corner(how):
    map = np.zeros((4, 4), np.float32)
    map[0, 3] = 1
    enlarged = resized(map, (32, 32), how)
    assert enlarged[:4, -4:].min() == 1
    assert enlarged[16:].max() == enlarged[:, :16].max() == 0


@pytest.mark.parametrize("colormap", COLORMAPS)
def test_the_ends_of_the_scale_are_the_ends_of_the_colours(colormap):
    painted = colored(np.array([[-5.0, -1.0, 1.0, 3.0, 9.0]]), (-1.0, 3.0), colormap)
    colors = matplotlib.colormaps[colormap]
    assert painted.dtype == np.uint8
    assert [tuple(color) for color in painted[0]] == [colors(x, bytes=True)[:3] for x in (0.0, 0.0, 0.5, 1.0, 1.0)]


def test_a_flat_map_is_the_lowest_colour_and_no_number_is_grey():
    lowest = matplotlib.colormaps["viridis"](0.0, bytes=True)[:3]
    assert (colored(np.full((3, 4), 7.0), (7.0, 7.0), "viridis") == lowest).all()
    painted = colored(np.array([[np.nan, 1.0]]), (1.0, 1.0), "viridis")
    assert painted.tolist() == [[[127, 127, 127], list(map(int, lowest))]]


def test_overlays():
    image = np.full((2, 2, 3), 200, np.uint8)
    image[0, 0] = (0, 100, 250)
    map, scale = np.array([[0.0, 1.0], [0.5, 0.25]]), (0.0, 1.0)
    paint = colored(map, scale)
    assert (overlaid(image, map, scale, mode="color") == paint).all()
    grey = overlaid(image, map, scale, mode="none")
    np.testing.assert_allclose(grey, np.repeat(255 * map[..., None], 3, axis=-1), atol=1)
    assert (overlaid(image, map, scale, alpha=0.0) == image).all()
    assert (overlaid(image, map, scale, alpha=1.0) == paint).all()
    assert (overlaid(image, map, scale, alpha=0.25) == np.rint(0.75 * image + 0.25 * paint)).all()


def test_a_grey_image_is_blended_as_a_coloured_one():
    grey, map = np.arange(6, dtype=np.uint8).reshape(2, 3), np.linspace(0, 1, 6).reshape(2, 3)
    assert (overlaid(grey, map, (0, 1)) == overlaid(np.stack([grey] * 3, axis=-1), map, (0, 1))).all()


@pytest.mark.parametrize("height", [16, 64, 256])
@pytest.mark.parametrize("scale", [(0.0, 1.0), (-0.0371, 12.5), (1e-6, 3.1e-6), (1000.1, 1000.2), (0.0, 0.0)])
def test_a_bar_is_as_high_as_asked_and_its_numbers_fit(height, scale):
    bar = color_bar(height, scale)
    assert bar.shape[0] == height
    assert bar.dtype == np.uint8
    assert (bar[:, -1] == 255).all()
    assert (bar[:, :4] == 255).all()
    assert (bar[:, 24:] < 250).any()


def test_a_bar_runs_from_the_last_colour_on_top_to_the_first():
    bar = color_bar(101, (0.0, 1.0), "viridis")[:, 10]
    column = bar[(bar != 255).any(axis=1)]
    colors = matplotlib.colormaps["viridis"]
    assert tuple(column[0]) == colors(1.0, bytes=True)[:3]
    assert tuple(column[-1]) == colors(0.0, bytes=True)[:3]


def test_ticks_are_round_and_told_apart():
    assert tick_labels(tick_values((0.0, 1.0), 6)) == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert tick_labels(tick_values((0.0, 0.37), 3)) == ["0.0", "0.2"]
    assert tick_labels(tick_values((-0.4, 12.5), 3)) == ["0", "10"]
    assert tick_labels(tick_values((1000.1, 1000.2), 3)) == ["1000.10", "1000.15", "1000.20"]
    assert tick_labels(tick_values((1e-6, 3.1e-6), 3)) == ["1e-06", "2e-06", "3e-06"]
    assert tick_labels(tick_values((5.0, 5.0), 3)) == ["5"]
    assert tick_labels([0.0]) == ["0"]


def test_an_unknown_colormap_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"no colormap 'infreno'. Did you mean 'inferno'\?"):
        colored(np.zeros((1, 1)), (0, 1), "infreno")
