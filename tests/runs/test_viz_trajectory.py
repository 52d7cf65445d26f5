"""Films and figures of sampling runs."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from uldm_cli.errors import ConfigError
from uldm_cli.formats.native import load_tensors
from uldm_cli.runs.draw.animation import BAR
from uldm_cli.runs.draw.grid import GAP
from uldm_cli.runs.draw.trajectory import Course, draw_courses
from uldm_cli.runs.files import write_png
from uldm_cli.runs.perceptual import load_lpips
from uldm_cli.runs.raw import read_trajectory
from uldm_cli.runs.sample import run as sample
from uldm_cli.runs.viz_trajectory import Request, run
from uldm_cli.specs.sampling import Sampling


@pytest.fixture(scope="module")
def raw_run(tiny_ldm, tmp_path_factory):
    """Two samples, pictures and numbers."""
    folder = tmp_path_factory.mktemp("raw") / "run"
    sampler = {"kind": "ddim", "steps": 10, "eta": 1.0}
    fields = {"model": str(tiny_ldm), "device": "cpu", "sampler": sampler, "step_size": 4, "num": 2}
    sample(Sampling.model_validate({**fields, "save": "image,latent,trajectory"}), folder)
    return folder


@pytest.fixture
def pictures(tmp_path):
    """A run's folder with pictures only: `pictures("image", steps=(1, 2))`."""

    def make(what="image", steps=(4, 8, 10), folder=tmp_path / "run", size=(16, 16)):
        for step in steps:
            write_png(folder_of(folder) / f"{what}_step_{step}.png", np.full((*size, 3), 20 * step, np.uint8))
        return folder

    def folder_of(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    return make


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def film(path):
    with Image.open(path) as image:
        for number in range(image.n_frames):
            image.seek(number)
            yield np.asarray(image.convert("RGB"))


def shown(folder, **request):
    """The first sample's picture in each frame of the film, as large as it was."""
    run(Request(folder, folder.parent / "film.apng", zoom=1, **request))
    height, width = pixels(next(folder.rglob("*_step_*.png"))).shape[:2]
    return [frame[GAP : GAP + height, GAP : GAP + width] for frame in film(folder.parent / "film.apng")]


def test_a_flat_run_s_pictures_in_the_order_of_their_steps(pictures):
    folder = pictures(steps=(2, 4, 10))
    (folder / "image_step(2,4,10).png").write_bytes(b"a grid, which is named alike")
    result = run(Request(folder))
    assert (result.film, result.figure, result.steps, result.samples) == (
        folder / "trajectory.gif",
        None,
        (2, 4, 10),
        ("",),
    )
    assert [frame[5, 5, 0] for frame in film(result.film)] == [40, 80, 200]
    assert result.fps == 2.0


@pytest.mark.parametrize("what", ["saliency", "attention"])
def test_maps_of_explain_are_films_too(pictures, what, capsys):
    folder = pictures(what)
    assert [picture[0, 0, 0] for picture in shown(folder, what=what)] == [80, 160, 200]
    assert "no figure" not in capsys.readouterr().err  # such a run cannot have the numbers
    assert run(Request(folder, what=what)).film == folder / f"trajectory_{what}.gif"


def test_samples_stand_side_by_side_or_one_is_chosen(raw_run, tmp_path):
    result = run(Request(raw_run, tmp_path / "film.apng", zoom=2))
    assert result.samples == ("00000", "00001")
    first = next(film(result.film))
    for i in range(2):
        there = pixels(raw_run / f"0000{i}" / "image_step_4.png").repeat(2, 0).repeat(2, 1)
        left = GAP + i * (64 + GAP)
        assert (first[GAP : GAP + 64, left : left + 64] == there).all()
    one = run(Request(raw_run, tmp_path / "one.apng", sample=1, zoom=2))
    assert one.samples == ("00001",)
    assert next(film(one.film)).shape[1] == 64 + 2 * GAP
    assert (next(film(one.film))[GAP : GAP + 64, GAP : GAP + 64] == there).all()


@pytest.mark.parametrize("what", ["image", "latent"])
def test_numbers_alone_give_the_same_film(raw_run, tmp_path, what):
    expected = shown(raw_run, what=what)
    for i in range(2):
        copy = tmp_path / "run" / f"0000{i}"
        copy.mkdir(parents=True)
        for path in (raw_run / copy.name).glob("trajectory.*"):
            (copy / path.name).write_bytes(path.read_bytes())
    result = run(Request(tmp_path / "run", tmp_path / "film.apng", zoom=1, what=what))
    frames = [frame[GAP : GAP + 32, GAP : GAP + 32] for frame in film(result.film)]
    assert all((a == b).all() for a, b in zip(frames, expected, strict=True))


def test_the_figure_shows_what_the_numbers_are(raw_run, tmp_path):
    result = run(Request(raw_run, tmp_path / "film.gif"))
    assert result.figure == tmp_path / "film.png"
    with Image.open(result.figure) as image:
        assert image.text["title"].endswith("DDIM, 10 steps, eta 1")
        assert json.loads(image.text["sampler"])["steps"] == 10
    assert [course.name for course in result.courses] == ["seed 1125", "seed 1126"]
    tensors = load_tensors(raw_run / "00001" / "trajectory.safetensors")
    x, course = tensors["x_t"].double(), result.courses[1]
    assert course.steps == (4, 8, 10)
    np.testing.assert_allclose(course.norm, x.flatten(1).norm(dim=1) / x[0].numel() ** 0.5)
    np.testing.assert_allclose(course.change, x.diff(dim=0).flatten(1).norm(dim=1) / x[0].numel() ** 0.5)
    np.testing.assert_allclose(course.log_snr, (tensors["alphas"] ** 2 / tensors["sigmas"] ** 2).log())
    assert (np.diff(course.log_snr) > 0).all()


def test_steps_are_whole_numbers():
    values = np.ones(4)
    made = draw_courses([Course("seed 0", (5, 10, 15, 20), values, values, values[1:], values)], "")
    for panel in made.axes:
        assert all(tick.is_integer() for tick in panel.get_xticks())


def test_lpips_is_that_to_the_last_image(raw_run, tmp_path):
    import torch

    course = run(Request(raw_run, tmp_path / "film.gif", sample=0)).courses[0]
    x = torch.from_numpy(read_trajectory(raw_run / "00000").images).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = load_lpips()(x, x[-1:].expand_as(x)).flatten().numpy()
    np.testing.assert_allclose(course.lpips, expected, rtol=1e-4, atol=1e-6)
    assert course.lpips[-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("ending", ["svg", "pdf"])
def test_the_figure_is_a_vector_picture_where_its_name_says_so(raw_run, tmp_path, ending):
    figure = tmp_path / f"figure.{ending}"
    assert run(Request(raw_run, tmp_path / "film.gif", figure)).figure == figure
    assert figure.read_bytes()[:5] in (b"<?xml", b"%PDF-")


def test_a_run_without_numbers_is_told_how_to_get_them(pictures, capsys):
    run(Request(pictures()))
    err = capsys.readouterr().err
    assert "trajectory.safetensors is missing; `uldm ldm sample --save image,trajectory` writes it" in err


def test_what_is_no_run_or_has_no_pictures(pictures, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere does not exist. Name the folder"):
        run(Request(tmp_path / "nowhere"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file, not the folder of a run"):
        run(Request(tmp_path / "file"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="has no pictures of steps"):
        run(Request(tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"no latent_step_\*.png, but pictures of image. Try --what latent|image"):
        run(Request(pictures(), what="latent"))
    with pytest.raises(ConfigError, match="--what images: expected one of image, latent"):
        run(Request(pictures(), what="images"))


def test_pictures_that_make_no_film_are_named(pictures, tmp_path):
    folder = pictures(steps=(4, 8))
    pictures(steps=(10,), size=(16, 8))
    with pytest.raises(ConfigError, match=r"image_step_4.png has 16x16 pixels and .*image_step_10.png has 8x16"):
        run(Request(folder))
    (folder / "image_step_10.png").write_bytes((folder / "image_step_4.png").read_bytes()[:60])
    with pytest.raises(ConfigError, match=r"image_step_10.png cannot be read"):
        run(Request(folder))
    (folder / "image_step_10.png").write_text("no picture")
    with pytest.raises(ConfigError, match=r"image_step_10.png cannot be read: not a PNG, or damaged"):
        run(Request(folder))
    assert not list(folder.glob("trajectory*"))


def test_samples_that_do_not_fit_together_are_named(pictures, tmp_path):
    folder = tmp_path / "several"
    pictures(folder=folder / "00000")
    pictures(folder=folder / "00001", size=(8, 8))
    with pytest.raises(ConfigError, match=r"00000 has pictures of 16x16 pixels and .*00001 of 8x8 pixels"):
        run(Request(folder))
    (folder / "00001" / "image_step_8.png").unlink()
    with pytest.raises(ConfigError, match=r"00001 has no picture of step 8, and .*00000 has one"):
        run(Request(folder))
    assert run(Request(folder, sample=0)).steps == (4, 8, 10)
    with pytest.raises(ConfigError, match=r"--sample 2: .* has the samples 0 to 1"):
        run(Request(folder, sample=2))


def test_settings_that_cannot_be(pictures):
    request = Request(pictures())
    for wrong, message in (
        ({"fps": 0.0}, "--fps 0: expected a rate above 0"),
        ({"fps": float("nan")}, "--fps nan"),
        ({"fps": 51.0}, "up to 50"),
        ({"zoom": 0}, "--zoom 0: expected 1 or more"),
        ({"out": request.run / "a.webm"}, "a film is written as"),
        ({"figure": request.run / "a.jpg"}, "a plot is written as"),
        ({"out": request.run / "a.png", "figure": request.run / "a.png"}, "both the film and the figure"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(replace(request, **wrong))
    assert run(replace(request, fps=10.0)).fps == 10
    assert pixels(request.run / "trajectory.gif").shape[0] == 16 * 16 + 2 * GAP + BAR + 2 * GAP + 17
