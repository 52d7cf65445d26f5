"""Checkpoints that are cut off or damaged, archives that PyTorch would not write, and files of other kinds."""

import io
import os
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from uldm_cli.errors import ConfigError, UldmError
from uldm_cli.formats.pickles import open_pickle


def refused(path: Path) -> str:
    """The message: one line that names the file and ends in what to do."""
    with pytest.raises(ConfigError) as caught:
        open_pickle(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert caught.value.hint
    assert caught.value.exit_code == 2
    return message.removeprefix(f"{path} ")


@pytest.fixture
def pieces() -> dict[str, bytes]:
    """The records that matter of a checkpoint with one tensor."""
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(4)}, buffer)
    with zipfile.ZipFile(buffer) as file:
        return {name: file.read(name) for name in ("archive/data.pkl", "archive/data/0")}


@pytest.fixture
def plain(pieces: dict[str, bytes], tmp_path: Path) -> Path:
    """Those in an archive as the standard library writes it."""
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w") as file:
        for name, content in pieces.items():
            file.writestr(name, content)
    assert open_pickle(path).tensors["a"].read().tolist() == [1, 1, 1, 1]
    return path


@pytest.fixture(scope="module", params=[True, False], ids=["zip", "legacy"])
def whole(request: pytest.FixtureRequest) -> bytes:
    torch.manual_seed(0)
    state = {"a": torch.randn(3, 2), "b": torch.ones(2, dtype=torch.int64), "c": torch.randn(4)[1:3].half()}
    buffer = io.BytesIO()
    torch.save({"state_dict": state, "epoch": 1}, buffer, _use_new_zipfile_serialization=request.param)
    return buffer.getvalue()


def test_half_a_download(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    for length in [*range(1, 40), *range(40, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        message = refused(path)
        assert "etch it again" in message
        if length > 600:
            assert f"{length:,} bytes" in message
    path.write_bytes(whole + b"x" * 9)
    if whole[:2] != b"PK":
        assert f"is damaged: it has {len(whole) + 9:,} bytes, and tells of {len(whole):,}" in refused(path)


@given(st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4))
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_corruption_reads_or_is_refused(whole: bytes, tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(whole)
    for place, value in changes:
        damaged[place % len(whole)] = value
    path = tmp_path / "x.ckpt"
    path.write_bytes(damaged)
    try:
        opened = open_pickle(path)
        read: list[Tensor] = [ref.read() for ref in opened.tensors.values()]
    except UldmError as e:
        if "\n" in str(e):
            pytest.fail(f"more than one line: {e}")
    else:
        assert [tuple(value.shape) for value in read] == [ref.shape for ref in opened.tensors.values()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty. Fetch it again"),
        (
            b"\n <!DOCTYPE html><html><body>Sign in</body>",
            "is a web page: its download was answered with that. Fetch it",
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is a pointer of Git LFS, not the file itself. Run",
        ),
        (
            b"kind: ldm-sample\n",
            "is not a checkpoint of PyTorch or safetensors, or its start is damaged. Fetch it again",
        ),
        (bytes(5000), "is not a checkpoint of PyTorch or safetensors, or its start is damaged. Fetch it again"),
        (
            b"x".ljust(257, b"\0") + b"ustar".ljust(255, b"\0"),
            "is a tar archive, or a checkpoint of PyTorch before 0.1.10.",
        ),
        (b"PK\5\6" + bytes(18), "is a zip archive, but no checkpoint: it has no data.pkl. If a checkpoint is inside"),
    ],
    ids=["empty", "html", "lfs", "text", "zeros", "tar", "empty-zip"],
)
def test_other_files(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    assert refused(path).startswith(message)


def test_safetensors_file_with_another_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "model.ckpt"
    save_file({"a": torch.ones(3)}, path)
    assert refused(path) == "is a safetensors file, not one of torch.save. Rename it to end in .safetensors"


def test_folder_missing_file_and_impossible_names(tmp_path: Path) -> None:
    assert refused(tmp_path).startswith("is a folder, not a checkpoint")
    for path in (tmp_path / "none", tmp_path / ("x" * 300), tmp_path / "nul\0"):
        with pytest.raises(ConfigError):
            open_pickle(path)


def test_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("data.pkl", "code/__torch__.py", "constants.pkl", "version"):
            file.writestr(f"archive/{name}", b"x")
    assert refused(path).startswith("is a TorchScript program, not a checkpoint. Load it with the program that made it")


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda file, all: [file.writestr(name, c, zipfile.ZIP_DEFLATED) for name, c in all.items()],
            "is damaged: its record archive/data.pkl is compressed or encrypted, which PyTorch does not do. ",
        ),
        (
            lambda file, all: [file.writestr(name, c) for name, c in [*all.items(), ("other/x", b"")]],
            "is damaged: a name is there twice, or outside of the folder archive/. ",
        ),
        (
            lambda file, all: [file.writestr(name, c) for name, c in [*all.items(), *all.items()]],
            "is damaged: a name is there twice, or outside of the folder archive/. ",
        ),
        (
            lambda file, all: (
                [file.writestr(name, c) for name, c in [*all.items(), ("a/b/data.pkl", b"")]][:0]
                or file.writestr("top/x", b"")
            ),
            "is damaged: a name is there twice, or outside of the folder archive/. ",
        ),
        (
            lambda file, all: file.writestr("data.pkl", all["archive/data.pkl"]),
            "is a zip archive, but no checkpoint: it has no data.pkl. If a checkpoint is inside, unpack it first",
        ),
        (
            lambda file, all: file.writestr("model/model.ckpt", b"x"),
            "is a zip archive, but no checkpoint: it has no data.pkl. If a checkpoint is inside, unpack it first",
        ),
    ],
    ids=["compressed", "second-folder", "twice", "elsewhere", "no-folder", "plain-zip"],
)
def test_archives_that_pytorch_would_not_write(
    change: Callable[[zipfile.ZipFile, dict[str, bytes]], object],
    message: str,
    pieces: dict[str, bytes],
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w") as file:
        change(file, pieces)
    assert refused(path).startswith(message)


def central(content: bytes, number: int, place: int, value: bytes) -> bytes:
    """Replaces bytes of an entry in an archive's list of contents."""
    at = -1
    for _ in range(number + 1):
        at = content.index(b"PK\1\2", at + 1)
    return content[: at + place] + value + content[at + place + len(value) :]


def test_records_that_overlap_or_lie_elsewhere(plain: Path) -> None:
    path, content = plain, plain.read_bytes()
    start = content.index(b"PK\3\4", 4)
    larger = struct.pack("<II", 100, 100)
    for damaged, message in {
        central(
            content, 0, 20, struct.pack("<II", 500, 500)
        ): "its records archive/data.pkl and archive/data/0 overlap",
        central(content, 1, 20, larger): "its record archive/data/0 reaches outside of it",
        central(content, 1, 42, struct.pack("<I", 0)): "its record archive/data/0 is not where it says",
        central(content, 1, 42, struct.pack("<I", start + 1)): "its record archive/data/0 is not where it says",
        central(content, 1, 46, b"archive/data/1"): "its record archive/data/1 is not where it says",
        central(content, 1, 8, b"\1"): "its record archive/data/0 is compressed or encrypted",
    }.items():
        path.write_bytes(damaged)
        assert refused(path).startswith(f"is damaged: {message}")


def test_a_gigabyte_of_contents_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    size = 1 << 30
    with path.open("wb") as file:
        file.write(b"PK\3\4")
        file.truncate(size)
        file.seek(size)
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, size - 4, 4, 0))
    start = time.process_time()
    assert refused(path).startswith(f"is not whole: it has {size + 22:,} bytes, and the list of its contents")
    assert time.process_time() - start < 2


def test_pickle_larger_than_any(tmp_path: Path) -> None:
    path, size = tmp_path / "x.ckpt", (1 << 28) + 1
    name = b"archive/data.pkl"
    with path.open("wb") as file:
        file.write(struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, size, size, len(name), 0) + name)
        end = file.seek(size, os.SEEK_CUR)
        entry = (b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, size, size, len(name), 0, 0, 0, 0, 0, 0)
        file.write(struct.pack("<4s6H3L5H2L", *entry) + name)
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 46 + len(name), end, 0))
    assert refused(path).startswith(f"has a data.pkl of {size:,} bytes, more than any checkpoint should. ")
