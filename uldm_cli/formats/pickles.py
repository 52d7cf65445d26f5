"""The files of `torch.save` (`.ckpt`, `.pth`, `.pt`, `.bin`), read without trusting them, and a tensor at a time."""

import io
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from uldm_cli.errors import ConfigError
from uldm_cli.formats.archive import Archive, read_archive
from uldm_cli.formats.storages import Storage, storage_of, unreadable
from uldm_cli.formats.tensors import ITEM_BYTES, LARGEST_HEADER, MappedFile, TensorRef, shown
from uldm_cli.formats.unpickler import HINT, Foreign, Global, Unpickler

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_AGAIN = "Fetch it again"
_LARGEST_PICKLE = 1 << 28
"""Bytes that a pickle may have; those of the largest published checkpoints have a hundredth."""
_MOST_NAMES = 1_000_000
_DEEPEST = 20
"""Dicts in dicts."""
_LARGEST_PLAIN = 100_000
"""Numbers, texts and lists that are kept of what is not weights."""

Layout = Literal["zip", "legacy", "safetensors", "unknown"]


@dataclass(frozen=True)
class Pickle:
    """What a file of `torch.save` holds."""

    tensors: dict[str, TensorRef]
    """Those of its `state_dict`; where there is none, all that lie in dicts. Names of dicts in dicts have dots."""
    plain: dict[str, Any]
    """What else is at the top, as far as it is numbers, text, and lists and dicts of them."""
    skipped: list[str]
    """Classes and functions that it names, of which nothing was made."""
    format: str
    """"zip", or "legacy" as PyTorch wrote before 1.6."""


def sniff(path: Path) -> Layout:
    """What a file is, by its first bytes and not by its name's ending.

    Raises:
        ConfigError: there is no such file, it is a folder, or it cannot be read.
    """
    start = _start(path)
    if len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= LARGEST_HEADER:
        return "safetensors"
    if start.startswith((b"PK\3\4", b"PK\5\6")):
        return "zip"
    return "legacy" if start[:1] == b"\x80" and start[1:2] <= b"\5" else "unknown"


def _start(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise ConfigError(f"{path} is a folder, not a checkpoint", "Name the file in it")
        with path.open("rb") as file:
            return file.read(512)
    except FileNotFoundError:
        raise ConfigError(f"there is no checkpoint {path}", "Check the path") from None
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}", "Check the path and its permissions") from e
    except ValueError:  # a name that no file can have
        raise ConfigError(f"there is no checkpoint {path}", "Check the path") from None


def open_pickle(path: Path) -> Pickle:
    """Reads what a checkpoint of PyTorch holds; none of its tensors.

    Nothing in it is executed, and nothing imported.

    Raises:
        ConfigError: it would call something when others load it, is damaged or cut off, is no such file, or its
            tensors have no names.
    """
    layout = sniff(path)
    if layout == "safetensors":
        raise ConfigError(f"{path} is a safetensors file, not one of torch.save", "Rename it to end in .safetensors")
    if layout == "unknown":
        _say_what_it_is(path, _start(path))
    try:
        content, names = _read_zip(path) if layout == "zip" else _read_legacy(path)
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}", "Check the path and its permissions") from e
    plain, skipped = _plain(content)
    return Pickle(_tensors(path, content), plain, [*names, *skipped], "zip" if layout == "zip" else "legacy")


def _say_what_it_is(path: Path, start: bytes) -> None:
    """Raises a ConfigError if the file is something that checkpoints are often mistaken for, or turn into."""
    text = start.lstrip().lower()
    if not start:
        raise ConfigError(f"{path} is empty", _AGAIN)
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ConfigError(f"{path} is a web page: its download was answered with that", "Fetch it from another address")
    if text.startswith(b"version https://git-lfs"):
        raise ConfigError(f"{path} is a pointer of Git LFS, not the file itself", "Run git lfs pull where it is from")
    if start[257:262] == b"ustar":
        hint = "Unpack it if it is an archive; else load it with PyTorch and save it again"
        raise ConfigError(f"{path} is a tar archive, or a checkpoint of PyTorch before 0.1.10", hint)


def _damaged(path: Path, what: str) -> ConfigError:
    return ConfigError(f"{path} is damaged: {what}", _AGAIN)


def _big_endian(path: Path) -> ConfigError:
    return ConfigError(f"{path} was written by a big-endian machine", "Load it with PyTorch and save it again here")


def _read_zip(path: Path) -> tuple[Any, list[str]]:
    """What the pickle in an archive describes, and the names that stand for nothing in it."""
    archive = read_archive(path)
    file = MappedFile(path, archive.found)

    def load(saved: Any) -> Storage:
        kind, of, key, _location, numel = saved
        if kind != "storage":
            raise ValueError
        storage = storage_of(of.name, numel, file)
        record = archive.records.get(f"data/{key}")
        if record is None:
            raise _damaged(path, f"it has no record data/{shown(key)}")
        if record.size != storage.nbytes:
            told = f"{record.size:,} bytes, and its pickle tells of {storage.nbytes:,}"
            raise _damaged(path, f"its record data/{shown(key)} has {told}")
        storage.begin = record.begin
        return storage

    if _record(path, archive, "byteorder") == b"big":
        raise _big_endian(path)
    unpickler = Unpickler(str(path), load)
    try:
        return unpickler.run(io.BytesIO(_record(path, archive, "data.pkl"))), list(unpickler.skipped)
    except ValueError:
        raise _damaged(path, "its data.pkl is not a whole pickle") from None


def _record(path: Path, archive: Archive, name: str) -> bytes:
    """A small record's content, empty if it is not there."""
    record = archive.records.get(name)
    if record is None:
        return b""
    if record.size > _LARGEST_PICKLE:
        raise ConfigError(f"{path} has a {name} of {record.size:,} bytes, more than any checkpoint should", HINT)
    with path.open("rb") as file:
        file.seek(record.begin)
        return file.read(record.size)


def _read_legacy(path: Path) -> tuple[Any, list[str]]:
    """The same of the older format: four pickles, then a list of storages, then their bytes."""
    with path.open("rb") as handle:
        found = os.fstat(handle.fileno())
        length = min(found.st_size, _LARGEST_PICKLE)
        with mmap.mmap(handle.fileno(), length, access=mmap.ACCESS_READ) as stream:
            return _read_stream(path, found, stream)


def _read_stream(path: Path, found: os.stat_result, stream: mmap.mmap) -> tuple[Any, list[str]]:
    file = MappedFile(path, found)
    storages: dict[str, Storage] = {}

    def load(saved: Any) -> Any:
        if saved[0] == "module":  # a class, with its source code
            return saved[1]
        kind, of, key, _location, numel, view = saved
        if kind != "storage" or not isinstance(key, str):
            raise ValueError
        if view is not None:
            raise unreadable(path, "a part of a storage, as PyTorch before 0.4 wrote it")
        storage = storage_of(of.name, numel, file)
        known = storages.setdefault(key, storage)
        if (known.dtype, known.nbytes) != (storage.dtype, storage.nbytes):
            raise ValueError
        return known

    unpickler = Unpickler(str(path), load)

    def run() -> Any:
        return unpickler.run(cast(IO[bytes], stream))

    try:
        if run() != _MAGIC or run() != _PROTOCOL:
            raise ConfigError(f"{path} is a pickle, but not one of torch.save", "Save the tensors with torch.save")
    except ValueError:
        raise ConfigError(
            f"{path} is not a checkpoint of PyTorch or safetensors, or its start is damaged", _AGAIN
        ) from None
    try:
        system, content, keys = run(), run(), run()
        if system["little_endian"] is not True:
            raise _big_endian(path)
        begin = stream.tell()
        total = begin + sum(8 + storages[key].nbytes for key in keys)
        if len(set(keys)) < len(keys) or set(keys) != set(storages):
            raise ValueError
    except (ValueError, TypeError, KeyError):
        what = f"it has {found.st_size:,} bytes, and what they describe is not whole"
        raise _damaged(path, what) from None
    if found.st_size != total:
        what = "is not whole" if found.st_size < total else "is damaged"
        sizes = f"it has {found.st_size:,} bytes, and tells of {total:,}"
        raise ConfigError(f"{path} {what}: {sizes}", _AGAIN)
    _place(path, [(key, storages[key]) for key in keys], begin)
    return content, list(unpickler.skipped)


def _place(path: Path, storages: list[tuple[str, Storage]], begin: int) -> None:
    """Finds the storages' bytes: each has its number of elements before it."""
    with path.open("rb") as file:
        for key, storage in storages:
            file.seek(begin)
            told = int.from_bytes(file.read(8), "little") * ITEM_BYTES.get(storage.dtype, 1)
            if told != storage.nbytes:
                sizes = f"{told:,} bytes, and its pickle tells of {storage.nbytes:,}"
                raise _damaged(path, f"its storage {shown(key)} has {sizes}")
            storage.begin = begin + 8
            begin += 8 + storage.nbytes


def _entries(value: Any) -> dict[Any, Any] | None:
    """What a dict, or an object of a class that is a kind of dict, holds."""
    if isinstance(value, Foreign):
        return value.entries or None
    return value if isinstance(value, dict) else None


def _name(key: Any) -> str:
    return key if isinstance(key, str) else key.name if isinstance(key, Global | Foreign) else str(key)[:100]


def _tensors(path: Path, content: Any) -> dict[str, TensorRef]:
    """The tensors by name: those of the state dict, or of all dicts in dicts."""
    entries = _entries(content) or {}
    flat = _Flat(path)
    flat.add(_entries(entries.get("state_dict")) or entries)
    if not flat.tensors:
        kind = "tensor" if isinstance(content, TensorRef) else type(content).__name__
        what = f"an object of {content.name}" if isinstance(content, Foreign) else f"a {kind}"
        hint = "Save the model's state_dict() with torch.save"
        raise ConfigError(f"{path} holds no tensors that have names ({what})", hint)
    return flat.tensors


class _Flat:
    """Collects tensors out of dicts in dicts, which may hold one another over and over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, TensorRef] = {}
        self._left = _MOST_NAMES

    def add(self, entries: dict[Any, Any], prefix: str = "", depth: int = 0) -> None:
        self._left -= len(entries)
        if self._left < 0 or depth > _DEEPEST:
            raise ConfigError(f"{self.path} holds dicts in dicts without end", HINT)
        for key, value in entries.items():
            name = f"{prefix}{_name(key)}"
            if isinstance(value, TensorRef):
                if name in self.tensors:
                    raise ConfigError(
                        f"{self.path} holds two tensors named {shown(name)}", "Save them under other names"
                    )
                self.tensors[name] = value
            elif inner := _entries(value):
                self.add(inner, f"{name}.", depth + 1)


_NOTHING = object()


class _TooLarge(Exception):
    pass


def _plain(content: Any) -> tuple[dict[str, Any], list[str]]:
    """The plain values beside the state dict, and the names of those that are too large to be of use."""
    plain, skipped = {}, []
    for key, value in (_entries(content) or {}).items():
        if key == "state_dict":
            continue
        try:
            copied = _Copy().of(value)
        except _TooLarge:
            skipped.append(f"{shown(_name(key))} (too large)")
        else:
            if copied is not _NOTHING:
                plain[_name(key)] = copied
    return plain, skipped


class _Copy:
    """Copies numbers, texts, and lists and dicts of them; a list may hold itself, or another a million times."""

    def __init__(self) -> None:
        self._left = _LARGEST_PLAIN

    def of(self, value: Any, depth: int = 0) -> Any:
        """The value without what is not plain in it; `_NOTHING` if nothing is left.

        Raises:
            _TooLarge: it is.
        """
        self._left -= 1 + (len(value) // 64 if isinstance(value, str) else 0)
        if self._left < 0 or depth > _DEEPEST:
            raise _TooLarge
        if isinstance(value, int):
            return value if value.bit_length() <= 64 else _NOTHING
        if isinstance(value, str | float | None):
            return value
        if isinstance(value, list | tuple | set | frozenset):
            copied = [self.of(item, depth + 1) for item in value]
            kept = [item for item in copied if item is not _NOTHING]
            return kept if kept or not value else _NOTHING
        entries = _entries(value)
        if entries is None and isinstance(value, Foreign):  # attributes, as of argparse.Namespace
            entries = _entries(value.state)
        return _NOTHING if entries is None else self._of_entries(entries, depth)

    def _of_entries(self, entries: dict[Any, Any], depth: int) -> Any:
        copied = {_name(key): self.of(value, depth + 1) for key, value in entries.items()}
        named = {name: value for name, value in copied.items() if value is not _NOTHING}
        return named if named or not entries else _NOTHING
