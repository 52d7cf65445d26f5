"""Writing a checkpoint that `torch.load` reads, one tensor in memory at a time.

`torch.save` wants all tensors at once. The file it makes is a zip archive: a pickle that names storages, and a member
of raw bytes for each storage. Both are written here in order, the tensors as they are read.
"""

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from uldm_cli.errors import ConfigError
from uldm_cli.formats.tensors import TORCH_NAMES, TensorRef
from uldm_cli.formats.whole import whole

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_STORAGES = {
    "BOOL": "BoolStorage",
    "U8": "ByteStorage",
    "I8": "CharStorage",
    "I16": "ShortStorage",
    "I32": "IntStorage",
    "I64": "LongStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
    "F32": "FloatStorage",
    "F64": "DoubleStorage",
    "C64": "ComplexFloatStorage",
}
"""PyTorch's names of storages, by safetensors' of their types."""
_ZIP_HEADER = 30  # bytes before the name of a member
_ALIGNMENT = 64  # of the bytes of a storage, so that a reader can map them


def write_pickle(path: Path, content: Mapping[str, Any]) -> None:
    """Writes plain values and `TensorRef`s to a file for `torch.load`: whole or not at all.

    The same `TensorRef` in two places is stored once, as PyTorch does with a tensor. The same content gives the same
    bytes.

    Raises:
        UldmError: the disk is full, the folder cannot be written to, a tensor's source cannot be read, or a tensor is
            of a type that such a file cannot hold.
    """
    described = BytesIO()
    pickler = _Pickler(described)
    pickler.dump(content)
    with whole(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _write_member(archive, file, "data.pkl", described.getbuffer())
        _write_member(archive, file, "byteorder", b"little")
        for key, ref in enumerate(pickler.storages):
            _write_member(archive, file, f"data/{key}", _content(ref))
        _write_member(archive, file, "version", b"3\n")


def _write_member(archive: zipfile.ZipFile, file: BinaryIO, name: str, content: "ReadableBuffer") -> None:
    info = zipfile.ZipInfo(f"archive/{name}")  # its date is always the same
    info.file_size = memoryview(content).nbytes
    large = info.file_size * 1.05 > zipfile.ZIP64_LIMIT  # the module's own rule for the longer header
    start = file.tell() + _ZIP_HEADER + len(info.filename) + 4 + (20 if large else 0)
    padding = -start % _ALIGNMENT
    # An extra field of zip archives: two bytes say what it is, two how long it is. PyTorch pads with the same one.
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(info, "w", force_zip64=large) as member:
        member.write(content)


def _content(ref: TensorRef) -> memoryview:
    import torch

    tensor = ref.read()
    if (tuple(tensor.shape), str(tensor.dtype)) != (ref.shape, f"torch.{TORCH_NAMES[ref.dtype]}"):
        raise ValueError(f"was to be {ref.dtype} {ref.shape}, and is {tensor.dtype} {tuple(tensor.shape)}")
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class _Storage:
    """Stands for the elements of a tensor while the pickle is made."""

    key: int
    ref: TensorRef


class _Pickler(pickle.Pickler):
    """Makes the pickle, and takes note of the storages that it names."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream, protocol=2)  # what torch.save uses
        self.storages: list[TensorRef] = []

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        if not isinstance(obj, _Storage):
            return None
        import torch

        kind = getattr(torch, _STORAGES[obj.ref.dtype])
        return ("storage", kind, str(obj.key), "cpu", math.prod(obj.ref.shape))

    def reducer_override(self, obj: Any) -> Any:
        """A tensor as a call of PyTorch's function that makes it again; everything else as usual."""
        if not isinstance(obj, TensorRef):
            return NotImplemented
        from torch._utils import _rebuild_tensor_v2

        if obj.dtype not in _STORAGES:
            raise ConfigError(f"a .ckpt cannot hold tensors of the type {obj.dtype}", "Convert with another --dtype")
        storage = _Storage(len(self.storages), obj)
        self.storages.append(obj)
        strides = tuple(accumulate(reversed(obj.shape[1:]), mul, initial=1))[::-1] if obj.shape else ()
        return _rebuild_tensor_v2, (storage, 0, obj.shape, strides, False, OrderedDict())
