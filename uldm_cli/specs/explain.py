"""From what Pydantic found wrong to one line that a person can act on."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from uldm_cli.errors import ConfigError, nearest
from uldm_cli.specs.complete import model_at

KeyPath = tuple[str, ...]
_CONSEQUENCE = "default_factory_not_called"  # a default that follows from a field that is itself wrong
NAMED = 3
"""So many of the problems that are not explained are named."""


@dataclass(frozen=True)
class Origin:
    """Where a value came from: a line of a YAML file, `steps=9` or `--steps 9` on the command line, a saved config."""

    place: str
    names: KeyPath | None = None  # the path that `place` itself spells out
    flag: str | None = None
    text: str | None = None  # what was typed, where the value is a reading of it

    def at(self, path: KeyPath) -> str:
        """The beginning of the line for an error at `path`."""
        dotted = ".".join(path)
        return ": ".join(part for part in (self.place, "" if path == self.names else dotted) if part)


@dataclass(frozen=True)
class _Problem:
    path: KeyPath
    text: str
    hint: str | None
    unknown: bool = False  # a key that does not exist
    missing: bool = False

    @property
    def rank(self) -> int:
        """A misspelt key is more telling than the missing one that it causes."""
        return 0 if self.unknown else 2 if self.missing else 1


def explain(
    error: ValidationError, model: type[BaseModel], tree: Mapping[str, Any], origins: Mapping[KeyPath, Origin]
) -> ConfigError:
    """The most telling problem with its place, value and remedy, and how many more there are."""
    items = [item for item in error.errors(include_url=False) if item["type"] != _CONSEQUENCE]
    problems = _distinct([_problem(item, model, tree) for item in items])
    first, *others = sorted(problems, key=lambda problem: problem.rank)
    if first.path[-1:] == ("kind",) and first.path not in origins and first.path[:-1] in origins:
        first = replace(first, path=first.path[:-1])  # given in short: `sampler=heun`
    origin = origin_of(first.path, origins)
    more = f" (and {len(others)} more: {_named(others)})" if others else ""
    if first.unknown and origin.flag is not None and origin.names == first.path:
        return ConfigError(f"{origin.flag} does not apply to {_owner(first.path, model, tree)}{more}")
    start = origin.at(first.path)
    shown = "" if origin.names == first.path else _value_at(tree, first)
    return ConfigError(f"{start}: {first.text}{shown}{more}" if start else f"{first.text}{shown}{more}", first.hint)


def _named(problems: Sequence[_Problem]) -> str:
    """Where they are; of many the first ones."""
    names = [".".join(problem.path) for problem in problems[:NAMED]]
    return ", ".join(names) + (", ..." if len(problems) > NAMED else "")


def origin_of(path: KeyPath, origins: Mapping[KeyPath, Origin]) -> Origin:
    """The origin of the nearest node at or above `path`."""
    for length in range(len(path), -1, -1):
        if path[:length] in origins:
            return origins[path[:length]]
    return Origin("")


def unknown_key(key: str, path: KeyPath, model: type[BaseModel], tree: Mapping[str, Any]) -> tuple[str, str | None]:
    """What to say of a key that the node at `path` does not have, and the hint."""
    node = model_at(model, tree, path)
    options = list(node.model_fields) if node is not None else []
    near = nearest(key, options)
    if near:
        return f"unknown key '{key}'", f"Did you mean '{near}'?"
    listing = ", ".join(option for option in options if option != "kind")
    return f"unknown key '{key}'", f"There are: {listing}" if listing else None


def show(value: object) -> str:
    """A value in a message, as YAML would have it, shortened."""
    names = {True: "true", False: "false", None: "null"}
    if value is None or isinstance(value, bool):
        return names[value]
    try:
        text = repr(str(value) if isinstance(value, Path) else value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; a structure of thousands of levels
        return "(too large to show)"
    return text if len(text) <= 60 else text[:57] + "..."


def _problem(item: Any, model: type[BaseModel], tree: Mapping[str, Any]) -> _Problem:
    path = _clean(item["loc"], tree, missing=item["type"] == "missing")
    context = item.get("ctx", {})
    match item["type"]:
        case "uldm":
            below = tuple(part for part in context["path"].split(".") if part)
            return _Problem(path + below, context["message"], context["hint"])
        case "extra_forbidden":
            text, hint = unknown_key(path[-1] if path else "", path[:-1], model, tree)
            return _Problem(path, text, hint, unknown=True)
        case "missing":
            return _Problem(path, "missing", _missing_hint(path, model, tree), missing=True)
        case "value_error" | "assertion_error":
            return _Problem(path, str(context["error"]), None)
        case "string_pattern_mismatch":
            return _Problem(path, f"expected {_description(path, model, tree) or context['pattern']}", None)
        case "literal_error" | "enum":
            options = re.findall(r"'([^']*)'", context["expected"])
            near = nearest(item["input"], options) if isinstance(item["input"], str) else None
            return _Problem(path, f"expected {context['expected']}", f"Did you mean '{near}'?" if near else None)
    if item["type"] in _EXPECTED:
        hint = "Put it in quotes" if item["type"] == "string_type" else None
        return _Problem(path, f"expected {_EXPECTED[item['type']](context)}", hint)
    return _Problem(path, item["msg"].replace("Input should be", "expected").replace("Value error, ", ""), None)


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


_Words = Callable[[Mapping[str, Any]], str]
_EXPECTED: dict[str, _Words] = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), lambda _: "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), lambda _: "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), lambda _: "true or false"),
    **dict.fromkeys(("list_type", "tuple_type", "set_type", "frozen_set_type"), lambda _: "a list"),
    **dict.fromkeys(("dict_type", "mapping_type", "model_type", "model_attributes_type"), lambda _: "a mapping"),
    "finite_number": lambda _: "a finite number",
    "string_type": lambda _: "text",
    "path_type": lambda _: "a path",
    "none_required": lambda _: "null",
    "greater_than": lambda c: f"a number greater than {_number(c['gt'])}",
    "greater_than_equal": lambda c: f"a number of at least {_number(c['ge'])}",
    "less_than": lambda c: f"a number less than {_number(c['lt'])}",
    "less_than_equal": lambda c: f"a number of at most {_number(c['le'])}",
    "multiple_of": lambda c: f"a multiple of {_number(c['multiple_of'])}",
    "too_short": lambda c: f"at least {_plural(c['min_length'], 'item')}",
    "too_long": lambda c: f"at most {_plural(c['max_length'], 'item')}",
    "string_too_short": lambda c: f"at least {_plural(c['min_length'], 'character')}",
    "string_too_long": lambda c: f"at most {_plural(c['max_length'], 'character')}",
}


def _clean(location: tuple[int | str, ...], tree: object, missing: bool) -> KeyPath:
    """Pydantic's location without what names no key: the members of a union, the steps of a validator."""
    path: list[str] = []
    for index, part in enumerate(location):
        last = index == len(location) - 1
        if isinstance(tree, Mapping) and (part in tree or (last and isinstance(part, str))):
            tree = tree.get(part)
        elif isinstance(tree, list) and isinstance(part, int) and (part < len(tree) or (last and missing)):
            tree = tree[part] if part < len(tree) else None
        else:
            continue
        path.append(str(part))
    return tuple(path)


def _distinct(problems: list[_Problem]) -> list[_Problem]:
    """One problem a path: what the members of a union each expected becomes "a number or text"."""
    by_path: dict[KeyPath, _Problem] = {}
    for problem in problems:
        known = by_path.get(problem.path)
        if known is None:
            by_path[problem.path] = problem
        elif known.text != problem.text and all(p.text.startswith("expected ") for p in (known, problem)):
            either = f"{known.text} or {problem.text.removeprefix('expected ')}"
            by_path[problem.path] = _Problem(known.path, either, known.hint or problem.hint)
    return list(by_path.values())


def _value_at(tree: Any, problem: _Problem) -> str:
    """The value to show: in brackets after an unknown key, after "got" where something else was expected."""
    for part in problem.path:
        if isinstance(tree, Mapping) and part in tree:
            tree = tree[part]
        elif isinstance(tree, list) and part.isdecimal() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            return ""
    if problem.unknown:
        return f" (value {show(tree)})"
    if problem.text.startswith("expected ") and ", got " not in problem.text:
        return f", got {show(tree)}"
    return ""


def _missing_hint(path: KeyPath, model: type[BaseModel], tree: Mapping[str, Any]) -> str:
    dotted = ".".join(path)
    what = _description(path, model, tree)
    return f"Add {dotted}=VALUE: {what}" if what else f"Add it, as {dotted}=VALUE on the command line"


def _description(path: KeyPath, model: type[BaseModel], tree: Mapping[str, Any]) -> str | None:
    node = model_at(model, tree, path[:-1]) if path else None
    field = node.model_fields.get(path[-1]) if node is not None else None
    text = field.description if field is not None else None
    return text.rstrip(".") if text else None


def _owner(path: KeyPath, model: type[BaseModel], tree: Mapping[str, Any]) -> str:
    """For a flag that sets `sampler.eta`: "sampler 'ddpm'"."""
    node: Any = tree
    for part in path[:-1]:
        node = node.get(part) if isinstance(node, Mapping) else None
    kind = node.get("kind") if isinstance(node, Mapping) else None
    return f"{path[-2]} '{kind}'" if len(path) > 1 and kind else "this command"
