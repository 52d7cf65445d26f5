"""Unpacking archives of strangers: into one new folder, nothing outside it, and no more than a model can need."""

import stat
import struct
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from uldm_cli import console
from uldm_cli.errors import ConfigError

MAX_ENTRIES = 1000
MAX_RATIO = 20  # weights hardly compress: what unpacks to more than this many times its size is no archive of a model
ALWAYS_ALLOWED = 100_000_000  # bytes that are unpacked at any ratio
_CHUNK = 1 << 20
_LOCAL_HEADER = 30  # bytes before an entry's name
_ENCRYPTED = 1
_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, struct.error, ValueError)


def members(archive: Path) -> list[str]:
    """The names of the files in a zip.

    Raises:
        ConfigError: it is truncated or damaged.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            return [info.filename for info in file.infolist() if not info.is_dir()]
    except _ERRORS as error:
        raise _damaged(archive, error) from error


def unzip(archive: Path, folder: Path) -> None:
    """Unpacks a zip into an empty folder, after a look at all that it says of itself.

    Raises:
        ConfigError: it is damaged, an entry would land outside the folder or on another, is a link or device or
            encrypted, entries overlap, or it unpacks to far more than its own size. The folder then holds a part.
        OSError: of the disk.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            entries = file.infolist()
            _check_sizes(archive, entries, file.start_dir)
            places = _places(archive, entries, folder)
            total = sum(info.file_size for info in entries)
            with console.progress(total, f"unpacking {archive.name}", "B") as progress:
                for info, place in places:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    _unpack(file, info, place, progress)
    except _ERRORS as error:
        raise _damaged(archive, error) from error


def _damaged(archive: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{archive} is no zip, or truncated or damaged ({error})", "Fetch it again")


def _check_sizes(archive: Path, entries: Sequence[zipfile.ZipInfo], end: int) -> None:
    """Refuses bombs: too many entries, entries that share bytes, too much out of too little."""
    if len(entries) > MAX_ENTRIES:
        raise ConfigError(f"{archive} holds {len(entries)} entries, and no model has more than {MAX_ENTRIES}")
    ordered = sorted(entries, key=lambda info: info.header_offset)
    ends = [info.header_offset for info in ordered[1:]] + [end]
    for info, limit in zip(ordered, ends, strict=True):
        if info.header_offset + _LOCAL_HEADER + len(info.filename) + info.compress_size > limit:
            raise ConfigError(f"{archive}: {info.filename!r} overlaps what follows it, as in a zip bomb")
    total, length = sum(info.file_size for info in entries), archive.stat().st_size
    if total > max(ALWAYS_ALLOWED, MAX_RATIO * length):
        raise ConfigError(f"{archive} unpacks from {length} to {total} bytes: a zip bomb, not a model")


def _places(archive: Path, entries: Sequence[zipfile.ZipInfo], folder: Path) -> list[tuple[zipfile.ZipInfo, Path]]:
    """Where each file goes. Folders are made as they are needed."""
    found: dict[str, tuple[zipfile.ZipInfo, Path]] = {}  # by name without regard to case, as some disks see it
    folders: set[str] = set()
    for info in entries:
        name = info.orig_filename
        if reason := _unsafe(info):
            raise ConfigError(f"{archive}: the entry {name!r} {reason}", "This is no archive of a published model")
        if info.is_dir():
            continue
        key = PurePosixPath(name.casefold())
        above = {parent.as_posix() for parent in key.parents}
        if key.as_posix() in found.keys() | folders or not above.isdisjoint(found):
            raise ConfigError(f"{archive}: the entry {name!r} would overwrite another")
        folders |= above
        found[key.as_posix()] = info, folder.joinpath(*PurePosixPath(name).parts)
    return list(found.values())


def _unsafe(info: zipfile.ZipInfo) -> str | None:
    """What is wrong with an entry, if anything. Its name is judged as it stands there, before Python mends it."""
    name = info.orig_filename
    if name.startswith("/") or "\\" in name or ":" in name or ".." in PurePosixPath(name).parts:
        return "points outside the folder"
    if not name.isprintable() or not PurePosixPath(name).parts:
        return "has no proper name"
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFDIR if info.is_dir() else stat.S_IFREG):
        return "is a link or a special file"
    return "is encrypted" if info.flag_bits & _ENCRYPTED else None


def _unpack(file: zipfile.ZipFile, info: zipfile.ZipInfo, place: Path, progress: console.Progress) -> None:
    with file.open(info) as source, place.open("xb") as target:
        while chunk := source.read(_CHUNK):
            target.write(chunk)
            progress.advance(len(chunk))
    if place.stat().st_size != info.file_size:
        with suppress(OSError):
            place.unlink()
        raise zipfile.BadZipFile(f"{info.filename} is shorter than it says")
