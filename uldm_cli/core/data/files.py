"""Sets of image files: a folder, or a .tar or .zip read in place. Nothing is ever extracted to disk."""

import os
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, Generic, Protocol, TypeVar

from torch import Tensor

from uldm_cli.core.data.streams import STRICT_HINT
from uldm_cli.core.images import EXTENSIONS, ImageError, check_header, decode_image
from uldm_cli.errors import ConfigError, UsageError, nearest

_READ_ERRORS = (OSError, EOFError, RuntimeError, KeyError, tarfile.TarError, zipfile.BadZipFile, zlib.error)

Handle = TypeVar("Handle", BinaryIO, zipfile.ZipFile)
Member = tuple[str, Callable[[], IO[bytes]]]  # its name, relative to the root with forward slashes, and how to open it


class FileImages:
    """Image files as square images of one size: short side scaled with an antialiased filter, centre cut out.

    The sub-folders of the root are the classes; a file beside them has the label -1. `names` are sorted by code point.
    """

    def __init__(self, source: "Source", names: list[str], skipped: list[tuple[str, str]], size: int, channels: int):
        self._source = source
        self.names = names
        self.skipped = skipped
        self.size = size
        self.channels = channels
        self.classes = tuple(sorted({folder for name in names if (folder := _top_folder(name))}))
        number = {folder: i for i, folder in enumerate(self.classes)}
        self._labels = [number.get(_top_folder(name), -1) for name in names]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        name = self.names[index]
        return decode_image(self._content(name), self.channels, self.size, name), self._labels[index]

    def side(self, index: int) -> int:
        """The short side of an image as it is stored, in pixels."""
        name = self.names[index]
        return min(decode_image(self._content(name), self.channels, name=name).shape[1:])

    def _content(self, name: str) -> bytes:
        try:
            return self._source.read(name)
        except _READ_ERRORS as error:
            raise ImageError(name, f"cannot be read ({error})") from error


def open_images(root: str | Path, *, size: int, channels: int = 3, strict: bool = False) -> FileImages:
    """Lists a folder's or an archive's images and reads the header of each.

    Hidden files and folders, and what lacks the extension of an image, are passed over. An image with a damaged
    header or an unusable size is left out and named in the set's `skipped`.

    Args:
        root: a folder, a .tar or a .zip.
        size: of the square images handed out, in pixels.
        channels: 3 for RGB, 1 for grey.
        strict: an image that would be skipped is an error.

    Raises:
        ConfigError: root is missing, of another type, damaged, or holds no readable image.
        UsageError: strict, and an image is unusable.
    """
    source = _open_source(Path(root).expanduser())
    names: set[str] = set()
    unusable: dict[str, str] = {}
    for name, opener in source.members():
        if PurePosixPath(name).suffix.lower() not in EXTENSIONS or _is_hidden(name):
            continue
        try:
            with opener() as file:
                check_header(file, name)
            names.add(name)
        except ImageError as error:
            unusable[name] = error.reason
        except _READ_ERRORS as error:
            unusable[name] = f"cannot be read ({error})"
    skipped = sorted(unusable.items())
    if strict and skipped:
        raise UsageError(f"{skipped[0][0]} in {root}: {skipped[0][1]}", STRICT_HINT)
    if not names:
        raise _no_images(root, skipped)
    return FileImages(source, sorted(names), skipped, size, channels)


class Source(Protocol):
    """Where files come from."""

    def members(self) -> Iterator[Member]:
        """All regular files, in the order that is quickest to read."""
        ...

    def read(self, name: str) -> bytes:
        """The content of a file; raises one of _READ_ERRORS."""
        ...


def _raise(error: OSError) -> None:
    """A sub-folder that cannot be listed would otherwise be missing without a word."""
    raise UsageError(f"the folder {error.filename} cannot be read ({error.strerror})", "Check its permissions")


class _Folder:
    def __init__(self, root: Path) -> None:
        self._root = root

    def members(self) -> Iterator[Member]:
        seen: set[str] = set()  # links to folders are followed, but not in circles
        for folder, subfolders, files in os.walk(self._root, followlinks=True, onerror=_raise):
            seen.add(os.path.realpath(folder))
            subfolders[:] = [s for s in subfolders if os.path.realpath(os.path.join(folder, s)) not in seen]
            for file in files:
                path = Path(folder, file)
                yield path.relative_to(self._root).as_posix(), partial(_open_file, path)

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()


class _Archive(ABC, Generic[Handle]):
    """A file that every process opens once, for itself: processes that share a handle would share its position."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._process = -1
        self._handle: Handle | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_process": -1, "_handle": None}

    def __del__(self) -> None:
        if self._handle is not None:
            self._handle.close()

    @abstractmethod
    def _open(self) -> Handle: ...

    def _mine(self) -> Handle:
        if self._handle is None or self._process != os.getpid():
            self._handle, self._process = self._open(), os.getpid()
        return self._handle


class _Tar(_Archive[BinaryIO]):
    """A plain tar: indexed once, its members then read by their place."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._places: dict[str, tuple[int, int]] = {}  # name to offset and length

    def members(self) -> Iterator[Member]:
        try:
            with tarfile.open(self._path, "r:") as tar:
                for member in tar:
                    if member.isreg() and not member.issparse():
                        name = _clean(member.name)
                        self._places[name] = (member.offset_data, member.size)
                        yield name, partial(_extract, tar, member)
        except tarfile.TarError as error:
            what = f"{self._path} is truncated or damaged after {len(self._places)} files ({error})"
            raise ConfigError(what, "Copy or fetch it again") from error

    def read(self, name: str) -> bytes:
        offset, length = self._places[name]
        file = self._mine()
        file.seek(offset)
        return file.read(length)

    def _open(self) -> BinaryIO:
        return self._path.open("rb")


class _Zip(_Archive[zipfile.ZipFile]):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._real_names: dict[str, str] = {}

    def members(self) -> Iterator[Member]:
        try:
            with zipfile.ZipFile(self._path) as archive:
                for info in archive.infolist():
                    if not info.is_dir():
                        name = _clean(info.filename)
                        self._real_names[name] = info.filename
                        yield name, partial(archive.open, info)
        except zipfile.BadZipFile as error:
            raise ConfigError(f"{self._path} is truncated or damaged ({error})", "Copy or fetch it again") from error

    def read(self, name: str) -> bytes:
        return self._mine().read(self._real_names[name])

    def _open(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self._path)


def _open_source(root: Path) -> Source:
    """Goes by the content, not by the extension."""
    if root.is_dir():
        return _Folder(root)
    if not root.exists():
        raise _missing(root)
    try:
        with root.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise ConfigError(f"{root} cannot be read ({error.strerror})") from error
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")):
        what = f"{root} is compressed, and single images cannot be read out of the middle of that"
        raise ConfigError(what, "Unpack it to a folder, or to a plain .tar")
    if start.startswith(b"PK"):
        return _Zip(root)
    if start[257:262] == b"ustar" or root.suffix.lower() == ".tar":
        return _Tar(root)
    hint = "Give the folder that holds it" if root.suffix.lower() in EXTENSIONS else None
    raise ConfigError(f"{root} is neither a folder nor a .tar or .zip of images", hint)


def _missing(root: Path) -> ConfigError:
    """Names the part of the path that goes wrong, and what is there instead."""
    wrong = root
    near: str | None = None
    while not wrong.parent.is_dir() and wrong.parent != wrong:
        wrong = wrong.parent
    with suppress(OSError):
        near = nearest(wrong.name, [path.name for path in wrong.parent.iterdir()])
    return ConfigError(f"{root} does not exist", f"Did you mean {wrong.parent / near}?" if near else None)


def _no_images(root: str | Path, skipped: list[tuple[str, str]]) -> ConfigError:
    if not skipped:
        return ConfigError(f"no images in {root}", f"Looked for {' '.join(sorted(EXTENSIONS))}, in sub-folders too")
    name, reason = skipped[0]
    return ConfigError(f"none of the {len(skipped)} images in {root} is usable; the first, {name}: {reason}")


def _open_file(path: Path) -> IO[bytes]:
    return path.open("rb")


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(member)
    assert file is not None  # it would be None for a folder or a device, and those are not asked for
    return file


def _clean(name: str) -> str:
    """A member's name without the "./" that `tar -C folder .` puts before it."""
    return str(PurePosixPath(name))


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _top_folder(name: str) -> str:
    return name.split("/", 1)[0] if "/" in name else ""
