"""`uldm viz lpips`: how different two images look, or all images of two folders, and where they differ."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from uldm_cli import console
from uldm_cli.errors import ConfigError, UsageError
from uldm_cli.runs.draw.codes import ending_of
from uldm_cli.runs.draw.heatmap import draw_heatmap
from uldm_cli.runs.draw.overlay import check_colormap, colored
from uldm_cli.runs.draw.plot import DEFAULT, FORMATS, Style, save_figure
from uldm_cli.runs.files import writable_folder, write_png
from uldm_cli.runs.perceptual import Backbone, Metric, load_metric

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

HEATMAP = Path("lpips_heatmap.png")
RANDOM_SIDE = 256


@dataclass(frozen=True)
class Look:
    """How images are compared and drawn."""

    backbone: Backbone = field(default_factory=Backbone)
    size: int | None = None
    """Side in pixels of the centre squares that are compared; None compares whole images at the first one's size."""
    colormap: str = "gray"
    scale: float | None = None
    """The difference that is drawn brightest; None: the largest of each picture."""
    device: str = "auto"
    style: Style = DEFAULT
    """Of a heatmap with title and colour bar, which an SVG or PDF is."""


@dataclass(frozen=True)
class Compared:
    """A pair of images."""

    name: str
    distance: float
    size: tuple[int, int]
    """Height and width that were compared, in pixels."""
    resized: bool
    """Whether the second image had another size than the first, to which it was brought."""
    map: NDArray[np.float32]
    """How much each pixel differs, `[height, width]`."""


@dataclass(frozen=True)
class Pair:
    """What came of two images."""

    metric: Metric
    compared: Compared
    heatmap: Path
    scale: float


@dataclass(frozen=True)
class Folders:
    """What came of two folders."""

    metric: Metric
    rows: tuple[tuple[str, float], ...]
    """Names and distances, the largest first."""
    resized: tuple[str, ...]
    """Names of the pairs of which an image was resized."""
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    unusable: tuple[tuple[str, str], ...]
    """Names and reasons of the pairs that could not be compared."""
    heatmaps: Path | None


def compare_images(first: Path, second: Path, look: Look, out: Path = HEATMAP) -> Pair:
    """Compares two images and draws where they differ.

    Raises:
        UsageError: an image cannot be read or is too small; the picture cannot be written.
    """
    images = _read(first, look.size), _read(second, look.size)
    return _drawn(f"{first}, {second}", images, look, out)


def compare_random(look: Look, out: Path = HEATMAP, *, seed: int = 0) -> Pair:
    """Compares two images of uniform noise, RANDOM_SIDE pixels a side unless the look has a size: a trial run."""
    import torch

    side = look.size or RANDOM_SIDE
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(0, 256, (2, 3, side, side), generator=generator, dtype=torch.uint8)
    return _drawn(f"two random images of seed {seed}", (first, second), look, out)


def compare_folders(first: Path, second: Path, look: Look, out: Path | None = None) -> Folders:
    """Compares the images that have the same name in two folders, whatever their format, sub-folders too.

    Args:
        first: a folder.
        second: a folder.
        look: how to compare.
        out: a folder for a heatmap of each pair; None draws none.

    Raises:
        UsageError: a folder holds no images, no name is in both, or no pair can be compared.
    """
    check_colormap(look.colormap)
    there, here = _images(first), _images(second)
    names = sorted(there.keys() & here.keys())
    if not names:
        one, other = next(iter(there.values())), next(iter(here.values()))
        raise UsageError(f"no image of {first} has the name of one of {second}: {one} there, {other} here")
    if out is not None:
        writable_folder(out)
    metric = load_metric(look.backbone, device=look.device)
    found: list[tuple[str, float, bool]] = []
    unusable: list[tuple[str, str]] = []
    with console.progress(len(names), "comparing", "pairs") as progress:
        for name in names:
            try:
                images = _read(first / there[name], look.size), _read(second / here[name], look.size)
                compared = _compare(name, images, metric)
            except UsageError as error:
                unusable.append((name, error.message))
            else:
                found.append((name, compared.distance, compared.resized))
                if out is not None:
                    _draw(compared, look, metric, out / f"{name}.png")
            progress.advance()
    if not found:
        raise UsageError(f"none of the {len(names)} pairs can be compared; the first: {unusable[0][1]}")
    return Folders(
        metric,
        rows=tuple(sorted(((name, distance) for name, distance, _ in found), key=lambda row: (-row[1], row[0]))),
        resized=tuple(name for name, _, resized in found if resized),
        only_first=tuple(there[name] for name in sorted(there.keys() - here.keys())),
        only_second=tuple(here[name] for name in sorted(here.keys() - there.keys())),
        unusable=tuple(unusable),
        heatmaps=out,
    )


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and its sub-folders, sorted; hidden ones are passed over.

    Raises:
        UsageError: there are none, or the folder cannot be read.
    """
    from uldm_cli.core.images import EXTENSIONS

    try:
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be read ({error.strerror})", "Check its permissions") from error
    shown = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not shown:
        raise UsageError(f"no images in {folder}", f"Looked for {' '.join(sorted(EXTENSIONS))}, in sub-folders too")
    return shown


def _images(folder: Path) -> dict[str, str]:
    """The images in a folder, by their path in it without the ending.

    Raises:
        UsageError: there are none, or two differ by the ending alone.
    """
    found: dict[str, str] = {}
    for path in image_files(folder):
        relative = path.relative_to(folder)
        name = relative.with_suffix("").as_posix()
        if name in found:
            hint = "Images are paired by their names without the ending"
            raise UsageError(f"{folder} holds both {found[name]} and {relative.as_posix()}", hint)
        found[name] = relative.as_posix()
    return found


def _read(path: Path, size: int | None) -> Tensor:
    from uldm_cli.core.images import decode_image

    return decode_image(path, size=size)


def _drawn(name: str, images: tuple[Tensor, Tensor], look: Look, out: Path) -> Pair:
    if out.suffix.lower().removeprefix(".") not in FORMATS:
        what = f"--out {out}: the heatmap of two images is a .png, or with title and colour bar a .svg or .pdf"
        raise ConfigError(what, "Choose a name with one of these endings")
    check_colormap(look.colormap)
    writable_folder(out.parent)
    metric = load_metric(look.backbone, device=look.device)
    compared = _compare(name, images, metric)
    return Pair(metric, compared, out, _draw(compared, look, metric, out))


def _compare(name: str, images: tuple[Tensor, Tensor], metric: Metric) -> Compared:
    """Distance and map of two images, uint8 `[3, H, W]`; the second is brought to the first's size."""
    import torch

    from uldm_cli.core.lpips import full_precision, spatial_map, total

    first, second = images
    size = (first.shape[1], first.shape[2])
    resized = second.shape != first.shape
    if resized:
        second = _fitted(second, size)
    least = metric.module.backbone.smallest
    if min(size) < least:
        what = f"{name}: compared at {size[1]}x{size[0]} pixels, and {metric.title} needs {least} a side"
        raise UsageError(what, "Give --size 64 or more")
    device = next(metric.module.parameters()).device
    x0, x1 = (image[None].to(device).float() / 127.5 - 1 for image in (first, second))
    with torch.inference_mode(), full_precision():
        differences = metric.module.differences(x0, x1)
        distance, places = total(differences).item(), spatial_map(differences, size)[0, 0]
    return Compared(name, distance, size, resized, places.cpu().numpy())


def _fitted(image: Tensor, size: tuple[int, int]) -> Tensor:
    """An image at another size (height, width): scaled to fill it, its middle cut out; nothing is distorted."""
    from PIL import Image, ImageOps

    from uldm_cli.core.images import to_tensor

    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    return to_tensor(ImageOps.fit(picture, size[::-1], method=Image.Resampling.LANCZOS))


def _draw(compared: Compared, look: Look, metric: Metric, out: Path) -> float:
    """Writes the heatmap of a pair, and gives the difference that is drawn brightest."""
    high = look.scale if look.scale is not None else float(compared.map.max())
    title = f"{metric.title} of {compared.name}"
    facts = {name: str(value) for name, value in metric.facts.items() if value is not None}
    about = _storable({"title": title, "distance": f"{compared.distance:.6g}", "scale": f"{high:.6g}", **facts})
    writable_folder(out.parent)
    if out.suffix.lower() == ".png":
        picture = colored(compared.map, (0.0, high), look.colormap)
        write_png(out, picture[..., 0] if look.colormap == "gray" else picture, about)
        return high
    named = "\n".join(ending_of(one, 60) for one in compared.name.split(", "))
    titled = f"{metric.title}: {compared.distance:.4f}\n{named}"
    drawn = draw_heatmap(compared.map, high, titled, "difference", look.colormap, look.style)
    save_figure(drawn, out, about, look.style)
    return high


def _storable(about: dict[str, str]) -> dict[str, str]:
    """What a file's text can hold: names of files may be no Unicode."""
    return {name: text.encode("utf-8", "replace").decode() for name, text in about.items()}
