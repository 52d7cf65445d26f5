"""Files that are whole or untouched: on a full disk, in a failing writer, after a kill."""

import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from PIL import Image

from uldm_cli.errors import ConfigError, UldmError
from uldm_cli.runs.files import atomic_write, writable_folder, write_png


def write_bytes(path: Path, content: bytes) -> None:
    atomic_write(path, lambda file: file.write(content))


def test_writes_and_replaces(tmp_path: Path) -> None:
    write_bytes(tmp_path / "x", b"old")
    write_bytes(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x"]


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    write_bytes(tmp_path / "x", b"1")
    (tmp_path / "y").write_bytes(b"1")
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == stat.S_IMODE((tmp_path / "y").stat().st_mode)


@pytest.mark.parametrize("failure", [ValueError("bug"), KeyboardInterrupt()])
def test_failing_writer_leaves_the_old_file(failure: BaseException, tmp_path: Path) -> None:
    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise failure

    write_bytes(tmp_path / "x", b"old")
    with pytest.raises(type(failure)):
        atomic_write(tmp_path / "x", fail)
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_killed_writer_leaves_the_old_file_and_its_litter_goes_later(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from uldm_cli.runs.files import atomic_write\n"
        "def write(file):\n  file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "atomic_write(Path(sys.argv[1]), write)\n"
    )
    write_bytes(tmp_path / "x", b"old")
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "x")], check=False)
    assert (tmp_path / "x").read_bytes() == b"old"
    (litter,) = tmp_path.glob(".x.*.tmp")
    another_process = [sys.executable, "-c", script.replace("os.kill(os.getpid(), signal.SIGKILL)", "None")]
    subprocess.run([*another_process, str(tmp_path / "x")], check=True)
    assert litter.exists()  # its process might still be writing
    os.utime(litter, (time.time() - 4000,) * 2)
    subprocess.run([*another_process, str(tmp_path / "x")], check=True)
    assert os.listdir(tmp_path) == ["x"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], check=False, capture_output=True)
    if made.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk(small_disk: Path) -> None:
    write_bytes(small_disk / "x", b"old")
    with pytest.raises(UldmError, match=r"disk full while writing .*/x\. .*whole"):
        write_bytes(small_disk / "x", bytes(100_000))
    assert (small_disk / "x").read_bytes() == b"old"
    assert os.listdir(small_disk) == ["x"]


def test_file_size_limit(tmp_path: Path) -> None:
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from uldm_cli.errors import UldmError; from uldm_cli.runs.files import atomic_write\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n  atomic_write(Path(sys.argv[1]), lambda file: file.write(bytes(5000)))\n"
        "except UldmError as error:\n  print(error)\n"
    )
    write_bytes(tmp_path / "x", b"old")
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "x")], capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("disk full while writing")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_missing_folder_and_folder_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(UldmError, match="cannot be written"):
        write_bytes(tmp_path / "none/x", b"1")
    (tmp_path / "d").mkdir()
    with pytest.raises(UldmError, match="cannot be written"):
        write_bytes(tmp_path / "d", b"1")
    assert os.listdir(tmp_path) == ["d"]


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_png_round_trip_with_text(shape: tuple[int, ...], tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    write_png(tmp_path / "x.png", array, {"seed": "7", "config": "kind: ldm-sample\nname: Ä→π"})
    with Image.open(tmp_path / "x.png") as image:
        assert np.array_equal(np.asarray(image), array)
        assert image.info["seed"] == "7"
        assert image.info["config"] == "kind: ldm-sample\nname: Ä→π"


def test_png_bytes_depend_on_the_picture_alone(tmp_path: Path) -> None:
    array = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for name in "ab":
        write_png(tmp_path / name, array)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_writable_folder_is_made(tmp_path: Path) -> None:
    assert writable_folder(tmp_path / "a/b") == tmp_path / "a/b"
    assert (tmp_path / "a/b").is_dir()
    writable_folder(tmp_path / "c/d", create=False)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("create", [True, False])
def test_file_in_the_way_of_a_folder(create: bool, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    for path in (tmp_path / "f", tmp_path / "f/below"):
        with pytest.raises(ConfigError, match=r"/f is a file where a folder is needed") as caught:
            writable_folder(path, create=create)
        assert caught.value.exit_code == 2


def test_broken_link_in_the_way_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is a broken link"):
        writable_folder(tmp_path / "link")


def test_read_only_folder(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        folder = Path("/proc/self")  # root may write anywhere, but not there
    if os.access(folder, os.W_OK):
        pytest.skip("every folder is writable here")
    with pytest.raises(ConfigError, match=r"is not writable|cannot be made"):
        writable_folder(folder / "below")
