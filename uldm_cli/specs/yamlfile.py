"""YAML in and out: a reader for text that strangers wrote, which remembers lines, and a writer that it reads back.

The reader builds plain values only (mappings, lists, text, numbers, true, false, null). Scalars follow the core schema
of YAML 1.2, so `3e-4` is a number and `no`, `1:30` and `2024-01-01` are text, unlike in PyYAML's default.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from uldm_cli.errors import ConfigError, nearest_file

MAX_BYTES = 1_000_000
MAX_VALUES = 50_000  # counted after aliases are expanded: ten lines of YAML can stand for billions of values

KeyPath = tuple[str, ...]
_TAG = "tag:yaml.org,2002:"

_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)


def read_yaml(path: Path, *, targets: bool = False) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """The mapping in a YAML file, and the line (from 1) of each key and list item by its path.

    `targets` lets `target: a.b.C` through, for a reader that looks such names up in a table of its own.
    Raises ConfigError, in one line with file and line, for whatever is not one UTF-8 document that holds a mapping.
    """
    return _Reader(path, targets).read(_read_text(path))


def parse_yaml(text: str) -> dict[str, Any]:
    """`read_yaml` for text that is in memory."""
    return _Reader(Path("<text>")).read(text)[0]


def to_yaml(data: Mapping[str, Any]) -> str:
    """Plain values as YAML that `read_yaml` reads back; lists of scalars on one line."""
    text = yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return str(text)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # PyYAML's own way to hold them


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        scalars = not any(isinstance(item, (list, tuple, Mapping)) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=scalars)

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Text with Unicode's own line breaks in double quotes: PyYAML would otherwise write them as they are."""
        style = '"' if any(character in data for character in "\x85\u2028\u2029") else None
        return self.represent_scalar(f"{_TAG}str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)
for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_TAG}{_name}", re.compile(rf"^(?:{_pattern})$"), _first)


def _read_text(path: Path) -> str:
    raw = _read_bytes(path)
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES // 1_000_000} MB, which no config is")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text (byte 0x{raw[error.start]:02x})") from error
    for number, line_text in enumerate(text.splitlines(), start=1):
        indent = line_text[: len(line_text) - len(line_text.lstrip(" \t"))]
        if "\t" in indent:
            raise ConfigError(f"{path}:{number}: indented with a tab", "YAML wants spaces")
    return text


def _read_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise _missing(path) from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: a folder, expected a YAML file") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{path}: cannot be read: {reason}") from error


def _missing(path: Path) -> ConfigError:
    if not path.parent.is_dir():
        return ConfigError(f"{path}: no such file; there is no folder {path.parent}")
    near = nearest_file(path)
    return ConfigError(f"{path}: no such file", f"Did you mean '{near}'?" if near else None)


class _Reader:
    """Turns one document's nodes into values. It knows the file, for the messages."""

    def __init__(self, path: Path, targets: bool = False) -> None:
        self._path = path
        self._targets = targets
        self._lines: dict[KeyPath, int] = {}
        self._open: set[int] = set()  # the nodes being read, to notice one that holds itself
        self._count = 0

    def read(self, text: str) -> tuple[dict[str, Any], dict[KeyPath, int]]:
        try:
            node = yaml.compose(text, Loader=_Loader)
            if node is None or (isinstance(node, yaml.ScalarNode) and node.tag == f"{_TAG}null"):
                raise ConfigError(f"{self._path}: holds nothing", "`uldm config new` prints a complete config")
            if not isinstance(node, yaml.MappingNode):
                found = "a list" if isinstance(node, yaml.SequenceNode) else "text"
                raise self._error(node, f"expected `key: value` lines, found {found}")
            return self._mapping(node, ()), self._lines
        except yaml.YAMLError as error:
            raise self._syntax(error, text) from error
        except RecursionError as error:
            raise ConfigError(f"{self._path}: nested too deeply") from error

    def _value(self, node: yaml.Node, at: KeyPath) -> Any:
        self._count += 1
        if self._count > MAX_VALUES:
            raise self._error(node, f"more than {MAX_VALUES} values, counting what aliases (*) stand for")
        if id(node) in self._open:
            raise self._error(node, "an alias (*) that stands for a value which holds it")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        self._open.add(id(node))
        value = self._mapping(node, at) if isinstance(node, yaml.MappingNode) else self._list(node, at)
        self._open.discard(id(node))
        return value

    def _list(self, node: yaml.Node, at: KeyPath) -> list[Any]:
        if node.tag != f"{_TAG}seq":
            raise self._error(node, f"the tag {_short(node.tag)} is not allowed")
        return [self._item(child, (*at, str(index))) for index, child in enumerate(node.value)]

    def _item(self, node: yaml.Node, at: KeyPath) -> Any:
        self._lines[at] = node.start_mark.line + 1
        return self._value(node, at)

    def _mapping(self, node: yaml.MappingNode, at: KeyPath) -> dict[str, Any]:
        if node.tag != f"{_TAG}map":
            raise self._error(node, f"the tag {_short(node.tag)} is not allowed")
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key, child in sorted(node.value, key=lambda pair: pair[0].tag != f"{_TAG}merge"):  # merged keys come first
            if key.tag == f"{_TAG}merge":
                merged = self._merge(child, at) | merged
                continue
            name = self._key(key, own, at)
            self._lines[(*at, name)] = key.start_mark.line + 1
            own[name] = self._value(child, (*at, name))
            if not self._targets:
                self._refuse_code(key, name, own[name])
        return merged | own

    def _key(self, key: yaml.Node, taken: Mapping[str, Any], at: KeyPath) -> str:
        if not isinstance(key, yaml.ScalarNode):
            raise self._error(key, "a list or mapping as a key; expected text")
        name = str(key.value)
        if name in taken:
            first = self._lines[(*at, name)]
            raise self._error(key, f"the key '{_short(name)}' stands twice (first in line {first})")
        return name

    def _merge(self, node: yaml.Node, at: KeyPath) -> dict[str, Any]:
        """What `<<: *alias` brings in; of several, the first that has a key decides."""
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, Any] = {}
        for child in nodes:
            value = self._value(child, at)
            if not isinstance(value, dict):
                raise self._error(child, "`<<` takes an alias (*) of a mapping")
            merged = value | merged
        return merged

    def _refuse_code(self, key: yaml.Node, name: str, value: Any) -> None:
        if name in ("target", "_target_") and isinstance(value, str) and re.fullmatch(r"\w+(\.\w+)+", value):
            raise self._error(
                key,
                f"`{name}: {_short(value)}` names Python code, which a config cannot",
                "Write `kind: NAME`; `uldm plugins list` shows the kinds",
            )

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        text = str(node.value)
        try:
            match node.tag.removeprefix(_TAG):
                case "str":
                    return text
                case "null":
                    return None
                case "bool":
                    return text.lower() == "true"
                case "int":
                    return int(text, 0 if text[:2] in ("0x", "0o") else 10)
                case "float":
                    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError as error:
            raise self._error(node, f"'{_short(text)}' is not {_short(node.tag)}") from error
        raise self._error(node, f"the tag {_short(node.tag)} is not allowed", "Write plain values")

    def _error(self, node: yaml.Node, message: str, hint: str | None = None) -> ConfigError:
        return ConfigError(f"{self._path}:{node.start_mark.line + 1}: {message}", hint)

    def _syntax(self, error: yaml.YAMLError, text: str) -> ConfigError:
        """PyYAML's several lines in one, and in this project's words where they are about more than a typing error."""
        if isinstance(error, yaml.reader.ReaderError):
            line = text.count("\n", 0, error.position) + 1
            return ConfigError(f"{self._path}:{line}: the character {error.character!r} is not allowed in YAML")
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        where = f"{self._path}:{mark.line + 1}" if mark else str(self._path)
        what = getattr(error, "problem", None) or "not YAML"
        if getattr(error, "context", None) == "expected a single document in the stream":
            return ConfigError(f"{where}: a second document (---); expected one")
        if "mapping values are not allowed" in what:
            what = "a `:` where no key can stand; is the indentation right, or does a text need quotes?"
        return ConfigError(f"{where}: not YAML: {what}")


def _short(text: str) -> str:
    text = text.replace(_TAG, "!!")
    return text if len(text) <= 60 else text[:57] + "..."
