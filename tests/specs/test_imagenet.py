"""ImageNet, as small archives made here in the layout of the published ones."""

import io
import os
import re
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from uldm_cli import fetch
from uldm_cli.errors import ConfigError
from uldm_cli.specs.datasets.imagenet import ImageNet

PICTURES = runpy.run_path(str(Path(__file__).parent / "pictures.py"))
encoded, tar, write, shows = (PICTURES[name] for name in ("encoded", "tar", "write", "shows"))

TRAIN = {
    "n01440764": {"n01440764_1.JPEG": encoded(1), "n01440764_2.JPEG": encoded(2)},
    "n01443537": {"n01443537_9.JPEG": encoded(3)},
}
VALIDATION = {"ILSVRC2012_val_00000001.JPEG": encoded(4), "ILSVRC2012_val_00000002.JPEG": encoded(5)}
SYNSETS = b"ILSVRC2012_val_00000001.JPEG n01443537\nILSVRC2012_val_00000002.JPEG n01440764\n"
ARCHIVES = {
    "ILSVRC2012_img_train.tar": tar({f"{synset}.tar": tar(files) for synset, files in TRAIN.items()}),
    "ILSVRC2012_img_val.tar": tar(VALIDATION),
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/autoencoders/data"


def test_imagenet_is_extracted_once(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path / "archives", ARCHIVES)
    data = ImageNet(root=str(root), size=16).build()
    assert shows(data, 1, 2, 3)
    assert [data[i][1] for i in range(3)] == [0, 0, 1]
    assert data.classes == ("n01440764", "n01443537")
    place = cache / "ILSVRC2012_train"
    names = ["data/n01440764/n01440764_1.JPEG", "data/n01440764/n01440764_2.JPEG", "data/n01443537/n01443537_9.JPEG"]
    found = sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file())
    assert found == [".ready", *names, "filelist.txt"]
    assert (place / "filelist.txt").read_text().splitlines() == [name.removeprefix("data/") for name in names]
    said = capsys.readouterr().err
    assert "extracting ILSVRC2012_img_train.tar" in said
    assert "2 classes, and ImageNet 1,000" in said
    for again in (None, root, root / "ILSVRC2012_img_train.tar", place, place / "data"):
        assert shows(ImageNet(root=again and str(again), size=16).build(), 1, 2, 3)
    assert "extracting" not in capsys.readouterr().err


def test_imagenet_of_a_root_without_it_although_it_is_extracted(tmp_path: Path, cache: Path) -> None:
    root = write(tmp_path / "archives", ARCHIVES)
    ImageNet(root=str(root), size=16).build()
    with pytest.raises(ConfigError, match=r"nowhere does not exist\. Give data\.root=FOLDER with ILSVRC2012_img_train"):
        ImageNet(root=str(tmp_path / "nowhere")).build()
    for other in (tmp_path, root / "ILSVRC2012_img_val.tar"):
        with pytest.raises(ConfigError, match=f"{re.escape(str(other))} does not hold ImageNet's train images"):
            ImageNet(root=str(other)).build()


def test_imagenet_goes_on_where_it_was_killed(tmp_path: Path, cache: Path) -> None:
    place = cache / "ILSVRC2012_train/data"
    write(place, {"n01440764/kept.JPEG": encoded(7), ".n01443537.1/half.JPEG": b"half", ".DS_Store": b"of a Mac"})
    write(place / "n01440764", {".half.JPEG.12": b"half", ".DS_Store": b"of a Mac"})
    write(place.parent, {".lock": b""})
    root = write(tmp_path / "archives", ARCHIVES)
    assert shows(ImageNet(root=str(root), size=16).build(), 7, 3)
    assert sorted(os.listdir(place)) == [".DS_Store", "n01440764", "n01443537"]
    assert sorted(os.listdir(place / "n01440764")) == [".DS_Store", "kept.JPEG"]
    assert (place.parent / "filelist.txt").read_text() == "n01440764/kept.JPEG\nn01443537/n01443537_9.JPEG\n"
    assert sorted(os.listdir(place.parent)) == [".ready", "data", "filelist.txt"]


EXTRACT = """
import sys
from pathlib import Path
from uldm_cli.unpacking import extract
extract(Path(sys.argv[1]), Path(sys.argv[2]), validation=False)
"""


def test_of_several_processes_one_extracts(tmp_path: Path, cache: Path) -> None:
    archive = write(tmp_path / "archives", ARCHIVES) / "ILSVRC2012_img_train.tar"
    place = cache / "ILSVRC2012_train"
    place.mkdir(parents=True)
    command = [sys.executable, "-c", EXTRACT, str(archive), str(place)]
    with fetch.alone(place / ".lock", "is the test"):
        started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        said = [process.stderr.readline() for process in started]
        assert not list((place / "data").iterdir())
    assert said == ["waiting for another process, which extracts ILSVRC2012_img_train.tar\n"] * 2
    errors = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert sorted("extracting" in text for text in errors) == [False, True]
    assert shows(ImageNet(size=16).build(), 1, 2, 3)
    assert sorted(os.listdir(place)) == [".ready", "data", "filelist.txt"]


def test_imagenet_validation_needs_the_classes(tmp_path: Path, cache: Path) -> None:
    root = write(tmp_path / "archives", ARCHIVES)
    spec = ImageNet(root=str(root), split="validation", size=16)
    with pytest.raises(ConfigError, match=r"no validation_synset\.txt beside it\. It has a line"):
        spec.build()
    (root / "validation_synset.txt").write_bytes(SYNSETS + b"ILSVRC2012_val_00000003.JPEG n01440764\n")
    with pytest.raises(ConfigError, match=r"is not whole: ILSVRC2012_val_00000003\.JPEG"):
        spec.build()
    (root / "validation_synset.txt").write_bytes(SYNSETS + b"x y\n")
    with pytest.raises(ConfigError, match=r"validation_synset\.txt line 3"):
        spec.build()
    assert not (cache / "ILSVRC2012_validation/.ready").exists()
    (root / "validation_synset.txt").write_bytes(SYNSETS)
    data = spec.build()
    assert shows(data, 5, 4)
    assert [data[i][1] for i in range(2)] == [0, 1]
    assert (cache / "ILSVRC2012_validation/.ready").exists()


@pytest.mark.parametrize("below", [".", "train"])
def test_imagenet_that_is_extracted_already(below: str, tmp_path: Path, cache: Path) -> None:
    for synset, files in TRAIN.items():
        write(tmp_path / "own" / below / synset, files)
    assert shows(ImageNet(root=str(tmp_path / "own"), size=16).build(), 1, 2, 3)
    assert not cache.exists()


def link(name: str, target: str) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = tarfile.SYMTYPE, target
        archive.addfile(member)
    return content.getvalue()


def cut(archive: bytes, members: int) -> bytes:
    """An archive that ends after so many members, without the zeros that end one; tarfile finds nothing wrong in it."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        end = [*(member.offset for member in opened.getmembers()), opened.offset][members]
        return archive[:end]


@pytest.mark.parametrize("members", [1, 2])
def test_cut_archives_are_not_made_ready(members: int, tmp_path: Path, cache: Path) -> None:
    train, validation = ARCHIVES.values()
    inner = cut(tar(TRAIN["n01440764"]), members)
    for content, named in ((tar({"n01440764.tar": inner}), "n01440764"), (cut(train, members), "ILSVRC2012_img_train")):
        root = write(tmp_path / "archives", {"ILSVRC2012_img_train.tar": content})
        with pytest.raises(ConfigError, match=rf"truncated or damaged \({named}\.tar has no end\)\. Copy"):
            ImageNet(root=str(root)).build()
    write(root, {"ILSVRC2012_img_val.tar": cut(validation, members), "validation_synset.txt": SYNSETS})
    with pytest.raises(ConfigError, match=r"truncated or damaged \(ILSVRC2012_img_val\.tar has no end"):
        ImageNet(root=str(root), split="validation").build()
    assert not list(cache.rglob(".ready"))
    assert shows(ImageNet(root=str(write(root, ARCHIVES)), size=16).build(), 1, 2, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tar({"../n01440764.tar": tar({})}), "expected archives such as"),
        (tar({"n01440764.tar": tar({"../../evil.JPEG": b"x"})}), "expected plain files without folders"),
        (tar({"n01440764.tar": tar({"/evil.JPEG": b"x"})}), "expected plain files without folders"),
        (tar({"n01440764.tar": link("a.JPEG", "/etc/passwd")}), "expected plain files without folders"),
        (link("n01440764.tar", "/etc/passwd"), "expected archives such as"),
        (tar({"n01440764.tar": b"no archive" * 100}), "is truncated or damaged"),
        (ARCHIVES["ILSVRC2012_img_train.tar"][:3000], "is truncated or damaged"),
        (b"no archive" * 100, "is truncated or damaged"),
        (ARCHIVES["ILSVRC2012_img_val.tar"], "expected archives such as"),
    ],
)
def test_hostile_and_damaged_archives(content: bytes, message: str, tmp_path: Path, cache: Path) -> None:
    root = write(tmp_path / "archives", {"ILSVRC2012_img_train.tar": content})
    with pytest.raises(ConfigError, match=message) as caught:
        ImageNet(root=str(root)).build()
    assert "\n" not in str(caught.value)
    assert not (cache / "ILSVRC2012_train/.ready").exists()
    assert not list(tmp_path.rglob("evil*"))


def test_imagenet_that_is_nowhere(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"ILSVRC2012_train does not hold ImageNet's train images\. Give data\.root"):
        ImageNet().build()
    assert not cache.exists()
