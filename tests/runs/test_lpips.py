"""Comparing images and folders: sizes, names, weights, heatmaps."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from uldm_cli import fetch
from uldm_cli.core.lpips import drawn_features
from uldm_cli.errors import ConfigError, UldmError, UsageError
from uldm_cli.runs import perceptual
from uldm_cli.runs.lpips import Look, compare_folders, compare_images, compare_random
from uldm_cli.runs.perceptual import Backbone, load_metric


def picture(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """Soft colours, with a share of noise."""
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return Image.blend(soft, Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)), 0.1)


def save(path: Path, image: Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_the_heatmap_is_bright_where_the_images_differ(tmp_path: Path) -> None:
    image = picture(0, 128, 96)
    other = image.copy()
    other.paste((255, 0, 0), (96, 64, 128, 96))  # the lower right corner
    out = tmp_path / "new" / "map.png"
    pair = compare_images(save(tmp_path / "a.png", image), save(tmp_path / "b.png", other), Look(), out)
    drawn = pixels(out)
    assert drawn.shape == (96, 128)
    assert drawn.max() == 255
    assert drawn[70:90, 100:125].mean() > 5 * drawn[:48, :64].mean()
    assert pair.scale == pytest.approx(pair.compared.map.max())
    with Image.open(out) as saved:
        assert float(saved.text["distance"]) == pytest.approx(pair.compared.distance, rel=1e-4)
        assert saved.text["weights_sha256"] == pair.metric.sha256


def test_equal_images_give_zero_and_black(tmp_path: Path) -> None:
    a = save(tmp_path / "a.png", picture(0))
    pair = compare_images(a, a, Look(), tmp_path / "map.png")
    assert pair.compared.distance == 0
    assert not pixels(tmp_path / "map.png").any()


def test_a_scale_of_ones_own_and_colours(tmp_path: Path) -> None:
    a, b = (save(tmp_path / f"{seed}.png", picture(seed)) for seed in (0, 1))
    grey = compare_images(a, b, Look(scale=1000.0), tmp_path / "dark.png")
    assert grey.scale == 1000
    assert pixels(tmp_path / "dark.png").max() <= 1
    compare_images(a, b, Look(colormap="magma"), tmp_path / "magma.png")
    assert pixels(tmp_path / "magma.png").shape == (40, 48, 3)


def test_the_second_is_brought_to_the_first_ones_size_undistorted(tmp_path: Path) -> None:
    """Twice as large, and with a margin at the sides that the first lacks: it goes."""
    image = picture(0)
    wide = Image.new("RGB", (136, 80), "red")
    wide.paste(image.resize((96, 80), Image.Resampling.LANCZOS), (20, 0))
    a, b = save(tmp_path / "a.png", image), save(tmp_path / "b.png", wide)
    pair = compare_images(a, b, Look(), tmp_path / "map.png")
    assert pair.compared.resized
    assert pair.compared.size == (40, 48)
    assert pair.compared.distance < 0.05
    back = compare_images(b, a, Look(), tmp_path / "back.png")
    assert back.compared.size == (80, 136)
    square = compare_images(a, b, Look(size=40), tmp_path / "square.png")
    assert (square.compared.size, square.compared.resized) == ((40, 40), False)


def test_random_images_are_those_of_the_seed(tmp_path: Path) -> None:
    look = Look(Backbone(dummy=True), size=64)
    one, same, other = (compare_random(look, tmp_path / "map.png", seed=seed) for seed in (3, 3, 4))
    assert one.compared.distance == same.compared.distance != other.compared.distance
    assert one.compared.size == (64, 64)
    assert (one.metric.weights, one.metric.sha256) == ("drawn", None)
    assert "no measure" in one.metric.title
    assert compare_random(Look(Backbone(dummy=True)), tmp_path / "map.png").compared.size == (256, 256)


def test_folders_are_paired_by_name_and_sorted(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for name, seed in (("same", 0), ("sub/far", 1), ("near", 2), ("alone", 3)):
        save(first / f"{name}.png", picture(seed))
    save(second / "same.bmp", picture(0))
    save(second / "sub" / "far.png", picture(9))
    save(second / "near.png", Image.blend(picture(2), picture(9), 0.1))
    save(second / "other.png", picture(4))
    (first / "broken.png").write_bytes(b"\x89PNG")
    (second / "broken.png").write_bytes(b"\x89PNG")
    (second / "notes.txt").write_text("no image")
    found = compare_folders(first, second, Look(), tmp_path / "maps")
    assert [name for name, _ in found.rows] == ["sub/far", "near", "same"]
    distances = [distance for _, distance in found.rows]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] == 0
    assert (found.only_first, found.only_second) == (("alone.png",), ("other.png",))
    assert [name for name, _ in found.unusable] == ["broken"]
    assert pixels(tmp_path / "maps" / "sub" / "far.png").shape == (40, 48)
    alone = compare_images(first / "near.png", second / "near.png", Look(), tmp_path / "map.png")
    assert dict(found.rows)["near"] == pytest.approx(alone.compared.distance, abs=1e-6)


def test_folders_that_cannot_be_compared(tmp_path: Path) -> None:
    a = save(tmp_path / "a" / "x.png", picture(0)).parent
    b = save(tmp_path / "b" / "y.png", picture(0)).parent
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no images in .*empty"):
        compare_folders(a, tmp_path / "empty", Look())
    with pytest.raises(UsageError, match=r"has the name of one of .*: x.png there, y.png here"):
        compare_folders(a, b, Look())
    save(b / "y.jpg", picture(0))
    with pytest.raises(UsageError, match=r"holds both y.jpg and y.png"):
        compare_folders(a, b, Look())
    (b / "x.png").write_bytes(b"broken")
    (b / "y.jpg").unlink()
    with pytest.raises(UsageError, match=r"none of the 1 pairs can be compared; the first: .*x.png: not an image"):
        compare_folders(a, b, Look())


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_weights_from_a_file(tmp_path: Path, ending: str) -> None:
    """As torchvision publishes them: with a classifier beside the features."""
    from safetensors.torch import save_file

    tensors = drawn_features("squeeze") | {"classifier.1.weight": torch.zeros(3)}
    file = tmp_path / f"weights{ending}"
    save_file(tensors, file) if ending == ".safetensors" else torch.save(tensors, file)
    read = load_metric(Backbone("squeeze", str(file)))
    drawn = load_metric(Backbone("squeeze", dummy=True))
    x = torch.linspace(-1, 1, 3 * 20 * 20).reshape(1, 3, 20, 20)
    assert torch.equal(read.module(x, x.flip(2)), drawn.module(x, x.flip(2)))
    assert read.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    torch.save(drawn_features("squeeze"), tmp_path / "squeeze.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"squeeze.pth holds other weights than the features of VGG16"):
        load_metric(Backbone("vgg", str(tmp_path / "squeeze.pth")))
    with pytest.raises(ConfigError, match=r"other.pth holds no weights named features"):
        load_metric(Backbone("vgg", str(tmp_path / "other.pth")))
    with pytest.raises(ConfigError, match="Did you mean 'squeeze'"):
        load_metric(Backbone("squeezenet"))
    with pytest.raises(ConfigError, match="--dummy and --weights-url"):
        load_metric(Backbone("vgg", "x.pth", dummy=True))


def test_nothing_is_downloaded_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("ULDM_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"--auto-download fetches them \(5 MB\)"):
        load_metric(Backbone("squeeze"))
    with pytest.raises(UldmError, match="ULDM_OFFLINE forbids"):
        load_metric(Backbone("squeeze", auto_download=True))
    with pytest.raises(UldmError, match="ULDM_OFFLINE forbids"):
        load_metric(Backbone("squeeze", "https://example.org/weights/squeeze.pth"))


def test_what_was_downloaded_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url = perceptual.PUBLISHED["squeeze"].url
    file = fetch.cache("weights") / url.rsplit("/", 1)[1]
    file.parent.mkdir(parents=True)
    torch.save(drawn_features("squeeze"), file)
    assert load_metric(Backbone("squeeze")).weights == url


@pytest.mark.skipif(
    "ULDM_TEST_ASSETS" not in os.environ, reason="ULDM_TEST_ASSETS names no folder with VGG16's weights"
)
def test_the_authors_example_with_vgg(tmp_path: Path) -> None:
    shared = Path(os.environ["ULDM_TEST_ASSETS"])
    look = Look(Backbone("vgg", str(shared / "weights" / "vgg16-imagenet-features.safetensors")))
    images = [shared / "data" / "lpips" / f"ex_{name}.png" for name in ("ref", "p0")]
    assert compare_images(*images, look, tmp_path / "map.png").compared.distance == pytest.approx(0.5686, abs=1e-4)
