"""The JSON files of a diffusers folder, field by field: what is wrong or cannot be held is an error that names it."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uldm_cli.errors import ConfigError

LARGEST_JSON = 100_000_000
"""Bytes; the index of a thousand shards is far smaller."""


def unheld(what: str) -> ConfigError:
    """The error for a model of ours that diffusers has no place for."""
    return ConfigError(what, "uldm's own format holds it, and so does that of the published code")


class Fields:
    """The fields of one JSON file. Each is asked for once, with the default that diffusers gives it."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values
        self._asked: set[str] = set()

    @classmethod
    def read(cls, path: Path) -> "Fields":
        """Reads a JSON object.

        Raises:
            ConfigError: there is no such file, or it holds something else.
        """
        try:
            with path.open("rb") as file:
                text = file.read(LARGEST_JSON + 1)
            values = json.loads(text) if len(text) <= LARGEST_JSON else None
        except FileNotFoundError:
            raise ConfigError(f"there is no {path}", "A diffusers folder has one: fetch it again") from None
        except OSError as e:
            raise ConfigError(f"{path} cannot be read: {e.strerror}", "Check the path and its permissions") from e
        except (ValueError, RecursionError):
            raise ConfigError(f"{path} is not JSON", "Fetch it again") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path} does not hold a JSON object", "Fetch it again")
        return cls(path, values)

    def get(self, name: str, default: Any = None) -> Any:
        self._asked.add(name)
        return self.values.get(name, default)

    def wrong(self, name: str, supported: str) -> ConfigError:
        """The error for a field's value that cannot be held."""
        value = json.dumps(self.values[name]) if name in self.values else "missing"
        return ConfigError(f"{self.path}: {name} is {value:.100}", f"Supported: {supported}")

    def fixed(self, table: Mapping[str, Sequence[Any]]) -> None:
        """Checks fields that can have one meaning only; the first value of each is diffusers' default."""
        for name, allowed in table.items():
            value = self.get(name, allowed[0])
            if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
                raise self.wrong(name, " or ".join(json.dumps(one) for one in allowed))

    def choice(self, name: str, options: Sequence[str | None]) -> Any:
        """One of several texts; the first is the default."""
        value = self.get(name, options[0])
        if value not in options:
            raise self.wrong(name, ", ".join(json.dumps(one) for one in options))
        return value

    def integer(self, name: str, default: int | None, most: int = 2**31 - 1) -> int:
        value = self.get(name, default)
        if not _is_integer(value, most):
            raise self.wrong(name, f"a whole number from 1 to {most}")
        return int(value)

    def integers(self, name: str, default: Sequence[int]) -> tuple[int, ...]:
        value = self.get(name, default)
        if not isinstance(value, list | tuple) or not value or not all(_is_integer(one) for one in value):
            raise self.wrong(name, "a list of whole numbers")
        return tuple(value)

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(name, "a number")
        return float(value)

    def side(self, name: str, default: int | None) -> int:
        """The side of a square, given as a number or as two equal ones."""
        value = self.get(name, default)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if not _is_integer(value):
            raise self.wrong(name, "the side of a square, a whole number")
        return int(value)

    def unknown(self) -> tuple[str, ...]:
        """Fields that nothing asked for and that say something."""
        return tuple(
            name
            for name, value in self.values.items()
            if name not in self._asked and not name.startswith("_") and value is not None and value is not False
        )


def _is_integer(value: object, most: int = 2**31 - 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
