"""A config for people and for editors: a commented YAML to begin with, and the JSON schema behind it."""

import json
from collections.abc import Iterator, Mapping
from textwrap import wrap
from typing import Any

from pydantic import BaseModel

from uldm_cli import registry
from uldm_cli.specs.base import Slot, slot_of, spec_class
from uldm_cli.specs.complete import complete, plain
from uldm_cli.specs.load import command_of
from uldm_cli.specs.yamlfile import to_yaml

WIDTH = 110


def schema_header(schema: str) -> str:
    """The line by which editors find the schema of a YAML file: a path relative to that file."""
    return f"# yaml-language-server: $schema={schema}"


def template(model: type[BaseModel], schema: str) -> str:
    """Every field of a command's config with its default, each under its description; `load_config` takes it as it is.

    What has no default, or one that follows from other fields, is commented out.
    """
    command = command_of(model.model_fields["kind"].default)
    about = " ".join((model.__doc__ or "").split())
    top = [schema_header(schema), f"# {about}", f"# `{command} FILE` runs it. What is left out keeps its default."]
    lines = list(_fields(model, complete(model, {}), ""))
    return "\n".join([*top, "", *lines]) + "\n"


def json_schema(model: type[BaseModel]) -> str:
    """The JSON schema of a config, with every built-in kind spelled out."""
    schema = model.model_json_schema()
    for part in schema.get("$defs", {}).values():
        part.pop("required", None)  # a part stands under a default, which has what the part leaves out
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2) + "\n"


def _fields(model: type[BaseModel], tree: Mapping[str, Any], indent: str) -> Iterator[str]:
    names = sorted(model.model_fields, key=lambda name: name != "kind")
    for index, name in enumerate(names):
        field = model.model_fields[name]
        slot = slot_of(field.annotation, field.metadata)
        if index and not indent:
            yield ""
        yield from _comment(_about(field.description, slot), indent)
        if name not in tree:
            yield f"{indent}# {name}: ..." + ("  (required)" if field.is_required() else "")
        elif isinstance(tree[name], Mapping) and (inner := _class(slot, tree[name])):
            yield f"{indent}{name}:"
            yield from _fields(inner, tree[name], indent + "  ")
        else:
            yield from (indent + line for line in to_yaml({name: plain(tree[name])}).splitlines())


def _about(description: str | None, slot: Slot | type[BaseModel] | None) -> str:
    if isinstance(slot, Slot):
        return f"{(description or '').rstrip('.')} (one of {', '.join(registry.BUILTIN[slot.group])}).".lstrip()
    if slot is not None and not description:
        return " ".join((slot.__doc__ or "").split())
    return description or ""


def _class(slot: Slot | type[BaseModel] | None, tree: Mapping[str, Any]) -> type[BaseModel] | None:
    return spec_class(slot.group, tree["kind"]) if isinstance(slot, Slot) else slot


def _comment(text: str, indent: str) -> list[str]:
    return wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ") if text else []
