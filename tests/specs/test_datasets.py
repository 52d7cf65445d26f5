"""The kinds of data sets: their defaults, the embedded set, IDX files as torchvision lays them out, and no network."""

import gzip
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from uldm_cli import assets
from uldm_cli.errors import ConfigError, UldmError
from uldm_cli.specs.datasets import MNIST, FashionMNIST, Images, Tiny

ASSETS = os.environ.get("ULDM_TEST_ASSETS")
needs_assets = pytest.mark.skipif(not ASSETS, reason="ULDM_TEST_ASSETS is not set")


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()


IMAGES = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 3, 9, 9], dtype=np.uint8)


def write_pair(folder: Path, images: bytes, labels: bytes, *, part: str = "train", gz: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
        if gz:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


def test_tiny_is_balanced_and_small() -> None:
    assert assets.path("tiny-fashion-mnist.png").stat().st_size < 1_500_000
    train, test = Tiny().build(), Tiny(train=False).build()
    for data, each in ((train, 320), (test, 40)):
        labels = [data[i][1] for i in range(len(data))]
        assert np.bincount(labels).tolist() == [each] * 10
    image, label = train[0]
    assert image.shape == (1, 32, 32)
    assert image.dtype == torch.uint8
    assert train.classes[label] == "t-shirt"
    assert not image[:, :2].any()


def test_tiny_parts_share_no_image() -> None:
    parts = (Tiny(size=28, train=train).build() for train in (True, False))
    train, test = ({hashlib.md5(data[i][0].numpy().tobytes()).digest() for i in range(len(data))} for data in parts)
    assert not train & test


def test_tiny_has_the_pixels_of_fashion_mnist() -> None:
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    real = FashionMNIST(root=str(folder), size=28).build()
    tiny = Tiny(size=28).build()
    bags = [i for i in range(400) if real[i][1] == 8]
    first = next(i for i in range(len(tiny)) if tiny[i][1] == 8)
    for offset, i in enumerate(bags):
        assert torch.equal(tiny[first + offset][0], real[i][0])


@pytest.mark.parametrize("where", ["MNIST/raw", "raw", "."])
@pytest.mark.parametrize("gz", [True, False])
def test_mnist_layouts(where: str, gz: bool, tmp_path: Path) -> None:
    write_pair(tmp_path / where, idx(IMAGES), idx(LABELS), gz=gz)
    data = MNIST(root=str(tmp_path)).build()
    assert len(data) == 6
    assert np.array_equal(data[2][0][0, 2:30, 2:30].numpy(), IMAGES[2])
    assert [data[i][1] for i in range(6)] == LABELS.tolist()


@needs_assets
@pytest.mark.parametrize(("train", "count"), [(True, 60_000), (False, 10_000)])
def test_real_mnist(train: bool, count: int) -> None:
    data = MNIST(root=f"{ASSETS}/data/mnist", train=train, size=28, channels=3).build()
    assert len(data) == count
    assert data[0][0].shape == (3, 28, 28)
    assert data[0][1] == (5 if train else 7)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (idx(IMAGES)[:-5], idx(LABELS), "truncated or damaged"),
        (idx(LABELS), idx(LABELS), r"holds an array \(6,\), expected \(N, 28, 28\)"),
        (idx(IMAGES), idx(LABELS[:5]), "a label below 10 for each"),
        (idx(IMAGES), idx(LABELS + 5), "a label below 10 for each"),
        (b"junk", idx(LABELS), "not an IDX file"),
    ],
)
def test_wrong_idx_files(images: bytes, labels: bytes, message: str, tmp_path: Path) -> None:
    write_pair(tmp_path, images, labels)
    with pytest.raises(ConfigError, match=message) as caught:
        MNIST(root=str(tmp_path)).build()
    assert "\n" not in str(caught.value)


def test_truncated_gzip(tmp_path: Path) -> None:
    write_pair(tmp_path, idx(IMAGES), idx(LABELS))
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"train-images-idx3-ubyte\.gz cannot be read.*truncated"):
        MNIST(root=str(tmp_path)).build()


def test_given_root_without_the_files_is_never_downloaded_to(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not hold FashionMNIST: no .*train-images.*leave root out"):
        FashionMNIST(root=str(tmp_path / "typo")).build()
    assert not any(tmp_path.iterdir())


def test_offline_names_file_address_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("ULDM_OFFLINE", "1")
    with pytest.raises(UldmError) as caught:
        MNIST().build()
    line = str(caught.value)
    assert "MNIST train-images-idx3-ubyte.gz is not on this machine" in line
    assert "https://ossci-datasets.s3.amazonaws.com/mnist/train-images-idx3-ubyte.gz" in line
    assert str(tmp_path / "uldm/data/mnist/MNIST/raw/train-images-idx3-ubyte.gz") in line


def test_files_in_the_cache_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("ULDM_OFFLINE", "1")
    write_pair(tmp_path / "uldm/data/fashionmnist/FashionMNIST/raw", idx(IMAGES), idx(LABELS), part="t10k")
    data = FashionMNIST(train=False).build()
    assert data.classes[data[4][1]] == "ankle-boot"


def test_checksums_are_torchvision_s() -> None:
    torchvision = pytest.importorskip("torchvision")
    for ours, theirs in ((MNIST, torchvision.datasets.MNIST), (FashionMNIST, torchvision.datasets.FashionMNIST)):
        assert ours.md5 == dict(theirs.resources)
        assert ours.mirrors[0] in theirs.mirrors


def test_images_of_a_folder(tmp_path: Path) -> None:
    shutil.copy(assets.path("tiny-fashion-mnist.png"), tmp_path / "x.png")
    data = Images(root=str(tmp_path), size=48).build()
    assert data[0][0].shape == (3, 48, 48)


@pytest.mark.parametrize(
    "fields", [{}, {"root": ""}, {"root": "x", "size": 4}, {"root": "x", "channels": 0}, {"root": "x", "rot": 1}]
)
def test_bad_fields(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Images(**fields)


@pytest.mark.parametrize("spec", [Images(root="x"), MNIST(), FashionMNIST(), Tiny()])
def test_kind_comes_first_and_fields_are_described(spec: Any) -> None:
    assert next(iter(spec.model_dump())) == "kind"
    fields = type(spec).model_fields
    assert all(field.description for name, field in fields.items() if name != "kind")
