from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from uldm_cli import registry
from uldm_cli.errors import PluginError
from uldm_cli.specs.base import Slot, Spec, slot_of, spec_class
from uldm_cli.specs.load import dump_yaml, load_config
from uldm_cli.testing import check_spec


class Plain(Spec):
    """A leaf."""

    kind: Literal["plain"] = "plain"
    rate: float = Field(0.5, description="A number.")
    name: str = Field("x", description="A text.")
    widths: tuple[int, ...] = Field((1, 2), description="A list.")

    def build(self) -> str:
        return self.name


class Wrap(Spec):
    """A kind that holds another of its own group."""

    kind: Literal["wrap"] = "wrap"
    inner: Annotated[Spec, Slot("samplers")] = Field(Plain(rate=0.25), description="What is wrapped.")

    def build(self) -> list[str]:
        return [self.inner.build()]


class Misnamed(Spec):
    """Its kind is not what it is registered as."""

    kind: Literal["other"] = "other"


class Top(Spec):
    """A command's config."""

    kind: Literal["top"] = "top"
    sampler: Annotated[Spec, Slot("samplers")] = Plain()
    maybe: Annotated[Spec, Slot("samplers")] | None = None
    many: tuple[Annotated[Spec, Slot("samplers")], ...] = ()


@pytest.fixture(autouse=True)
def _kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"plain": f"{__name__}:Plain", "wrap": f"{__name__}:Wrap"}
    wrong = {"misnamed": f"{__name__}:Misnamed", "function": f"{__name__}:_kinds", "path": "pathlib:Path"}
    monkeypatch.setitem(registry.BUILTIN, "samplers", table)
    monkeypatch.setitem(registry.BUILTIN, "metrics", wrong)


@pytest.mark.parametrize("value", ["plain", {"kind": "plain"}, Plain()])
def test_slot_takes_a_kind_a_mapping_or_a_spec(value: Any) -> None:
    assert Top(sampler=value).sampler == Plain()


def test_slots_nest_and_repeat() -> None:
    top = Top.model_validate(
        {"sampler": {"kind": "wrap", "inner": {"kind": "wrap"}}, "many": ["plain", {"kind": "wrap"}]}
    )
    assert top.sampler == Wrap(inner=Wrap())
    assert top.many == (Plain(), Wrap())
    assert top.maybe is None


def test_slot_imports_only_what_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BUILTIN["samplers"], "dear", "no.such.module:Dear")
    assert Top(sampler="plain").sampler == Plain()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "location", "message"),
    [
        ("plian", ("sampler",), "unknown sampler 'plian'"),
        ({"kind": "plian"}, ("sampler",), "unknown sampler 'plian'"),
        ({"rate": 1}, ("sampler",), "expected a `kind` that names the sampler"),
        ({"kind": 3}, ("sampler",), "expected a `kind` that names the sampler"),
        (7, ("sampler",), "expected a sampler: the name of a kind, or a mapping with `kind`"),
        (None, ("sampler",), "expected a sampler: the name of a kind, or a mapping with `kind`"),
        ({"kind": "plain", "rat": 1}, ("sampler", "rat"), "Extra inputs are not permitted"),
        ({"kind": "wrap", "inner": {"kind": "plain", "widths": [1, "a"]}}, ("sampler", "inner", "widths", 1), None),
    ],
)
def test_wrong_values_are_located(value: Any, location: tuple[str | int, ...], message: str | None) -> None:
    with pytest.raises(ValidationError) as caught:
        Top(sampler=value)
    [error] = caught.value.errors()
    assert error["loc"] == location
    assert message is None or error["msg"] == message


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("misnamed", "metric 'misnamed' of uldm calls itself 'other'. Its `kind` must be the name of its entry point"),
        ("path", "metric 'path' of uldm is not a Spec subclass but <class 'pathlib.Path'>"),
        ("function", "metric 'function' of uldm is not a Spec subclass but"),
    ],
)
def test_what_is_registered_must_be_the_spec_it_claims(kind: str, message: str) -> None:
    with pytest.raises(PluginError) as caught:
        spec_class("metrics", kind)
    assert str(caught.value).startswith(message)


def test_specs_are_frozen_and_hashable() -> None:
    spec = Wrap()
    with pytest.raises(ValidationError):
        spec.inner = Plain()
    assert hash(spec) == hash(Wrap())


def test_dump_names_every_kind() -> None:
    dumped = Top(sampler=Wrap()).model_dump(mode="json")
    assert dumped["sampler"] == {
        "kind": "wrap",
        "inner": {"kind": "plain", "rate": 0.25, "name": "x", "widths": [1, 2]},
    }
    assert Top.model_validate(dumped) == Top(sampler=Wrap())


plains = st.builds(
    Plain,
    rate=st.floats(allow_nan=False),
    name=st.text(),
    widths=st.lists(st.integers(-(2**70), 2**70)).map(tuple),
)
specs = st.recursive(plains, lambda inner: st.builds(Wrap, inner=inner), max_leaves=4)
tops = st.builds(Top, sampler=specs, maybe=st.none() | specs, many=st.lists(specs, max_size=3).map(tuple))


@given(tops)
def test_dump_and_load_are_inverse(tmp_path_factory: pytest.TempPathFactory, top: Top) -> None:
    assert Top.model_validate(top.model_dump(mode="json")) == top
    assert Top.model_validate_json(top.model_dump_json()) == top
    path: Path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_yaml(top), encoding="utf-8", newline="")
    assert load_config(Top, path) == top


def test_schema_offers_each_kind_by_name_and_in_full() -> None:
    schema = Top.model_json_schema()
    [names, plain, wrap] = schema["properties"]["sampler"]["anyOf"]
    assert names == {"enum": ["plain", "wrap"], "type": "string"}
    assert plain["properties"]["kind"]["const"] == "plain"
    assert plain["additionalProperties"] is False
    inner = wrap["properties"]["inner"]["anyOf"]
    assert inner[1]["required"] == ["kind"]  # a kind in a kind of the same group ends there


@pytest.mark.parametrize(
    ("field", "expected"),
    [("sampler", Slot("samplers")), ("maybe", Slot("samplers")), ("many", None), ("kind", None)],
)
def test_slot_of_a_field(field: str, expected: Slot | None) -> None:
    info = Top.model_fields[field]
    assert slot_of(info.annotation, info.metadata) == expected


def test_check_spec_returns_what_is_built() -> None:
    assert check_spec(Plain(name="me")) == "me"
    assert check_spec(Wrap()) == ["x"]


def test_check_spec_names_what_is_wrong() -> None:
    class Silent(Plain):
        """Has a field that says nothing."""

        more: int = 1

    class Loose(Spec):
        """Says no kind."""

        kind: str = "loose"

    class Forgetful(Plain):
        """Builds nothing."""

        def build(self) -> None:  # type: ignore[override]
            pass

    with pytest.raises(AssertionError, match="Silent has fields without a description: more"):
        check_spec(Silent())
    with pytest.raises(AssertionError, match=r"Loose\.kind is not declared as"):
        check_spec(Loose())
    with pytest.raises(AssertionError, match=r"Forgetful\.build\(\) returned nothing"):
        check_spec(Forgetful())
    with pytest.raises(AssertionError, match=r"Misnamed has no build\(\)"):
        check_spec(Misnamed())
