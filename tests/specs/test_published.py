"""The published sets, each as a small copy made here in the layout that its authors give it."""

import io
import re
import runpy
import tarfile
import zipfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import huggingface_hub
import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from uldm_cli import registry
from uldm_cli.core.data import FileImages, sequential, stream
from uldm_cli.errors import ConfigError, UldmError, UsageError
from uldm_cli.specs.autoencoder_training import AutoencoderTraining
from uldm_cli.specs.base import spec_class
from uldm_cli.specs.datasets import Images, Tiny
from uldm_cli.specs.datasets.cifar import ARCHIVE, CIFAR10
from uldm_cli.specs.datasets.files import FFHQ, LSUN, CelebA, CelebAHQ
from uldm_cli.specs.datasets.hub import HuggingFace
from uldm_cli.specs.datasets.imagenet import ImageNet
from uldm_cli.specs.load import load_config

datasets = pytest.importorskip("datasets")
PICTURES = runpy.run_path(str(Path(__file__).parent / "pictures.py"))
pixels, encoded, write, shows = (PICTURES[name] for name in ("pixels", "encoded", "write", "shows"))


# CIFAR-10


def cifar_file(*numbers: int) -> bytes:
    return b"".join(bytes([n % 10]) + pixels(n, 32, 32).transpose(2, 0, 1).tobytes() for n in numbers)


CIFAR = {f"cifar-10-batches-bin/data_batch_{i}.bin": cifar_file(2 * i, 2 * i + 1) for i in range(1, 6)} | {
    "cifar-10-batches-bin/test_batch.bin": cifar_file(20),
    "cifar-10-batches-bin/batches.meta.txt": b"airplane\n",
}


def cifar_archive(path: Path) -> Path:
    with tarfile.open(path / ARCHIVE, "w:gz") as archive:
        for name, body in CIFAR.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return path / ARCHIVE


def test_cifar_of_a_folder_and_of_the_archive(tmp_path: Path) -> None:
    write(tmp_path / "folder", CIFAR)
    (tmp_path / "archive").mkdir()
    archive = cifar_archive(tmp_path / "archive")
    for root in (tmp_path / "folder", tmp_path / "folder/cifar-10-batches-bin", archive, archive.parent):
        data = CIFAR10(root=str(root)).build()
        assert shows(data, *range(2, 12))
        assert [data[i][1] for i in range(10)] == [n % 10 for n in range(2, 12)]
        assert data.classes[data[4][1]] == "frog"
        assert shows(CIFAR10(root=str(root), train=False).build(), 20)


def test_cifar_is_scaled_and_grey(tmp_path: Path) -> None:
    root = str(write(tmp_path, CIFAR))
    grey, _ = CIFAR10(root=root, channels=1).build()[3]
    picture = Image.fromarray(pixels(5, 32, 32))
    assert np.array_equal(grey[0], np.asarray(picture.convert("L")))
    large, _ = CIFAR10(root=root, size=64).build()[3]
    assert np.array_equal(large.permute(1, 2, 0), np.asarray(picture.resize((64, 64), Image.Resampling.LANCZOS)))


def test_cifar_of_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"does not hold the binary version of CIFAR-10: no cifar-10-batches-bin"):
        CIFAR10(root=str(tmp_path)).build()
    write(tmp_path / "pickled", {"cifar-10-batches-py/data_batch_1": b"\x80"})
    with pytest.raises(ConfigError, match=r"pickled version, and no pickle is opened\. Put cifar-10-binary"):
        CIFAR10(root=str(tmp_path / "pickled")).build()
    short = write(tmp_path / "short", CIFAR | {"cifar-10-batches-bin/test_batch.bin": b"x" * 3000})
    with pytest.raises(ConfigError, match=r"test_batch\.bin is truncated or no file of CIFAR-10: 3000 bytes"):
        CIFAR10(root=str(short), train=False).build()
    wrong = write(tmp_path / "wrong", CIFAR | {"cifar-10-batches-bin/test_batch.bin": b"\x0a" * 3073})
    with pytest.raises(ConfigError, match="a label above 9"):
        CIFAR10(root=str(wrong), train=False).build()
    (tmp_path / "cut.tar.gz").write_bytes(cifar_archive(tmp_path).read_bytes()[:2000])
    with pytest.raises(ConfigError, match=r"cut\.tar\.gz cannot be read .*truncated"):
        CIFAR10(root=str(tmp_path / "cut.tar.gz")).build()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("ULDM_OFFLINE", "1")
    with pytest.raises(UldmError, match=r"CIFAR-10 is not on this machine.*cs\.toronto\.edu"):
        CIFAR10().build()


# CelebA, CelebA-HQ, FFHQ


def celeba(path: Path) -> Path:
    faces = {f"img_align_celeba/{i:06}.jpg": encoded(i, "PNG", 178, 218) for i in range(1, 7)}
    write(path / "folder", faces | {"list_eval_partition.txt": CELEBA_PARTS})
    write(path / "zip", {"celeba/list_eval_partition.txt": CELEBA_PARTS})
    with zipfile.ZipFile(path / "zip/celeba/img_align_celeba.zip", "w") as archive:
        for name, content in faces.items():
            archive.writestr(name, content)
    return path / "folder"


CELEBA_PARTS = b"000001.jpg 0\n000002.jpg 0\n000003.jpg 1\n000004.jpg 2\n000005.jpg 2\n000006.jpg 0\n"


def test_celeba_splits_and_window(tmp_path: Path) -> None:
    folder = celeba(tmp_path)
    for root in (folder, tmp_path / "zip"):
        for split, numbers in (("train", [1, 2, 6]), ("valid", [3]), ("test", [4, 5]), ("all", range(1, 7))):
            data = CelebA(root=str(root), split=split, size=140).build()
            assert len(data) == len(numbers)
            assert data.classes == ()
            for i, number in enumerate(numbers):
                centre = pixels(number, 178, 218)[39:179, 19:159]
                assert np.array_equal(data[i][0].permute(1, 2, 0), centre)
                assert data[i][1] == -1
    whole = CelebA(root=str(folder), size=178, window=178).build()
    assert np.array_equal(whole[0][0].permute(1, 2, 0), pixels(1, 178, 218)[20:198])


def test_celeba_at_random_places_of_the_window(tmp_path: Path) -> None:
    data = CelebA(root=str(celeba(tmp_path)), size=130, resize="none", crop="random").build()
    window = pixels(1, 178, 218)[39:179, 19:159]
    assert np.array_equal(data.sample(0, 0)[0].permute(1, 2, 0), window[:130, :130])
    assert np.array_equal(data.sample(0, 11 * 11 - 1)[0].permute(1, 2, 0), window[10:, 10:])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("size=176", "resize=none"), r"data\.size=176 .*: expected at most 140, the window.*got 176"),
        (("size=64", "crop=random"), r"data\.crop=random .*: expected center: the square is the whole window"),
        (("size=64", "window=178", "crop=random"), r"data\.crop=random .*: expected center"),
        (("size=140", "resize=none", "crop=random"), r"data\.crop=random .*: expected center"),
    ],
)
def test_celeba_with_settings_that_do_nothing(given: tuple[str, ...], message: str) -> None:
    words = ["autoencoder=vqvae", "data=celeba", "data.root=x", *(f"data.{word}" for word in given)]
    with pytest.raises(ConfigError, match=message):
        load_config(AutoencoderTraining, None, words)


def test_celeba_with_parts_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not hold CelebA: no img_align_celeba or img_align_celeba\.zip"):
        CelebA(root=str(tmp_path)).build()
    folder = celeba(tmp_path)
    partition = folder / "list_eval_partition.txt"
    partition.write_text("000001.jpg 0\n000002.jpg 5\n")
    with pytest.raises(ConfigError, match=r"list_eval_partition\.txt line 2: expected a name and 0, 1 or 2"):
        CelebA(root=str(folder)).build()
    partition.write_text("000001.jpg 0\n999999.jpg 0\n")
    with pytest.raises(ConfigError, match=r"1 of the 2 images of split train are not in .*999999\.jpg"):
        CelebA(root=str(folder)).build()
    partition.unlink()
    with pytest.raises(ConfigError, match=r"list_eval_partition\.txt cannot be read"):
        CelebA(root=str(folder)).build()


def npy(number: int) -> bytes:
    file = io.BytesIO()
    np.save(file, pixels(number).transpose(2, 0, 1)[None])
    return file.getvalue()


def test_celebahq_as_the_arrays_of_the_published_list(tmp_path: Path) -> None:
    write(tmp_path / "faces", {f"imgHQ{i:05}.npy": npy(i) for i in range(4)})
    (tmp_path / "validation.txt").write_text("imgHQ00003.npy\nimgHQ00001.npy\n")
    assert shows(CelebAHQ(root=str(tmp_path / "faces"), size=16).build(), 0, 1, 2, 3)
    split = str(tmp_path / "validation.txt")
    assert shows(CelebAHQ(root=str(tmp_path / "faces"), size=16, split_file=split).build(), 1, 3)


def test_a_list_finds_images_in_another_layout(tmp_path: Path) -> None:
    """The published list of FFHQ has 00001.png; the authors' archive has folders of a thousand."""
    with zipfile.ZipFile(tmp_path / "ffhq.zip", "w") as archive:
        for i in (0, 1, 1000, 1001):
            archive.writestr(f"images/{i // 1000 * 1000:05}/{i:05}.png", encoded(i))
    split = tmp_path / "train.txt"
    split.write_text("00001.png\n01000.png\n")
    data = FFHQ(root=str(tmp_path / "ffhq.zip"), size=16, split_file=str(split)).build()
    assert shows(data, 1, 1000)
    assert data.classes == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"list\.txt is empty"),
        ("a/1.png\nz.png\n", r"1 of the 2 images of .*list\.txt are not in .*, the first is z\.png"),
        ("2.png\n", r"2\.png of .*list\.txt could be [ab]/2\.png or [ab]/2\.png"),
    ],
)
def test_wrong_lists(content: str, message: str, tmp_path: Path) -> None:
    root = write(tmp_path / "root", {"a/1.png": encoded(1), "a/2.png": encoded(2), "b/2.png": encoded(3)})
    (tmp_path / "list.txt").write_text(content)
    with pytest.raises(ConfigError, match=message):
        Images(root=str(root), split_file=str(tmp_path / "list.txt")).build()


def test_a_list_of_ones_own(tmp_path: Path) -> None:
    root = write(tmp_path / "root", {"a/1.png": encoded(1), "a/2.png": encoded(2), "b/2.png": encoded(3)})
    (tmp_path / "list.txt").write_text("b/2.png\na/1.png\n")
    data = Images(root=str(root), size=16, split_file=str(tmp_path / "list.txt")).build()
    assert shows(data, 1, 3)
    assert data.classes == ("a", "b")


# LSUN


def lsun(path: Path, numbers: range = range(5)) -> Path:
    folder = path / "church_outdoor_train_lmdb"
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=1 << 20) as environment, environment.begin(write=True) as writing:
        for i in numbers:
            writing.put(f"{i:040x}".encode(), encoded(i, "WEBP"))
    return folder


def test_lsun_of_its_lmdb(tmp_path: Path) -> None:
    folder = lsun(tmp_path)
    assert shows(LSUN(root=str(folder), size=16).build(), *range(5))
    (tmp_path / "val.txt").write_text(f"{3:040x}.webp\n{1:040x}.webp\n")
    assert shows(LSUN(root=str(folder), size=16, split_file=str(tmp_path / "val.txt")).build(), 1, 3)
    with pytest.raises(ConfigError, match=r"holds the LMDBs of several parts.*church_outdoor_train_lmdb"):
        LSUN(root=str(tmp_path)).build()


def test_lsun_of_a_folder_is_bicubic(tmp_path: Path) -> None:
    write(tmp_path / "churches", {f"{i:040x}.webp": encoded(i, "WEBP", 30, 20) for i in range(3)})
    (tmp_path / "val.txt").write_text(f"{2:040x}.webp\n")
    (image, label), *_ = LSUN(root=str(tmp_path / "churches"), size=16, split_file=str(tmp_path / "val.txt")).build()
    expected = Image.fromarray(pixels(2, 30, 20)[:, 5:25]).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(image.permute(1, 2, 0), np.asarray(expected))
    assert label == -1


def test_lmdb_is_shared_by_workers_and_sets(tmp_path: Path) -> None:
    folder = lsun(tmp_path)
    one, other = (LSUN(root=str(folder), size=16).build() for _ in range(2))
    alone = list(islice(stream(one, batch_size=4, seed=0), 4))
    helped = list(islice(stream(other, batch_size=4, seed=0, workers=2), 4))
    assert all(torch.equal(a.image, b.image) for a, b in zip(alone, helped, strict=True))


def test_damaged_lmdb(tmp_path: Path) -> None:
    write(tmp_path / "x_lmdb", {"data.mdb": b"no database" * 1000})
    with pytest.raises(ConfigError, match="is no whole LMDB"):
        LSUN(root=str(tmp_path / "x_lmdb")).build()


# Hugging Face


def table(labels: Any = ("cat", "dog", "cat", "emu"), **columns: Any) -> Any:
    rows = {"image": [{"bytes": encoded(i), "path": None} for i in range(4)], "kind": list(labels), **columns}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


@pytest.fixture
def quiet_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")
    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)  # so that it is put back
    monkeypatch.setenv("ULDM_OFFLINE", "1")


def hub_parquet(path: Path) -> Path:
    (path / "hub/data").mkdir(parents=True)
    table().to_parquet(str(path / "hub/data/train-00000.parquet"))
    return path / "hub"


@pytest.mark.usefixtures("quiet_hub")
def test_hub_of_local_files(tmp_path: Path) -> None:
    table().save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": table()}).save_to_disk(str(tmp_path / "dict"))
    for root in (hub_parquet(tmp_path), tmp_path / "saved", tmp_path / "dict"):
        plain = HuggingFace(name=str(root), size=16).build()
        assert shows(plain, 0, 1, 2, 3)
        assert plain.classes == ()
        data = HuggingFace(name=str(root), size=16, image="image", label="kind").build()
        assert data.classes == ("cat", "dog", "emu")
        assert [data[i][1] for i in range(4)] == [0, 1, 0, 2]


@pytest.mark.usefixtures("quiet_hub")
def test_hub_is_shut_off_by_the_variable_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table().save_to_disk(str(tmp_path / "saved"))
    for value, offline in (("false", False), ("0", False), ("1", True)):
        monkeypatch.setenv("ULDM_OFFLINE", value)
        HuggingFace(name=str(tmp_path / "saved"), size=16).build()
        for module in (datasets.config, huggingface_hub.constants):
            assert module.HF_HUB_OFFLINE is offline


@pytest.mark.usefixtures("quiet_hub")
def test_hub_class_labels_keep_their_numbers(tmp_path: Path) -> None:
    labels = table([2, 0, 1, None]).cast_column("kind", datasets.ClassLabel(names=["a", "b", "c"]))
    labels.save_to_disk(str(tmp_path / "saved"))
    data = HuggingFace(name=str(tmp_path / "saved"), label="kind", size=16).build()
    assert data.classes == ("a", "b", "c")
    assert [data[i][1] for i in range(4)] == [2, 0, 1, -1]


@pytest.mark.usefixtures("quiet_hub")
def test_hub_with_something_missing(tmp_path: Path) -> None:
    root = str(hub_parquet(tmp_path))
    for fields, message in (
        ({"name": root, "image": "picture"}, r"no image column picture\. There are: image"),
        ({"name": root, "label": "colour"}, r"no column colour\. There are: image, kind"),
        ({"name": root, "split": "test"}, r"cannot be opened, split test \(ValueError: "),
        ({"name": "nobody/nothing-at-all"}, r"the data set nobody/nothing-at-all of Hugging Face cannot be opened"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            HuggingFace(**fields).build()
        assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("quiet_hub")
@pytest.mark.parametrize("labels", [[["a"], ["b", "c"], [], None], [{"a": 1}, {"a": 2}, {"a": 3}, None]])
def test_hub_labels_that_are_several(labels: list[Any], tmp_path: Path) -> None:
    table(labels, name=["w", "x", "y", "z"]).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ConfigError, match=r"column kind of .*not hold one number or text a row.*that do: name$"):
        HuggingFace(name=str(tmp_path / "saved"), label="kind", size=16).build()


@pytest.mark.usefixtures("quiet_hub")
def test_hub_rows_without_an_image_are_skipped_by_name(tmp_path: Path) -> None:
    rows = {"image": [{"bytes": encoded(0), "path": None}, None, {"bytes": b"broken", "path": None}]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "saved"))
    data = HuggingFace(name=str(tmp_path / "saved"), size=16).build()
    (batch,) = sequential(data, batch_size=3)
    assert len(batch) == 1
    assert [name for name, _ in batch.skipped] == ["row 1", "row 2"]
    with pytest.raises(UsageError, match="row 1"):
        list(sequential(data, batch_size=3, strict=True))


# Every kind


def ones_own(path: Path) -> Images:
    write(path / "own", {f"{'ab'[i % 2]}/{i}.png": encoded(i, "PNG", 20, 24) for i in range(5)})
    return Images(root=str(path / "own"), size=16, crop="random")


CLASSES = {f"n0144076{i % 2}/{i}.JPEG": encoded(i) for i in range(4)}
EVERY: dict[str, Callable[[Path], Any]] = {
    "images": ones_own,
    "tiny": lambda path: Tiny(),
    "cifar10": lambda path: CIFAR10(root=str(write(path, CIFAR))),
    "celeba": lambda path: CelebA(root=str(celeba(path)), size=16),
    "celebahq": lambda path: CelebAHQ(root=str(write(path / "hq", {f"{i}.npy": npy(i) for i in range(4)})), size=16),
    "ffhq": lambda path: FFHQ(root=str(write(path / "f", {f"{i}.png": encoded(i) for i in range(4)})), size=16),
    "lsun": lambda path: LSUN(root=str(lsun(path)), size=16),
    "imagenet": lambda path: ImageNet(root=str(write(path / "classes", CLASSES)), size=16),
    "hf": lambda path: HuggingFace(name=str(hub_parquet(path)), size=16),
}


def test_every_built_in_kind_is_tested() -> None:
    assert {*EVERY, "mnist", "fashion-mnist"} == set(registry.BUILTIN["datasets"])


def test_the_page_about_data_names_every_kind_and_its_commands_are_right() -> None:
    page = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    assert all(f"`{kind}`" in page for kind in registry.BUILTIN["datasets"])
    commands = re.findall(r"^uldm vqvae train (.*)$", page, re.MULTILINE)
    kinds = {load_config(AutoencoderTraining, None, command.split()).data.kind for command in commands}
    assert kinds == set(registry.BUILTIN["datasets"]) - {"mnist", "fashion-mnist", "tiny"}


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.usefixtures("quiet_hub")
def test_every_kind_goes_on_where_it_stopped(kind: str, tmp_path: Path) -> None:
    """Also with batches larger than the data, which the epochs then run through."""
    spec = EVERY[kind](tmp_path)
    assert spec_class("datasets", kind).model_validate(spec.model_dump()) == spec
    assert next(iter(spec.model_dump())) == "kind"
    assert all(field.description for name, field in type(spec).model_fields.items() if name != "kind")
    data = spec.build()
    size = min(len(data), 9) + 2
    (whole,) = islice(stream(data, batch_size=3 * size, seed=1), 1)
    assert whole.image.shape == (3 * size, spec.channels, spec.size, spec.size)
    assert whole.image.dtype == torch.uint8
    later = list(islice(stream(spec.build(), batch_size=size, seed=1, start=size), 2))
    for name in ("image", "label", "number"):
        tail = torch.cat([getattr(batch, name) for batch in later])
        assert torch.equal(tail, getattr(whole, name)[size:])


def test_a_class_with_one_image(tmp_path: Path) -> None:
    data = Images(
        root=str(write(tmp_path, {"a/1.png": encoded(1), "b/2.png": encoded(2), "b/3.png": encoded(3)}))
    ).build()
    assert isinstance(data, FileImages)
    assert data.classes == ("a", "b")
    assert [data[i][1] for i in range(3)] == [0, 1, 1]
    (alone,) = [Images(root=str(write(tmp_path / "one", {"a/1.png": encoded(1)})), size=16).build()]
    batch = next(stream(alone, batch_size=5, seed=0))
    assert batch.number.tolist() == [0, 1, 2, 3, 4]
    assert len(batch.image.flatten(1).unique(dim=0)) == 1
