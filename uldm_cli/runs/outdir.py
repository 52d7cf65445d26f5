"""Which folder a run writes to: of one command, a folder holds the results of one config, never of two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from uldm_cli.errors import ConfigError
from uldm_cli.runs.files import atomic_write, writable_folder
from uldm_cli.specs.load import dump_yaml
from uldm_cli.specs.yamlfile import read_yaml

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from uldm_cli.specs.base import Spec

OUTPUTS = Path("outputs")

# Where and how fast a run computes, who reads its images, what it tells, keeps and stops at: that makes no other run.
NOT_COMPARED = frozenset(
    {
        "device",
        "workers",
        *(f"train.{name}" for name in ("device", "workers", "compile")),
        *(f"train.{name}" for name in ("log_every", "save_every", "picture_every", "keep", "best", "trackers")),
        "data.strict",
    }
)

_ABSENT = "absent"


def default_outdir(group: str, verb: str, config: Path | None = None) -> Path:
    """`outputs/<group>-<verb>`, or `outputs/<group>-<name of the config>` when there is one.

    A file that is named like its group says nothing (`fruits64/ldm.yaml`): its folder's name is taken.
    """
    if config is None:
        return OUTPUTS / f"{group}-{verb}"
    parent = config.resolve().parent.name
    return OUTPUTS / f"{group}-{parent if config.stem == group and parent else config.stem}"


def choose_outdir(
    explicit: Path | None,
    default: Path,
    record: str,
    config: Spec,
    *,
    ignored: frozenset[str] = NOT_COMPARED,
    may_change: frozenset[str] = frozenset(),
) -> Path:
    """The folder for a run of `config`, whose resolved config is kept there as the file `record`. Writes nothing.

    A folder the user names has to be new, or to hold results of the same config, fields in `may_change` aside. By
    default it is `default`, or the first of `default-2`, `default-3`... that fits. Those in `ignored` do not count.

    Raises:
        ConfigError: the folder named holds results of another config, or cannot be a folder.
    """
    if explicit is not None:
        writable_folder(explicit, create=False)
        difference = difference_from(explicit / record, config, ignored | may_change)
        if difference:
            raise ConfigError(
                f"--outdir {explicit} holds results of another config: {difference}",
                "Give another --outdir, or remove this one",
            )
        return explicit
    folder = next(path for path in candidates(default) if difference_from(path / record, config, ignored) is None)
    return writable_folder(folder, create=False)


def difference_from(record: Path, config: Spec, ignored: frozenset[str] = NOT_COMPARED) -> str | None:
    """The first field in which the config kept in `record` differs, for people; None if there is none, or no record."""
    if not record.is_file():
        return None
    try:
        there, _ = read_yaml(record)
    except ConfigError:
        return f"its {record.name} cannot be read"
    old, new = _flatten(there), _flatten(config.model_dump(mode="json"))
    for field in (*new, *(old.keys() - new.keys())):
        if field in ignored:
            continue
        before, now = old.get(field, _ABSENT), new.get(field, _ABSENT)
        if before != now:
            return f"{field} is {_show(before)} there and {_show(now)} here"
    return None


def write_record(folder: Path, record: str, config: Spec) -> Path:
    """Keeps the resolved config as YAML in `folder`, which is made if need be."""
    path = writable_folder(folder) / record
    content = dump_yaml(config).encode()
    atomic_write(path, lambda file: file.write(content))
    return path


def candidates(default: Path) -> Iterator[Path]:
    """The folders that are taken by default, one after another, without an end."""
    yield default
    number = 2
    while True:
        yield default.with_name(f"{default.name}-{number}")
        number += 1


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Nested mappings as dotted fields; a list counts as one value."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _show(value: object) -> str:
    return "not set" if value is None else str(value)
