"""Taking values out of a config of the reference one by one, so that nothing is passed over in silence."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uldm_cli.errors import ConfigError, nearest
from uldm_cli.formats.compvis.targets import TARGETS
from uldm_cli.specs.yamlfile import KeyPath

_REQUIRED: Any = object()


@dataclass(frozen=True)
class Source:
    """A YAML file that is being translated."""

    path: Path
    lines: Mapping[KeyPath, int]
    warnings: list[str] = field(default_factory=list)

    def place(self, at: KeyPath) -> str:
        """`file:line: dotted.path`, for the beginning of a message."""
        known = at
        while known and known not in self.lines:
            known = known[:-1]
        line = f":{self.lines[known]}" if known else ""
        return ": ".join(filter(None, (f"{self.path}{line}", ".".join(at))))


class Params:
    """A mapping of the file. Each value is taken by name; what nobody took is reported by `end`."""

    def __init__(self, source: Source, at: KeyPath, values: Any) -> None:
        if not isinstance(values, dict):
            raise ConfigError(f"{source.place(at)}: expected `key: value` lines, found {_shown(values)}")
        self.source, self.at = source, at
        self._values = values
        self._taken: set[str] = set()

    def error(self, name: str, message: str, hint: str | None = None) -> ConfigError:
        return ConfigError(f"{self.source.place((*self.at, name))}: {message}", hint)

    def raw(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value as it stands there."""
        self._taken.add(name)
        value = self._values.get(name, default)
        if value is _REQUIRED:
            near = nearest(name, self._values)
            raise self.error(name, "is missing", f"There is '{near}'" if near else None)
        return value

    def integer(self, name: str, default: int = _REQUIRED) -> int:
        value = self.raw(name, default)
        if type(value) is not int:
            raise self.error(name, f"expected a whole number, found {_shown(value)}")
        return value

    def size(self, name: str, default: int = _REQUIRED) -> int:
        """A whole number above 0."""
        value = self.integer(name, default)
        if value < 1:
            raise self.error(name, f"expected a whole number above 0, found {value}")
        return value

    def optional_size(self, name: str) -> int | None:
        return None if self.raw(name, None) is None else self.size(name)

    def sizes(self, name: str, default: Sequence[int] = _REQUIRED) -> list[int]:
        value = self.raw(name, default)
        if not isinstance(value, list | tuple) or not all(type(item) is int and item > 0 for item in value):
            raise self.error(name, f"expected a list of whole numbers above 0, found {_shown(value)}")
        return list(value)

    def number(self, name: str, default: float = _REQUIRED) -> float:
        value = self.raw(name, default)
        if type(value) not in (int, float):
            raise self.error(name, f"expected a number, found {_shown(value)}")
        return float(value)

    def flag(self, name: str, default: bool = _REQUIRED) -> bool:
        value = self.raw(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"expected true or false, found {_shown(value)}")
        return value

    def choice(self, name: str, options: Mapping[str, str], default: str = _REQUIRED) -> str:
        """What stands in `options` for the word that stands here."""
        value = self.raw(name, default)
        if not isinstance(value, str) or value not in options:
            raise self.error(name, f"{_shown(value)} is not supported", f"Known are: {', '.join(options)}")
        return options[value]

    def only(self, name: str, *supported: Any) -> None:
        """Accepts no other value than these; where there is none, the first holds."""
        value = self.raw(name, supported[0])
        if not any(value == option and isinstance(value, bool) == isinstance(option, bool) for option in supported):
            listing = " or ".join(map(_shown, supported))
            raise self.error(name, f"{_shown(value)} is not supported", f"It must be {listing}")

    def ignore(self, *names: str) -> None:
        """Takes note of what does not matter to a trained model."""
        self._taken.update(names)

    def part(self, name: str) -> "Params":
        """A mapping inside this one."""
        return Params(self.source, (*self.at, name), self.raw(name))

    def built(self, name: str, *wanted: str) -> tuple[str, str, "Params"]:
        """A part with `target` and `params`: the target, what it is (one of `wanted`), and its params."""
        return self.part(name).as_target(*wanted)

    def as_target(self, *wanted: str) -> tuple[str, str, "Params"]:
        """`built`, where this mapping is the one with `target` and `params`."""
        target = self.raw("target")
        what = TARGETS[target]
        if what not in wanted:
            fitting = ", ".join(name for name, is_ in TARGETS.items() if is_ in wanted)
            raise self.error("target", f"'{target}' cannot stand here", f"Expected one of: {fitting}")
        params = Params(self.source, (*self.at, "params"), self.raw("params", {}))
        self.end()
        return target, what, params

    def end(self) -> None:
        """Warns of each value that was not taken."""
        for name in self._values:
            if name not in self._taken:
                self.source.warnings.append(f"{self.source.place((*self.at, name))}: unknown, ignored")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
