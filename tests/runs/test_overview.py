"""What a sampling run shows in the terminal: its files, in few pictures."""

import numpy as np
import pytest

from uldm_cli.runs.draw.grid import GAP, draw_grid
from uldm_cli.runs.files import read_picture
from uldm_cli.runs.overview import MOST_ROWS, overviews
from uldm_cli.runs.sample import run
from uldm_cli.specs.sampling import Sampling


@pytest.fixture
def shown(tiny_ldm, tmp_path):
    def sample(**fields):
        sampler = {"kind": "ddim", "steps": 4}
        given = {"model": str(tiny_ldm), "device": "cpu", "sampler": sampler, "step_size": 2}
        result = run(Sampling.model_validate(given | fields), tmp_path)
        return list(overviews(result.plan))

    return sample


def test_a_sample_is_a_row_of_steps_a_kind(shown, tmp_path):
    image, latent, difference = shown(save="image,latent,image-diff")
    assert (image == draw_grid([[read_picture(tmp_path / f"image_step_{n}.png") for n in (2, 4)]], ["2", "4"])).all()
    assert latent.ndim == 2
    assert (difference == draw_grid([[read_picture(tmp_path / "image_diff_4_minus_2.png")]], ["4-2"])).all()


def test_many_samples_are_so_many_rows_at_most(shown, tmp_path):
    [image] = shown(save="image", num=MOST_ROWS + 2)
    rows = [[read_picture(tmp_path / f"{i:05d}" / f"image_step_{n}.png") for n in (2, 4)] for i in range(MOST_ROWS)]
    assert (image == draw_grid(rows, ["2", "4"])).all()


def test_final_images_stand_in_a_near_square(shown):
    [image] = shown(step_size=0, num=5)
    assert image.shape == (2 * (32 + GAP) + GAP, 3 * (32 + GAP) + GAP, 3)
    assert (image[-32 - GAP :, -32 - GAP :] == 255).all()
    assert np.ptp(image) > 0


def test_numbers_alone_show_nothing(shown):
    assert shown(step_size=0, save="npz") == []
