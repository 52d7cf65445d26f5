"""Sets of images and their streams: real fruits from a tar, and folders and archives with damage made here."""

import gc
import io
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from uldm_cli.core import rng
from uldm_cli.core.data import ArrayImages, Batch, Draws, FileImages, filled, open_images, read_idx, sequential, stream
from uldm_cli.core.data.streams import permutation
from uldm_cli.errors import ConfigError, UldmError, UsageError

ASSETS = os.environ.get("ULDM_TEST_ASSETS")
needs_assets = pytest.mark.skipif(not ASSETS, reason="ULDM_TEST_ASSETS is not set")


def png(value: int, size: tuple[int, int] = (16, 16)) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels[0, 0] = value  # by which the tests know the image again
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


GOOD = {f"{folder}/{i:02}.png": png(10 * k + i) for k, folder in enumerate("ab") for i in range(5)} | {"Z.PNG": png(99)}
HEADER_DAMAGE = {"a/text.jpg": b"no image", "a/tiny.png": png(1, (1, 1)), "b/cut.png": png(2)[:20]}
LATE_DAMAGE = {"a/02x.png": png(3)[:400]}  # its header is whole
OTHERS = {"notes.txt": b"x", ".hidden/a.png": png(0), "a/._00.png": b"resource fork", "__MACOSX/a.png": b"x"}


def as_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def as_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path / "set.tar", "w") as tar:
        for name, content in reversed(files.items()):
            member = tarfile.TarInfo("./" + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("a/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return path / "set.tar"


def as_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path / "set.zip"


LAYOUTS = [as_folder, as_tar, as_zip]
Layout = Callable[[Path, dict[str, bytes]], Path]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lists_sorts_and_labels(layout: Layout, tmp_path: Path) -> None:
    found = open_images(layout(tmp_path, GOOD | HEADER_DAMAGE | OTHERS), size=16)
    assert found.names == sorted(GOOD)
    assert found.classes == ("a", "b")
    assert [name for name, _ in found.skipped] == sorted(HEADER_DAMAGE)
    labels = {name: found[i][1] for i, name in enumerate(found.names)}
    assert labels == {name: {"a": 0, "b": 1}.get(name.split("/")[0], -1) for name in GOOD}
    for i, name in enumerate(found.names):
        expected = torch.from_numpy(np.array(Image.open(io.BytesIO(GOOD[name])))).permute(2, 0, 1)
        assert torch.equal(found[i][0], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reasons_are_one_line_each(layout: Layout, tmp_path: Path) -> None:
    reasons = dict(open_images(layout(tmp_path, GOOD | HEADER_DAMAGE), size=16).skipped)
    assert reasons["a/text.jpg"].startswith("not an image")
    assert reasons["a/tiny.png"] == "1x1 pixels, smaller than 8 on a side"
    assert not any("\n" in reason for reason in reasons.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strict_stops_at_the_first_unusable_file(layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a/text\.jpg in .*not an image.*strict"):
        open_images(layout(tmp_path, GOOD | HEADER_DAMAGE), size=16, strict=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_of_formats_that_are_not_read_are_named(layout: Layout, tmp_path: Path) -> None:
    """Whoever has photographs of a telephone must not believe that they are trained on."""
    root = layout(
        tmp_path, GOOD | {"a/phone.HEIC": b"ftypheic", "b/scan.jp2": b"jP", "b/.hidden.heic": b"", "b/x.txt": b""}
    )
    found = open_images(root, size=16)
    assert found.names == sorted(GOOD)
    reason = "of a format that is not read; as JPEG or PNG it would be"
    assert found.skipped == [("a/phone.HEIC", reason), ("b/scan.jp2", reason)]
    with pytest.raises(UsageError, match=r"a/phone\.HEIC in .*of a format that is not read.*strict"):
        open_images(root, size=16, strict=True)


def test_follows_links_to_folders_but_not_in_circles(tmp_path: Path) -> None:
    as_folder(tmp_path / "elsewhere", {"1.png": png(1)})
    as_folder(tmp_path / "root", {"a/2.png": png(2)})
    (tmp_path / "root/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/a/circle").symlink_to(tmp_path / "root")
    assert open_images(tmp_path / "root", size=16).names == ["a/2.png", "b/1.png"]


def test_grey_and_other_sizes(tmp_path: Path) -> None:
    image, _ = open_images(as_folder(tmp_path, {"x.png": png(7, (40, 20))}), size=12, channels=1)[0]
    assert image.shape == (1, 12, 12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_usable(layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none of the 3 images in .*a/text\.jpg"):
        open_images(layout(tmp_path, dict(HEADER_DAMAGE)), size=16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_images_at_all(layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no images in .*\.jpg"):
        open_images(layout(tmp_path, {"notes.txt": b"x"}), size=16)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no images in") as caught:
        open_images(tmp_path, size=16)
    assert caught.value.exit_code == 2


def test_missing_path_offers_the_nearest_name(tmp_path: Path) -> None:
    as_folder(tmp_path / "flowers/train", GOOD)
    with pytest.raises(ConfigError, match=r"does not exist\. Did you mean .*/flowers/train\?"):
        open_images(tmp_path / "flowers/trian", size=16)
    with pytest.raises(ConfigError, match=r"does not exist\. Did you mean .*/flowers\?"):
        open_images(tmp_path / "flower/train", size=16)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_tar_is_refused_whatever_its_name(mode: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", mode):
        pass
    with pytest.raises(ConfigError, match=r"is compressed.*Unpack"):
        open_images(tmp_path / "set.tar", size=16)


def test_other_files_as_root(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    with pytest.raises(ConfigError, match=r"neither a folder.*Give the folder"):
        open_images(tmp_path / "a.png", size=16)
    (tmp_path / "a.bin").write_bytes(b"1234")
    with pytest.raises(ConfigError, match=r"neither a folder nor a \.tar or \.zip"):
        open_images(tmp_path / "a.bin", size=16)


@pytest.mark.parametrize("layout", [as_tar, as_zip])
def test_truncated_archive(layout: Layout, tmp_path: Path) -> None:
    path = layout(tmp_path, GOOD)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 100])
    with pytest.raises(ConfigError, match="truncated or damaged"):
        open_images(path, size=16)


def test_archive_that_shrinks_after_opening(tmp_path: Path) -> None:
    found = open_images(as_tar(tmp_path, {"a.png": png(1), "b.png": png(2)}), size=16)
    os.truncate(tmp_path / "set.tar", 600)
    with pytest.raises(UldmError, match="not one image of the data set can be decoded"):
        next(stream(found, batch_size=2, seed=0))


def test_handles_are_closed(tmp_path: Path) -> None:
    for layout in (as_tar, as_zip):
        found = open_images(layout(tmp_path, GOOD), size=16)
        found[0]
        again = pickle.loads(pickle.dumps(found))
        assert torch.equal(again[3][0], found[3][0])
    del found, again
    gc.collect()
    handles = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)]
    assert not [name for name in handles if str(tmp_path) in name]


def _is_open(descriptor: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{descriptor}")


class Numbers:
    """A set whose image i shows i."""

    classes = ()
    channels = 1
    size = 1

    def __init__(self, length: int) -> None:
        self.length = length
        self.skipped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((1, 1, 1), index, dtype=torch.uint8), index


def shown(batches: Iterator[Batch], count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        found += next(batches).label.tolist()
    return found[:count]


@settings(deadline=None, max_examples=30)
@given(
    length=st.integers(1, 40),
    batch=st.integers(1, 50),
    seed=st.integers(0, 2**63),
    start=st.integers(0, 300),
    count=st.integers(1, 100),
)
def test_order_depends_on_the_sample_number_alone(length: int, batch: int, seed: int, start: int, count: int) -> None:
    data = Numbers(length)
    one_by_one = shown(stream(data, batch_size=1, seed=seed), start + count)
    assert shown(stream(data, batch_size=batch, seed=seed, start=start), count) == one_by_one[start:]


@settings(deadline=None, max_examples=20)
@given(length=st.integers(1, 60), seed=st.integers(-5, 2**70))
def test_each_epoch_shows_everything_once(length: int, seed: int) -> None:
    labels = shown(stream(Numbers(length), batch_size=7, seed=seed), 3 * length)
    for epoch in range(3):
        assert sorted(labels[epoch * length : (epoch + 1) * length]) == list(range(length))


def test_orders_differ_between_epochs_and_seeds() -> None:
    orders = {tuple(permutation(50, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_order_is_the_same_in_every_version() -> None:
    assert permutation(10, 1125, 3).tolist() == [6, 7, 0, 1, 3, 4, 9, 2, 5, 8]


def test_batches_are_full_and_numbered_across_epochs() -> None:
    batches = list(islice(stream(Numbers(5), batch_size=4, seed=0, start=3), 3))
    assert [batch.number.tolist() for batch in batches] == [[3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13, 14]]
    assert batches[0].image.shape == (4, 1, 1, 1)
    assert batches[0].image.flatten().tolist() == batches[0].label.tolist()


@settings(deadline=None, max_examples=30)
@given(length=st.integers(1, 20), batch=st.integers(1, 30), world=st.integers(1, 4), start=st.integers(0, 50))
def test_processes_share_the_samples_of_one(length: int, batch: int, world: int, start: int) -> None:
    data = Numbers(length)
    (alone,) = islice(stream(data, batch_size=3 * world * batch, seed=4, start=start), 1)
    streams = [stream(data, batch_size=batch, seed=4, start=start, rank=r, world=world) for r in range(world)]
    together = [next(batches) for _ in range(3) for batches in streams]
    assert torch.equal(torch.cat([b.number for b in together]), alone.number)
    assert torch.equal(torch.cat([b.label for b in together]), alone.label)
    assert all(len(b) == batch for b in together)


class Sampled(Numbers):
    """A set whose image, in training, shows what was drawn for it."""

    def sample(self, index: int, bits: int) -> tuple[torch.Tensor, int]:
        return torch.full((1, 1, 1), bits % 251, dtype=torch.uint8), index


class Gathered(Numbers):
    def gather(self, indices: torch.Tensor, draws: Draws | None) -> tuple[torch.Tensor, torch.Tensor]:
        values = indices if draws is None else draws.seed + draws.numbers
        return values.to(torch.uint8)[:, None, None, None], indices


def test_only_training_hands_out_draws() -> None:
    numbers = torch.arange(5, 15)
    drawn = rng.bits(3, rng.STREAM_CROP, numbers, 1)[:, 0].tolist()
    for data, expected in (
        (Sampled(7), [(value % 2**64) % 2**63 % 251 for value in drawn]),
        (Gathered(7), [3 + n for n in range(5, 15)]),
    ):
        assert next(stream(data, batch_size=10, seed=3, start=5)).image.flatten().tolist() == expected
        assert next(sequential(data, batch_size=7)).image.flatten().tolist() == list(range(7))
        assert next(filled(data, [range(2, 5)])).image.flatten().tolist() == [2, 3, 4]


def test_workers_change_nothing(tmp_path: Path) -> None:
    found = open_images(as_zip(tmp_path, GOOD | LATE_DAMAGE), size=16)
    alone, helped = (list(islice(stream(found, batch_size=4, seed=3, workers=w), 8)) for w in (0, 2))
    for a, b in zip(alone, helped, strict=True):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.label, b.label)
        assert torch.equal(a.number, b.number)
        assert a.skipped == b.skipped


def test_stream_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    next(stream(Numbers(5), batch_size=2, seed=0))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_undecodable_file_is_replaced_by_the_next_and_named(layout: Layout, tmp_path: Path) -> None:
    found = open_images(layout(tmp_path, GOOD | LATE_DAMAGE), size=16)
    damaged = found.names.index("a/02x.png")
    assert not found.skipped
    (batch,) = islice(stream(found, batch_size=len(found), seed=1), 1)
    assert [name for name, _ in batch.skipped] == ["a/02x.png"]
    place = permutation(len(found), 1, 0).tolist().index(damaged)
    assert torch.equal(batch.image[place], found[damaged + 1][0])
    assert len(batch) == len(found)


@pytest.mark.parametrize("workers", [0, 1])
def test_strict_stream_names_the_file(workers: int, tmp_path: Path) -> None:
    found = open_images(as_folder(tmp_path, GOOD | LATE_DAMAGE), size=16)
    with pytest.raises(UsageError, match=r"^a/02x\.png: cannot be decoded.*strict") as caught:
        list(islice(stream(found, batch_size=4, seed=0, workers=workers, strict=True), 6))
    assert "\n" not in str(caught.value)


def test_sequential_is_in_order_and_leaves_damage_out(tmp_path: Path) -> None:
    found = open_images(as_folder(tmp_path, GOOD | LATE_DAMAGE), size=16)
    damaged = found.names.index("a/02x.png")
    for batch_size in (1, 4, 100):
        batches = list(sequential(found, batch_size=batch_size))
        assert all(len(batch) for batch in batches)
        assert torch.cat([b.number for b in batches]).tolist() == [i for i in range(len(found)) if i != damaged]
        assert [name for b in batches for name, _ in b.skipped] == ["a/02x.png"]
        assert torch.equal(batches[-1].image[-1], found[len(found) - 1][0])


def test_sequential_keeps_the_names_of_leading_and_trailing_damage(tmp_path: Path) -> None:
    cut = png(3)[:400]
    found = open_images(as_folder(tmp_path, {"a.png": cut, "b.png": cut, "c.png": png(1), "d.png": cut}), size=16)
    (batch,) = sequential(found, batch_size=1)
    assert [name for name, _ in batch.skipped] == ["a.png", "b.png", "d.png"]
    with pytest.raises(UsageError, match=r"^a\.png"):
        list(sequential(found, batch_size=1, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_filled_puts_the_next_readable_in_the_place_of_damage_and_names_each_once(workers: int, tmp_path: Path) -> None:
    cut = png(3)[:400]
    files = {"a.png": png(1), "b.png": cut, "c.png": cut, "d.png": png(2), "e.png": png(4), "f.png": cut}
    found = open_images(as_folder(tmp_path, files), size=16)
    batches = list(filled(found, [range(2), range(4, 6), range(2, 4)], workers=workers))
    assert [batch.number.tolist() for batch in batches] == [[0, 1], [4, 5], [2, 3]]
    assert [[name for name, _ in batch.skipped] for batch in batches] == [["b.png"], ["f.png"], ["c.png"]]
    sources = [[0, 3], [4, 0], [3, 3]]
    for batch, indices in zip(batches, sources, strict=True):
        assert torch.equal(batch.image, torch.stack([found[index][0] for index in indices]))
    with pytest.raises(UsageError, match=r"^b\.png"):
        list(filled(found, [range(6)], workers=workers, strict=True))


def test_nothing_decodable(tmp_path: Path) -> None:
    found = open_images(as_folder(tmp_path, LATE_DAMAGE), size=16)
    given = filled(found, [range(1)])
    for batches in (stream(found, batch_size=2, seed=0), sequential(found, batch_size=2), given):
        with pytest.raises(UsageError, match=r"not one image.*a/02x\.png"):
            next(batches)


def test_workers_end_with_the_iterator(tmp_path: Path) -> None:
    found = open_images(as_folder(tmp_path, GOOD), size=16)
    batches = stream(found, batch_size=4, seed=0, workers=2)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


def test_killed_worker_is_explained(tmp_path: Path) -> None:
    found = open_images(as_folder(tmp_path, GOOD), size=16)
    batches = stream(found, batch_size=4, seed=0, workers=1)
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
    with pytest.raises(UldmError, match=r"was killed.*fewer workers"):
        list(islice(batches, 20))


@pytest.mark.skipif(os.name == "nt", reason="sends a signal to a process group")
def test_interrupt_shows_no_traceback_of_workers(tmp_path: Path) -> None:
    as_folder(tmp_path, GOOD)
    script = (
        "import sys; from uldm_cli.core.data import open_images, stream\n"
        "batches = stream(open_images(sys.argv[1], size=16), batch_size=4, seed=0, workers=2)\n"
        "next(batches); print('ready', flush=True)\n"
        "try:\n  for _ in batches: pass\n"
        "except KeyboardInterrupt: print('interrupted')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)  # in the middle of its reading
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (output, errors) == ("interrupted\n", "")


@pytest.fixture
def arrays() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)


def in_memory(arrays: np.ndarray, size: int, channels: int = 1) -> ArrayImages:
    return ArrayImages(arrays, np.arange(20, dtype=np.uint8), classes=["x"] * 20, size=size, channels=channels)


def test_arrays_are_padded_not_scaled(arrays: np.ndarray) -> None:
    image, label = in_memory(arrays, 32, 3)[4]
    assert label == 4
    assert image.shape == (3, 32, 32)
    assert np.array_equal(image[1, 2:30, 2:30].numpy(), arrays[4])
    assert int(image.sum()) == 3 * int(arrays[4].sum())


def test_arrays_are_scaled_down(arrays: np.ndarray) -> None:
    image, _ = in_memory(arrays, 14)[0]
    assert image.shape == (1, 14, 14)
    assert abs(float(image.float().mean()) - float(arrays[0].mean())) < 3


def test_arrays_stream_like_files(arrays: np.ndarray) -> None:
    data = in_memory(arrays, 28)
    batches = list(islice(stream(data, batch_size=8, seed=2, workers=2), 5))
    assert not multiprocessing.active_children()
    assert torch.cat([b.label for b in batches]).tolist() == shown(stream(Numbers(20), batch_size=40, seed=2), 40)
    assert np.array_equal(batches[0].image[3, 0].numpy(), arrays[batches[0].label[3]])
    assert torch.cat([b.label for b in sequential(data, batch_size=8)]).tolist() == list(range(20))


def idx(array: np.ndarray, code: int = 8) -> bytes:
    return bytes((0, 0, code, array.ndim)) + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()


def test_read_idx_round_trip(tmp_path: Path, arrays: np.ndarray) -> None:
    (tmp_path / "x").write_bytes(idx(arrays))
    assert np.array_equal(read_idx(tmp_path / "x"), arrays)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x00\x00\x0d\x03", "not an IDX file"),
        (b"\x00\x00\x08\x03\x00\x00", "truncated or damaged"),
        (idx(np.zeros((3, 4, 4), np.uint8))[:-1], r"truncated or damaged: 63 bytes .*\[3, 4, 4\].* 64"),
    ],
)
def test_read_idx_names_the_damage(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_idx(tmp_path / "x")


@needs_assets
def test_real_fruits_from_a_tar() -> None:
    found = open_images(Path(str(ASSETS), "data/fruits64/test.tar"), size=64)
    assert isinstance(found, FileImages)
    assert len(found.classes) == 27
    assert not found.skipped
    assert found.names == sorted(found.names)
    batch = next(stream(found, batch_size=64, seed=0, workers=2))
    assert batch.image.shape == (64, 3, 64, 64)
    assert batch.image[:, :, 0, 0].float().mean() > 240  # fruits on white
    assert len(batch.label.unique()) > 10
