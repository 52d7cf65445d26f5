"""`uldm viz trajectory`: a sampling run as a film, and what its numbers did along the steps as a figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from uldm_cli import console
from uldm_cli.errors import ConfigError
from uldm_cli.runs.draw.animation import LARGEST_RATE, draw_frame, enlargement, film_format, write_film
from uldm_cli.runs.draw.latents import draw_latent
from uldm_cli.runs.draw.plot import DEFAULT, Style, picture_format, save_figure
from uldm_cli.runs.files import writable_folder
from uldm_cli.runs.raw import Trajectory, read_trajectory, trajectory_paths

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from uldm_cli.core.lpips import LPIPS
    from uldm_cli.runs.draw.trajectory import Course

    Bytes = NDArray[np.uint8]

DRAWN_FROM_NUMBERS = ("image", "latent")
KINDS = ("image", "latent", "saliency", "attention")
SECONDS = 4.0  # that a film takes where no rate is asked for
SLOWEST, FASTEST = 2.0, 25.0


class Pictures(Protocol):
    """The pictures of one sample."""

    @property
    def steps(self) -> tuple[int, ...]:
        """Completed steps, rising."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of every picture."""

    def picture(self, step: int) -> Bytes:
        """uint8 `[H, W]` or `[H, W, 3]`."""


@dataclass(frozen=True)
class Result:
    """What was written, and of what."""

    film: Path
    figure: Path | None
    """None where there are no numbers to draw."""
    what: str
    samples: tuple[str, ...]
    """Their folders, relative to the run's; "" where the run has one sample."""
    steps: tuple[int, ...]
    fps: float
    courses: tuple[Course, ...] = ()
    """Of each sample, where a figure was drawn."""


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    run: Path
    out: Path | None = None
    """The film; None is `trajectory.gif` in the run's folder, or `trajectory_saliency.gif` and so on."""
    figure: Path | None = None
    """None is a PNG beside the film, of its name."""
    what: str = "image"
    fps: float | None = None
    """Pictures a second; by default what makes the film take SECONDS, in bounds."""
    sample: int | None = None
    """Only this one, from 0."""
    zoom: int | None = None
    """How many times a picture is enlarged; None enlarges small ones."""
    device: str = "auto"
    style: Style = field(default=DEFAULT)

    @property
    def film_path(self) -> Path:
        """Where the film is written."""
        name = "trajectory" if self.what == "image" else f"trajectory_{self.what}"
        return self.out or self.run / f"{name}.gif"

    @property
    def figure_path(self) -> Path:
        """Where the figure is written."""
        if self.figure:
            return self.figure
        film = self.film_path
        return film.with_name(f"{film.stem}{'-plots' if film.suffix.lower() == '.png' else ''}.png")


def run(request: Request) -> Result:
    """Writes the film, and the figure where the run has the numbers for it.

    Raises:
        ConfigError: it is no run, or it has no such pictures; they do not fit together, or one cannot be read; the
            output cannot be written.
    """
    _check(request)
    folders = _chosen(_sample_folders(request.run), request)
    samples = [_pictures(folder, request.what, request.run) for folder in folders]
    steps = _common_steps(folders, samples)
    _same_size(folders, samples)
    fps = request.fps or min(max(len(steps) / SECONDS, SLOWEST), FASTEST)
    for path in (request.film_path, request.figure_path):
        writable_folder(path.parent)
    _film(request, samples, steps, fps)
    courses = _figure(request, folders)
    names = tuple("" if folder == request.run else folder.name for folder in folders)
    figure = request.figure_path if courses else None
    return Result(request.film_path, figure, request.what, names, steps, fps, courses)


def _check(request: Request) -> None:
    """All that can be wrong before a picture is opened."""
    film_format(request.film_path)
    if request.what not in KINDS:
        raise ConfigError(f"--what {request.what}: expected one of {', '.join(KINDS)}")
    if request.fps is not None and not 0 < request.fps <= LARGEST_RATE:
        raise ConfigError(f"--fps {request.fps:g}: expected a rate above 0 and up to {LARGEST_RATE:g}")
    if request.zoom is not None and request.zoom < 1:
        raise ConfigError(f"--zoom {request.zoom}: expected 1 or more")
    picture_format(request.figure_path)
    if request.figure_path.resolve() == request.film_path.resolve():
        raise ConfigError(f"{request.film_path} would be both the film and the figure", "Name one of them otherwise")


def _sample_folders(run: Path) -> list[Path]:
    """Where the samples of a run lie: in folders that are numbered, or in the run's own.

    Raises:
        ConfigError: there is no such folder.
    """
    if not run.is_dir():
        what = "is a file, not the folder of a run" if run.exists() else "does not exist"
        raise ConfigError(f"{run} {what}", "Name the folder that `uldm ldm sample` wrote")
    numbered = sorted(path for path in run.iterdir() if path.is_dir() and path.name.isdecimal())
    return numbered or [run]


def _chosen(folders: list[Path], request: Request) -> list[Path]:
    if request.sample is None:
        return folders
    if not 0 <= request.sample < len(folders):
        counted = f"the samples 0 to {len(folders) - 1}" if len(folders) > 1 else "one sample, 0"
        raise ConfigError(f"--sample {request.sample}: {request.run} has {counted}")
    return [folders[request.sample]]


class Files:
    """Pictures that a run wrote, one file a step."""

    def __init__(self, folder: Path, what: str) -> None:
        self._paths = {step: path for path in folder.glob(f"{what}_step_*.png") if (step := _step_of(path)) is not None}

    @property
    def steps(self) -> tuple[int, ...]:
        """Completed steps, rising."""
        return tuple(sorted(self._paths))

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width. Raises ConfigError where the pictures differ in it, or one is none."""
        sizes = {step: self._size(step) for step in self.steps}
        first = self.steps[0]
        for step, size in sizes.items():
            if size != sizes[first]:
                one, other = (f"{self._paths[n]} has {_pixels(sizes[n])}" for n in (first, step))
                raise ConfigError(f"{one} and {other}: a film has one size", "Sample again into one folder")
        return sizes[first]

    def picture(self, step: int) -> Bytes:
        """uint8 `[H, W]` or `[H, W, 3]`."""
        import numpy as np

        with self._opened(step) as image:
            return np.asarray(image if image.mode == "L" else image.convert("RGB"))

    def _size(self, step: int) -> tuple[int, int]:
        with self._opened(step) as image:
            return image.height, image.width

    @contextmanager
    def _opened(self, step: int) -> Iterator[Any]:
        from PIL import Image

        try:
            with Image.open(self._paths[step], formats=("PNG",)) as image:
                yield image
        except (OSError, SyntaxError, ValueError) as e:
            said = "cannot be read: not a PNG, or damaged"
            raise ConfigError(f"{self._paths[step]} {said}", "Sample again") from e


def _step_of(path: Path) -> int | None:
    """`40` of `image_step_40.png`; None of a grid, which is named alike."""
    text = path.stem.rpartition("_")[2]
    return int(text) if text.isdecimal() else None


class Numbers:
    """Pictures drawn from the numbers that a run wrote."""

    def __init__(self, folder: Path, what: str) -> None:
        self._what, self._read = what, read_trajectory(folder)
        self.steps = self._read.steps
        self.size: tuple[int, int] = self._read.images.shape[1:3]

    def picture(self, step: int) -> Bytes:
        """uint8 `[H, W]` or `[H, W, 3]`."""
        index, read = self.steps.index(step), self._read
        if self._what == "image":
            image: Bytes = read.images[index]
            return image[..., 0] if image.shape[-1] == 1 else image
        return draw_latent((read.x0 if read.about.get("show") == "x0" else read.x_t)[index], self.size)


def _pictures(folder: Path, what: str, run: Path) -> Pictures:
    """The pictures of a sample, from its files or else from its numbers.

    Raises:
        ConfigError: there are neither.
    """
    files = Files(folder, what)
    if files.steps:
        return files
    if what in DRAWN_FROM_NUMBERS and all(path.exists() for path in trajectory_paths(folder)):
        return Numbers(folder, what)
    others = [other for other in KINDS if other != what and Files(folder, other).steps]
    if others:
        raise ConfigError(f"{folder} has no {what}_step_*.png, but pictures of {', '.join(others)}", _how(what, others))
    raise ConfigError(f"{folder} has no pictures of steps", _how(what, []))


def _how(what: str, others: Sequence[str]) -> str:
    if others:
        return f"Try --what {others[0]}"
    if what in ("saliency", "attention"):
        return "Write them with `uldm ldm explain --separate`"
    return "Write them with `uldm ldm sample` and a --step-size above 0"


def _common_steps(folders: Sequence[Path], samples: Sequence[Pictures]) -> tuple[int, ...]:
    steps = samples[0].steps
    for folder, sample in zip(folders, samples, strict=True):
        missing = sorted(set(steps) ^ set(sample.steps))
        if missing:
            has, lacks = (folders[0], folder) if missing[0] in steps else (folder, folders[0])
            raise ConfigError(
                f"{lacks} has no picture of step {missing[0]}, and {has} has one",
                "Go on with --resume, or take --sample",
            )
    return steps


def _same_size(folders: Sequence[Path], samples: Sequence[Pictures]) -> None:
    for folder, sample in zip(folders, samples, strict=True):
        if sample.size != samples[0].size:
            one, other = _pixels(samples[0].size), _pixels(sample.size)
            raise ConfigError(f"{folders[0]} has pictures of {one} and {folder} of {other}", "Choose one with --sample")


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]} pixels"


def _film(request: Request, samples: Sequence[Pictures], steps: Sequence[int], fps: float) -> None:
    zoom = request.zoom or enlargement(samples[0].size, len(samples))
    about = {"title": f"{request.run.resolve().name}: {request.what}"}
    with console.progress(len(steps), "drawing", "pictures") as progress:

        def drawn() -> Iterator[Bytes]:
            for step in steps:
                pictures = [sample.picture(step) for sample in samples]
                yield draw_frame(pictures, zoom, f"step {step} of {steps[-1]}", step / steps[-1])
                progress.advance()

        write_film(request.film_path, drawn(), len(steps), fps, about)


def _figure(request: Request, folders: Sequence[Path]) -> tuple[Course, ...]:
    """Draws the figure and gives what is in it; only says what is missing where there are no numbers."""
    from uldm_cli.runs.draw.trajectory import draw_courses

    lacking = [path for folder in folders for path in trajectory_paths(folder) if not path.exists()]
    if lacking:
        if request.what in DRAWN_FROM_NUMBERS:
            console.note(
                f"no figure of norm, SNR, change and LPIPS: {lacking[0]} is missing; `uldm ldm sample --save "
                "image,trajectory` writes it"
            )
        return ()
    reads = (read_trajectory(folder) for folder in folders)
    first = next(reads)
    courses = []
    with console.progress(len(folders) * len(first.steps), "measuring", "images") as progress:
        measure = _Distance(request.device, progress)
        for folder, read in zip(folders, chain([first], reads), strict=True):
            if read.steps != first.steps:
                what = f"the numbers in {folders[0]} and {folder} are of other steps"
                raise ConfigError(what, "Choose one with --sample")
            courses.append(_course(read, folder.name, measure))
    title = _title(first, courses)
    made = draw_courses(courses, title, request.style)
    about = {name: first.about[name] for name in ("model", "sampler", "show") if name in first.about}
    save_figure(made, request.figure_path, {"title": title, **about}, request.style)
    return tuple(courses)


def _title(read: Trajectory, courses: Sequence[Course]) -> str:
    """What made these numbers: the model, the sampler and its settings, the seeds."""
    import json

    try:
        sampler = json.loads(read.about["sampler"])
    except (KeyError, ValueError):
        sampler = {}
    said = [Path(read.about.get("model", "")).name, str(sampler.pop("kind", "")).upper()]
    if sampler.get("spacing") in ("auto", "uniform"):  # nobody expects another
        del sampler["spacing"]
    for name, value in sampler.items():
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        said.append(f"{shown} steps" if name == "steps" else f"{name} {shown}")
    if len(courses) == 1:
        said.append(courses[0].name)
    return ", ".join(part for part in said if part)


def _course(read: Trajectory, fallback: str, measure: _Distance) -> Course:
    """What the numbers of a sample did along its steps."""
    import numpy as np

    from uldm_cli.runs.draw.trajectory import Course

    def rms(values: NDArray[Any]) -> NDArray[np.float64]:
        roots: NDArray[np.float64] = np.sqrt(np.square(values.astype(np.float64)).mean((1, 2, 3)))
        return roots

    alphas, sigmas = (np.array(values) for values in (read.alphas, read.sigmas))
    with np.errstate(divide="ignore"):
        log_snr = 2 * (np.log(alphas) - np.log(sigmas))
    seed = read.about.get("seed")
    return Course(
        name=f"seed {seed}" if seed is not None and "rng" not in read.about else fallback,
        steps=read.steps,
        norm=rms(read.x_t),
        log_snr=log_snr,
        change=rms(np.diff(read.x_t, axis=0)),
        lpips=measure(read.images),
    )


class _Distance:
    """LPIPS of images to the last of them. The network is loaded when it is first needed; images count as progress."""

    BATCH = 16

    def __init__(self, device: str, progress: console.Progress) -> None:
        self._device, self._progress = device, progress

    @cached_property
    def _network(self) -> LPIPS:
        from uldm_cli.core.device import pick_device
        from uldm_cli.runs.perceptual import load_lpips

        return load_lpips().to(pick_device(self._device))

    def __call__(self, images: Bytes) -> NDArray[np.float64] | None:
        """Of uint8 `[K, H, W, C]`, `[K]`; None where they are too small."""
        import torch

        network = self._network
        if min(images.shape[1:3]) < network.backbone.smallest:
            return None

        def embedded(part: Tensor) -> Tensor:
            return network.embed(part.to(network.device).permute(0, 3, 1, 2) / 255, normalize=True)

        x, found = torch.from_numpy(images), []
        with torch.inference_mode():
            last = embedded(x[-1:])
            for part in torch.split(x, self.BATCH):
                found.append((embedded(part) - last).square().sum(1).double().cpu())
                self._progress.advance(len(part))
        distances: NDArray[np.float64] = torch.cat(found).numpy()
        return distances
