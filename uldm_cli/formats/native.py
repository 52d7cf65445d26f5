"""uldm's own checkpoint: one safetensors file whose header says what model it holds. Never a pickle.

Tensors are named `<part>.<key>`: `model.*` and `ema.*` of an autoencoder; `autoencoder.*`, `backbone.*` and `ema.*`
(the backbone's average) of a latent diffusion model. A file may leave out the raw or the averaged weights.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from uldm_cli.errors import ConfigError
from uldm_cli.formats.checkpoint import KINDS, Checkpoint, Header
from uldm_cli.formats.tensors import Tensors, open_safetensors, read_raw_header, shown, write_safetensors

if TYPE_CHECKING:
    from torch import Tensor, nn

KEY = "uldm"
FIELDS = {"kind": str, "config": dict, "training": dict, "step": int}
"""What is written under that key of the file's metadata, as JSON."""


def read_header(path: Path) -> Header:
    """Reads what a checkpoint says of itself; none of its tensors, and no torch.

    Raises:
        ConfigError: no such file, a folder, truncated, or not a checkpoint of uldm.
    """
    raw = read_raw_header(path)[0]
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


def read(path: Path) -> Checkpoint:
    """A checkpoint of ours, with none of its tensors read yet.

    Raises:
        ConfigError: no such file, a folder, truncated, or not a checkpoint of uldm.
    """
    return Checkpoint(path, "uldm", read_header(path), open_safetensors(path)[1])


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Writes a model of any layout as one of ours, a tensor at a time.

    Raises:
        UldmError: the disk is full, the folder cannot be written to, or the source cannot be read.
    """
    write_safetensors(path, checkpoint.tensors, _metadata(checkpoint.header))


def save(path: Path, header: Header, parts: Mapping[str, "Mapping[str, Tensor]"]) -> None:
    """Writes a checkpoint whole or not at all. `parts` maps a part's name to its state dict.

    Raises:
        UldmError: the disk is full, or the folder cannot be written to.
    """
    tensors = {f"{part}.{key}": value for part, state in parts.items() for key, value in state.items()}
    write_safetensors(path, tensors, _metadata(header))


def _metadata(header: Header) -> dict[str, str]:
    return {KEY: json.dumps({name: getattr(header, name) for name in FIELDS})}


def load_tensors(path: Path, prefix: str = "") -> "dict[str, Tensor]":
    """The tensors of a safetensors file whose names begin with `prefix`, without it; copied to the CPU's memory."""
    tensors = open_safetensors(path)[1]
    return {name.removeprefix(prefix): ref.read().clone() for name, ref in tensors.items() if name.startswith(prefix)}


def load_into(module: "nn.Module", path: Path, part: str) -> None:
    """Loads one part of a checkpoint into a module that its config made. As `load_part`."""
    load_part(module, open_safetensors(path)[1], part, path)


def load_part(module: "nn.Module", tensors: Tensors, part: str, place: Path | str) -> None:
    """Loads the tensors named `<part>.<key>` into a module that a config made, one after the other.

    Args:
        module: keeps its types, memory formats and devices.
        tensors: of the whole model.
        part: the name's beginning, without the dot.
        place: where the tensors are from, for the message.

    Raises:
        ConfigError: the tensors are not those that the module has; the first ten that differ are named.
    """
    found = fitting_part(module, tensors, part, place)
    # Copied, not mapped: where in a file weights lie would change the last bits of what is computed with them.
    for name, value in module.state_dict().items():
        value.copy_(found[name].read())


def fitting_part(module: "nn.Module", tensors: Tensors, part: str, place: Path | str) -> Tensors:
    """The tensors that `load_part` loads, by their names in the module, none of them read yet. Arguments and errors are
    those of `load_part`; the module may be without memory."""
    found = {name.removeprefix(f"{part}."): ref for name, ref in tensors.items() if name.startswith(f"{part}.")}
    state: dict[str, Tensor] = module.state_dict()
    shapes = {name: ref.shape for name, ref in found.items()}
    expected = {name: tuple(value.shape) for name, value in state.items()}
    differing = [name for name in expected | shapes if expected.get(name) != shapes.get(name)]
    if differing:
        first = "; ".join(
            f"{part}.{shown(name)} is {_shape(shapes.get(name))} in the file "
            f"and {_shape(expected.get(name))} by the config"
            for name in differing[:10]
        )
        raise ConfigError(
            f"{place} was made for another config: {len(differing)} tensors differ, first {first}",
            "Use the config it was made with",
        )
    return found


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))
