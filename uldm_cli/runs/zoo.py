"""The zoo: published models by name, from their publishers' addresses to checked files on this machine.

A pulled model is a folder in the cache that holds the checkpoint and its `config.yaml`. Beside the folder a small file
keeps the checkpoint's sha256, for publishers give none: what is pulled again later has to be the same.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from uldm_cli import assets
from uldm_cli.errors import ConfigError, UldmError, UsageError, nearest
from uldm_cli.fetch import cache, fetch
from uldm_cli.formats import compvis
from uldm_cli.formats.published import published_config
from uldm_cli.runs.files import atomic_write, sha256_of
from uldm_cli.runs.unzip import members, unzip
from uldm_cli.specs.yamlfile import read_yaml, to_yaml

CONFIG = "config.yaml"
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"  # how files of these formats begin
_WEB_PAGE = re.compile(rb"\s*<(!doctype|html|head|body)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """What is known of a published model; `assets/zoo.yaml` explains the fields."""

    name: str
    kind: str
    """"autoencoder" or "latent-diffusion"."""
    model: str
    url: str
    shape: Mapping[str, Any]
    data: str | None = None
    task: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    figures_guided: Mapping[str, float] = field(default_factory=dict)
    train_steps: int | None = None
    size: str | None = None
    bytes: int | None = None
    sha256: str | None = None
    mirrors: tuple[str, ...] = ()
    hub: str | None = None
    extras: Mapping[str, str] = field(default_factory=dict)
    licence: str | None = None
    file: str = "model.ckpt"
    """The checkpoint's name inside the archive, or what a bare checkpoint is called here."""
    comment: str | None = None


@dataclass(frozen=True)
class Pulled:
    """A checkpoint of the zoo on this machine."""

    path: Path
    sha256: str
    bytes: int
    source: str
    """The address or file that it came from, when it was pulled first."""


def entries() -> list[Entry]:
    """Every model of the zoo: the autoencoders, then the latent diffusion models."""
    data, _ = read_yaml(assets.path("zoo.yaml"))
    kinds = {"autoencoders": "autoencoder", "models": "latent-diffusion"}
    return [
        Entry(name=name, kind=kind, **{**facts, "mirrors": tuple(facts.get("mirrors", ()))})
        for section, kind in kinds.items()
        for name, facts in data[section].items()
    ]


def entry(name: str) -> Entry:
    """One model.

    Raises:
        ConfigError: the zoo has none of that name.
    """
    known = {one.name: one for one in entries()}
    if name not in known:
        near = nearest(name, known)
        hint = f"Did you mean {near!r}?" if near else "`uldm convert zoo list` shows them"
        raise ConfigError(f"the zoo has no model {name!r}", hint)
    return known[name]


def folder(name: str) -> Path:
    """Where a model of the zoo lies once it is pulled."""
    return cache("models") / name


def config_of(name: str) -> dict[str, Any]:
    """The config of a model in the layout of its publishers; reads no file of the model."""
    shapes = {one.name: one.shape for one in entries()}
    return published_config(shapes[entry(name).name], shapes)


def described(name: str) -> compvis.Translated:
    """What is known of a model without it: as its config would be read. Reads no file of the model."""
    with TemporaryDirectory() as place:
        path = Path(place) / f"{name}.yaml"
        path.write_text(to_yaml(config_of(name)), encoding="utf-8")
        return compvis.read_config(path)


def resolve(name: str) -> Path:
    """The checkpoint that `zoo:NAME` means; its config lies beside it.

    Raises:
        ConfigError: there is no such model, or it has not been pulled.
    """
    what = entry(name)
    if not folder(name).exists():
        raise ConfigError(f"{name} of the zoo is not on this machine", f"Run: uldm convert zoo pull {name}")
    return _checkpoint_in(folder(name), what, str(folder(name)))


def pull(name: str, source: Path | None = None) -> Pulled:
    """Downloads, checks and unpacks a model, unless it is there; then it is checked again.

    Args:
        name: of the model.
        source: the published archive, or a checkpoint out of it, that was downloaded by hand. It stays as it is.

    Raises:
        ConfigError: there is no such model; the file is damaged, hostile, or not what was published or pulled before.
        UldmError: it cannot be downloaded or stored.
    """
    what = entry(name)
    target = folder(name)
    with _storing(what):
        if target.exists():
            if source:
                raise UsageError(f"{name} is at {target} already", "Remove that folder to pull it from another file")
            return _checked(_checkpoint_in(target, what, str(target)), what, str(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        if source:
            return _install(source.expanduser(), what, str(source))
        download = target.with_name(f"{name}.download")
        came_now = not download.exists()
        fetch([what.url, *what.mirrors], download, description=f"{name} of the zoo", by_hand=_by_hand(what, download))
        try:
            pulled = _install(download, what, what.url)
        except ConfigError:
            if came_now:  # what somebody put there stays
                download.unlink()
            raise
        download.unlink()
        return pulled


def doubt(name: str, pulled: Pulled) -> str | None:
    """Why what was pulled cannot be used as that model, if so: a wrong file may have been given in its place."""
    try:
        compvis.read(pulled.path)
    except ConfigError as error:
        places = f"{folder(name)} and {_record_path(name)}"
        return f"zoo:{name} cannot be used. {error}. If it was the wrong file, remove {places}"
    return None


def _by_hand(what: Entry, place: Path) -> str:
    command = f"uldm convert zoo pull {what.name} --from FILE"
    return f"Download {what.url} by other means and run `{command}`, or put it at {place}"


@contextmanager
def _storing(what: Entry) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UldmError(f"{what.name} of the zoo cannot be stored: {error.strerror or error}{where}") from error


def _install(source: Path, what: Entry, origin: str) -> Pulled:
    """Puts a model's folder in place in one step, when all that is in it has been checked."""
    target = folder(what.name)
    temporary = target.with_name(f".{what.name}.unpacking")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    temporary.mkdir()
    try:
        if _is_archive(source):
            unzip(source, temporary)
        else:
            _copy(source, temporary / what.file)
        checkpoint = _checkpoint_in(temporary, what, origin)
        found = _fingerprint(checkpoint, what, origin)
        _write_config(checkpoint, what)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _recorded(target / checkpoint.relative_to(temporary), what, found)


def _copy(source: Path, place: Path) -> None:
    """A copy, or for a download, which goes away afterwards, a second name: no room for two of gigabytes is needed."""
    if source.parent == place.parent.parent:
        with suppress(OSError):  # not every disk has second names
            os.link(source, place)
            return
    shutil.copyfile(source, place)


def _is_archive(source: Path) -> bool:
    """Whether a file is a zip with a checkpoint in it, and not a checkpoint, which is a zip of another kind."""
    try:
        with source.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise ConfigError(f"{source} cannot be read ({error.strerror})", "Name the downloaded file") from error
    if start.startswith(_ZIP):
        names = members(source)
        if any(name.endswith(".ckpt") for name in names):
            return True
        if any(Path(name).name == "data.pkl" for name in names):
            return False
        raise ConfigError(f"{source} is a zip without a checkpoint (.ckpt)", f"It holds: {', '.join(names[:5])}")
    if start.startswith(_PICKLE):
        return False
    found = "a web page" if _WEB_PAGE.match(start) else "neither a zip nor a checkpoint"
    raise ConfigError(f"{source} is {found}", "Name the archive as it was published, or the .ckpt out of it")


def _checkpoint_in(place: Path, what: Entry, called: str) -> Path:
    """The checkpoint among unpacked files; `called` is what messages call the place."""
    found = sorted(path for path in place.rglob("*.ckpt") if path.is_file() and not path.name.startswith("."))
    chosen = [path for path in found if path.name == what.file] or found
    if len(chosen) == 1:
        return chosen[0]
    names = ", ".join(path.relative_to(place).as_posix() for path in chosen[:5]) or "none"
    raise ConfigError(f"{called} should hold one checkpoint {what.file}, and holds {names}")


def _checked(checkpoint: Path, what: Entry, origin: str) -> Pulled:
    """A checkpoint that is in place: the same as ever, or put there by hand and now seen first."""
    found = _fingerprint(checkpoint, what, origin)
    _write_config(checkpoint, what)
    return _recorded(checkpoint, what, found)


def _record_path(name: str) -> Path:
    return folder(name).with_name(f"{name}.json")


def _record(name: str) -> dict[str, Any] | None:
    path = _record_path(name)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"sha256": str(record["sha256"]), "bytes": int(record["bytes"]), "source": str(record["source"])}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is damaged ({error!r})", f"Remove it, and pull {name} again") from error


def _fingerprint(checkpoint: Path, what: Entry, origin: str) -> dict[str, Any]:
    """A checkpoint's sha256 and length, held to what is known of it.

    Raises:
        ConfigError: it is another file than was published, or than was pulled first.
    """
    found: dict[str, Any] = {"sha256": sha256_of(checkpoint), "bytes": checkpoint.stat().st_size, "source": origin}
    again = f"If you trust it, remove {_record_path(what.name)} and run this again"
    expectations = [
        ("was published", {"sha256": what.sha256, "bytes": what.bytes}, "Fetch it again"),
        ("was pulled first", _record(what.name) or {}, again),
    ]
    for when, expected, hint in expectations:
        length, digest = expected.get("bytes"), expected.get("sha256")
        problem = None
        if length is not None and found["bytes"] != length:
            problem = f"{found['bytes']} bytes instead of {length}"
        elif digest and found["sha256"] != digest.lower():
            problem = f"its sha256 begins with {found['sha256'][:12]}, expected {digest[:12]}"
        if problem:
            raise ConfigError(f"{checkpoint.name} of {origin} is not what {when} as {what.name}: {problem}", hint)
    return found


def _recorded(checkpoint: Path, what: Entry, found: dict[str, Any]) -> Pulled:
    """Keeps the fingerprint of what is pulled for the first time."""
    known = _record(what.name)
    if known is None:
        content = json.dumps(found, indent=2).encode()
        atomic_write(_record_path(what.name), lambda file: file.write(content))
    return Pulled(path=checkpoint, **(known or found))


def _write_config(checkpoint: Path, what: Entry) -> None:
    """The config beside a checkpoint, where the archive brought none."""
    path = checkpoint.with_name(CONFIG)
    if not path.exists():
        text = f"# {what.name}, from {what.url}: written by uldm\n{to_yaml(config_of(what.name))}"
        atomic_write(path, lambda file: file.write(text.encode()))


def as_json(what: Entry) -> dict[str, Any]:
    """An entry for people's scripts: all but its shape, and where it lies on this machine (null: nowhere)."""
    facts = {name: value for name, value in asdict(what).items() if name != "shape"}
    return {**facts, "folder": str(folder(what.name)) if folder(what.name).exists() else None}
