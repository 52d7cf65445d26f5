"""Finds what is installed by its metadata, and imports only what is named.

Built-in kinds stand in one table. Plugins announce theirs as entry points of the group `uldm.<group>.v1`; reading
those costs a scan of the installed distributions, which happens at most once and only when a name is not built in.
"""

import os
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from uldm_cli.errors import ConfigError, PluginError, nearest

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

API_VERSION = "v1"
GROUPS = (
    "samplers",
    "schedules",
    "backbones",
    "autoencoders",
    "quantizers",
    "conditioners",
    "datasets",
    "metrics",
    "extractors",
    "analyses",
)

BUILTIN: dict[str, dict[str, str]] = {
    "samplers": {
        "ddim": "uldm_cli.specs.samplers:DDIM",
        "ddpm": "uldm_cli.specs.samplers:DDPM",
        "plms": "uldm_cli.specs.samplers:PLMS",
    },
    "schedules": {
        "scaled_linear": "uldm_cli.specs.schedules:ScaledLinear",
        "linear": "uldm_cli.specs.schedules:Linear",
        "cosine": "uldm_cli.specs.schedules:Cosine",
        "sigmoid": "uldm_cli.specs.schedules:Sigmoid",
    },
    "backbones": {"unet": "uldm_cli.specs.backbones:UNet"},
    "autoencoders": {
        "vqvae": "uldm_cli.specs.autoencoders:VQVAE",
        "vq": "uldm_cli.specs.autoencoders:VQ",
        "kl": "uldm_cli.specs.autoencoders:KL",
    },
    "quantizers": {
        "nearest": "uldm_cli.specs.quantizers:Nearest",
        "ema": "uldm_cli.specs.quantizers:EMA",
        "cosine": "uldm_cli.specs.quantizers:Cosine",
        "fsq": "uldm_cli.specs.quantizers:FSQ",
    },
    "conditioners": {
        "class": "uldm_cli.specs.conditioners:Class",
        "tokens": "uldm_cli.specs.conditioners:Tokens",
        "rescaler": "uldm_cli.specs.conditioners:Rescaler",
        "first-stage": "uldm_cli.specs.conditioners:FirstStage",
        "identity": "uldm_cli.specs.conditioners:Identity",
    },
    "datasets": {
        "images": "uldm_cli.specs.datasets.files:Images",
        "mnist": "uldm_cli.specs.datasets.mnist:MNIST",
        "fashion-mnist": "uldm_cli.specs.datasets.mnist:FashionMNIST",
        "tiny": "uldm_cli.specs.datasets.mnist:Tiny",
        "cifar10": "uldm_cli.specs.datasets.cifar:CIFAR10",
        "celeba": "uldm_cli.specs.datasets.files:CelebA",
        "celebahq": "uldm_cli.specs.datasets.files:CelebAHQ",
        "ffhq": "uldm_cli.specs.datasets.files:FFHQ",
        "lsun": "uldm_cli.specs.datasets.files:LSUN",
        "imagenet": "uldm_cli.specs.datasets.imagenet:ImageNet",
        "hf": "uldm_cli.specs.datasets.hub:HuggingFace",
    },
    "metrics": {},
    "extractors": {},
    "analyses": {},
    # The config of each built-in command; what a plugin offers in this group is the command itself.
    "commands": {
        "vqvae-train": "uldm_cli.specs.autoencoder_training:AutoencoderTraining",
        "vqvae-encode": "uldm_cli.specs.encoding:Encoding",
        "ldm-train": "uldm_cli.specs.diffusion_training:DiffusionTraining",
        "ldm-sample": "uldm_cli.specs.sampling:Sampling",
        "ldm-explain": "uldm_cli.specs.explaining:Explaining",
    },
}

_SINGULAR = {"analyses": "analysis"}


@dataclass(frozen=True)
class Entry:
    """What the metadata says of one kind. `status` is "ok", or why the name cannot be used or means another."""

    group: str
    kind: str
    target: str
    distribution: str
    version: str
    builtin: bool = False
    status: str = "ok"


def singular(group: str) -> str:
    """The word for one member of a group: "sampler" for "samplers"."""
    return _SINGULAR.get(group, group.removesuffix("s"))


def load(group: str, kind: str) -> Any:
    """Import the one object that is registered as `kind` in `group`.

    Raises ConfigError for a name that nothing offers, PluginError where the plugin that offers it cannot be used.
    """
    target = BUILTIN[group].get(kind)
    if target is not None:
        return _import(target)
    offers = [entry for entry in _plugins() if entry.group == group and entry.kind == kind]
    enabled = [entry for entry in offers if not _disabled(entry)]
    if not enabled:
        raise _unknown(group, kind, disabled=offers)
    if len(enabled) > 1:
        raise PluginError(
            f"{singular(group)} '{kind}' is offered by several plugins: {', '.join(map(_owner, enabled))}",
            f"Uninstall all but one, or set ULDM_DISABLE_PLUGINS={enabled[1].distribution}",
        )
    return _load_plugin(enabled[0])


def kinds(group: str) -> list[str]:
    """The names that `load` would look for in this group, built-in ones first."""
    builtin = BUILTIN[group]
    return [*builtin, *sorted({entry.kind for entry in _usable(group)} - set(builtin))]


def commands() -> list[Entry]:
    """The commands that plugins add, by metadata alone; `load("commands", entry.kind)` imports one."""
    return _usable("commands")


def entries() -> list[Entry]:
    """Everything that is installed, also what is disabled, hidden or of another API version; imports none of it."""
    from uldm_cli import __version__

    builtin = [
        Entry(group, kind, target, "uldm", __version__, builtin=True)
        for group, table in BUILTIN.items()
        if group in GROUPS
        for kind, target in table.items()
    ]
    return builtin + [_with_status(entry) for entry in _plugins()]


def owner(group: str, kind: str) -> str:
    """Who offers this kind, for messages: "uldm", or "the plugin 'uldm-foo 0.1'"."""
    plugins = [entry for entry in _usable(group) if entry.kind == kind] if kind not in BUILTIN[group] else []
    return "the plugin " + ", ".join(map(_owner, plugins)) if plugins else "uldm"


@cache
def _plugins() -> tuple[Entry, ...]:
    from importlib import metadata

    points = metadata.entry_points()
    found = [
        _entry(point) for group in points.groups if group.startswith("uldm.") for point in points.select(group=group)
    ]
    return tuple(sorted(found, key=lambda entry: (entry.group, entry.kind, entry.distribution)))


def _entry(point: "EntryPoint") -> Entry:
    name = point.group.removeprefix("uldm.").removesuffix(f".{API_VERSION}")
    known = name in BUILTIN and point.group == f"uldm.{name}.{API_VERSION}"
    distribution, version = (point.dist.name, point.dist.version) if point.dist else ("unknown", "unknown")
    return Entry(name if known else point.group, point.name, point.value, distribution, version)


def _usable(group: str) -> list[Entry]:
    return [entry for entry in _plugins() if entry.group == group and not _disabled(entry)]


def _disabled(entry: Entry) -> bool:
    """ULDM_PLUGINS=0 turns all of them off, ULDM_DISABLE_PLUGINS=a,b those kinds or distributions."""
    if os.environ.get("ULDM_PLUGINS") == "0":
        return True
    names = {name.strip() for name in os.environ.get("ULDM_DISABLE_PLUGINS", "").split(",")}
    return entry.kind in names or entry.distribution in names


def _with_status(entry: Entry) -> Entry:
    from dataclasses import replace

    if entry.group not in BUILTIN:
        return replace(entry, status=f"not used: uldm looks for groups like uldm.samplers.{API_VERSION}")
    if _disabled(entry):
        return replace(entry, status="disabled by the environment")
    if entry.kind in BUILTIN[entry.group]:
        return replace(entry, status="hidden by the built-in of this name")
    if sum(other.kind == entry.kind for other in _usable(entry.group)) > 1:
        return replace(entry, status="conflict: several plugins offer this name")
    return entry


def _owner(entry: Entry) -> str:
    return f"'{entry.distribution} {entry.version}'"


def _import(target: str) -> Any:
    from importlib import import_module

    module, _, name = target.partition("[")[0].strip().partition(":")
    found = import_module(module)
    for part in filter(None, name.split(".")):
        found = getattr(found, part)
    return found


def _load_plugin(entry: Entry) -> Any:
    try:
        return _import(entry.target)
    except (Exception, SystemExit) as error:  # a plugin's code may raise anything; Ctrl-C still stops
        lines = str(error).strip().splitlines()
        cause = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        raise PluginError(
            f"{singular(entry.group)} '{entry.kind}' of the plugin {_owner(entry)} failed to load: {cause}",
            f"Repair or uninstall it, or set ULDM_DISABLE_PLUGINS={entry.kind}",
        ) from error


def _unknown(group: str, kind: str, disabled: list[Entry]) -> ConfigError:
    if disabled:
        return ConfigError(
            f"{singular(group)} '{kind}' of the plugin {_owner(disabled[0])} is disabled by the environment",
            "Unset ULDM_PLUGINS and ULDM_DISABLE_PLUGINS to use it",
        )
    options = kinds(group)
    near = nearest(kind, options)
    if near:
        return ConfigError(f"unknown {singular(group)} '{kind}'", f"Did you mean '{near}'?")
    listing = ", ".join(options) if options else "none is installed"
    return ConfigError(f"unknown {singular(group)} '{kind}'", f"There are: {listing}")
