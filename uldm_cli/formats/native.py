"""uldm's own checkpoint: one safetensors file whose header says what model it holds. Never a pickle.

Tensors are named `<part>.<key>`: `model.*` and `ema.*` of an autoencoder; `autoencoder.*`, `backbone.*` and `ema.*`
(the backbone's average) of a latent diffusion model. A file may leave out the raw or the averaged weights.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uldm_cli.errors import ConfigError, UldmError
from uldm_cli.formats.checkpoint import KINDS, Header

if TYPE_CHECKING:
    from torch import Tensor, nn

KEY = "uldm"
FIELDS = {"kind": str, "config": dict, "training": dict, "step": int}
"""What is written under that key of the file's metadata, as JSON."""
LARGEST_HEADER = 100_000_000  # the format's own limit
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
"""Size of a tensor's element, by the format's name for its type."""


def read_header(path: Path) -> Header:
    """Reads what a checkpoint says of itself; none of its tensors, and no torch.

    Raises:
        ConfigError: no such file, a folder, truncated, or not a checkpoint of uldm.
    """
    raw = _raw_header(path)
    try:
        said = {"training": {}, "step": 0} | json.loads(raw["__metadata__"][KEY])
        if not all(isinstance(said[name], kind) for name, kind in FIELDS.items()):
            raise TypeError
    except (KeyError, TypeError, ValueError, RecursionError) as e:
        raise ConfigError(
            f"{path} is a safetensors file, but not a checkpoint of uldm", "Name one that `uldm ... train` wrote"
        ) from e
    if said["kind"] not in KINDS:
        raise ConfigError(f"{path} holds a model of the unknown kind {said['kind']!r}", "A newer uldm may know it")
    tensors = {name: tuple(entry["shape"]) for name, entry in raw.items() if name != "__metadata__"}
    return Header(**{name: said[name] for name in FIELDS}, tensors=tensors)


def _raw_header(path: Path) -> dict[str, Any]:
    """The JSON at the start of a safetensors file: 8 bytes of length, then the text (the format's specification)."""
    try:
        if path.is_dir():
            raise ConfigError(f"{path} is a folder, not a checkpoint", "Name the .safetensors file or a run's folder")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            if len(start) < 8 or (length := struct.unpack("<Q", start)[0]) > LARGEST_HEADER:
                raise ValueError
            raw = json.loads(file.read(length))
            if not isinstance(raw, dict):
                raise ValueError
            told = 8 + length + _data_length([raw[name] for name in raw if name != "__metadata__"])
    except FileNotFoundError:
        raise ConfigError(f"there is no checkpoint {path}", "Check the path") from None
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}", "Check the path and its permissions") from e
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        what = "is not a safetensors file, or its start is damaged"
        raise ConfigError(f"{path} {what}", "Fetch or save it again") from None
    if size != told:
        what = "truncated" if size < told else "damaged"
        raise ConfigError(f"{path} is {what}: {size:,} bytes, and its header tells of {told:,}", "Fetch it again")
    return raw


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


def save(path: Path, header: Header, parts: Mapping[str, "Mapping[str, Tensor]"]) -> None:
    """Writes a checkpoint whole or not at all. `parts` maps a part's name to its state dict.

    Raises:
        UldmError: the disk is full, or the folder cannot be written to.
    """
    said = {"kind": header.kind, "config": header.config, "training": header.training, "step": header.step}
    tensors = {f"{part}.{key}": value for part, state in parts.items() for key, value in state.items()}
    save_tensors(path, tensors, {KEY: json.dumps(said)})


def save_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: dict[str, str]) -> None:
    """Writes a safetensors file under a temporary name, syncs it and renames it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors makes files that only their owner can read
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary, metadata)
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(e, OSError | SafetensorError):
            raise UldmError(f"{path} could not be written: {e}", "What was saved before is whole") from e
        raise


def load_tensors(path: Path, prefix: str = "") -> "dict[str, Tensor]":
    """The tensors of a safetensors file whose names begin with `prefix`, without it; on the CPU."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118  # not a mapping
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as e:
        raise ConfigError(f"{path} cannot be read: {e}", "Fetch or save it again") from e


def load_into(module: "nn.Module", path: Path, part: str) -> None:
    """Loads one part of a checkpoint into a module that its config made.

    Raises:
        ConfigError: the tensors are not those that the module has; the first three that differ are named.
    """
    state = load_tensors(path, f"{part}.")
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    differing = [name for name in expected | found if expected.get(name) != found.get(name)]
    if differing:
        first = "; ".join(
            f"{part}.{name} is {_shape(found.get(name))} in the file and {_shape(expected.get(name))} by the config"
            for name in differing[:3]
        )
        raise ConfigError(
            f"{path} was made for another config: {len(differing)} tensors differ, first {first}",
            "Use the config it was made with",
        )
    module.load_state_dict(state)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))
