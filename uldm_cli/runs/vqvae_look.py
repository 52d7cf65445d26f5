"""What the commands that look into an autoencoder share: the model that is meant, and the images that it is shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from uldm_cli import __version__, console
from uldm_cli.errors import ConfigError, UsageError
from uldm_cli.runs.checkpoints import Checkpoints
from uldm_cli.runs.files import writable_folder
from uldm_cli.runs.models import EMBEDDED, ModelFile, load_autoencoder, model_config, newest_autoencoder, resolve
from uldm_cli.runs.outdir import OUTPUTS, default_outdir
from uldm_cli.specs.autoencoder_training import AutoencoderTraining
from uldm_cli.specs.load import load_config
from uldm_cli.specs.models import AutoencoderModel
from uldm_cli.specs.yamlfile import read_yaml

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from uldm_cli.core.codes import Look

VIZ_OUT = Path("viz_out")
BATCH_SIZE = 16
BATCH_PIXELS = BATCH_SIZE * 256 * 256  # by default, larger images go in smaller batches


@dataclass(frozen=True)
class Picture:
    """An image, made to fit the autoencoder."""

    name: str
    """Relative to the folder, with forward slashes; of a single file its name."""
    pixels: Tensor
    """uint8 `[C, H, W]`."""
    original: tuple[int, int]
    """Height and width in the file."""
    scaled: tuple[int, int]
    """Height and width that it was scaled to before the centre was cut out."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[1], self.pixels.shape[2]

    @property
    def change(self) -> str:
        """What was done to make it fit, in words; empty where nothing was."""
        scaled = f"scaled to {by(self.scaled)}" if self.scaled != self.original else ""
        cut = f"its centre of {by(self.size)} taken" if self.size != self.scaled else ""
        return " and ".join(filter(None, (scaled, cut)))


@dataclass(frozen=True)
class Request:
    """Which autoencoder is to look, and how it is shown images."""

    model: str | None = None
    """Its reference; see `choose`."""
    config: Path | None = None
    """A YAML; see `choose`."""
    device: str | None = None
    """To compute on."""
    side: int | None = None
    """What the short side of each image is scaled to; None keeps it, see `Autoencoder.fit`."""
    batch_size: int | None = None
    """How many images are computed at once; None is about 16."""

    def __post_init__(self) -> None:
        check_counts(size=self.side, batch_size=self.batch_size)

    def open(self) -> Autoencoder:
        """The autoencoder, its weights not read yet."""
        return Autoencoder(choose(self.model, self.config), self.device)


class Autoencoder:
    """The autoencoder that a reference means.

    Args:
        file: from `choose`.
        device: as `core.device.pick_device` takes it.
    """

    def __init__(self, file: ModelFile, device: str | None) -> None:
        self.file, self.name = file, file.name
        self._device = device or "auto"
        config = model_config(file, AutoencoderModel)
        self.spec, self.image_size = config.autoencoder, config.image_size
        if self.spec.in_channels not in (1, 3):
            raise ConfigError(f"{self.name} takes images of {self.spec.in_channels} channels, and files have 1 or 3")

    @cached_property
    def device(self) -> torch.device:
        """Where it computes."""
        from uldm_cli.core.device import pick_device

        return pick_device(self._device)

    @cached_property
    def module(self) -> nn.Module:
        """The network, float32 in evaluation mode; read when it is first needed."""
        return load_autoencoder(self.file).requires_grad_(False).to(self.device)

    def about(self, command: str, **more: str) -> dict[str, str]:
        """What its pictures say of how they were made, as text by keyword."""
        made = {"command": f"uldm vqvae {command}", "version": __version__}
        return {**made, "model": self.name, "step": str(self.file.header.step), **more}

    @property
    def has_codes(self) -> bool:
        """Whether it has a codebook."""
        from uldm_cli.core.vqvae import VectorQuantized

        return isinstance(self.module, VectorQuantized)

    def need_codes(self) -> None:
        """Raises ConfigError where there is no codebook."""
        if not self.has_codes:
            hint = "Its latents are seen with `uldm vqvae latents`, its posterior with `uldm vqvae visualize`"
            raise ConfigError(f"{self.name} has no codebook: it is of the kind {self.spec.kind!r}", hint)

    def fit(self, path: Path, name: str, side: int | None = None) -> Picture:
        """Reads an image, and makes it fit.

        One of more than 768x768 pixels is scaled down to about as many, unless `side` is what its short side is to be
        scaled to; then the largest centre of which the factor divides both sides is taken.

        Raises:
            ImageError: it cannot be read, or is too small or too large.
        """
        from uldm_cli.core.codes import fit_multiple
        from uldm_cli.core.images import ImageError, check_header, decode_image
        from uldm_cli.core.latent import LARGEST_WHOLE

        try:
            with path.open("rb") as file:
                check_header(file, name)
        except OSError as error:
            raise ImageError(name, f"cannot be read ({error.strerror})") from error
        image = decode_image(path, self.spec.in_channels, name=name)
        pixels, scaled = fit_multiple(image, self.spec.factor, side, LARGEST_WHOLE)
        if not pixels.numel():
            least = f"smaller than {self.spec.factor} on a side, which is one latent of {self.name}"
            raise ImageError(name, f"{by(scaled)} pixels, {least}")
        return Picture(name, pixels, (image.shape[1], image.shape[2]), scaled)

    def look(self, pictures: list[Picture]) -> list[Look]:
        """What it makes of pictures of one size."""
        from uldm_cli.core.codes import look

        return look(self.module, self.batch(pictures))

    def batch(self, pictures: list[Picture]) -> Tensor:
        """Pictures of one size as the network takes them."""
        import torch

        from uldm_cli.core.training import to_float

        return to_float(torch.stack([picture.pixels for picture in pictures]).to(self.device))


def choose(model: str | None, config: Path | None) -> ModelFile:
    """The checkpoint that `--model` and `--config` mean; without either, the newest trained autoencoder if there is
    one, else the embedded model's.

    A training config alone means the run of it; with a checkpoint it has to be that one's. The YAML of a published
    checkpoint goes with a checkpoint.

    Raises:
        ConfigError: there is none, it cannot be read, or the two do not fit.
    """
    if config is not None and "kind" in read_yaml(config, targets=True)[0]:
        return _of_training(config, model)
    if config is not None and model is None:
        raise ConfigError(f"{config} describes a published checkpoint, and none is given", "Name it with --checkpoint")
    if model is None:
        model = newest_autoencoder(OUTPUTS)
        which = f"{model}, the newest `uldm vqvae train` run" if model else f"that of the embedded {EMBEDDED[0]}"
        console.note(f"autoencoder: {which}")
    return resolve(model or EMBEDDED[0], "autoencoder", config)


def _of_training(config: Path, model: str | None) -> ModelFile:
    spec = load_config(AutoencoderTraining, config)
    run = default_outdir("vqvae", "train", config)
    if model is None and Checkpoints(run).newest() is None:
        raise ConfigError(
            f"{config} has not been trained yet: there is no checkpoint in {run}",
            f"Run `uldm vqvae train {config}`, or name the model with --checkpoint",
        )
    file = resolve(model or str(run), "autoencoder")
    if model_config(file, AutoencoderModel).autoencoder != spec.autoencoder:
        raise ConfigError(f"{file.name} was not made with {config}: its autoencoder is another", "Leave --config out")
    return file


@dataclass(frozen=True)
class Source:
    """The image files that a command was given."""

    paths: dict[str, Path]
    """By their names, sorted; see `Picture.name`."""
    skipped: list[tuple[str, str]]
    """Names and reasons of the files that turned out unusable so far."""
    strict: bool
    """Whether each was named, so that one that cannot be used is an error."""

    @classmethod
    def of(cls, path: Path, out: Path | None = None) -> Source:
        """The images at a path: a file, or a folder with its sub-folders; what lies in the folder `out` is not meant.

        Raises:
            ConfigError: there is nothing, or no image in it.
        """
        if not path.is_dir():
            if not path.exists():
                raise ConfigError(f"there is no image or folder {path}", "Check the path")
            return cls({path.name: path}, [], strict=True)
        from uldm_cli.core.data import open_images

        found = open_images(path, size=1)
        own = out.resolve() if out else None
        paths = {name: path / name for name in found.names}
        if own and own != path.resolve():
            paths = {name: file for name, file in paths.items() if own not in file.resolve().parents}
        if not paths:
            raise ConfigError(f"no images in {path}, but for those in {out}", "Give another folder")
        return cls(paths, list(found.skipped), strict=False)

    @classmethod
    def of_all(cls, paths: list[Path]) -> Source:
        """The images at several paths, in their order; named by their paths where their names are not enough.

        Raises:
            ConfigError: there is nothing at one of them, or no image in it.
        """
        sources = [cls.of(path) for path in paths]
        if len(sources) == 1:
            return sources[0]
        files = list(dict.fromkeys(file for source in sources for file in source.paths.values()))
        short = {file.name: file for file in files}
        skipped = [one for source in sources for one in source.skipped]
        found = short if len(short) == len(files) else {str(file): file for file in files}
        return cls(found, skipped, strict=all(source.strict for source in sources))

    @property
    def stems(self) -> dict[str, str]:
        """By name, the beginning of the names of what is written about it: without the ending, unless two files of a
        folder differ in that alone."""
        stems = {name: str(Path(name).with_suffix("")) for name in self.paths}
        count = Counter(stem.lower() for stem in stems.values())
        chosen = {name: name if count[stem.lower()] > 1 else stem for name, stem in stems.items()}
        return chosen if len(set(chosen.values())) == len(chosen) else {name: name for name in stems}

    def say_shared(self) -> None:
        """A note on files whose endings are kept in the names of what is written, so that none replaces another."""
        shared = [name for name, stem in self.stems.items() if name == stem]
        if shared and len(self.paths) > 1:
            console.note(f"{named(shared)} share their names up to the endings: these are kept in what is written")

    def pictures(self, model: Autoencoder, side: int | None) -> Iterator[Picture]:
        """Those that can be read, in order.

        Raises:
            UsageError: one that was named, or all of a folder, cannot be.
        """
        from uldm_cli.core.images import ImageError

        read = 0
        for name, path in self.paths.items():
            try:
                picture = model.fit(path, name, side)
            except ImageError as error:
                if self.strict:
                    raise ImageError(str(path), error.reason) from error
                self.skipped.append((error.name, error.reason))
                continue
            read += 1
            yield picture
        if not read:
            name, reason = self.skipped[0]
            raise UsageError(f"none of the {len(self.skipped)} images can be used; the first, {name}: {reason}")


def batches(pictures: Iterator[Picture], batch_size: int | None) -> Iterator[list[Picture]]:
    """Pictures of one size each, in order; without `batch_size` about 16, fewer of large ones."""
    held: list[Picture] = []
    for picture in pictures:
        height, width = picture.size
        most = batch_size or min(BATCH_SIZE, max(1, BATCH_PIXELS // (height * width)))
        if held and (held[0].size != picture.size or len(held) >= most):
            yield held
            held = []
        held.append(picture)
    if held:
        yield held


def looked(model: Autoencoder, source: Source, request: Request, doing: str) -> Iterator[tuple[Picture, Look]]:
    """Every picture with what the autoencoder makes of it, under a progress bar; afterwards what was skipped or
    changed is said."""
    changed: list[Picture] = []
    model.module  # noqa: B018  # read now, before the progress counts time
    with console.progress(len(source.paths), doing, "images") as progress:
        left_out = len(source.skipped)
        for batch in batches(source.pictures(model, request.side), request.batch_size):
            for picture, look in zip(batch, model.look(batch), strict=True):
                yield picture, look
                progress.advance()
                if picture.change:
                    changed.append(picture)
        progress.advance(len(source.skipped) - left_out)
    _say(source, changed, model.spec.factor)


def _say(source: Source, changed: list[Picture], factor: int) -> None:
    for name, reason in source.skipped:
        console.warn(f"skipped {name}: {reason}")
    if len(changed) == 1:
        [picture] = changed
        console.note(f"{picture.name} of {by(picture.original)} pixels: {picture.change} (multiples of {factor} fit)")
    elif changed:
        first = f"{changed[0].name} of {by(changed[0].original)} pixels: {changed[0].change}"
        console.note(f"{len(changed)} images were made to fit (multiples of {factor}), the first, {first}")


def check_out(out: Path, source: Source, outputs: list[Path]) -> None:
    """That files can be written to a folder, and that none of them would replace an image that is read.

    Raises:
        ConfigError: one would, or it cannot be a folder.
    """
    read = {path.resolve() for path in source.paths.values()}
    for path in outputs:
        if path.resolve() in read:
            raise ConfigError(f"{path} would replace an image that is read", "Give another --out")
    writable_folder(out, create=False)


def check_counts(**counts: int | None) -> None:
    """That what was given of these options is at least 1.

    Raises:
        UsageError: one is less.
    """
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}", "It is a number from 1")


def by(size: tuple[int, int]) -> str:
    """A height and width as people write it, width first."""
    return f"{size[1]}x{size[0]}"


def named(names: list[str], most: int = 3) -> str:
    """The first names of a list."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
