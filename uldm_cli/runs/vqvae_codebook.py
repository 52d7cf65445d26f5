"""`uldm vqvae codebook`: how the codes are used, how they lie, and what each draws alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uldm_cli import console, registry
from uldm_cli.errors import ConfigError
from uldm_cli.runs.draw.codes import draw_map, draw_tiles, draw_usage, ending_of, rgb
from uldm_cli.runs.draw.page import check_format, write_page
from uldm_cli.runs.draw.plot import DEFAULT, Style, save_figure
from uldm_cli.runs.files import writable_folder
from uldm_cli.runs.vqvae_look import BATCH_SIZE, Autoencoder, Request, check_counts

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from uldm_cli.core.data import ImageSet

PAGE = 256  # codes on a picture
PICTURE = 32  # pixels on a side of what is shown of a code, about
AT_ONCE = 64  # codes


@dataclass(frozen=True)
class Usage:
    """How often each code is used."""

    counts: NDArray[np.floating[Any]]
    """`[K]`; zero is a dead code."""
    of: str
    """Where they were counted."""
    perplexity: float
    images: int
    skipped: list[tuple[str, str]]

    @property
    def dead(self) -> list[int]:
        """The codes that are not used."""
        return [code for code, count in enumerate(self.counts) if count == 0]


@dataclass(frozen=True)
class Result:
    """What `codebook` did."""

    model: Autoencoder
    usage: Usage | None
    size: int
    dim: int
    files: list[Path]


@dataclass(frozen=True)
class Pages:
    """Where the files are written, and how."""

    folder: Path
    form: str
    about: dict[str, str]
    style: Style

    def path(self, stem: str) -> Path:
        """Of a file."""
        return self.folder / f"{stem}.{self.form}"


class Spread:
    """So many images of a set, evenly spread over it."""

    def __init__(self, images: ImageSet, num: int) -> None:
        self._images = images
        self._indices = [i * len(images) // num for i in range(num)]
        self.classes, self.channels, self.size, self.skipped = (
            images.classes,
            images.channels,
            images.size,
            images.skipped,
        )

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._images[self._indices[index]]


def codebook(
    out: Path,
    request: Request,
    *,
    data: str | None = None,
    num: int | None = None,
    every: bool = False,
    style: Style = DEFAULT,
    form: str = "png",
) -> Result:
    """Draws a codebook.

    Args:
        out: the folder to write to.
        request: which autoencoder looks, and how it is shown images.
        data: what use is counted over: a folder, .tar or .zip of images, or a kind of data set. Without it, the moving
            average that training kept is taken, which an EMA codebook has.
        num: count over so many images, evenly spread over the data; None is all of them.
        every: draw every code alone, 256 a page, not the most used 256 only.
        style: of the plots and the pages.
        form: their format, one of FORMATS.

    Raises:
        ConfigError: no such model or data, no codebook, or `out` cannot be written to.
    """
    check_format(form)
    check_counts(num=num)
    if num is not None and data is None:
        raise ConfigError("--num without --data: there are no images to count over", "Give --data PATH")
    writable_folder(out, create=False)
    opened = request.open()
    opened.need_codes()
    usage = _counted(opened, data, num, request.batch_size) if data is not None else _of_training(opened)
    writable_folder(out)
    module: Any = opened.module
    size, dim = module.quantize.codebook_size, module.quantize.dim
    pages = Pages(out, form, opened.about("codebook"), style)
    files = [*_draw_usage(opened, usage, pages), _draw_map(opened, usage, pages)]
    files += _draw_codes(opened, usage, pages, every=every)
    return Result(opened, usage, size, dim, files)


def _counted(model: Autoencoder, data: str, num: int | None, batch_size: int | None) -> Usage:
    """How often each code is used in images, made square at the size of the training."""
    import torch

    from uldm_cli.core.data import sequential
    from uldm_cli.core.training import to_float

    images = _open(model, data)
    if num is not None and num < len(images):
        images = Spread(images, num)
    module: Any = model.module
    counts = torch.zeros(module.quantize.codebook_size, dtype=torch.int64)
    skipped, read = list(images.skipped), 0
    at_once = batch_size or max(1, BATCH_SIZE * 256 * 256 // max(model.image_size, 256) ** 2)
    with console.progress(len(images), "counting codes", "images") as progress, torch.no_grad():
        for batch in sequential(images, batch_size=at_once):
            indices = module.encode_with_indices(to_float(batch.image.to(model.device)))[2]
            counts += torch.bincount(indices.flatten().cpu(), minlength=len(counts))
            skipped += batch.skipped
            read += len(batch)
            progress.advance(len(batch))
    for name, reason in skipped:
        console.warn(f"skipped {name}: {reason}")
    return _usage(
        counts,
        f"{read:,} {'image' if read == 1 else 'images'} of {ending_of(Path(data).name or data, 40)}",
        read,
        skipped,
    )


def _of_training(model: Autoencoder) -> Usage | None:
    """What training kept; None where it keeps nothing."""
    from uldm_cli.core.quantizers import EMAQuantizer

    module: Any = model.module
    quantizer = module.quantize
    if not isinstance(quantizer, EMAQuantizer):
        console.note("how often codes are used is not known: count it over images with --data")
        return None
    counts = quantizer.cluster_size.float().cpu().clone()
    counts[counts < max(1e-5, quantizer.revive_below * float(counts.mean()))] = 0  # what training revives is dead
    return _usage(counts, "the end of its training, a moving average", 0, [])


def _usage(counts: torch.Tensor, of: str, images: int, skipped: list[tuple[str, str]]) -> Usage:
    from uldm_cli.core.quantizers import perplexity

    return Usage(counts.double().numpy(), of, float(perplexity(counts)), images, skipped)


def _open(model: Autoencoder, data: str) -> ImageSet:
    """The images that `--data` names, as large as those of the model's training."""
    from pydantic import ValidationError

    from uldm_cli.core.data import open_images

    size, channels = model.image_size, model.spec.in_channels
    if data in registry.kinds("datasets") and data != "images" and not Path(data).exists():
        try:
            spec = registry.load("datasets", data).model_validate({"kind": data, "size": size, "channels": channels})
        except ValidationError as error:
            text = error.errors()[0]["msg"]
            raise ConfigError(f"--data {data} cannot be had for {model.name}: {text}", "Give a folder") from error
        images: ImageSet = spec.build()
        return images
    return open_images(data, size=size, channels=channels)


def _draw_usage(model: Autoencoder, usage: Usage | None, pages: Pages) -> list[Path]:
    if usage is None:
        return []
    size, dead = len(usage.counts), len(usage.dead)
    counted = f"{size - dead:,} of {size:,} codes used, {dead:,} dead; perplexity {usage.perplexity:.1f}"
    title = f"{ending_of(model.name, 40)}: {counted}\nover {usage.of}"
    plot = draw_usage(usage.counts, title, "uses" if usage.images else "uses a step", dead=True, style=pages.style)
    path = pages.path("codebook_usage")
    save_figure(plot, path, {"title": "Use of the codes", **pages.about, "counted over": usage.of}, pages.style)
    return [path]


def _draw_map(model: Autoencoder, usage: Usage | None, pages: Pages) -> Path:
    from uldm_cli.core.codes import principal

    module: Any = model.module
    codes = module.quantize.codes.detach().cpu().numpy()
    points, shares = principal(codes)
    title = f"The {len(codes):,} codes of {ending_of(model.name, 40)}" + (f"\nuse over {usage.of}" if usage else "")
    plot = draw_map(points, shares, usage.counts if usage else None, title, pages.style)
    path = pages.path("codebook_map")
    save_figure(plot, path, {"title": "Map of the codes", **pages.about}, pages.style)
    return path


def _draw_codes(model: Autoencoder, usage: Usage | None, pages: Pages, *, every: bool) -> list[Path]:
    """The pages of what codes draw alone, the most used first; by number where use is not known."""
    import numpy as np
    import torch

    from uldm_cli.core.codes import code_pictures
    from uldm_cli.core.images import to_uint8

    module: Any = model.module
    count = module.quantize.codebook_size
    order = np.argsort(-usage.counts, kind="stable") if usage else np.arange(count)
    shown = order if every else order[:PAGE]
    side = max(2, PICTURE // model.spec.factor)
    pictures: list[Any] = []
    with console.progress(len(shown), "decoding codes", "codes") as progress:
        for start in range(0, len(shown), AT_ONCE):
            chosen = torch.from_numpy(shown[start : start + AT_ONCE]).to(model.device)
            drawn = code_pictures(module, chosen, 2 * side)
            edge = drawn.shape[-1] // 4  # of what lies at an edge, the edge decides more than the code
            pictures += [rgb(picture) for picture in to_uint8(drawn[..., edge:-edge, edge:-edge])]
            progress.advance(len(chosen))
    by = "the most used first" if usage else "in the codebook's order"
    files = []
    for number, start in enumerate(range(0, len(shown), PAGE), start=1):
        page = slice(start, start + PAGE)
        path = pages.path("codebook_codes" if number == 1 else f"codebook_codes_{number}")
        sheet = draw_tiles(
            pictures[page], [str(code) for code in shown[page]], _title(model, by, start, shown), style=pages.style
        )
        latents = f"the centre of {2 * side}x{2 * side} of one code"
        write_page(sheet, path, {"title": "The codes", **pages.about, "latents": latents}, pages.style)
        files.append(path)
    return files


def _title(model: Autoencoder, by: str, start: int, shown: NDArray[np.integer[Any]]) -> str:
    """Of a page of codes' pictures."""
    module: Any = model.module
    all_of_them = module.quantize.codebook_size
    name = ending_of(model.name, 40)
    count = min(PAGE, len(shown) - start)
    part = "" if count == all_of_them else f", {start + 1:,} to {start + count:,} of {all_of_them:,}"
    return f"What each code of {name} draws alone{part}\nBelow each its id in the codebook; {by}"
