"""LPIPS, ready to use: the embedded weights, and those of the larger networks from a file or their publisher."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from uldm_cli import assets, console
from uldm_cli.errors import ConfigError, UldmError, nearest
from uldm_cli.fetch import cache, fetch
from uldm_cli.formats.native import load_tensors
from uldm_cli.formats.pickles import open_pickle, sniff
from uldm_cli.formats.tensors import open_safetensors
from uldm_cli.runs.files import sha256_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from uldm_cli.core.lpips import LPIPS, Net

VERSION = "0.1"  # of the linear weights


@dataclass(frozen=True)
class Published:
    """Where torchvision publishes a network trained on ImageNet."""

    url: str
    sha256: str
    size: int


PUBLISHED: Mapping[str, Published] = {
    "vgg": Published(
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        553_433_881,
    ),
    "squeeze": Published(
        "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
        "b8a52dc049b60e4b6ab68ad0df457362afab8b6304b2febdc1650a5dab4d7e7b",
        4_958_839,
    ),
}


@dataclass(frozen=True)
class Settings:
    """What the settings of a `Backbone` are called where they were made, for messages."""

    net: str = "--net {}"
    weights: str = "--weights-url"
    download: str = "--auto-download"
    places: str = "takes a file or an address"


@dataclass(frozen=True)
class Backbone:
    """Which network, and where its weights come from."""

    net: str = "alex"
    """"alex", "vgg" or "squeeze"."""
    weights: str | None = None
    """A file or an http(s) address with torchvision's `features.*`, or a folder that holds the published file."""
    auto_download: bool = False
    """Fetch weights that are not on this machine from torchvision's address."""
    dummy: bool = False
    """Features that are drawn instead of trained: no weights are needed, and the numbers mean nothing."""
    settings: Settings = Settings()


@dataclass(frozen=True)
class Metric:
    """LPIPS, and what its numbers depend on."""

    module: LPIPS
    weights: str
    """Where the network's weights come from."""

    @property
    def sha256(self) -> str | None:
        """Of the file with the network's weights; None where they are drawn."""
        return self.module.sha256

    @property
    def title(self) -> str:
        """For people: "LPIPS 0.1 (AlexNet)"."""
        drawn = "" if self.sha256 else ", weights drawn and not trained: no measure of anything"
        return f"LPIPS {VERSION} ({self.module.backbone.title}{drawn})"

    @property
    def described(self) -> str:
        """The title, and of weights that are nobody's published ones their hash."""
        published = PUBLISHED.get(self.module.net)
        known = self.weights == "embedded" or (published is not None and self.sha256 == published.sha256)
        return self.title if known else f"{self.title}, weights {self.weights} (SHA-256 {self.sha256})"

    @property
    def facts(self) -> dict[str, object]:
        """For results and pictures."""
        return {"net": self.module.net, "version": VERSION, "weights": self.weights, "weights_sha256": self.sha256}


def load_metric(backbone: Backbone, *, device: str = "auto", checked: bool = True) -> Metric:
    """LPIPS on a device.

    Args:
        backbone: its network.
        device: as `core.device.pick_device` takes it.
        checked: as `core.lpips.LPIPS` takes it.

    Raises:
        ConfigError: there is no such network, or a file of weights does not fit.
        UldmError: the weights are not on this machine, or cannot be downloaded.
    """
    from uldm_cli.core.device import pick_device
    from uldm_cli.core.lpips import BACKBONES, LPIPS, NETS, drawn_features

    if backbone.net not in NETS:
        near = nearest(backbone.net, NETS)
        hint = f"Did you mean {near!r}?" if near else f"There are: {', '.join(NETS)}"
        raise ConfigError(f"{backbone.settings.net.format(backbone.net)}: no such network", hint)
    net: Net = backbone.net
    if backbone.dummy and backbone.weights:
        raise ConfigError("--dummy and --weights-url are both given", "Give one of them")
    where = pick_device(device)
    embedded = load_tensors(assets.path(f"lpips-{net}.safetensors"))
    if backbone.dummy:
        return Metric(LPIPS(embedded | drawn_features(net), net, checked=checked).to(where), "drawn")
    if net == "alex" and not backbone.weights:
        own = sha256_of(assets.path("lpips-alex.safetensors"))
        return Metric(LPIPS(embedded, net, checked=checked, sha256=own).to(where), "embedded")
    file = _file(backbone)
    found = _features(file, net)
    try:
        module = LPIPS(embedded | found, net, checked=checked, sha256=sha256_of(file))
    except UldmError as error:
        what = f"{file} holds other weights than the features of {BACKBONES[net].title}"
        raise ConfigError(what, "Name another file, or the network that it is of") from error
    return Metric(module.to(where), backbone.weights or PUBLISHED[net].url)


def _file(backbone: Backbone) -> Path:
    """The network's weights on this machine, downloaded if that was asked for."""
    given = backbone.weights
    published = PUBLISHED.get(backbone.net)
    if given and urlsplit(given).scheme not in ("http", "https"):
        path = Path(given).expanduser()
        return _published_in(path, backbone) if path.is_dir() else path
    if given and (published is None or given != published.url):
        destination = cache("weights") / f"{hashlib.sha256(given.encode()).hexdigest()[:8]}-{_name(given)}"
        return fetch([given], destination, description=f"weights of {backbone.net}")
    assert published is not None  # AlexNet's are embedded
    destination = cache("weights") / _name(published.url)
    if not (destination.exists() or backbone.auto_download or given):
        said = backbone.settings
        raise ConfigError(
            f"{said.net.format(backbone.net)}: its weights are not on this machine",
            f"{said.download} fetches them ({published.size / 1e6:,.0f} MB), {said.weights} {said.places}",
        )
    if not destination.exists():
        console.note(f"downloading {published.url} to {destination}")
    return fetch(
        [published.url],
        destination,
        description=f"weights of {backbone.net}",
        sha256=published.sha256,
        size=published.size,
    )


def _published_in(folder: Path, backbone: Backbone) -> Path:
    """The published file in a folder that was filled for machines without a network, its checksum verified."""
    published = PUBLISHED.get(backbone.net)
    if published is None:
        what = f"{backbone.settings.weights} {folder} is a folder, and the network {backbone.net} is embedded"
        raise ConfigError(what, f"Leave {backbone.settings.weights} out, or name a file")
    file = folder / _name(published.url)
    if not file.is_file():
        raise ConfigError(f"{folder} holds no {file.name}", f"Put the file there that {published.url} names")
    found = sha256_of(file)
    if found != published.sha256:
        what = f"{file} is not the published file: its SHA-256 is {found[:12]}..., expected {published.sha256[:12]}..."
        raise ConfigError(what, f"Fetch it again from {published.url}, or name the file itself to use it as it is")
    return file


def _name(url: str) -> str:
    return PurePosixPath(unquote(urlsplit(url).path)).name or "weights"


def _features(path: Path, net: Net) -> dict[str, Tensor]:
    """`features.*` of a .safetensors or of a file of `torch.save`; a classifier beside them is left alone."""
    from uldm_cli.core.lpips import BACKBONES

    tensors = open_safetensors(path)[1] if sniff(path) == "safetensors" else open_pickle(path).tensors
    # Copies: what is read may lie in the file, which can be replaced while it is in use.
    found = {name: ref.read().clone() for name, ref in tensors.items() if name.startswith("features.")}
    if not found:
        title = BACKBONES[net].title
        raise ConfigError(f"{path} holds no weights named features.*", f"It should be {title} as torchvision names it")
    return found


def load_lpips() -> LPIPS:
    """The perceptual distance with the embedded AlexNet, of whatever values."""
    return load_metric(Backbone(), device="cpu", checked=False).module
