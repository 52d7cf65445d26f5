"""`uldm viz nearest`: which training images are nearest to samples, and how near that is among training images."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from uldm_cli import console, registry
from uldm_cli.errors import ConfigError, UsageError, nearest
from uldm_cli.runs.lpips import image_files
from uldm_cli.runs.perceptual import Backbone, Metric, load_metric
from uldm_cli.specs.base import Slot, Spec
from uldm_cli.specs.load import Flag, load_config

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from uldm_cli.core.data import ImageSet
    from uldm_cli.core.nearest import Nearest
    from uldm_cli.runs.draw.plot import Style

By = Literal["pixels", "lpips"]

LARGEST_SIDE = 256  # that is taken over from the data unasked
QUERY_BYTES = 1 << 30  # of vectors held at once; more images than that are searched for in several passes
BATCH_BYTES = 1 << 28
LARGEST_BATCH = 64
NOBODY = -1  # the index of a neighbour that there is not


@dataclass(frozen=True)
class Question:
    """What is looked for."""

    samples: tuple[Path, ...]
    """Image files, and folders of them."""
    data: str
    """A folder, .tar or .zip of images, or a kind of data set."""
    k: int = 4
    size: int | None = None
    """Side of the squares that are compared; None: the data's own, at most LARGEST_SIDE for image files."""
    reference: int = 64
    """How many training images to compare with the rest of them."""
    seed: int = 0
    """Of the choice of these."""
    flip: bool = False
    """Mirror images of training images count, too: where training saw them."""
    backbone: Backbone = field(default_factory=Backbone)
    device: str = "auto"


@dataclass(frozen=True)
class Neighbour:
    """A training image."""

    name: str
    index: int
    distance: float
    mirrored: bool
    """Its mirror image is as near as this."""


@dataclass(frozen=True)
class Sample:
    """An image, and the training images that are nearest to it, the nearest first."""

    name: str
    pixels: tuple[Neighbour, ...]
    lpips: tuple[Neighbour, ...]


@dataclass(frozen=True)
class Typical:
    """How far training images are from their own nearest other one: medians over some of them."""

    pixels: float
    lpips: float
    count: int


@dataclass(frozen=True)
class Answer:
    """What was found."""

    metric: Metric
    count: int
    """How many training images there are."""
    size: int
    samples: tuple[Sample, ...]
    typical: Typical | None
    """None where there is but one training image."""
    skipped: tuple[tuple[str, str], ...]
    """Names and reasons of the training images that could not be read."""
    images: Images
    """For pictures of what was found."""

    def is_near(self, by: By, distance: float) -> bool:
        """Whether this is nearer than training images usually are to each other."""
        return self.typical is not None and distance < getattr(self.typical, by)

    def nearer(self, by: By) -> int:
        """How many samples have a training image nearer than usual."""
        return sum(self.is_near(by, getattr(sample, by)[0].distance) for sample in self.samples)


@dataclass(frozen=True)
class Images:
    """The images that an answer is about, to look at."""

    samples: Tensor
    data: ImageSet

    def sample(self, number: int) -> NDArray[np.uint8]:
        """`[H, W, C]`."""
        return self.samples[number].permute(1, 2, 0).numpy()

    def found(self, neighbour: Neighbour) -> NDArray[np.uint8]:
        """`[H, W, C]`."""
        image = self.data[neighbour.index][0].permute(1, 2, 0).numpy()
        return image[:, ::-1] if neighbour.mirrored else image


class Data(Spec):
    """Only to have `--data` read as everywhere else."""

    kind: Literal["viz-nearest"] = "viz-nearest"
    data: Annotated[Spec, Slot("datasets")]


def search(question: Question) -> Answer:
    """Compares every sample with every training image.

    Raises:
        UsageError: a sample or the data cannot be read, there are fewer training images than are asked for, or the
            images are too small.
    """
    import torch

    files = _sample_files(question.samples)
    data = open_data(question.data, question.size)
    if question.k > len(data):
        raise UsageError(f"--k {question.k}: {question.data} holds {len(data)} images", "Ask for no more than these")
    metric = load_metric(question.backbone, device=question.device)
    _check_size(data, metric, question)
    samples = torch.stack([_read(file, data) for file in files])
    own, reference = _reference(data, question)
    queries = torch.cat([samples, reference])
    own = torch.cat([torch.full((len(files),), -1), own])
    if question.flip:  # each query is mirrored instead of each of the many training images: as far apart by pixels
        queries, own = torch.cat([queries, queries.flip(3)]), own.repeat(2)
    pixels, lpips, skipped = _search(queries, own, data, metric, question.k)
    if question.flip:
        pixels, lpips = _either(pixels), _either(lpips)
    return Answer(
        metric,
        count=len(data) - len(skipped),
        size=data.size,
        samples=tuple(
            Sample(str(file), _neighbours(pixels, i, data), _neighbours(lpips, i, data)) for i, file in enumerate(files)
        ),
        typical=_typical(pixels[0][len(files) :, 0], lpips[0][len(files) :, 0]),
        skipped=(*data.skipped, *skipped),
        images=Images(samples, data),
    )


def open_data(data: str, size: int | None) -> ImageSet:
    """The training images, as squares of `size` pixels, or of the size that they have.

    Raises:
        ConfigError: there is no such folder, archive or kind of data set, or it cannot be read.
    """
    from uldm_cli.core.data import FileImages

    path = Path(data).expanduser()
    kinds = [kind for kind in registry.kinds("datasets") if kind != "images"]
    if path.exists() and data not in kinds:
        given: Any = {"kind": "images", "root": data}
    elif data in kinds or data.startswith("{"):
        given = _parsed(data)
    else:
        near = nearest(data, kinds)
        hint = f"Did you mean {near!r}?" if near else f"Name a folder, .tar or .zip, or one of: {', '.join(kinds)}"
        raise ConfigError(f"--data {data}: there is no such file, folder or data set", hint)
    flags = {"data": Flag("--data", given), "data.size": Flag("--size", size)}
    opened: ImageSet = load_config(Data, None, flags=flags).data.build()
    if size is None and isinstance(opened, FileImages) and given == {"kind": "images", "root": data}:
        opened.size = min(opened.side(0), LARGEST_SIDE)
    return opened


def draw(answer: Answer, question: Question, out: Path, most: int, style: Style) -> int:
    """Writes the picture: a row for each of at most `most` samples; of more, those that are nearest by LPIPS.

    Returns:
        How many samples are in it.
    """
    from uldm_cli.runs.draw.nearest import Cell, Row, draw_nearest
    from uldm_cli.runs.draw.plot import save_figure

    order = sorted(range(len(answer.samples)), key=lambda i: answer.samples[i].lpips[0].distance)
    shown = sorted(order) if len(order) <= most else order[:most]

    def cells(found: Sequence[Neighbour], by: By) -> list[Cell]:
        return [Cell(answer.images.found(one), label(one), answer.is_near(by, one.distance)) for one in found]

    rows = []
    for i in shown:
        sample = answer.samples[i]
        groups = [cells(sample.pixels, "pixels"), cells(sample.lpips, "lpips")]
        rows.append(Row(Cell(answer.images.sample(i), Path(sample.name).name), groups))
    name = Path(question.data).absolute().name if Path(question.data).exists() else question.data
    images = "image" if answer.count == 1 else "images"
    title = f"Nearest of {answer.count:,} training {images} ({name}, {answer.size}x{answer.size})"
    headings = ("sample", "by pixels (RMS difference)", f"by {answer.metric.title}")
    drawn = draw_nearest(rows, headings, title, _notes(answer, question), style)
    save_figure(drawn, out, {"title": title, **{key: str(value) for key, value in answer.metric.facts.items()}}, style)
    return len(shown)


def label(neighbour: Neighbour) -> str:
    """A distance as it is written below a picture, with an arrow where the picture is mirrored."""
    return figure(neighbour.distance) + (" ↔" if neighbour.mirrored else "")


def figure(distance: float) -> str:
    """A distance to three digits; what is below the accuracy of LPIPS's search is 0."""
    return f"{distance:#.3g}" if distance >= 1e-5 else "0"


def _notes(answer: Answer, question: Question) -> list[str]:
    """What a distance in bold means."""
    usual = answer.typical
    notes = ["↔: its mirror image"] if question.flip else []
    if usual:
        what = "bold: nearer than training images usually are to their nearest other one"
        notes.insert(0, f"{what} ({figure(usual.pixels)} by pixels, {figure(usual.lpips)} by LPIPS)")
    return notes


def _parsed(data: str) -> Any:
    """A kind, or a mapping with its settings written as JSON."""
    from json import JSONDecodeError, loads

    if not data.startswith("{"):
        return data
    try:
        return loads(data)
    except JSONDecodeError as error:
        what = f"--data {data}: not JSON ({error.msg} at character {error.pos})"
        raise ConfigError(what, 'Like {"kind": "mnist", "root": "folder"}') from error


def _sample_files(paths: Sequence[Path]) -> list[Path]:
    return [file for path in paths for file in (image_files(path) if path.is_dir() else [path])]


def _check_size(data: ImageSet, metric: Metric, question: Question) -> None:
    least = metric.module.backbone.smallest
    if data.size < least:
        what = f"{question.data}: images of {data.size} pixels, and {metric.title} needs {least} a side"
        raise UsageError(what, f"Give --size {max(least, 32)} or more")


def _read(file: Path, data: ImageSet) -> Tensor:
    from uldm_cli.core.images import decode_image

    return decode_image(file, data.channels, data.size)


def _reference(data: ImageSet, question: Question) -> tuple[Tensor, Tensor]:
    """Some training images drawn at random, and their numbers."""
    import torch

    from uldm_cli.core.images import ImageError

    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(question.seed))
    numbers, images = [], []
    for number in order[: question.reference].tolist() if len(data) > 1 else []:
        try:
            images.append(data[number][0])
        except ImageError:
            continue  # the search names it
        numbers.append(number)
    empty = torch.empty((0, data.channels, data.size, data.size), dtype=torch.uint8)
    return torch.tensor(numbers, dtype=torch.int64), torch.stack(images) if images else empty


Table = tuple["Tensor", "Tensor"]
"""Distances and indices `[Q, k]`."""


def _search(
    queries: Tensor, own: Tensor, data: ImageSet, metric: Metric, k: int
) -> tuple[Table, Table, list[tuple[str, str]]]:
    """By pixels and by LPIPS, and what could not be read; in as many passes over the data as memory asks for."""
    import torch

    from uldm_cli.core.data import sequential
    from uldm_cli.core.nearest import Search, embed

    vector_bytes = 4 * embed(metric.module, queries[:1]).shape[1]
    at_once, batch_size = QUERY_BYTES // vector_bytes or 1, min(BATCH_BYTES // vector_bytes or 1, LARGEST_BATCH)
    parts = list(zip(torch.split(queries, at_once), torch.split(own, at_once), strict=True))
    found: list[Search] = []
    skipped: list[tuple[str, str]] = []
    with console.progress(len(parts) * len(data), "comparing", "images") as progress:
        for some, theirs in parts:
            search = Search(some, theirs, metric.module, k)
            skipped = []
            for batch in sequential(data, batch_size=batch_size):
                search.update(batch.image, batch.number)
                skipped += batch.skipped
                progress.advance(len(batch) + len(batch.skipped))
            found.append(search)
    return _table([one.pixels for one in found]), _table([one.perceptual for one in found]), skipped


def _table(parts: Sequence[Nearest]) -> Table:
    import torch

    return torch.cat([part.distance.cpu() for part in parts]), torch.cat([part.index.cpu() for part in parts])


def _either(table: Table) -> Table:
    """One table of a query's neighbours and those of its mirror image; an index of the latter is `-2 - index`.

    Queries come first, then all of them mirrored. An image that is near both ways counts once.
    """
    import torch

    (straight, mirrored), (index, other) = (part.chunk(2) for part in table)
    again = (other[:, :, None] == index[:, None]) & (mirrored[:, :, None] >= straight[:, None])
    worse = (index[:, :, None] == other[:, None]) & (straight[:, :, None] > mirrored[:, None])
    distance = torch.cat(
        [straight.masked_fill(worse.any(2), torch.inf), mirrored.masked_fill(again.any(2), torch.inf)], 1
    )
    index = torch.cat([index, torch.where(other < 0, other, -2 - other)], 1)
    nearest, where = distance.topk(table[0].shape[1], largest=False)
    return nearest, index.gather(1, where).where(nearest < torch.inf, -1)


def _neighbours(table: Table, query: int, data: ImageSet) -> tuple[Neighbour, ...]:
    distances, indices = (part[query].tolist() for part in table)
    found = []
    for index, distance in zip(indices, distances, strict=True):
        if index != NOBODY:
            number = index if index >= 0 else -2 - index
            found.append(Neighbour(_name(data, number), number, distance, mirrored=index < 0))
    return tuple(found)


def _name(data: ImageSet, index: int) -> str:
    names: Sequence[str] | None = getattr(data, "names", None)
    return names[index] if names else f"number {index}"


def _typical(pixels: Tensor, lpips: Tensor) -> Typical | None:
    if not len(pixels):
        return None
    return Typical(float(pixels.quantile(0.5)), float(lpips.quantile(0.5)), len(pixels))
