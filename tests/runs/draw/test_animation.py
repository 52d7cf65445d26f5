"""Films: what is in the file is what was drawn, for as long as was asked."""

import numpy as np
import pytest
from PIL import Image

from uldm_cli.errors import ConfigError
from uldm_cli.runs.draw import animation
from uldm_cli.runs.draw.animation import draw_frame, enlargement, film_format, write_film
from uldm_cli.runs.draw.grid import GAP


def scene(count=5, size=(21, 31)):
    """A white square that wanders over grey."""
    for step in range(count):
        picture = np.full((*size, 3), 90, np.uint8)
        picture[5:10, 3 * step : 3 * step + 5] = (250, 200, 40)
        yield picture


def frames_of(path):
    with Image.open(path) as image:
        for number in range(image.n_frames):
            image.seek(number)
            yield image.info["duration"], np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("name", ["film.gif", "film.apng", "film.png", "FILM.GIF"])
def test_every_picture_is_in_the_film_and_the_last_stays(tmp_path, name):
    write_film(tmp_path / name, scene(), 5, fps=10, about={"title": "dog: image"})
    times, pictures = zip(*frames_of(tmp_path / name), strict=True)
    assert times == (100, 100, 100, 100, 1000)
    for shown, drawn in zip(pictures, scene(), strict=True):
        assert (shown == drawn).all()
    with Image.open(tmp_path / name) as image:
        told = image.info.get("comment") or image.text["title"].encode()
        assert (image.info["loop"], told) == (0, b"dog: image")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_same_film_is_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_film(tmp_path / f"{name}.gif", scene(), 5, fps=10, about={})
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()


def test_mp4_is_h264_of_even_sides_and_holds_the_last(tmp_path):
    av = pytest.importorskip("av")
    write_film(tmp_path / "film.mp4", scene(), 5, fps=4, about={"title": "dog"})
    with av.open(str(tmp_path / "film.mp4")) as film:
        [stream] = film.streams.video
        pictures = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 4)
        assert film.metadata["title"] == "dog"
    assert len(pictures) == 5 + 3
    assert pictures[0].shape == (22, 32, 3)
    for shown, drawn in zip(pictures, [*scene(), *[list(scene())[-1]] * 3], strict=True):
        assert np.abs(shown[:20, :30].astype(int) - drawn[:20, :30]).mean() < 6
    assert pictures[0][-1].min() > 200  # the line that was added


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ConfigError, match=r"MP4 needs PyAV. pip install 'uldm\[video\]', or write .gif"):
        film_format(tmp_path / "film.mp4")
    assert film_format(tmp_path / "film.gif") == "gif"


def test_other_endings_and_films_too_large_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"film.webm: a film is written as .gif, .apng \(or .png\) or .mp4"):
        film_format(tmp_path / "film.webm")
    monkeypatch.setattr(animation, "MOST_BYTES", 5000)
    with pytest.raises(ConfigError, match=r"5 pictures of 31x21 pixels are too many for .gif"):
        write_film(tmp_path / "film.gif", scene(), 5, fps=10, about={})
    assert not list(tmp_path.iterdir())


def test_a_frame_has_the_samples_side_by_side_enlarged():
    red, grey = np.full((8, 60, 3), (200, 0, 0), np.uint8), np.full((8, 60), 128, np.uint8)
    drawn = draw_frame([red, grey], 3, "step 5 of 10", 0.5)
    assert drawn.shape[1] == GAP + 2 * (180 + GAP)
    assert (drawn[GAP : GAP + 24, GAP : GAP + 180] == (200, 0, 0)).all()
    assert (drawn[GAP : GAP + 24, 2 * GAP + 180 : 2 * GAP + 360] == 128).all()
    bar = drawn[24 + 3 * GAP]
    assert (bar[GAP] == animation.INK).all()
    assert (bar[-GAP - 1] == animation.PALE).all()
    assert (bar == animation.INK).all(1).sum() == pytest.approx(180, abs=3)
    assert (drawn[24 + 3 * GAP + animation.BAR + GAP :] < 100).any()  # the label


def test_a_label_that_has_no_room_is_left_out():
    narrow = draw_frame([np.zeros((8, 8), np.uint8)], 1, "step 5 of 10", 1.0)
    assert narrow.shape[0] == 8 + 2 * GAP + animation.BAR + 2 * GAP


def test_many_samples_are_a_square_and_small_pictures_grow():
    drawn = draw_frame([np.zeros((8, 8), np.uint8)] * 10, 1, "", 1.0)
    assert drawn.shape[1] == GAP + 4 * (8 + GAP)
    assert enlargement((64, 64), 1) == 4
    assert enlargement((64, 64), 3) == 4
    assert enlargement((64, 64), 5) == 3
    assert enlargement((512, 512), 1) == enlargement((512, 512), 40) == 1
