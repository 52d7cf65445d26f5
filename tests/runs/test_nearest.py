"""The nearest training images: copies are found, wherever the training images lie, and what is drawn of it."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from uldm_cli.errors import ConfigError, UsageError
from uldm_cli.runs import nearest
from uldm_cli.runs.draw.nearest import Cell, Row, draw_nearest, shortened
from uldm_cli.runs.draw.plot import Style, save_figure
from uldm_cli.runs.nearest import Question, draw, open_data, search


def picture(seed: int, side: int = 40) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(colours).resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture
def training(tmp_path: Path) -> Path:
    folder = tmp_path / "training"
    for seed in range(10):
        path = folder / f"class-{seed % 2}" / f"{seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(path)
    return folder


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """A copy, a near copy of another size, a mirrored copy, and one that is like none."""
    folder = tmp_path / "samples"
    folder.mkdir()
    picture(3).save(folder / "copy.png")
    Image.blend(picture(4), picture(77), 0.05).resize((80, 80), Image.Resampling.LANCZOS).save(folder / "near.png")
    ImageOps.mirror(picture(5)).save(folder / "mirrored.png")
    picture(99).save(folder / "other.png")
    return folder


def test_copies_are_found(training: Path, samples: Path) -> None:
    answer = search(Question((samples,), str(training), k=2))
    found = {Path(sample.name).stem: sample for sample in answer.samples}
    assert list(found) == ["copy", "mirrored", "near", "other"]
    assert (answer.size, answer.count, answer.typical.count) == (40, 10, 10)
    for by in ("pixels", "lpips"):
        copy, near, other = (getattr(found[name], by) for name in ("copy", "near", "other"))
        assert [one[0].name for one in (copy, near)] == ["class-1/3.png", "class-0/4.png"]
        assert copy[0].distance < 1e-5 < near[0].distance < near[1].distance
        usual = getattr(answer.typical, by)
        assert near[0].distance < usual < 3 * other[0].distance
        assert getattr(found["mirrored"], by)[0].distance > near[0].distance  # nobody asked for mirror images
        assert answer.nearer(by) == sum(getattr(one, by)[0].distance < usual for one in found.values())


def test_mirrored_copies_are_found_when_asked_for(training: Path, samples: Path) -> None:
    answer = search(Question((samples / "mirrored.png", samples / "copy.png"), str(training), k=3, flip=True))
    mirrored, copy = answer.samples
    for found, name, flipped in ((mirrored, "class-1/5.png", True), (copy, "class-1/3.png", False)):
        for by in (found.pixels, found.lpips):
            assert (by[0].name, by[0].mirrored) == (name, flipped)
            assert by[0].distance < 1e-5
            assert len({one.index for one in by}) == 3  # each image once
            assert [one.distance for one in by] == sorted(one.distance for one in by)
    np.testing.assert_array_equal(answer.images.found(mirrored.pixels[0]), answer.images.sample(0))


def test_passes_and_batches_change_nothing(training: Path, samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    question = Question((samples,), str(training), k=3)
    at_once = search(question)
    monkeypatch.setattr(nearest, "QUERY_BYTES", 1)
    monkeypatch.setattr(nearest, "LARGEST_BATCH", 3)
    one_by_one = search(question)
    for a, b in zip(at_once.samples, one_by_one.samples, strict=True):
        assert [one.name for one in a.lpips] == [one.name for one in b.lpips]
        assert [one.distance for one in a.lpips] == pytest.approx([one.distance for one in b.lpips], abs=2e-6)
        assert a.pixels == b.pixels


def test_archives_sizes_and_files_that_are_broken(training: Path, samples: Path, tmp_path: Path) -> None:
    broken = (training / "class-0" / "4.png").read_bytes()[:120]
    (training / "class-0" / "broken.png").write_bytes(broken)
    with tarfile.open(tmp_path / "training.tar", "w") as tar:
        tar.add(training, "training")
    answer = search(Question((samples / "copy.png",), str(tmp_path / "training.tar"), size=32, reference=3))
    assert (answer.size, answer.count, answer.typical.count) == (32, 10, 3)
    assert [name for name, _ in answer.skipped] == ["training/class-0/broken.png"]
    assert answer.samples[0].lpips[0].name == "training/class-1/3.png"


def test_embedded_data(tmp_path: Path) -> None:
    data = open_data("tiny", None)
    Image.fromarray(data[17][0][0].numpy()).save(tmp_path / "clothes.png")
    answer = search(Question((tmp_path / "clothes.png",), '{"kind": "tiny", "train": true}', k=1, reference=2))
    assert (answer.samples[0].pixels[0].index, answer.samples[0].pixels[0].name) == (17, "number 17")
    assert answer.samples[0].pixels[0].distance == 0


def test_wrong_input(training: Path, samples: Path, tmp_path: Path) -> None:
    def ask(data: object = training, **changes: object) -> None:
        search(Question((samples,), str(data), **changes))

    with pytest.raises(UsageError, match=r"--k 11: .* holds 10 images"):
        ask(k=11)
    with pytest.raises(UsageError, match=r"images of 16 pixels, .* Give --size 32 or more"):
        ask(size=16)
    with pytest.raises(ConfigError, match="Did you mean 'mnist'"):
        ask("mnits")
    with pytest.raises(ConfigError, match=r"--data .*: not JSON"):
        ask("{kind: mnist}")
    with pytest.raises(UsageError, match=r"nowhere.png: cannot be read"):
        search(Question((tmp_path / "nowhere.png",), str(training)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no images in"):
        search(Question((tmp_path / "empty",), str(training)))


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_picture(training: Path, samples: Path, tmp_path: Path, ending: str) -> None:
    question = Question((samples,), str(training), k=2, flip=True)
    out = tmp_path / f"nearest.{ending}"
    assert draw(search(question), question, out, 3, Style()) == 3
    assert out.stat().st_size > 1000
    if ending == "png":
        with Image.open(out) as image:
            assert "Nearest of 10 training images" in image.text["title"]


def test_pictures_are_drawn_pixel_by_pixel(tmp_path: Path) -> None:
    """Whole multiples of the pixels, so that nothing is smeared."""
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    row = Row(Cell(image, "a"), [[Cell(image, "0.1", near=True), Cell(image, "0.2")]])
    style = Style(dpi=100)
    figure = draw_nearest([row], ("sample", "near"), "title", ["bold: near"], style)
    save_figure(figure, tmp_path / "picture.png", {}, style)
    with Image.open(tmp_path / "picture.png") as saved:
        drawn = np.asarray(saved.convert("RGB"))
    twice = image.repeat(2, 0).repeat(2, 1)
    places = [
        (y, x)
        for y in range(drawn.shape[0] - 80)
        for x in range(drawn.shape[1] - 80)
        if (drawn[y, x] == twice[0, 0]).all() and np.array_equal(drawn[y : y + 80, x : x + 80], twice)
    ]
    assert len(places) == 3
    assert len({y for y, _ in places}) == 1


def test_names_are_shortened_at_the_front() -> None:
    assert shortened("sample-0001.png", 40) == "sample-0001.png"
    assert shortened("sample-0001.png", 9.5) == "…0001.png"
