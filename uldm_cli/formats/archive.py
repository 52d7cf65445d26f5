"""The zip archives that PyTorch writes: where each record's bytes lie. None of them is unpacked."""

import io
import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

from uldm_cli.errors import ConfigError
from uldm_cli.formats.tensors import shown

_LARGEST_DIRECTORY = 1 << 24
"""Bytes of an archive's list of contents: a hundred times that of the largest published checkpoints."""
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_UTF8 = 0x800
_AGAIN = "Fetch it again"


@dataclass(frozen=True)
class Record:
    """A file in an archive, as it is there."""

    begin: int
    size: int


@dataclass(frozen=True)
class Archive:
    """A checkpoint's records, by their names without the folder that they all lie in."""

    records: dict[str, Record]
    found: os.stat_result
    """What the system said of the file."""


class _Careful(io.FileIO):
    """A file of which the standard library does not read a gigabyte because the file says so."""

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(
            _LARGEST_DIRECTORY + 1 if size is None or size < 0 else min(size, _LARGEST_DIRECTORY + 1)
        )
        if content is None or len(content) > _LARGEST_DIRECTORY:
            raise zipfile.BadZipFile
        return content


def read_archive(path: Path) -> Archive:
    """The records of a checkpoint's archive.

    Raises:
        ConfigError: half of it is missing, it is damaged, its records overlap or are compressed, or it is another zip.
    """
    with _Careful(path) as file:
        found = os.fstat(file.fileno())
        try:
            with zipfile.ZipFile(file) as archive:
                entries, end = archive.infolist(), archive.start_dir
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, OverflowError, struct.error):
            missing = "the list of its contents, which ends such a file, is missing or damaged"
            raise ConfigError(
                f"{path} is not whole: it has {found.st_size:,} bytes, and {missing}",
                "Fetch it again; it was probably not fetched to its end",
            ) from None
        names = [entry.orig_filename for entry in entries]
        top = _top_folder(path, names)
        try:
            records = _located(file, entries, end)
        except ValueError as e:
            raise ConfigError(f"{path} is damaged: {e}", _AGAIN) from None
        except (OSError, OverflowError, struct.error):
            raise ConfigError(f"{path} is damaged: its records are not where it says", _AGAIN) from None
    return Archive({name.removeprefix(top): record for name, record in zip(names, records, strict=True)}, found)


def _top_folder(path: Path, names: list[str]) -> str:
    """The folder that all records lie in, with its slash."""
    tops = [name.removesuffix("data.pkl") for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if not tops:
        hint = "If a checkpoint is inside, unpack it first"
        raise ConfigError(f"{path} is a zip archive, but no checkpoint: it has no data.pkl", hint)
    top = tops[0]
    if len(set(names)) < len(names) or not all(name.startswith(top) for name in names):
        raise ConfigError(f"{path} is damaged: a name is there twice, or outside of the folder {shown(top)}", _AGAIN)
    if any(name == f"{top}constants.pkl" or name.startswith(f"{top}code/") for name in names):
        hint = "Load it with the program that made it, and save its state_dict()"
        raise ConfigError(f"{path} is a TorchScript program, not a checkpoint", hint)
    return top


def _located(file: _Careful, entries: list[zipfile.ZipInfo], end: int) -> list[Record]:
    """Where the records lie: stored as they are, one after the other, before `end`.

    Raises:
        ValueError: they do not; the message says what is wrong.
    """
    records: dict[str, Record] = {}
    last, before = 0, ""
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        name = entry.orig_filename
        record = _record(file, entry)
        if entry.header_offset < last:
            raise ValueError(f"its records {before} and {shown(name)} overlap")
        last, before = record.begin + record.size, shown(name)
        records[name] = record
    if last > end:
        raise ValueError(f"its record {before} reaches outside of it")
    return [records[entry.orig_filename] for entry in entries]


def _record(file: _Careful, entry: zipfile.ZipInfo) -> Record:
    name = entry.orig_filename
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
        raise ValueError(f"its record {shown(name)} is compressed or encrypted, which PyTorch does not do")
    file.seek(entry.header_offset)
    signature, length, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    local_name = file.read(length).decode("utf-8" if entry.flag_bits & _UTF8 else "cp437", "replace")
    if signature != b"PK\x03\x04" or local_name != name:
        raise ValueError(f"its record {shown(name)} is not where it says")
    return Record(entry.header_offset + _LOCAL_HEADER.size + length + extra, entry.file_size)
