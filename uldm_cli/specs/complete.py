"""Plain values and models: what a config's tree of mappings holds once every default is written out.

Overrides and flags address a field wherever its node came from, so the tree is completed before they are applied.
"""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import PurePath
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from uldm_cli.errors import ConfigError
from uldm_cli.specs.base import Slot, slot_of, spec_class

Tree = dict[str, Any]


def complete(model: type[BaseModel], given: Mapping[str, Any], below: Mapping[str, Any] | None = None) -> Tree:
    """`given` over `below` over the model's defaults, as plain values; wrong ones are left for validation to refuse.

    A node of a slot that says its `kind` stands alone; one that does not changes fields of the node below it.
    Defaults that depend on other fields stay out: they follow when the model is built.
    """
    below = below or {}
    tree = {key: deepcopy(value) for key, value in below.items() if key not in model.model_fields}
    for name, field in model.model_fields.items():
        under = below[name] if name in below else _default(field)
        if name in given:
            tree[name] = _node(field.annotation, field.metadata, given[name], under)
        elif under is not PydanticUndefined:
            tree[name] = _node(field.annotation, field.metadata, deepcopy(under), None)
    return tree | {key: value for key, value in given.items() if key not in tree}


def plain(value: object) -> Any:
    """Models, mappings, tuples and paths as the dicts, lists and text of a tree; `kind` comes first."""
    if isinstance(value, BaseModel):
        return plain(value.model_dump(mode="json"))
    if isinstance(value, Mapping):
        items = {str(key): plain(item) for key, item in value.items()}
        return {"kind": items.pop("kind"), **items} if "kind" in items else items
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    return value


def model_at(model: type[BaseModel], tree: object, path: tuple[str, ...]) -> type[BaseModel] | None:
    """The class that describes the node at `path` of a completed tree; None where the node is no model."""
    annotation: Any = model
    metadata: tuple[Any, ...] = ()
    current: type[BaseModel] | None = model
    for part in path:
        tree = _child(tree, part)
        if current is not None:
            field = current.model_fields.get(part)
            if field is None:
                return None
            annotation, metadata = field.annotation, tuple(field.metadata)
        else:
            annotation, metadata = _item_of(annotation), ()
        current = _class_of(slot_of(annotation, metadata), tree)
    return current


def _default(field: FieldInfo) -> Any:
    if field.default_factory is not None and field.default_factory_takes_validated_data:
        return PydanticUndefined
    default = field.get_default(call_default_factory=True)
    return default if default is PydanticUndefined else plain(default)


def _node(annotation: Any, metadata: list[Any], value: Any, below: Any) -> Any:
    slot = slot_of(annotation, metadata)
    if slot is None:
        item = _item_of(annotation)
        if slot_of(item) is not None and isinstance(value, (list, tuple)):
            return [_node(item, [], part, None) for part in value]
        return plain(value)
    if isinstance(value, BaseModel):
        value = plain(value)
    under = below if isinstance(below, Mapping) else {}
    if isinstance(slot, Slot):
        if isinstance(value, str):
            value = {"kind": value}
        if isinstance(value, Mapping) and "kind" in value:
            under = {}
        elif isinstance(value, Mapping) and "kind" in under:
            value = {"kind": under["kind"], **value}
    model = _class_of(slot, value)
    return complete(model, value, under) if model is not None and isinstance(value, Mapping) else value


def _class_of(slot: Slot | type[BaseModel] | None, value: object) -> type[BaseModel] | None:
    if not isinstance(slot, Slot):
        return slot
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if not isinstance(kind, str):
        return None
    try:
        return spec_class(slot.group, kind)
    except ConfigError:  # an unknown kind; validation names it and the nearest
        return None


def _item_of(annotation: Any) -> Any:
    """What a list or tuple of one type holds; None for all else."""
    args = [arg for arg in get_args(annotation) if arg is not Ellipsis]
    return args[0] if get_origin(annotation) in (list, tuple) and len(args) == 1 else None


def _child(tree: object, part: str) -> object:
    if isinstance(tree, Mapping):
        return tree.get(part)
    if isinstance(tree, list) and part.isdecimal() and int(part) < len(tree):
        return tree[int(part)]
    return None
