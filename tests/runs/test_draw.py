"""Arrays to pictures: what a grey value means, and where each pixel lands."""

import numpy as np
import pytest

from uldm_cli.runs.draw.grid import GAP, LABEL, draw_grid
from uldm_cli.runs.draw.latents import MID_GREY, draw_latent, enlarge, largest, signed_to_bytes, tile_channels


def test_zero_is_mid_grey_and_the_scale_is_black_and_white():
    grey = signed_to_bytes(np.array([-9.0, -3.0, 0.0, 3.0, 9.0, 1.5]), 3.0)
    assert grey.tolist() == [0, 0, 128, 255, 255, 191]


def test_a_sign_changes_nothing_but_the_side_of_grey():
    values = np.linspace(-2, 2, 101)
    up, down = signed_to_bytes(values, 2.0), signed_to_bytes(-values, 2.0)
    assert np.abs(up.astype(int) + down.astype(int) - 255).max() <= 1


def test_the_largest_magnitude_of_nothing_still_divides():
    assert largest(np.array([[0.5, -2.0]])) == 2.0
    assert largest(np.zeros((3, 3))) == 1.0


@pytest.mark.parametrize(
    ("channels", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (3, 2, 2), (4, 2, 2), (5, 2, 3), (16, 4, 4)]
)
def test_channels_are_tiled_near_square_in_reading_order(channels, rows, columns):
    tiles = tile_channels(np.arange(channels, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 3), np.uint8))
    assert tiles.shape == (rows * 2, columns * 3)
    corners = tiles[::2, ::3].ravel()
    assert corners[:channels].tolist() == list(range(channels))
    assert (corners[channels:] == MID_GREY).all()


def test_enlarging_repeats_pixels_and_never_shrinks():
    small = np.array([[1, 2], [3, 4]], np.uint8)
    assert enlarge(small, (4, 6)).tolist() == [[1, 1, 1, 2, 2, 2]] * 2 + [[3, 3, 3, 4, 4, 4]] * 2
    assert enlarge(small, (1, 1)).tolist() == small.tolist()


def test_a_latent_has_the_size_of_its_image():
    assert draw_latent(np.zeros((4, 16, 16)), (64, 64)).shape == (64, 64)
    assert draw_latent(np.zeros((3, 10, 10)), (64, 48)).shape == (64, 48)


@pytest.mark.parametrize("channels", [(), (3,)])
def test_a_grid_has_a_column_a_label_and_a_row_a_sample(channels):
    rows = [[np.full((20, 30, *channels), 10 * i + j, np.uint8) for j in range(5)] for i in range(4)]
    grid = draw_grid(rows, ["40", "80", "120", "160", "200"])
    assert grid.shape == (LABEL + 4 * (20 + GAP) + GAP, 5 * (30 + GAP) + GAP, *channels)
    for i in range(4):
        for j in range(5):
            top, left = LABEL + GAP + i * (20 + GAP), GAP + j * (30 + GAP)
            assert (grid[top : top + 20, left : left + 30] == 10 * i + j).all()


def test_labels_stand_over_their_columns():
    grid = draw_grid([[np.zeros((8, 60), np.uint8)] * 2], ["40", "1"])
    dark = (grid[:LABEL] < 128).any(axis=0)
    assert dark[GAP : GAP + 60].any()
    assert dark[2 * GAP + 60 :].any()
    assert not dark[:GAP].any()


def test_labels_that_would_touch_are_left_out():
    assert draw_grid([[np.zeros((8, 8), np.uint8)] * 2], ["1000", "2000"]).shape == (8 + 2 * GAP, 2 * (8 + GAP) + GAP)
