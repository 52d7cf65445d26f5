"""`uldm vqvae encode`: the latents of a set of images, in files that training reads in place of the images."""

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from uldm_cli import console
from uldm_cli.errors import ConfigError, UldmError
from uldm_cli.runs.files import atomic_write, order_of
from uldm_cli.runs.latent_cache import (
    INDEX,
    RECORD,
    difference,
    identity,
    is_intact,
    read_index,
    read_shard,
    shard_path,
)
from uldm_cli.runs.latent_writer import LatentWriter
from uldm_cli.runs.models import ModelFile, load_autoencoder, model_config
from uldm_cli.runs.outdir import OUTPUTS, choose_outdir
from uldm_cli.runs.signals import stop_on_signals
from uldm_cli.runs.train import open_images
from uldm_cli.runs.trained_on import chosen_autoencoder, chosen_data, tell_other_size
from uldm_cli.specs.encoding import Contents, Encoding, LatentIndex
from uldm_cli.specs.models import AutoencoderModel
from uldm_cli.specs.training import misfit, refuse

if TYPE_CHECKING:
    from torch import nn

    from uldm_cli.core.data import ImageSet
    from uldm_cli.core.engine import Engine
    from uldm_cli.specs.datasets import Dataset


@dataclass(frozen=True)
class Plan:
    """An encoding whose config, autoencoder, images and folder fit together."""

    config: Encoding
    """Complete: autoencoder and data are named."""
    folder: Path
    file: ModelFile
    """The autoencoder."""
    model: AutoencoderModel
    """What the file holds, as if made for images of this size."""

    @property
    def data(self) -> "Dataset":
        assert self.config.data is not None
        return self.config.data


@dataclass(frozen=True)
class Preview:
    """What a run would do."""

    plan: Plan
    contents: Contents
    skipped: int
    there: int
    """Files that are there."""
    device: str


@dataclass(frozen=True)
class Result:
    """A finished cache."""

    plan: Plan
    index: LatentIndex
    encoded: int
    """Images that this call encoded, on all processes."""
    seconds: float

    @property
    def skipped(self) -> int:
        """Images that could not be used."""
        return len(self.index.left_out) + sum(len(file.skipped) for file in self.index.files)


def plan(spec: Encoding, outdir: Path | None) -> Plan:
    """Where latents are written, and of what. Writes nothing.

    Raises:
        ConfigError: no autoencoder or no images are found, or do not fit; the folder holds latents of another config.
    """
    reference, file = chosen_autoencoder(spec.autoencoder)
    data = chosen_data(spec.data, file)
    model = model_config(file, AutoencoderModel)
    refuse(misfit(model.autoencoder, data), reference)
    config = spec.model_copy(update={"autoencoder": reference, "data": data})
    folder = choose_outdir(outdir, OUTPUTS / "vqvae-encode", RECORD, config)
    return Plan(config, folder, file, model.model_copy(update={"image_size": data.size}))


def preview(plan: Plan) -> Preview:
    """What `run` would do."""
    from uldm_cli.core.device import pick_device

    images = _open(plan.data)
    contents = _contents(plan, images, load_autoencoder(plan.file))
    there = sum(shard_path(plan.folder, number).exists() for number in range(contents.shards))
    return Preview(plan, contents, len(images.skipped), there, f"{pick_device(plan.config.device)}")


def run(plan: Plan) -> Result:
    """Encodes what is missing or damaged, and writes the index. A run that was stopped goes on so.

    Raises:
        ConfigError: the folder holds latents of other images or of another autoencoder.
        UldmError: the disk is full, or a latent is no number.
    """
    from uldm_cli.core.engine import Engine

    began = time.perf_counter()
    engine = Engine(plan.config.device, plan.config.precision)
    images = _open(plan.data)
    tell_other_size(images.size, plan.file)
    module = load_autoencoder(plan.file)
    contents = _contents(plan, images, module)
    missing = _missing(plan.folder, contents, engine)
    if missing:
        _check_room(plan.folder, contents, missing)
        with stop_on_signals() as stop:
            LatentWriter(plan.folder, plan.config, contents, images, module, engine, stop).write(missing)
    if engine.main:
        _write_index(plan, contents, images)
    engine.wait()
    return Result(plan, read_index(plan.folder), sum(map(contents.count, missing)), time.perf_counter() - began)


def _open(data: "Dataset") -> "ImageSet":
    images = open_images(data)
    # A set of a plugin that draws its samples, and does not say that it always cuts out the centre, counts as random.
    if getattr(data, "crop", "random" if hasattr(images, "sample") else "center") == "random":
        what = "data.crop is random: training sees another part of an image each time, and only one can be encoded"
        raise ConfigError(what, "Name the images with data.crop=center, or train without a cache")
    return images


def _contents(plan: Plan, images: "ImageSet", module: "nn.Module") -> Contents:
    from uldm_cli.core.autoencoders import has_posterior

    return Contents(
        autoencoder=identity(module, plan.model.autoencoder),
        images=len(images),
        order=order_of(images),
        image_shape=plan.model.image_shape,
        latent_shape=plan.model.latent_shape,
        posterior=has_posterior(module),
        flip=plan.data.flip,
        dtype=plan.config.dtype,
        shard_size=plan.config.shard_size,
    )


def _missing(folder: Path, contents: Contents, engine: "Engine") -> list[int]:
    """The numbers of the files that are not there or are damaged, the same in every process.

    Every process looks at all headers, so that they stop together; the bytes are checked by one process each.
    """
    import torch

    from uldm_cli.core.collectives import total

    there = {number for number in range(contents.shards) if shard_path(folder, number).exists()}
    damaged = torch.ones(contents.shards, dtype=torch.int64)
    if there:
        readable = {number for number in there if _is_part(shard_path(folder, number), contents)}
        damaged[list(readable)] = 0
        mine = sorted(readable)[engine.rank :: engine.world]
        if mine:
            with console.progress(len(mine), "checking what is there", "files") as progress:
                for number in mine:
                    damaged[number] = int(not is_intact(shard_path(folder, number)))
                    progress.advance()
    # Nobody goes on before all have looked: a slow process would find the first files of a quick one.
    missing: list[int] = total(damaged.to(engine.device)).nonzero()[:, 0].tolist()
    if there:
        for number in missing:
            if number in there:
                console.warn(f"{shard_path(folder, number)} is damaged: it is encoded again")
        console.note(f"{contents.shards - len(missing)} of {contents.shards} files in {folder} are there already")
    return missing


def _is_part(path: Path, contents: Contents) -> bool:
    """Whether a file that is there is one of these, by its header."""
    try:
        found = read_shard(path)[0]
    except ConfigError:
        return False
    other = difference(found, contents)
    if other:
        what = f"{path} holds latents of something else: {other}"
        raise ConfigError(what, "Give another --outdir, or remove this folder")
    return True


def _check_room(folder: Path, contents: Contents, missing: list[int]) -> None:
    """Hours of work should not end at a disk that is too small."""
    needed = contents.nbytes * sum(map(contents.count, missing)) // contents.images
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(above).free
    if needed > free:
        what = f"the latents need {needed / 1e9:,.2f} GB, and {folder} has room for {free / 1e9:,.2f} GB"
        raise UldmError(what, "Give another --outdir, or dtype=float16")


def _write_index(plan: Plan, contents: Contents, images: "ImageSet") -> None:
    """Written last: where there is an index, all files are there."""
    from uldm_cli.core.data.latents import deviation_of

    files = tuple(read_shard(shard_path(plan.folder, number))[1] for number in range(contents.shards))
    deviation = deviation_of([file.sums.model_dump() for file in files])
    if not (math.isfinite(deviation) and deviation > 0):
        raise UldmError(f"the latents have the standard deviation {deviation}", "Train the autoencoder first")
    index = LatentIndex(
        **contents.model_dump(),
        reference=str(plan.config.autoencoder),
        data=plan.data.model_dump(mode="json"),
        classes=images.classes,
        left_out=tuple(images.skipped),
        scale_factor=1 / deviation,
        files=files,
    )
    content = index.model_dump_json(indent=1).encode()
    path = plan.folder / INDEX
    if not path.exists() or path.read_bytes() != content:
        atomic_write(path, lambda file: file.write(content))
