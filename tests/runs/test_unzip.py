"""Archives as strangers can make them: each is refused in one line, and nothing appears outside the folder."""

import copy
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from uldm_cli.errors import ConfigError
from uldm_cli.runs import unzip
from uldm_cli.runs.unzip import members

DATA = bytes(range(256)) * 40


@pytest.fixture
def pack(tmp_path: Path) -> Callable[..., Path]:
    """Make an archive of these entries, by name; `change` may spoil what stands in its directory."""

    def make(*names: str, content: bytes = DATA, change: Callable[[zipfile.ZipFile], None] | None = None) -> Path:
        archive = tmp_path / "archive.zip"
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for name in names:
                file.writestr(name, content)
            if change:
                change(file)
        return archive

    return make


def refuse(archive: Path, match: str) -> None:
    """It is not unpacked, and nothing lies beside its folder."""
    folder = archive.parent / "deep" / "folder"
    folder.mkdir(parents=True)
    with pytest.raises(ConfigError, match=match) as caught:
        unzip.unzip(archive, folder)
    assert str(archive) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in archive.parent.rglob("*")) in (
        ["archive.zip", "deep", "folder"],
        ["archive.zip", "deep", "folder", "model.ckpt"],
    )


def test_unpacks(pack: Callable[..., Path], tmp_path: Path) -> None:
    archive = pack("model.ckpt", "logs/config.yaml", "empty/")
    unzip.unzip(archive, tmp_path / "folder")
    assert (tmp_path / "folder/model.ckpt").read_bytes() == DATA
    assert (tmp_path / "folder/logs/config.yaml").read_bytes() == DATA
    assert members(archive) == ["model.ckpt", "logs/config.yaml"]


@pytest.mark.parametrize(
    "name", ["../model.ckpt", "logs/../../model.ckpt", "/etc/model.ckpt", "C:/model.ckpt", "..\\model.ckpt"]
)
def test_entries_that_point_outside(pack: Callable[..., Path], name: str) -> None:
    refuse(pack(name), "points outside the folder")


@pytest.mark.parametrize("name", ["mo\x1b[2Jkpt", "mode\0.ckpt", "./"])
def test_names_that_are_none(pack: Callable[..., Path], name: str) -> None:
    def rename(file: zipfile.ZipFile) -> None:
        file.filelist[0].filename = file.filelist[0].orig_filename = name

    refuse(pack("model.ckpt", change=rename), "has no proper name")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFDIR])
def test_links_and_special_files(pack: Callable[..., Path], kind: int) -> None:
    def retype(file: zipfile.ZipFile) -> None:
        file.filelist[0].external_attr = (kind | 0o777) << 16

    refuse(pack("model.ckpt", content=b"/etc/passwd", change=retype), "is a link or a special file")


@pytest.mark.parametrize(
    "names", [("model.ckpt", "Model.ckpt"), ("a", "a/b"), ("a/b", "a"), ("model.ckpt", "./model.ckpt")]
)
def test_entries_that_overwrite_each_other(pack: Callable[..., Path], names: tuple[str, str]) -> None:
    refuse(pack(*names), "would overwrite another")


def test_encrypted(pack: Callable[..., Path]) -> None:
    def encrypt(file: zipfile.ZipFile) -> None:
        file.filelist[0].flag_bits |= 1

    refuse(pack("model.ckpt", change=encrypt), "is encrypted")


def test_entries_that_share_their_bytes(pack: Callable[..., Path]) -> None:
    def share(file: zipfile.ZipFile) -> None:
        twin = copy.copy(file.filelist[0])
        twin.filename = twin.orig_filename = "other.ckpt"
        file.filelist.append(twin)

    refuse(pack("model.ckpt", change=share), "overlaps what follows it")


def test_too_much_out_of_too_little(pack: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unzip, "ALWAYS_ALLOWED", 1000)
    refuse(pack("model.ckpt", content=bytes(1_000_000)), r"unpacks from \d+ to 1000000 bytes: a zip bomb")


def test_too_many_entries(pack: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unzip, "MAX_ENTRIES", 3)
    refuse(pack(*"abcd"), "holds 4 entries")


@pytest.mark.parametrize("claimed", [1, len(DATA) + 1])
def test_a_length_that_is_not_true(pack: Callable[..., Path], claimed: int) -> None:
    def claim(file: zipfile.ZipFile) -> None:
        file.filelist[0].file_size = claimed

    refuse(pack("model.ckpt", change=claim), "truncated or damaged")


@pytest.mark.parametrize("damage", ["cut", "flip", "text"])
def test_damaged(pack: Callable[..., Path], damage: str) -> None:
    archive = pack("model.ckpt")
    content = archive.read_bytes()
    spoilt = {"cut": content[:-30], "flip": content[:60] + b"\xff" + content[61:], "text": b"no zip"}
    archive.write_bytes(spoilt[damage])
    refuse(archive, "truncated or damaged")
