"""`uldm vqvae visualize`: for each image its reconstruction, its codes, how often they are used, and the losses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uldm_cli import console
from uldm_cli.errors import UldmError
from uldm_cli.runs.draw.codes import beside, beside_map, draw_posterior, draw_usage, ending_of, rgb
from uldm_cli.runs.draw.page import check_format, write_page
from uldm_cli.runs.draw.plot import DEFAULT, Style, save_figure
from uldm_cli.runs.files import atomic_write, writable_folder, write_png
from uldm_cli.runs.vqvae_look import (
    Autoencoder,
    Picture,
    Request,
    Source,
    check_out,
    looked,
)
from uldm_cli.runs.writer import drop_grey_channel

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from uldm_cli.core.codes import Look

    Bytes = NDArray[np.uint8]

PANELS = ("original", "reconstruction")
CODES = ("_recon.png", "_recon_indices.png", "_code_hist.png", "_loss.txt")
POSTERIOR = ("_recon.png", "_recon_kl.png", "_posterior_hist.png", "_loss.txt")
PLAIN = ("_recon.png", "_recon_panels.png", "_loss.txt")
AS_THEY_ARE = ("_recon.png", "_loss.txt")  # in any format of the others


@dataclass(frozen=True)
class Visualized:
    """What was written about one image."""

    image: str
    files: list[Path]
    original: tuple[int, int]
    """Height and width in the file."""
    size: tuple[int, int]
    """Height and width that the autoencoder was given."""
    change: str
    """What was done to make it fit; empty where nothing was."""
    figures: dict[str, float]
    """By name, as in the file of the losses."""


@dataclass(frozen=True)
class Result:
    """What `visualize` did."""

    model: Autoencoder
    out: Path
    images: list[Visualized]
    source: Source


def visualize(
    path: Path,
    out: Path,
    request: Request,
    style: Style = DEFAULT,
    *,
    form: str = "png",
) -> Result:
    """Writes what an autoencoder makes of an image, or of each in a folder.

    Args:
        path: of a file or a folder.
        out: the folder to write to.
        request: which autoencoder looks, and how it is shown images.
        style: of the sheets and histograms.
        form: theirs, one of FORMATS; the reconstruction alone is a PNG in any case.

    Raises:
        UsageError: no such images or model, or `out` cannot be written to.
    """
    check_format(form)
    writable_folder(out, create=False)
    source = Source.of(path, out)
    opened = request.open()
    stems = source.stems
    endings = endings_of(opened)
    written = [ending if ending in AS_THEY_ARE else ending.replace(".png", f".{form}") for ending in endings]
    outputs = {name: [out / f"{stem}{ending}" for ending in written] for name, stem in stems.items()}
    source.say_shared()
    check_out(out, source, [file for files in outputs.values() for file in files])
    done = []
    for picture, look in looked(opened, source, request, "visualizing"):
        files = outputs[picture.name]
        writable_folder(files[0].parent)
        figures = _write(opened, picture, look, files, style)
        done.append(Visualized(picture.name, files, picture.original, picture.size, picture.change, figures))
    if endings is PLAIN:
        console.note(f"{opened.name} has neither a codebook nor a posterior: reconstructions only")
    elif endings is POSTERIOR:
        console.note(f"{opened.name} has no codebook: its posterior is drawn instead")
    return Result(opened, out, done, source)


def heading(name: str, model: Autoencoder) -> str:
    """The first line of a plot's title: which image, and by which model."""
    return f"{ending_of(name, 40)}, by {ending_of(model.name, 40)}"


def endings_of(model: Autoencoder) -> tuple[str, ...]:
    """What follows the stem in the names of an image's files."""
    from uldm_cli.core.autoencoders import KL

    if model.has_codes:
        return CODES
    return POSTERIOR if isinstance(model.module, KL) else PLAIN


def pixel_figures(original: Bytes, recon: Bytes) -> dict[str, float]:
    """How near a reconstruction is, both `[H, W, C]` of 8 bits: `psnr` in dB, `l1` as a share of the full range."""
    import numpy as np

    difference = (original.astype(np.float64) - recon.astype(np.float64)) / 255
    squared = float(np.mean(difference**2))
    return {"psnr": -10 * math.log10(squared) if squared else math.inf, "l1": float(np.mean(np.abs(difference)))}


def recon_bytes(look: Look, name: str) -> Bytes:
    """The reconstruction as 8 bits, `[H, W, C]`.

    Raises:
        UldmError: it is not a number everywhere.
    """
    from uldm_cli.core.images import to_uint8

    try:
        recon: Bytes = to_uint8(look.recon[None])[0]
    except UldmError as error:
        raise UldmError(f"the reconstruction of {name} contains NaN", "The model is damaged") from error
    return recon


def _write(model: Autoencoder, picture: Picture, look: Look, files: list[Path], style: Style) -> dict[str, float]:
    original: Bytes = picture.pixels.permute(1, 2, 0).numpy()
    recon = recon_bytes(look, picture.name)
    about = model.about("visualize", image=picture.name)
    write_png(files[0], drop_grey_channel(recon), about)
    pair = [rgb(original), rgb(recon)]
    figures = dict(look.losses)
    if look.indices is not None:
        figures |= _write_codes(model, picture.name, look, pair, (files[1], files[2]), about, style)
    elif look.logvar is not None:
        _write_posterior(model, picture.name, look, pair, (files[1], files[2]), about, style)
    else:
        title = heading(picture.name, model)
        write_page(beside(pair, PANELS, title, style=style), files[1], {"title": title, **about}, style)
    figures |= pixel_figures(original, recon)
    lines = "".join(f"{name} {value:.8g}\n" for name, value in figures.items())
    atomic_write(files[-1], lambda file: file.write(lines.encode()))
    return figures


def _write_codes(
    model: Autoencoder,
    name: str,
    look: Look,
    pair: list[Bytes],
    files: tuple[Path, Path],
    about: dict[str, str],
    style: Style,
) -> dict[str, float]:
    """The map of the codes' indices and their histogram; returns what is counted in them."""
    import torch

    from uldm_cli.core.quantizers import perplexity

    module: Any = model.module
    size = module.quantize.codebook_size
    indices = look.indices
    assert indices is not None
    scale = (0.0, float(max(size - 1, 1)))
    title = heading(name, model)
    drawn = beside_map(pair, indices.numpy(), scale, (*PANELS, "code indices"), title, style)
    write_page(drawn, files[0], {"title": title, **about}, style)
    counts = torch.bincount(indices.flatten(), minlength=size)
    counted = {"perplexity": float(perplexity(counts)), "codes_used": int((counts > 0).sum())}
    said = f"{counted['codes_used']:,} of {size:,} codes used, perplexity {counted['perplexity']:.1f}"
    plot = draw_usage(
        counts.numpy(),
        f"{title}\n{said}",
        f"uses in {indices.numel():,} latents",
        dead=False,
        style=style,
    )
    save_figure(plot, files[1], {"title": f"Codes of {name}", **about}, style)
    return counted


def _write_posterior(
    model: Autoencoder,
    name: str,
    look: Look,
    pair: list[Bytes],
    files: tuple[Path, Path],
    about: dict[str, str],
    style: Style,
) -> None:
    """The map of the divergence, and the histograms of means and deviations."""
    from uldm_cli.core.autoencoders import divergence

    assert look.logvar is not None
    nats = divergence(look.latent, look.logvar).sum(0).numpy()
    labels = (*PANELS, "KL divergence, nats")
    drawn = beside_map(pair, nats, (0.0, float(nats.max())), labels, heading(name, model), style)
    write_page(drawn, files[0], {"title": heading(name, model), **about}, style)
    deviation = (0.5 * look.logvar).exp().numpy()
    each = look.losses["kl"] / look.latent.numel()
    title = f"{heading(name, model)}\n{look.latent.numel():,} latents, {each:.3g} nats each from a standard normal"
    plot = draw_posterior(look.latent.numpy(), deviation, title, style)
    save_figure(plot, files[1], {"title": f"Posterior of {name}", **about}, style)
