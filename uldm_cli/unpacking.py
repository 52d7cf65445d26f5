"""ImageNet's archives, extracted to class folders."""

import os
import re
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from uldm_cli import console, fetch
from uldm_cli.errors import ConfigError, UldmError

SYNSET = re.compile(r"n\d{8}")
"""The name of a class, and of its folder."""

_SYNSETS = "validation_synset.txt"
_CLASSES = 1000
_PICTURE = re.compile(r"\w[\w.-]*")
_UNFINISHED = re.compile(r"\.[\w.-]+\.\d+")  # the name and the process
_END = bytes(2 * tarfile.BLOCKSIZE)


def extract(archive: Path, target: Path, *, validation: bool) -> None:
    """Extracts one of ImageNet's archives to class folders in `target/data`; the file `target/.ready` is made last.

    Killed, it goes on where it was. Of several processes one extracts, and the others wait. Only plain files are
    written, into folders and under names that it checks.

    Raises:
        ConfigError: the archive is damaged or not ImageNet's; or the validation images' classes are nowhere.
        UldmError: it cannot be written, for want of room, say.
    """
    try:
        (target / "data").mkdir(parents=True, exist_ok=True)
        with fetch.alone(target / ".lock", f"extracts {archive.name}"):
            if not (target / ".ready").exists():
                _extract(archive, target, validation)
                _finish(target)
    except OSError as error:
        hint = "The same command goes on from there"
        raise UldmError(f"{archive} cannot be extracted to {target} ({error.strerror or error})", hint) from error


def _extract(archive: Path, target: Path, validation: bool) -> None:
    data = target / "data"
    _tidy(data)
    size = archive.stat().st_size
    free = shutil.disk_usage(target).free
    if free < size and not any(data.iterdir()):
        what = f"{archive} does not fit into {target}: it has {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        raise UldmError(what, "Make room, or set XDG_CACHE_HOME to a folder on another disk")
    with console.progress(size, f"extracting {archive.name}", "B") as progress, _open(archive) as tar:
        if validation:
            _extract_validation(tar, archive, data, progress)
        else:
            _extract_train(tar, archive, data, progress)


def _tidy(data: Path) -> None:
    """Removes what killed extractions left: folders of half a class, and half images."""
    for folder in [data, *data.iterdir()]:
        if _UNFINISHED.fullmatch(folder.name) and folder.is_dir():
            shutil.rmtree(folder)
        elif folder.is_dir():
            for file in [file for file in folder.iterdir() if _UNFINISHED.fullmatch(file.name) and file.is_file()]:
                file.unlink()


def _finish(target: Path) -> None:
    """Writes the list that the published code reads, and the marker."""
    classes = sorted(folder for folder in (target / "data").iterdir() if SYNSET.fullmatch(folder.name))
    if len(classes) != _CLASSES:
        console.warn(f"{target / 'data'} has {len(classes)} classes, and ImageNet {_CLASSES:,}")
    files = ((folder, file) for folder in classes for file in sorted(os.listdir(folder)))
    names = (f"{folder.name}/{file}\n" for folder, file in files if not file.startswith("."))
    (target / "filelist.txt").write_text("".join(names), encoding="utf-8")
    (target / ".ready").touch()


def _members(tar: tarfile.TarFile, name: str) -> Iterator[tarfile.TarInfo]:
    """What an archive holds. `tarfile` takes a header that is cut off or damaged for the end.

    Raises:
        tarfile.ReadError: it does not end as the format has it (POSIX ustar), with two blocks of zeros.
    """
    yield from tar
    assert tar.fileobj is not None, "it is open"
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(len(_END)) != _END:
        raise tarfile.ReadError(f"{name} has no end")


@contextmanager
def _open(archive: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(archive, "r:") as tar:
            yield tar
    except tarfile.TarError as error:
        raise ConfigError(f"{archive} is truncated or damaged ({error})", "Copy or fetch it again") from error


def _extract_train(tar: tarfile.TarFile, archive: Path, data: Path, progress: console.Progress) -> None:
    """An archive of archives, one a class. A class is whole when its folder has its name."""
    for member in _members(tar, archive.name):
        synset = member.name.removeprefix("./").removesuffix(".tar")
        if not member.isreg() or not SYNSET.fullmatch(synset):
            raise _not_imagenet(archive, member.name, "archives such as n01440764.tar")
        if not (data / synset).exists():
            part = data / f".{synset}.{os.getpid()}"
            part.mkdir(exist_ok=True)
            with tarfile.open(fileobj=_content(tar, member), mode="r:") as images:
                for image in _members(images, member.name):
                    _write(images, image, archive, part)
            _put(part, data / synset)
        progress.advance(member.size)


def _put(part: Path, place: Path) -> None:
    """Gives a folder its name, unless another process was quicker."""
    try:
        part.rename(place)
    except OSError:
        if not place.is_dir():
            raise
        shutil.rmtree(part)


def _extract_validation(tar: tarfile.TarFile, archive: Path, data: Path, progress: console.Progress) -> None:
    synsets = _synsets(archive, data.parent)
    for member in _members(tar, archive.name):
        name = member.name.rpartition("/")[2]
        synset = synsets.get(name)
        if synset is None:
            raise _not_imagenet(archive, member.name, f"the images of {_SYNSETS}")
        folder = data / synset
        folder.mkdir(exist_ok=True)
        if not (folder / name).exists():
            _write(tar, member, archive, folder)
        progress.advance(member.size)
    missing = next((name for name, synset in synsets.items() if not (data / synset / name).is_file()), None)
    if missing:
        raise ConfigError(f"{archive} is not whole: {missing} of {_SYNSETS} is not in it", "Copy or fetch it again")


def _synsets(archive: Path, target: Path) -> dict[str, str]:
    """The class of each validation image: the archive does not say."""
    path = next((folder / _SYNSETS for folder in (archive.parent, target) if (folder / _SYNSETS).is_file()), None)
    if path is None:
        what = f"{archive} does not say which class its images are of, and there is no {_SYNSETS} beside it"
        raise ConfigError(what, "It has a line `ILSVRC2012_val_00000001.JPEG n01751748` for each image")
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for i, line in enumerate(lines, 1):
        if len(line) != 2 or not SYNSET.fullmatch(line[1]):
            raise ConfigError(f"{path} line {i}: expected a file and its class, such as n01751748", "Fetch it again")
    return dict(lines)


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, archive: Path, folder: Path) -> None:
    """A member as a file of the folder, which appears whole or not at all."""
    name = member.name.removeprefix("./")
    if not member.isreg() or not _PICTURE.fullmatch(name):
        raise _not_imagenet(archive, member.name, "plain files without folders")
    part = folder / f".{name}.{os.getpid()}"
    with _content(tar, member) as source, part.open("wb") as file:
        shutil.copyfileobj(source, file)
    part.rename(folder / name)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(member)
    assert file is not None, "it is a regular file"
    return file


def _not_imagenet(archive: Path, name: str, expected: str) -> ConfigError:
    return ConfigError(f"{archive} is not ImageNet's: it holds {name!r}, expected {expected}", "Fetch it again")
