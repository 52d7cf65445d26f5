"""What can be configured: `Spec`, a small frozen model with a `kind`, and `Slot`, a field for any kind of a group.

    class DDIM(Spec):
        kind: Literal["ddim"] = "ddim"
        steps: int = Field(200, gt=0, description="denoising steps")

        def build(self) -> Sampler: ...       # imports torch here, not at the top of the file

    class Sampling(Spec):
        kind: Literal["ldm-sample"] = "ldm-sample"
        sampler: Annotated[Spec, Slot("samplers")] = DDIM()

A slot takes a spec, the name of a kind (`"ddim"`), or a mapping with `kind`; it imports that one kind and no other.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError, core_schema

from uldm_cli import registry
from uldm_cli.errors import ConfigError, PluginError

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
    from pydantic.json_schema import JsonSchemaValue

DEVICE = r"^(auto|cpu|mps|cuda(:\d+)?)$"
"""What a field that names a device takes."""

_groups_in_schema: ContextVar[tuple[str, ...]] = ContextVar("groups_in_schema", default=())


class Spec(BaseModel):
    """The description of one part: frozen, every field known, no heavy import until `build()`.

    A subclass declares `kind: Literal["name"] = "name"`, describes its fields and defines `build()`. The config of a
    command is a Spec too; its kind names the command and it has nothing to build.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=(), ser_json_inf_nan="constants"
    )

    if TYPE_CHECKING:
        # Each kind has its own arguments, so there is no common signature, and nothing to inherit at run time.
        def build(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class Slot:
    """Marks a field that holds any Spec of a registry group: `Annotated[Spec, Slot("samplers")]`."""

    group: str

    def __get_pydantic_core_schema__(self, source: Any, handler: "GetCoreSchemaHandler") -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._validate)

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: "GetJsonSchemaHandler"
    ) -> "JsonSchemaValue":
        """Any built-in kind, by name or in full; inside a slot of the same group only its name is spelled out."""
        names = list(registry.BUILTIN[self.group])
        short = {"enum": names, "type": "string"}
        above = _groups_in_schema.get()
        if self.group in above:
            return {"anyOf": [short, {"type": "object", "properties": {"kind": short}, "required": ["kind"]}]}
        token = _groups_in_schema.set((*above, self.group))
        try:
            full = [handler(spec_class(self.group, name).__pydantic_core_schema__) for name in names]
        finally:
            _groups_in_schema.reset(token)
        return {"anyOf": [short, *full]}

    def _validate(self, value: object) -> Spec:
        if isinstance(value, Spec):
            return value
        word = registry.singular(self.group)
        given = {"kind": value} if isinstance(value, str) else value
        if not isinstance(given, Mapping):
            raise problem(f"expected a {word}: the name of a kind, or a mapping with `kind`")
        if not isinstance(given.get("kind"), str):
            raise problem(
                f"expected a `kind` that names the {word}", f"There are: {', '.join(registry.kinds(self.group))}"
            )
        try:
            spec = spec_class(self.group, given["kind"])
        except ConfigError as error:
            raise problem(error.message, error.hint, path="kind" if isinstance(value, Mapping) else "") from error
        return spec.model_validate(dict(given))


def problem(message: str, hint: str | None = None, *, path: str = "") -> PydanticCustomError:
    """What a validator of a Spec raises, so that the error line can point at the place.

    `path` is dotted and relative to where the validator sits: a model validator that finds `step_size` wrong raises
    `problem("expected a divisor of sampler.steps (200), got 30", path="step_size")`, and the user reads the line of
    `step_size` in the YAML, or `--step-size`, in front of it.
    """
    return PydanticCustomError("uldm", "{message}", {"message": message, "hint": hint, "path": path})


def spec_class(group: str, kind: str) -> type[Spec]:
    """The Spec that a group offers under this kind; imports it, and refuses a plugin's object that is not one."""
    found = registry.load(group, kind)
    where = f"{registry.singular(group)} '{kind}' of {registry.owner(group, kind)}"
    if not (isinstance(found, type) and issubclass(found, Spec)):
        raise PluginError(f"{where} is not a Spec subclass but {found!r:.80}", "Report it to the plugin's author")
    field = found.model_fields.get("kind")
    if field is None or field.default != kind:
        claim = None if field is None else field.default
        raise PluginError(f"{where} calls itself {claim!r}", "Its `kind` must be the name of its entry point")
    return found


def slot_of(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> Slot | type[BaseModel] | None:
    """The Slot, or the model class, that a field's type comes down to, through Annotated and `| None`."""
    for item in metadata:
        if isinstance(item, Slot):
            return item
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return slot_of(args[0], args[1:])
    if origin is Union or type(annotation).__name__ == "UnionType":
        inner = [slot_of(arg) for arg in args if arg is not type(None)]
        return inner[0] if len(inner) == 1 else None
    return None
