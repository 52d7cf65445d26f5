"""The weights in a folder of diffusers: safetensors or pickles, in one file or in shards that an index names."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uldm_cli.errors import ConfigError
from uldm_cli.formats.diffusers.fields import Fields

if TYPE_CHECKING:
    from uldm_cli.formats.tensors import TensorRef, Tensors

NAME = "diffusion_pytorch_model"
FILES = tuple(f"{NAME}{ending}" for ending in (".safetensors", ".bin"))
"""One of these holds all weights of a model, or the same name with `.index.json` behind it tells of shards."""
INDEX = ".index.json"
SHARD_BYTES = 5_000_000_000
"""Most bytes of a file that is written."""
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD = re.compile(rf"(.*attentions\.\d+\.)({'|'.join(_OLD_NAMES)})(\.(?:weight|bias))")
_POINTER = b"version https://git-lfs"


def read_weights(folder: Path) -> tuple[dict[str, "TensorRef"], list[str]]:
    """The tensors of a model under the names that diffusers has for them today, and warnings.

    Raises:
        ConfigError: there are no weights, or they cannot be read.
    """
    for name in FILES:
        if (folder / name).is_file():
            tensors, warnings = _open(folder / name)
            break
        if (folder / f"{name}{INDEX}").is_file():
            tensors, warnings = _shards(Fields.read(folder / f"{name}{INDEX}"))
            break
    else:
        raise ConfigError(f"{folder} holds no weights", f"Expected {' or '.join(FILES)}, or the {INDEX} of either")
    renamed = {_today(name): ref for name, ref in tensors.items()}
    if len(renamed) < len(tensors):
        raise ConfigError(f"{folder} holds weights under old and new names at once", "Fetch it again")
    return renamed, warnings


def _today(name: str) -> str:
    """The attention's tensors had other names before diffusers 0.13."""
    found = _OLD.fullmatch(name)
    return f"{found[1]}{_OLD_NAMES[found[2]]}{found[3]}" if found else name


def _open(path: Path) -> tuple[dict[str, "TensorRef"], list[str]]:
    from uldm_cli.formats.tensors import open_safetensors

    if path.stat().st_size < 1000 and path.read_bytes().startswith(_POINTER):
        raise ConfigError(f"{path} is only git's pointer to the weights", "Fetch them: git lfs pull")
    if path.suffix == ".safetensors":
        return open_safetensors(path)[1], []
    from uldm_cli.formats.pickles import open_pickle

    pickle = open_pickle(path)
    skipped = [f"{path}: left out {', '.join(pickle.skipped)}"] if pickle.skipped else []
    return dict(pickle.tensors), skipped


def _shards(index: Fields) -> tuple[dict[str, "TensorRef"], list[str]]:
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(_is_plain(name) for name in places.values()):
        raise ConfigError(f"{index.path} does not say in which file each tensor lies", "Fetch it again")
    tensors: dict[str, TensorRef] = {}
    warnings: list[str] = []
    for name in dict.fromkeys(places.values()):
        path = index.path.parent / name
        if not path.is_file():
            raise ConfigError(f"there is no {path}, which {index.path.name} tells of", "Fetch it again")
        found, said = _open(path)
        tensors |= {key: ref for key, ref in found.items() if places.get(key) == name}
        warnings += said
    if missing := [name for name in places if name not in tensors]:
        raise ConfigError(
            f"{index.path} tells of {len(missing)} tensors that its files lack, first {missing[0]}", "Fetch it again"
        )
    return tensors, warnings


def _is_plain(name: object) -> bool:
    """Whether a shard's name is that of a file beside its index."""
    return isinstance(name, str) and name == Path(name).name and name.endswith((".safetensors", ".bin"))


def write_weights(folder: Path, tensors: "Tensors", shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a model's tensors as safetensors: one file, or shards with an index if it would be too large.

    Raises:
        UldmError: the disk is full, or the folder cannot be written to.
    """
    from uldm_cli.formats.tensors import write_safetensors

    shards = _split(tensors, shard_bytes)
    names = [FILES[0]]
    if len(shards) > 1:
        names = [f"{NAME}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(ref.nbytes for ref in tensors.values())
        write_json(folder / f"{FILES[0]}{INDEX}", {"metadata": {"total_size": total}, "weight_map": places})
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, {"format": "pt"})


def _split(tensors: "Tensors", most: int) -> list[dict[str, "TensorRef"]]:
    """Tensors in their order, in groups of at most that many bytes (or of one tensor that is larger)."""
    groups: list[dict[str, TensorRef]] = [{}]
    size = 0
    for name, ref in tensors.items():
        if groups[-1] and size + ref.nbytes > most:
            groups.append({})
            size = 0
        groups[-1][name] = ref
        size += ref.nbytes
    return groups


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
