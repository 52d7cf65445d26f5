"""How a picture was made, kept in the picture: the command, its config and which model, as JSON in a PNG's text."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from uldm_cli import __version__
from uldm_cli.errors import ConfigError
from uldm_cli.runs.calls import KEYWORD, PLACES, Call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from uldm_cli.runs.models import ModelFile
    from uldm_cli.specs.sampling import Walk

_Formed = TypeVar("_Formed")

_ENDS = 65_536  # bytes of each end of a file that tell it from another


@dataclass(frozen=True)
class Recipe:
    """What has to be known to make a picture again."""

    version: str
    """Of the program."""
    command: str
    """As it is typed: "ldm sample"."""
    config: dict[str, Any]
    """The resolved config that makes the picture, and no other sample's."""
    model: dict[str, Any]
    """Which model it was; see `identity`."""
    picture: dict[str, Any]
    """Which of the pictures that the command writes it is."""

    def as_text(self) -> dict[str, str]:
        """As a PNG keeps it."""
        return {KEYWORD: json.dumps(vars(self), separators=(",", ":"))}


class Recipes:
    """Of the pictures of one run.

    Args:
        command: as it is typed, without `uldm`.
        spec: the run's config.
        model: what it samples from.
    """

    def __init__(self, command: str, spec: Walk, model: ModelFile) -> None:
        self._command, self._spec = command, spec
        self._config: dict[str, Any] = spec.model_dump(mode="json")
        if spec.deterministic:  # whatever the batches were to be, samples are computed one at a time
            self._config["batch_size"] = 1
        self._model = identity(model)

    def of_sample(self, index: int, **picture: object) -> dict[str, str]:
        """The text of a picture of sample `index` alone; `picture` tells it from the sample's others.

        The config is that of this sample: of ten thousand seeds only its own is kept.
        """
        spec = self._spec
        if spec.rng != "compvis":
            config = {**self._config, "seed": spec.sample_seeds[index], "seeds": None, "num": 1}
            return self._recipe(config, picture)
        # Its draws follow those of the samples before it, and are made together with those of its batch.
        needed = min((index // spec.batch_size + 1) * spec.batch_size, spec.num)
        return self._recipe({**self._config, "num": needed}, {**picture, "sample": index})

    def of_all(self, **picture: object) -> dict[str, str]:
        """The text of a picture of all samples."""
        return self._recipe(self._config, picture)

    def _recipe(self, config: dict[str, Any], picture: dict[str, Any]) -> dict[str, str]:
        return Recipe(__version__, self._command, config, self._model, picture).as_text()


def identity(model: ModelFile) -> dict[str, Any]:
    """What tells a model from another of the same name: its step, its bytes and a hash of both ends of its files.

    The weights change with every step of training, and so do the ends of a file that holds them.
    """
    digest, size = hashlib.sha256(), 0
    for name, path in _files(model.path):
        length = path.stat().st_size
        size += length
        with path.open("rb") as file:
            digest.update(f"{name} {length}\n".encode() + file.read(_ENDS))
            file.seek(max(length - _ENDS, 0))
            digest.update(file.read(_ENDS))
    return {"step": model.header.step, "bytes": size, "sha256_of_ends": digest.hexdigest()[:32]}


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """The files of a model, by names that stay when the model moves."""
    if path.is_file():
        yield "", path
        return
    for file in sorted(path.rglob("*")):
        if file.suffix in (".json", ".safetensors", ".bin"):
            yield file.relative_to(path).as_posix(), file


def read_recipe(path: Path) -> Recipe:
    """The recipe that a picture carries.

    Raises:
        ConfigError: it is no picture, has none, or one of a newer version of this program.
    """
    return _read(path, _as_recipe)


def read_call(path: Path) -> tuple[Call, Recipe] | None:
    """The call that made a picture, and what to show as its recipe; None where the picture has a recipe of its own.

    Raises:
        ConfigError: as `read_recipe`.
    """
    return _read(path, _as_call)


def _read(path: Path, form: Callable[[Any], _Formed]) -> _Formed:
    """What `form` makes of the JSON in a picture."""
    text = _text_in(path)
    if text is None:
        raise ConfigError(
            f"{path} does not say how it was made",
            "Only PNG files of uldm do, as long as no other program saved them again",
        )
    try:
        found = json.loads(text)
        version = _typed(found, "version", str)
        formed = form(found)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        hint = "Only PNG files of uldm do so in a way that can be read"
        raise ConfigError(f"what {path} says of how it was made is not of this program", hint) from error
    if _release(version) > _release(__version__):
        raise ConfigError(f"{path} was made by uldm {version}, and this is {__version__}", "Update uldm")
    return formed


def _as_recipe(found: Any) -> Recipe:
    return Recipe(
        *(_typed(found, name, str) for name in ("version", "command")),
        *(_typed(found, name, dict) for name in ("config", "model", "picture")),
    )


def _as_call(found: Any) -> tuple[Call, Recipe] | None:
    if "arguments" not in found:
        return None
    version, command, name = (_typed(found, field, str) for field in ("version", "command", "name"))
    arguments, places = _typed(found, "arguments", list), _typed(found, "places", dict)
    if not all(isinstance(word, str) for word in (*arguments, *places.values())) or not places.keys() <= set(PLACES):
        raise TypeError("not what is written")
    if any(place != os.path.basename(place) or place == os.pardir for place in (name, *places.values())):
        raise ValueError("a name of a file is more than that")
    return Call(command, arguments, places), Recipe(
        version, command, {}, {}, {"arguments": arguments, "places": places, "name": name}
    )


def _typed(found: Any, name: str, kind: type) -> Any:
    value = found[name]
    if not isinstance(value, kind):
        raise TypeError(f"{name} is a {type(value).__name__}")
    return value


def _text_in(path: Path) -> str | None:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()  # text may come after the pixels
            text = image.info.get(KEYWORD)
    except Exception as error:  # damaged files break Pillow in many ways
        reason = getattr(error, "strerror", None) or "it is no picture, or damaged"
        raise ConfigError(f"{path} cannot be read ({reason})") from error
    return text if isinstance(text, str) else None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
