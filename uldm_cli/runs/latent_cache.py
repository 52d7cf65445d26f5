"""The folder of a latent cache: what its files say, whether they are whole and fit, and opening it for training.

A cache is `latents-00000.safetensors` and so on, each whole from the moment it appears, and `index.json`, which is
written when all of them are there.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uldm_cli.errors import ConfigError
from uldm_cli.formats.tensors import TORCH_NAMES, Tensors, open_safetensors
from uldm_cli.runs.models import ModelFile, load_autoencoder, model_config
from uldm_cli.runs.train import open_images
from uldm_cli.runs.train_plan import Plan
from uldm_cli.specs.autoencoders import Autoencoder
from uldm_cli.specs.datasets import Dataset
from uldm_cli.specs.encoding import Contents, LatentIndex, Shard, read_said
from uldm_cli.specs.models import AutoencoderModel

if TYPE_CHECKING:
    from torch import nn

    from uldm_cli.core.data import ImageSet
    from uldm_cli.core.data.latents import LatentSet

RECORD = "encode.yaml"
INDEX = "index.json"
KEY = "uldm-latents"
"""Under which a file's metadata say what it holds, as JSON: `contents` and `shard`."""


def shard_path(folder: Path, number: int) -> Path:
    """Of a cache's file, counted from 0."""
    return folder / f"latents-{number:05}.safetensors"


def identity(module: "nn.Module", autoencoder: Autoencoder) -> str:
    """What tells an autoencoder from any other, in whichever file it lies: a hash of its config and its weights."""
    from uldm_cli.core.data.latents import fingerprint

    # Without defaults, so that a field which a later version adds does not make it another one.
    said = {"kind": autoencoder.kind, **autoencoder.model_dump(mode="json", exclude_defaults=True)}
    return fingerprint(json.dumps(said, sort_keys=True), module)


def read_shard(path: Path) -> tuple[Contents, Shard, Tensors]:
    """What a file says that it holds, after a look at its header and its length.

    Raises:
        ConfigError: it is missing, truncated, or not a file of latents.
    """
    metadata, tensors = open_safetensors(path)
    hint = "Encode it again"
    try:
        said = json.loads(metadata[KEY])
        contents = read_said(Contents, said["contents"], str(path), hint)
        shard = read_said(Shard, said["shard"], str(path), hint)
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{path} holds no latents of this version of uldm", hint) from None
    shapes = {name: (ref.shape, TORCH_NAMES[ref.dtype]) for name, ref in tensors.items()}
    expected: dict[str, tuple[tuple[int, ...], str]] = {"label": ((shard.count,), "int64")}
    expected |= dict.fromkeys(contents.tensors, ((shard.count, *contents.latent_shape), contents.dtype))
    if shapes != expected or shard.count != contents.count(shard.number):
        raise ConfigError(f"{path} does not hold the tensors that it says", hint)
    return contents, shard, tensors


def is_intact(path: Path) -> bool:
    """Whether a file's tensors are those that were written, by their hash; reads all of them."""
    from uldm_cli.core.data.latents import digest_of

    try:
        _, shard, tensors = read_shard(path)
    except ConfigError:
        return False
    return digest_of({name: ref.read() for name, ref in tensors.items()}) == shard.sha256


def difference(there: Contents, here: Contents) -> str | None:
    """The first way in which two caches are of different contents, for people; None if there is none."""
    for name in Contents.model_fields:
        before, now = getattr(there, name), getattr(here, name)
        if before != now:
            short = name in ("autoencoder", "order")
            shown = (before[:12], now[:12]) if short else (before, now)
            return f"{_LABELS.get(name, name)} {shown[0]} there and {shown[1]} here"
    return None


_LABELS = {
    "autoencoder": "the autoencoder has the hash",
    "order": "the names of the images have the hash",
    "images": "the images are",
    "image_shape": "their shape is",
    "latent_shape": "the latents' shape is",
    "flip": "flip is",
    "dtype": "dtype is",
    "shard_size": "shard_size is",
}


def read_index(folder: Path) -> LatentIndex:
    """The index of a finished cache.

    Raises:
        ConfigError: no such folder, it is no cache or half-written, or its index is damaged.
    """
    path = folder / INDEX
    try:
        said: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(said, Mapping):
            raise ValueError("it is no object")
    except (FileNotFoundError, NotADirectoryError):
        raise _unfinished(folder) from None
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} cannot be read ({e})", _again(folder)) from e
    return read_said(LatentIndex, said, str(path), _again(folder))


def check_autoencoder(folder: Path, index: LatentIndex, file: ModelFile) -> None:
    """Makes sure that a finished cache holds the latents of this autoencoder.

    Raises:
        ConfigError: they are another one's.
    """
    here = identity(load_autoencoder(file), model_config(file, AutoencoderModel).autoencoder)
    if here != index.autoencoder:
        what = (
            f"{folder} holds the latents of another autoencoder: of {index.reference} (hash {index.autoencoder[:12]})"
        )
        hint = f"Encode the images with this one: uldm vqvae encode {folder / RECORD} --model {file.name} --outdir NEW"
        raise ConfigError(f"{what}, and not of {file.name} ({here[:12]})", hint)


def cached_data(folder: Path, index: LatentIndex, data: Dataset | None) -> Dataset:
    """The images that latents stand for: those of `data`, or, where that names none, those that were encoded.

    Raises:
        ConfigError: the latents are of other images than `data` asks for; or the index names ones that are not known.
    """
    encoded = _encoded(folder, index)
    if data is None:
        return encoded
    there, here = encoded.model_dump(mode="json"), data.model_dump(mode="json")
    for name in (*here, *there):
        before, now = there.get(name, "not set"), here.get(name, "not set")
        if before != now and name not in ("flip", "strict"):
            what = f"{folder} holds latents of other images: data.{name} was {before}, and is {now}"
            raise ConfigError(what, "Train on those with data=null, or encode these")
    if data.flip and not index.flip:
        hint = "Encode them with data.flip=true, or train with data.flip=false"
        raise ConfigError(f"{folder} holds no latents of mirrored images, and data.flip is true", hint)
    return data


def training_set(plan: Plan[Any]) -> "ImageSet":
    """What a run trains on: its config's images, or the latents that the config names in their place.

    Raises:
        ConfigError: there are none, or a file of latents is missing, damaged or of another cache.
    """
    config = plan.config
    if plan.latents is None:
        return open_images(config.data)
    return open_cache(Path(config.latents), plan.latents, flip=config.data.flip)


def open_cache(folder: Path, index: LatentIndex, *, flip: bool) -> "LatentSet":
    """The latents of a cache, mapped into memory, after a look at the header and length of each file.

    Raises:
        ConfigError: a file is missing, truncated, or of another cache.
    """
    from uldm_cli.core.data.latents import LatentSet

    paths = [shard_path(folder, number) for number in range(index.shards)]
    for path, listed in zip(paths, index.files, strict=True):
        try:
            contents, shard, _ = read_shard(path)
        except ConfigError as e:
            raise ConfigError(e.message, _again(folder)) from e
        other = difference(contents, index)
        if other or shard != listed:
            raise ConfigError(
                f"{path} is not the file that {INDEX} lists: {other or 'its hash differs'}", _again(folder)
            )
    channels, size, _ = index.image_shape
    return LatentSet(paths, index.parts, flip=flip, classes=index.classes, channels=channels, size=size)


def _encoded(folder: Path, index: LatentIndex) -> Dataset:
    from uldm_cli.specs.diffusion_training import data_of

    data = data_of({"data": index.data}, str(folder / INDEX))
    assert data is not None, "an index always names its images"
    return data


def _unfinished(folder: Path) -> ConfigError:
    """Why there is no index."""
    if not folder.is_dir():
        return ConfigError(f"there is no folder {folder} of latents", "`uldm vqvae encode` makes one")
    there = len(list(folder.glob("latents-*.safetensors")))
    if not there:
        return ConfigError(f"{folder} holds no latents: no {INDEX}", "`uldm vqvae encode` makes a folder that does")
    return ConfigError(
        f"{folder} is half-written: {there} file{'s' if there > 1 else ''} of latents, and no {INDEX}", _again(folder)
    )


def _again(folder: Path) -> str:
    """How to finish or repair a cache."""
    return f"This goes on, and makes damaged files anew: uldm vqvae encode {folder / RECORD} --outdir {folder}"
