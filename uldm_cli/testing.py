"""What the author of a plugin calls in a test.

def test_euler():
    sampler = check_spec(Euler(steps=3))
"""

from typing import Any, Literal, get_args, get_origin

from uldm_cli.specs.base import Spec
from uldm_cli.specs.complete import plain
from uldm_cli.specs.yamlfile import parse_yaml, to_yaml


def check_spec(spec: Spec, *arguments: object) -> Any:
    """Check a spec against what `uldm` relies on, and return what `spec.build(*arguments)` gives.

    It names its kind, describes itself and its fields, refuses unknown keys, cannot be changed, survives being written
    to YAML and read again, has a JSON schema, and builds. Raises AssertionError that says which of these does not hold.
    """
    cls = type(spec)
    _check_kind(cls)
    assert cls.__doc__, f"{cls.__name__} has no docstring, which is what its users read first"
    undescribed = [name for name, field in cls.model_fields.items() if name != "kind" and not field.description]
    assert not undescribed, f"{cls.__name__} has fields without a description: {', '.join(undescribed)}"
    assert cls.model_config.get("frozen"), f"{cls.__name__} is not frozen"
    assert cls.model_config.get("extra") == "forbid", f"{cls.__name__} accepts unknown keys"
    _check_round_trip(spec)
    schema = cls.model_json_schema()
    assert schema.get("properties"), f"{cls.__name__} has an empty JSON schema"
    assert callable(getattr(spec, "build", None)), f"{cls.__name__} has no build()"
    built = spec.build(*arguments)
    assert built is not None, f"{cls.__name__}.build() returned nothing"
    return built


def _check_kind(cls: type[Spec]) -> None:
    field = cls.model_fields.get("kind")
    assert field is not None, f"{cls.__name__} has no `kind`"
    literal = get_origin(field.annotation) is Literal and get_args(field.annotation) == (field.default,)
    assert literal, f'{cls.__name__}.kind is not declared as `kind: Literal["name"] = "name"`'


def _check_round_trip(spec: Spec) -> None:
    name = type(spec).__name__
    data = plain(spec)
    again = type(spec).model_validate(data)
    assert again == spec, f"{name} is another one after being dumped and loaded: {again!r} from {spec!r}"
    text = to_yaml(data)
    assert parse_yaml(text) == data, f"{name} does not survive YAML: {text!r}"
