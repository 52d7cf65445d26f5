"""`uldm vqvae reconstruct`: a folder of images as an autoencoder gives them back, and how near they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uldm_cli import console
from uldm_cli.runs.files import writable_folder, write_png
from uldm_cli.runs.vqvae_look import (
    Autoencoder,
    Picture,
    Request,
    Source,
    check_out,
    looked,
    named,
)
from uldm_cli.runs.vqvae_visualize import pixel_figures, recon_bytes
from uldm_cli.runs.writer import Writer, drop_grey_channel

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from uldm_cli.core.lpips import LPIPS

    Bytes = NDArray[np.uint8]

FIGURES = {"psnr": "PSNR, dB", "lpips": "LPIPS (AlexNet)", "l1": "L1, of the full range"}
LEAST_LPIPS = 31  # pixels on a side, below which AlexNet has no features


@dataclass(frozen=True)
class Reconstructed:
    """One image's reconstruction."""

    image: str
    file: Path
    original: tuple[int, int]
    """Height and width in the file."""
    size: tuple[int, int]
    """Height and width that the autoencoder was given."""
    change: str
    """What was done to make it fit; empty where nothing was."""
    figures: dict[str, float]
    """`psnr`, `l1`, and `lpips` unless it is too small for that."""


@dataclass(frozen=True)
class Summary:
    """One figure over all images that have it."""

    mean: float
    least: float
    most: float
    worst: list[str]
    """The images that are farthest from their reconstruction by it, the worst first."""


@dataclass(frozen=True)
class Result:
    """What `reconstruct` did."""

    model: Autoencoder
    out: Path
    images: list[Reconstructed]
    source: Source

    def summaries(self, most: int = 3) -> dict[str, Summary]:
        """Of every figure that was measured, with the `most` worst images of each."""
        found = {}
        for name in FIGURES:
            values = {one.image: one.figures[name] for one in self.images if name in one.figures}
            if values:
                better_is_more = name == "psnr"
                ordered = sorted(values, key=lambda image: values[image], reverse=not better_is_more)
                mean = math.fsum(values.values()) / len(values)
                found[name] = Summary(mean, min(values.values()), max(values.values()), ordered[:most])
        return found


def reconstruct(
    path: Path,
    out: Path,
    request: Request,
) -> Result:
    """Writes the reconstruction of an image, or of each in a folder, under the same names as PNG, and measures it.

    What is measured is the difference of the 8-bit reconstruction to the 8-bit image that the autoencoder was given.

    Args:
        path: of a file or a folder.
        out: the folder to write to.
        request: which autoencoder looks, and how it is shown images.

    Raises:
        UsageError: no such images or model, or `out` cannot be written to.
    """
    from uldm_cli.runs.perceptual import load_lpips

    writable_folder(out, create=False)
    source = Source.of(path, out)
    opened = request.open()
    outputs = {name: out / f"{stem}.png" for name, stem in source.stems.items()}
    source.say_shared()
    check_out(out, source, list(outputs.values()))
    lpips = load_lpips().to(opened.device)
    done = []
    with Writer() as writer:
        for picture, look in looked(opened, source, request, "reconstructing"):
            recon, file = recon_bytes(look, picture.name), outputs[picture.name]
            writable_folder(file.parent)
            writer.submit(write_png, file, drop_grey_channel(recon), opened.about("reconstruct", image=picture.name))
            figures = _measured(picture, recon, lpips)
            done.append(Reconstructed(picture.name, file, picture.original, picture.size, picture.change, figures))
    small = [one.image for one in done if "lpips" not in one.figures]
    if small:
        console.warn(f"no LPIPS of {named(small)}: AlexNet needs {LEAST_LPIPS} pixels on a side")
    return Result(opened, out, done, source)


def _measured(picture: Picture, recon: Bytes, lpips: LPIPS) -> dict[str, float]:
    import torch

    from uldm_cli.core.training import to_float

    figures = pixel_figures(picture.pixels.permute(1, 2, 0).numpy(), recon)
    if min(picture.size) >= LEAST_LPIPS:
        pair: Any = torch.stack([picture.pixels, torch.from_numpy(recon).permute(2, 0, 1)])
        pair = to_float(pair.to(lpips.device))
        with torch.no_grad():
            figures["lpips"] = float(lpips(pair[:1], pair[1:]))
    return figures
