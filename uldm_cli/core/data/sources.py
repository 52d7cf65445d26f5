"""Where image files come from: a folder, a .tar or .zip read in place, or an LMDB. Nothing is extracted to disk."""

import io
import os
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import IO, Any, Generic, Protocol, TypeVar
from weakref import WeakValueDictionary

from uldm_cli.core.images import EXTENSIONS
from uldm_cli.errors import ConfigError, UsageError, nearest

READ_ERRORS = (OSError, EOFError, RuntimeError, KeyError, tarfile.TarError, zipfile.BadZipFile, zlib.error)
"""What opening a file of any source, or reading from it, may raise."""

Handle = TypeVar("Handle", tarfile.TarFile, zipfile.ZipFile)


class Readable(Protocol):
    """What files are read from, by their names."""

    def open(self, name: str) -> IO[bytes]:
        """A file at its beginning. This, and reading from it, raises one of READ_ERRORS."""
        ...


class Source(Readable, Protocol):
    """Where files come from."""

    only_images: bool
    """Every file is an image, whatever its name."""

    def names(self) -> Iterator[str]:
        """Of all regular files, relative to the root with forward slashes, in the order that is quickest to read."""
        ...


def _raise(error: OSError) -> None:
    """A sub-folder that cannot be listed would otherwise be missing without a word."""
    raise UsageError(f"the folder {error.filename} cannot be read ({error.strerror})", "Check its permissions")


class _Folder:
    only_images = False

    def __init__(self, root: Path) -> None:
        self._root = root

    def names(self) -> Iterator[str]:
        seen: set[str] = set()  # links to folders are followed, but not in circles
        for folder, subfolders, files in os.walk(self._root, followlinks=True, onerror=_raise):
            seen.add(os.path.realpath(folder))
            subfolders[:] = [s for s in subfolders if os.path.realpath(os.path.join(folder, s)) not in seen]
            below = "" if Path(folder) == self._root else f"{Path(folder).relative_to(self._root).as_posix()}/"
            for file in files:
                yield below + file

    def open(self, name: str) -> IO[bytes]:
        return (self._root / name).open("rb")


class _Archive(ABC, Generic[Handle]):
    """A file that every process opens once, for itself: processes that share a handle would share its position."""

    only_images = False

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
    def _opened(self) -> Handle: ...

    def _mine(self) -> Handle:
        if self._handle is None or self._process != os.getpid():
            if self._handle is not None:
                self._handle.close()  # that of the process from which this one was forked
            self._handle, self._process = self._opened(), os.getpid()
        return self._handle


class _Tar(_Archive[tarfile.TarFile]):
    """A plain tar: indexed once, its members then read by their place."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._places: dict[str, tuple[int, int]] = {}  # name to offset and length

    def names(self) -> Iterator[str]:
        try:
            with tarfile.open(self._path, "r:") as tar:  # not the one that is kept: it remembers all that it lists
                for member in tar:
                    if member.isreg() and not member.issparse():
                        name = _clean(member.name)
                        self._places[name] = (member.offset_data, member.size)
                        yield name
        except tarfile.TarError as error:
            what = f"{self._path} is truncated or damaged after {len(self._places)} files ({error})"
            raise ConfigError(what, "Copy or fetch it again") from error

    def open(self, name: str) -> IO[bytes]:
        member = tarfile.TarInfo(name)
        member.offset_data, member.size = self._places[name]
        file = self._mine().extractfile(member)
        assert file is not None, "it is a regular file"
        return file

    def _opened(self) -> tarfile.TarFile:
        tar = tarfile.TarFile(self._path)
        assert isinstance(tar.fileobj, io.BufferedReader), "it was opened by its path"
        tar.fileobj = tar.fileobj.detach()  # unbuffered: no image is what was once read along with another
        return tar


class _Zip(_Archive[zipfile.ZipFile]):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._real_names: dict[str, str] = {}

    def names(self) -> Iterator[str]:
        try:
            for info in self._mine().infolist():
                if not info.is_dir():
                    name = _clean(info.filename)
                    self._real_names[name] = info.filename
                    yield name
        except zipfile.BadZipFile as error:
            raise ConfigError(f"{self._path} is truncated or damaged ({error})", "Copy or fetch it again") from error

    def open(self, name: str) -> IO[bytes]:
        return self._mine().open(self._real_names[name])

    def _opened(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self._path)


class _Lmdb:
    """An LMDB of encoded images, as LSUN is published. Its keys are the names.

    Processes that are forked read through the map that their parent opened: it has no position, and the library opens
    a file once in a process and those forked from it.
    """

    only_images = True

    def __init__(self, root: Path) -> None:
        self._root = root
        self._environment: Any = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_environment": None}

    def names(self) -> Iterator[str]:
        with self._opened().begin() as reading, reading.cursor() as cursor:
            yield from map(os.fsdecode, cursor.iternext(keys=True, values=False))

    def open(self, name: str) -> IO[bytes]:
        with self._opened().begin() as reading:
            value: bytes | None = reading.get(os.fsencode(name))
        if value is None:
            raise KeyError(name)
        return io.BytesIO(value)

    def _opened(self) -> Any:
        if self._environment is None:
            lmdb = optional("lmdb", f"{self._root} is an LMDB; to read it")
            path = os.path.realpath(self._root)
            self._environment = _environments.get(path)
            if self._environment is None:
                try:
                    self._environment = lmdb.open(path, readonly=True, lock=False, readahead=False, create=False)
                except lmdb.Error as error:
                    raise ConfigError(f"{self._root} is no whole LMDB ({error})", "Copy or fetch it again") from error
                _environments[path] = self._environment
        return self._environment


_environments: WeakValueDictionary[str, Any] = WeakValueDictionary()
"""The LMDBs that are open in this process, by their real path."""


def optional(package: str, purpose: str) -> Any:
    """A package that uldm does not bring along.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        what = f"{purpose}, uldm needs the package {package}, which cannot be imported ({error})"
        raise ConfigError(what, f"Install it: pip install {package}") from error


def open_source(root: Path) -> Source:
    """Goes by the content, not by the extension.

    Raises:
        ConfigError: root is missing, compressed, or of another type.
    """
    if (root / "data.mdb").is_file():
        return _Lmdb(root)
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


def _clean(name: str) -> str:
    """A member's name without the "./" that `tar -C folder .` puts before it."""
    return str(PurePosixPath(name))
