"""What a pickle of PyTorch says of storages and of the tensors that are views of them, checked before any is read."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uldm_cli.errors import ConfigError
from uldm_cli.formats.tensors import ITEM_BYTES, TORCH_NAMES, MappedFile, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {f"torch.{name}": dtype for dtype, name in TORCH_NAMES.items()}
"""Types of elements by the names that PyTorch pickles for them."""
_STORAGES = {
    **{"Float": "F32", "Double": "F64", "Half": "F16", "BFloat16": "BF16", "ComplexFloat": "C64"},
    **{"Long": "I64", "Int": "I32", "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL"},
    **{"Untyped": "", "_Untyped": ""},
}
"""The same by the names of its classes of storages, without `Storage`."""
_LARGEST_REPEATED = 1 << 28
"""Bytes of a tensor that is made by repeating fewer."""


@dataclass(eq=False)
class Storage:
    """Bytes that tensors are views of."""

    file: MappedFile
    dtype: str
    """Empty where the tensors say it."""
    nbytes: int
    begin: int = 0
    """Where in the file; in the old format that becomes known after the tensors."""


def storage_type(name: str) -> str | None:
    """The type that a class of storages is for, "" where it leaves that to the tensors; None: it is no such class."""
    module, _, kind = name.rpartition(".")
    known = module in {"torch", "torch.cuda", "torch.storage"} and kind.endswith("Storage")
    return _STORAGES.get(kind.removesuffix("Storage")) if known else None


def storage_of(kind: str, numel: Any, file: MappedFile) -> Storage:
    """A storage of the class of that name, with as many elements as the pickle says.

    Raises:
        ConfigError: the class is for elements that are not read.
        ValueError, TypeError: there is no such class, or no such number.
    """
    dtype = storage_type(kind)
    if dtype is None:
        if kind.startswith("torch.") and kind.endswith("Storage"):
            raise unreadable(file.path, f"a {kind}")
        raise ValueError
    return Storage(file, dtype, counts([numel])[0] * ITEM_BYTES.get(dtype, 1))


def unreadable(place: object, what: str) -> ConfigError:
    """A refusal of what may be a tensor, but none of a model's weights."""
    return ConfigError(f"{place} holds {what}, which cannot be read", "Save it as a common tensor of floats")


def counts(numbers: Any) -> tuple[int, ...]:
    """Sizes, strides or offsets: few of them, none negative, all of 63 bits.

    Raises:
        ValueError, TypeError: they are not.
    """
    if not isinstance(numbers, tuple | list) or len(numbers) > 64:
        raise TypeError
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        raise ValueError
    return tuple(numbers)


def view(storage: Any, dtype: str, offset: Any, size: Any, stride: Any, metadata: Any = None) -> TensorRef:
    """A tensor that a storage's elements make.

    Args:
        storage: a `Storage`, if the pickle is sound. So with what follows.
        dtype: of the elements.
        offset: of the first element, in elements.
        size: the tensor's shape.
        stride: elements from one to the next, for each dimension.
        metadata: bits that say that the numbers are to be read with the other sign, or conjugated.

    Raises:
        ConfigError: it reaches outside of the storage, is much larger than that, or has such bits.
        ValueError, TypeError: the arguments are of other kinds.
    """
    if not isinstance(storage, Storage) or dtype not in ITEM_BYTES:
        raise TypeError
    path = storage.file.path
    if metadata:
        raise unreadable(path, "a tensor of negated or conjugated numbers")
    start, shape, steps = counts([offset])[0], counts(size), counts(stride)
    if len(shape) != len(steps) or math.prod(max(n, 1) for n in shape) >= 1 << 60:
        raise ValueError
    steps = tuple(step if n > 1 else 1 for n, step in zip(shape, steps, strict=True))
    elements = 0 if 0 in shape else 1 + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
    held = storage.nbytes // ITEM_BYTES[dtype]
    if elements and start + elements > held:
        told = f"elements {start:,} to {start + elements:,} of a storage that has {held:,}"
        raise ConfigError(f"{path} is damaged: a tensor would be {told}", "Fetch it again")

    def read() -> "Tensor":
        flat = storage.file.elements(storage.begin + start * ITEM_BYTES[dtype], elements, dtype)
        return flat.as_strided(shape, steps) if elements else flat.view(shape)

    ref = TensorRef(shape, dtype, read)
    if ref.nbytes > max(storage.nbytes, _LARGEST_REPEATED):  # steps of 0 repeat what is there
        made = f"a tensor of {ref.nbytes:,} bytes made of {storage.nbytes:,}"
        raise ConfigError(f"{path} holds {made}", "It is no model's: do not open this file with other programs")
    return ref
