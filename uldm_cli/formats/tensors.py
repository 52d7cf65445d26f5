"""Tensors on disk: known by shape and type, read only when asked for; and safetensors files made of them.

Nothing here imports torch before a tensor is read or written.
"""

import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from weakref import WeakValueDictionary

from uldm_cli.errors import ConfigError
from uldm_cli.formats.whole import whole

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_HEADER = 100_000_000  # the format's own limit
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
"""Size of a tensor's element, by the format's name for its type."""
TORCH_NAMES = {
    **{"BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
    **{"U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16"},
    **{"U32": "uint32", "I32": "int32", "F32": "float32"},
    **{"U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64"},
}
"""PyTorch's names of the same types."""
_WINDOW = 1 << 26
"""Bytes of a file that are mapped together: of a thousand small tensors each would else hold a file open."""


@dataclass(frozen=True)
class TensorRef:
    """A tensor that has not been read yet."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it: "F32", "BF16", "I64" ..."""
    read: Callable[[], "Tensor"] = field(compare=False, repr=False)
    """Gives the tensor, on the CPU. It may lie in the file itself: copy it before writing to it."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def map(self, shape: tuple[int, ...], function: Callable[["Tensor"], "Tensor"]) -> "TensorRef":
        """The same tensor, changed by a function whenever it is read. It keeps the type and gives `shape`."""
        return TensorRef(shape, self.dtype, lambda: function(self.read()))

    @staticmethod
    def of(tensor: "Tensor") -> "TensorRef":
        """Stands for a tensor that is there already.

        Raises:
            TypeError: safetensors has no name for its type.
        """
        name = str(tensor.dtype).removeprefix("torch.")
        for dtype, torch_name in TORCH_NAMES.items():
            if torch_name == name:
                return TensorRef(tuple(tensor.shape), dtype, lambda: tensor.detach().cpu())
        raise TypeError(f"a safetensors file cannot hold {tensor.dtype}")


Tensors = Mapping[str, TensorRef]


class MappedFile:
    """A file whose tensors are mapped into memory. Each part of it is let go of with the last tensor that lies there.

    Args:
        path: of the file.
        found: what the system said of it when its directory or header was read; the file must not change after that.
    """

    def __init__(self, path: Path, found: os.stat_result) -> None:
        self.path = path
        self._found = _identity(found)
        self._windows: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()

    def elements(self, begin: int, count: int, dtype: str) -> "Tensor":
        """A tensor of one dimension with the `count` elements from byte `begin` on. Writing to it leaves the file be.

        Raises:
            ConfigError: the file went away or changed since.
        """
        import torch

        kind: torch.dtype = getattr(torch, TORCH_NAMES[dtype])
        if count == 0:
            return torch.empty(0, dtype=kind)
        size = count * ITEM_BYTES[dtype]
        memory, offset = self._mapped(begin, begin + size)
        if offset % ITEM_BYTES[dtype]:  # such a tensor can be had, but some processors would stop at it
            return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset).clone().view(kind)
        return torch.frombuffer(memory, dtype=kind, count=count, offset=offset)

    def _mapped(self, begin: int, end: int) -> tuple[mmap.mmap, int]:
        """Memory that holds those bytes, and where in it they begin."""
        number = begin // _WINDOW
        start, stop = number * _WINDOW, (number + 1) * _WINDOW
        if end <= stop:
            window = self._windows.get(number)
            if window is None:
                window = self._windows[number] = self._map(start, min(stop, self._found[0]))
            return window, begin - start
        start = begin - begin % mmap.ALLOCATIONGRANULARITY
        return self._map(start, end), begin - start

    def _map(self, begin: int, end: int) -> mmap.mmap:
        try:
            with self.path.open("rb") as file:
                if _identity(os.fstat(file.fileno())) != self._found:
                    raise ConfigError(f"{self.path} changed while it was being read", "Try again when it is whole")
                # What is written to a private copy stays in memory: PyTorch knows no tensors that are only read.
                return mmap.mmap(file.fileno(), end - begin, access=mmap.ACCESS_COPY, offset=begin)
        except OSError as e:
            raise ConfigError(f"{self.path} cannot be read: {e.strerror}", "Check the path and its permissions") from e


def shown(name: object) -> str:
    """A name out of a file as a message may have it: not long, on one line, and without codes for the terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(name)[:200])


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev


def read_raw_header(path: Path) -> tuple[dict[str, Any], int, os.stat_result]:
    """The JSON at the start of a safetensors file: 8 bytes of length, then the text (the format's specification).

    Returns:
        The JSON, whose entries of tensors are sound; where the data begin; what the system says of the file.

    Raises:
        ConfigError: no such file, a folder, truncated, or not a safetensors file.
    """
    try:
        if path.is_dir():
            raise ConfigError(f"{path} is a folder, not a checkpoint", "Name the .safetensors file or a run's folder")
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            start = file.read(8)
            if len(start) < 8 or (length := struct.unpack("<Q", start)[0]) > LARGEST_HEADER:
                raise ValueError
            raw = json.loads(file.read(length))
            if not isinstance(raw, dict):
                raise ValueError
            told = 8 + length + _data_length([raw[name] for name in raw if name != "__metadata__"])
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}", "Check the path") from None
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}", "Check the path and its permissions") from e
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _damaged(path) from None
    if found.st_size != told:
        what = "truncated" if found.st_size < told else "damaged"
        sizes = f"{found.st_size:,} bytes, and its header tells of {told:,}"
        raise ConfigError(f"{path} is {what}: {sizes}", "Fetch it again")
    return raw, 8 + length, found


def _damaged(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} is not a safetensors file, or its start is damaged",
        "Fetch or save it again",
    )


def _data_length(entries: list[dict[str, Any]]) -> int:
    """Bytes of all tensors that a header tells of. They lie one after the other, each as long as its shape says.

    Raises:
        ValueError, TypeError, KeyError: the header tells of anything else.
    """
    position = 0
    for entry in sorted(entries, key=lambda entry: entry["data_offsets"]):
        (begin, end), shape = entry["data_offsets"], entry["shape"]
        if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
            raise ValueError
        if begin != position or end - begin != math.prod(shape) * ITEM_BYTES[entry["dtype"]]:
            raise ValueError
        position = end
    return position


def open_safetensors(path: Path) -> tuple[dict[str, str], dict[str, TensorRef]]:
    """Reads the header of a safetensors file: its metadata and its tensors, none of which is read yet.

    Raises:
        ConfigError: no such file, a folder, truncated, or not a safetensors file.
    """
    raw, start, found = read_raw_header(path)
    metadata = raw.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise _damaged(path)
    file = MappedFile(path, found)
    return metadata, {name: _reference(file, start, entry) for name, entry in raw.items()}


def _reference(file: MappedFile, start: int, entry: dict[str, Any]) -> TensorRef:
    shape, dtype, begin = tuple(entry["shape"]), entry["dtype"], start + entry["data_offsets"][0]
    return TensorRef(shape, dtype, lambda: file.elements(begin, math.prod(shape), dtype).view(shape))


def write_safetensors(path: Path, tensors: "Mapping[str, TensorRef | Tensor]", metadata: dict[str, str]) -> None:
    """Writes a safetensors file under a temporary name, syncs it and renames it: whole or not at all.

    Tensors are read and written one after the other, so memory is needed for one at a time.

    Raises:
        UldmError: the disk is full, the folder cannot be written to, or a tensor's source cannot be read.
        TypeError: the format cannot hold a tensor's type.
    """
    refs = {name: t if isinstance(t, TensorRef) else TensorRef.of(t) for name, t in tensors.items()}
    # Large elements first: then every one begins at a multiple of its size, as the format's own writer has it.
    order = sorted(refs, key=lambda name: -ITEM_BYTES[refs[name].dtype])
    start = _header([(name, refs[name]) for name in order], metadata)
    with whole(path) as file:
        file.write(start)
        for name in order:
            _write_tensor(file, name, refs[name])


def _header(refs: list[tuple[str, TensorRef]], metadata: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, ref in refs:
        end = position + ref.nbytes
        entries[name] = {"dtype": ref.dtype, "shape": ref.shape, "data_offsets": (position, end)}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_tensor(file: BinaryIO, name: str, ref: TensorRef) -> None:
    import torch

    tensor = ref.read()
    if (tuple(tensor.shape), str(tensor.dtype)) != (ref.shape, f"torch.{TORCH_NAMES[ref.dtype]}"):
        raise ValueError(f"{name} was to be {ref.dtype} {ref.shape}, and is {tensor.dtype} {tuple(tensor.shape)}")
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    file.write(plain.reshape(-1).view(torch.uint8).numpy().data)
