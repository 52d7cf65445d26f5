"""From a YAML file, `key=value` overrides and flags to a validated config, and back to YAML.

What wins: the base (a checkpoint's or a run's config) < the YAML < overrides < flags. Each failure is a ConfigError of
one line that says where the value came from: `configs/x.yaml:7: sampler.etta: unknown key 'etta' (value 0.5)`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from uldm_cli import registry
from uldm_cli.errors import ConfigError, nearest
from uldm_cli.specs.base import slot_of
from uldm_cli.specs.complete import complete, model_at, plain
from uldm_cli.specs.explain import KeyPath, Origin, explain, origin_of, show, unknown_key
from uldm_cli.specs.yamlfile import read_yaml, to_yaml

T = TypeVar("T", bound=BaseModel)

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Flag:
    """A flag's value with the name that messages use, where that is not the last part of the path it sets."""

    name: str
    value: object


@dataclass(frozen=True)
class Override:
    """One `key=value` (or `~key`) of the command line, read."""

    text: str
    path: KeyPath
    value: Any
    raw: str
    remove: bool = False

    @property
    def origin(self) -> Origin:
        place = self.text if len(self.text) <= 80 else self.text[:77] + "..."
        raw = None if self.remove else self.raw
        return Origin(f"{place} (command line)", names=self.path, text=raw)


def load_config(
    model: type[T],
    path: Path | None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, object] = {},
    base: Mapping[str, Any] = {},
) -> T:
    """The validated config of `model`: base < the YAML at `path` < overrides < flags, over the model's defaults.

    `flags` maps a dotted path to a value, or to a `Flag` where the flag is not named like the path's last part; None
    stands for a flag that was not given. Raises ConfigError for wrong input, PluginError for a plugin that is broken.
    """
    try:
        config = _Config(model, base)
        if path is not None:
            config.read(path)
        for text in overrides:
            config.override(parse_override(text))
        for dotted, value in sorted(flags.items(), key=lambda item: item[0].count(".")):
            flag = value if isinstance(value, Flag) else Flag(_flag_name(dotted), value)
            if flag.value is not None:
                config.flag(tuple(dotted.split(".")), flag)
        return config.build()
    except RecursionError:
        raise ConfigError(f"{path or 'an override'}: nested too deeply") from None


def dump_yaml(spec: BaseModel) -> str:
    """The resolved config as YAML, which `load_config` reads back to an equal one."""
    return to_yaml(plain(spec))


def parse_override(text: str) -> Override:
    """Read `a.b=3`, `sampler=heun` or `~key`: split at the first `=`, the value JSON where it is that, else text."""
    remove = text.startswith("~")
    key, equals, raw = text.removeprefix("~").partition("=")
    if remove == bool(equals):
        form = "takes no value; write ~KEY" if remove else "has no value; write KEY=VALUE"
        raise ConfigError(f"{show(text)} {form}")
    if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise ConfigError(
            f"{show(text)}: {show(key)} is not a key", "Keys are words with dots between: sampler.steps=50"
        )
    return Override(text, tuple(key.split(".")), None if remove else _read_value(raw), raw, remove)


def split_arguments(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Sort a command's `[CONFIG] [KEY=VALUE]...` into the config, if there is one, and the overrides."""
    config: Path | None = None
    overrides: list[str] = []
    for argument in arguments:
        if not _is_config(argument):
            if "=" not in argument and not argument.startswith("~"):
                raise _neither(argument)
            overrides.append(argument)
        elif config is not None:
            raise ConfigError(f"two configs, {config} and {argument}; a command takes one")
        else:
            config = Path(argument)
    return config, overrides


def command_of(kind: str) -> str:
    """The command that a config of this kind is for: "uldm ldm sample" for "ldm-sample"."""
    return "uldm " + kind.replace("-", " ")


class _Config(Generic[T]):
    """A tree of plain values in the making, and where each of them came from."""

    def __init__(self, model: type[T], base: Mapping[str, Any]) -> None:
        self._model = model
        self._tree = complete(model, base)
        self._origins: dict[KeyPath, Origin] = {(): Origin("the saved config")} if base else {}
        self._check_kind()

    def read(self, path: Path) -> None:
        data, lines = read_yaml(path)
        self._tree = complete(self._model, data, self._tree)
        self._origins[()] = Origin(str(path))
        self._origins |= {at: Origin(f"{path}:{line}") for at, line in lines.items()}
        self._check_kind()

    def override(self, override: Override) -> None:
        if override.remove:
            self._remove(override.path, override.origin)
        else:
            self._set(override.path, override.value, override.origin)
        if override.path == ("kind",):
            self._check_kind()

    def flag(self, path: KeyPath, flag: Flag) -> None:
        value = plain(flag.value)
        shown = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        place = flag.name if value is True else f"{flag.name} {shown}"
        self._set(path, value, Origin(place, names=path, flag=flag.name))

    def build(self) -> T:
        try:
            return self._model.model_validate(self._tree)
        except ValidationError as error:
            if self._restore_text(error):
                return self.build()
            raise explain(error, self._model, self._tree, self._origins) from None

    def _set(self, path: KeyPath, value: Any, origin: Origin) -> None:
        if len(path) > 1 and path[-1] == "kind" and isinstance(value, str):
            path, value = path[:-1], {"kind": value}  # another kind's fields must not stay
        node = self._walk(path, origin)
        if isinstance(node, list):
            node[self._index(node, path, origin)] = value
        else:
            node[path[-1]] = value
        self._settle(path, origin)

    def _remove(self, path: KeyPath, origin: Origin) -> None:
        node = self._walk(path, origin)
        if isinstance(node, list):
            del node[self._index(node, path, origin)]
        elif path[-1] not in node and self._field(path) is None:
            raise self._unknown(path, origin)
        else:
            node.pop(path[-1], None)
        self._settle(path, origin)

    def _settle(self, path: KeyPath, origin: Origin) -> None:
        """After a change at `path`: what lay below it is gone, and new nodes get their defaults."""
        self._origins = {at: known for at, known in self._origins.items() if at[: len(path)] != path}
        self._origins[path] = origin
        self._tree = complete(self._model, self._tree)

    def _walk(self, path: KeyPath, origin: Origin) -> dict[str, Any] | list[Any]:
        """The mapping or list that holds the last part of `path`."""
        node: Any = self._tree
        for depth, part in enumerate(path[:-1]):
            here = path[: depth + 1]
            if isinstance(node, list):
                node = node[self._index(node, here, origin)]
            elif part in node or self._field(here) is not None:
                if node.get(part) is None and model_at(self._model, self._tree, here) is not None:
                    node[part] = {}  # a part that is off by default, and is now described
                node = node.get(part)
            elif model_at(self._model, self._tree, here[:-1]) is None:
                node = node.setdefault(part, {})  # a mapping of free keys
            else:
                raise self._unknown(here, origin)
            if not isinstance(node, (dict, list)):
                self.build()  # an unknown kind, say, is the better message
                raise self._indivisible(node, here, origin)
        found: dict[str, Any] | list[Any] = node
        return found

    def _indivisible(self, node: object, path: KeyPath, origin: Origin) -> ConfigError:
        """The error for a path that goes on below a single value."""
        dotted = ".".join(path)
        field = self._field(path)
        if node is None and field is not None and slot_of(field.annotation, field.metadata) is not None:
            what = f"{origin.place}: {dotted} is not given, so nothing in it can be changed"
            return ConfigError(what, f"Choose its kind first: {dotted}=KIND")
        what = f"is {show(node)}" if node is not None else "has no value that could be changed in part"
        return ConfigError(f"{origin.place}: {dotted} {what}", "Set it whole")

    def _field(self, path: KeyPath) -> FieldInfo | None:
        node = model_at(self._model, self._tree, path[:-1])
        return node.model_fields.get(path[-1]) if node is not None else None

    def _index(self, node: list[Any], path: KeyPath, origin: Origin) -> int:
        part = path[-1]
        if not part.isascii() or not part.isdecimal() or int(part[:10]) >= len(node):
            numbers = f"0 to {len(node) - 1}" if node else "none, it is empty"
            raise ConfigError(f"{origin.place}: '{part}' is no item of {'.'.join(path[:-1])}", f"Items: {numbers}")
        return int(part)

    def _unknown(self, path: KeyPath, origin: Origin) -> ConfigError:
        if origin.flag is not None:
            return ConfigError(f"{origin.flag} does not apply to this command")
        text, hint = unknown_key(path[-1], path[:-1], self._model, self._tree)
        return ConfigError(f"{origin.place}: {text}", hint)

    def _check_kind(self) -> None:
        """The top-level `kind` names the command; another command's config is a likely slip, so it is named."""
        field = self._model.model_fields.get("kind")
        kind = self._tree.get("kind")
        if field is None or kind == field.default:
            return
        start = origin_of(("kind",), self._origins).at(())
        own = command_of(field.default)
        if isinstance(kind, str) and kind in registry.BUILTIN["commands"]:
            raise ConfigError(f"{start}: a config of `{command_of(kind)}`, not of `{own}`", f"Run `{command_of(kind)}`")
        raise ConfigError(f"{start}: kind {show(kind)} names no command", f"A config of `{own}` says {field.default}")

    def _restore_text(self, error: ValidationError) -> bool:
        """Where text is wanted and an override looked like JSON (`name=007`, `root=2024`), take it as it was typed."""
        restored = False
        for item in error.errors(include_url=False, include_context=False):
            path = tuple(str(part) for part in item["loc"])
            origin = self._origins.get(path)
            if item["type"] in ("string_type", "path_type") and origin is not None and origin.text is not None:
                node = self._walk(path, origin)
                restored |= _put_text(node, path[-1], origin.text)
        return restored


def _put_text(node: dict[str, Any] | list[Any], part: str, text: str) -> bool:
    key: Any = int(part) if isinstance(node, list) else part
    changed = not isinstance(node[key], str)
    node[key] = text
    return changed


def _read_value(raw: str) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return raw


def _flag_name(dotted: str) -> str:
    return "--" + dotted.rpartition(".")[2].replace("_", "-")


def _is_config(argument: str) -> bool:
    path = Path(argument)
    try:
        is_file = path.is_file()
    except OSError:  # a name too long to be one
        is_file = False
    if "=" in argument or argument.startswith("~"):
        return path.suffix in SUFFIXES and is_file
    return path.suffix in SUFFIXES or is_file


def _neither(argument: str) -> ConfigError:
    path = Path(argument)
    if path.is_dir():
        return ConfigError(f"'{argument}' is a folder; expected a YAML file or KEY=VALUE")
    folder = path.parent if path.parent.is_dir() else Path()
    files = {entry.stem: entry for entry in folder.iterdir() if entry.suffix in SUFFIXES}
    near = nearest(path.name, files)
    hint = f"Did you mean '{files[near]}'?" if near else "Write FILE.yaml, or a value as in sampler.steps=50"
    return ConfigError(f"'{argument}' is neither a YAML file nor KEY=VALUE", hint)
