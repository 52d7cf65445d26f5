"""What `uldm config` does: the configs of the commands, resolved, checked, begun and described."""

from collections.abc import Sequence
from pathlib import Path

from uldm_cli import registry
from uldm_cli.errors import ConfigError, nearest
from uldm_cli.runs.files import atomic_write, writable_folder
from uldm_cli.specs.base import Spec
from uldm_cli.specs.describe import json_schema, template
from uldm_cli.specs.load import SUFFIXES, load_config
from uldm_cli.specs.yamlfile import read_yaml


def config_kinds() -> list[str]:
    """The kinds of config that there are, one a command."""
    return list(registry.BUILTIN["commands"])


def config_class(kind: str) -> type[Spec]:
    """The class of a command's config. Raises ConfigError for a kind that names no command."""
    if kind not in registry.BUILTIN["commands"]:
        near = nearest(kind, config_kinds())
        hint = f"Did you mean '{near}'?" if near else f"There are: {', '.join(config_kinds())}"
        raise ConfigError(f"'{kind}' is no kind of config", hint)
    found: type[Spec] = registry.load("commands", kind)
    return found


def resolve_config(target: str, overrides: Sequence[str] = ()) -> Spec:
    """The config of a file, or a command's default where `target` is a kind, with overrides applied."""
    if target in config_kinds():
        return load_config(config_class(target), None, overrides)
    path = Path(target)
    if path.suffix not in SUFFIXES and not path.exists():
        near = nearest(target, config_kinds())
        hint = f"Did you mean '{near}'?" if near else f"Kinds: {', '.join(config_kinds())}"
        raise ConfigError(f"'{target}' is neither a YAML file nor a kind of config", hint)
    return load_config(config_class(_kind_in(path)), path, overrides)


def validate_configs(paths: Sequence[Path]) -> list[tuple[Path, Spec]]:
    """Each file with its config. Raises one ConfigError that names what is wrong in every file that is not valid."""
    valid, errors = [], []
    for path in paths:
        try:
            valid.append((path, load_config(config_class(_kind_in(path)), path)))
        except ConfigError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ConfigError(f"{len(errors)} of {len(paths)} files: " + "; ".join(str(error) for error in errors))
    return valid


def new_config(kind: str) -> str:
    """A commented YAML with every default of a command; its header expects the schema beside it."""
    return template(config_class(kind), schema_name(kind))


def write_new_config(kind: str, out: Path) -> list[Path]:
    """Write `new_config` to `out` and, where it is not there yet, the schema beside it; returns what was written.

    Raises ConfigError where `out` exists, or its folder cannot be written to.
    """
    text = new_config(kind)
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists", "Remove it, or choose another --out")
    writable_folder(out.parent)
    written = [_write(out, text)]
    schema = out.parent / schema_name(kind)
    if not schema.exists():
        written.append(_write(schema, schema_text(kind)))
    return written


def schema_text(kind: str) -> str:
    """The JSON schema of a command's config."""
    return json_schema(config_class(kind))


def schema_name(kind: str) -> str:
    """What the file with a kind's schema is called, beside a config of a user."""
    return f"{kind}.schema.json"


def write_schemas(folder: Path) -> list[Path]:
    """Write every command's schema as `<kind>.json`, replacing what is there; returns the files."""
    writable_folder(folder)
    return [_write(folder / f"{kind}.json", schema_text(kind)) for kind in config_kinds()]


def _kind_in(path: Path) -> str:
    data, lines = read_yaml(path)
    kind = data.get("kind")
    if not isinstance(kind, str):
        kinds = ", ".join(config_kinds())
        where = f"{path}:{lines[('kind',)]}" if ("kind",) in lines else str(path)
        raise ConfigError(f"{where}: no `kind` that says which command it is for", f"There are: {kinds}")
    try:
        config_class(kind)
    except ConfigError as error:
        raise ConfigError(f"{path}:{lines[('kind',)]}: {error.message}", error.hint) from error
    return kind


def _write(path: Path, text: str) -> Path:
    atomic_write(path, lambda file: file.write(text.encode()))
    return path
