"""`uldm vqvae visualize`, `reconstruct`, `codebook`, `latents` and `interpolate`: looking into an autoencoder."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from uldm_cli import console
from uldm_cli.cli.options import Command, Device, Dpi, FontSize, Json, Quiet, ShowInline

if TYPE_CHECKING:
    from uldm_cli.runs import vqvae_codebook, vqvae_latents, vqvae_reconstruct, vqvae_visualize
    from uldm_cli.runs.vqvae_look import Source

_OUTPUT = "Output"
_MACHINE = "Machine"

Images = Annotated[Path, typer.Argument(metavar="PATH", help="An image, or a folder of them, sub-folders too.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="REF",
        help="A .safetensors or .ckpt file, a run's folder, zoo:NAME, hf://owner/name, or an embedded model (default: "
        "the newest `uldm vqvae train` run, else the embedded fruits64).",
        show_default=False,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="YAML", help="A training config: the model of its run; or a published checkpoint's."
    ),
]
Size = Annotated[
    int | None,
    typer.Option(
        "--size",
        metavar="N",
        help="Scale the short side to N pixels (default: as it is, up to 768x768 pixels in all).",
    ),
]
Folder = Annotated[
    Path, typer.Option("--out", "--outdir", metavar="DIR", help="Where to write.", rich_help_panel=_OUTPUT)
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        metavar="N",
        help="Images computed at once (default: 16, fewer of more than 256x256 pixels).",
        rich_help_panel=_MACHINE,
    ),
]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="png|svg|pdf",
        help="Of the plots and sheets (default: png).",
        show_default=False,
        rich_help_panel=_OUTPUT,
    ),
]

EXAMPLES = {
    "visualize": """
Examples:
  uldm vqvae visualize photo.jpg                             four files in viz_out: photo_recon.png, ...
  uldm vqvae visualize photos --model outputs/vqvae-mine --out looked
  uldm vqvae visualize photos --model zoo:kl-f8              no codebook: the posterior instead of the codes
  uldm vqvae visualize photo.jpg --format pdf                the sheet and the histogram, with text that stays text

Written of each image: NAME_recon.png; NAME_recon_indices.png, the codes beside it; NAME_code_hist.png, how often each
is used; NAME_loss.txt. Of a model with a posterior: NAME_recon_kl.png and NAME_posterior_hist.png in their place.
NAME_recon.png is a PNG in any --format. Images keep their size, but for edges cut so that the model's factor divides
it. Of files that differ in the ending alone, NAME keeps it.
""",
    "reconstruct": """
Examples:
  uldm vqvae reconstruct photos --out reconstructed          the same names, as .png
  uldm vqvae reconstruct photos --size 256 --json            PSNR, LPIPS and L1 of each

Compared are the 8-bit images: what the model was given, and what it gave back.
""",
    "codebook": """
Examples:
  uldm vqvae codebook --data photos                          how often photos use each code
  uldm vqvae codebook --data photos.tar --num 1000 --all     fewer images, every code's picture
  uldm vqvae codebook                                        use as training counted it, if it did

Written: codebook_usage.png, codebook_map.png (the codes along their two principal components) and codebook_codes.png,
what each draws when it fills the latents alone.
""",
    "latents": """
Examples:
  uldm vqvae latents photo.jpg                               viz_out/photo_latents.png
  uldm vqvae latents a.png b.png --scale 3 --out latents.svg
""",
    "interpolate": """
Examples:
  uldm vqvae interpolate a.png b.png                         viz_out/a_to_b.png, eight pictures
  uldm vqvae interpolate a.png b.png --steps 12 --out strip.pdf
""",
}


def add_to(app: typer.Typer) -> None:
    """Mounts the commands."""
    abouts: dict[Callable[..., None], str] = {
        visualize: "Draw what an autoencoder makes of images: reconstructions, codes, losses.",
        reconstruct: "Write the reconstructions of a folder of images, and measure them.",
        codebook: "Draw a codebook: its use, a map of the codes, what each draws.",
        latents: "Draw the latents of images, channel by channel.",
        interpolate: "Draw what lies between two images in the latents.",
    }
    for command, about in abouts.items():
        app.command(cls=Command, help=about, epilog=EXAMPLES[command.__name__])(command)


def visualize(
    path: Images,
    model: Model = None,
    config: Config = None,
    size: Size = None,
    out: Folder = Path("viz_out"),
    form: Format = "png",
    dpi: Dpi = 150,
    font_size: FontSize = 9.0,
    show_inline: ShowInline = False,
    json: Json = False,
    quiet: Quiet = False,
    device: Device = None,
    batch_size: BatchSize = None,
) -> None:
    from uldm_cli.runs.draw.plot import Style
    from uldm_cli.runs.vqvae_look import Request
    from uldm_cli.runs.vqvae_visualize import visualize

    request = Request(model, config, device, size, batch_size)
    _show_visualized(visualize(path, out, request, Style(dpi, font_size), form=form), inline=show_inline)


def _show_visualized(result: "vqvae_visualize.Result", *, inline: bool) -> None:
    names = list(dict.fromkeys(name for one in result.images for name in one.figures))
    data = {
        "command": "vqvae visualize",
        "model": result.model.name,
        "out": result.out,
        "images": [
            {
                "image": one.image,
                "files": one.files,
                "original_size": one.original[::-1],
                "size": one.size[::-1],
                "change": one.change,
                **one.figures,
            }
            for one in result.images
        ],
        "skipped": _skipped(result.source),
    }
    shown = result.images[:MOST_ROWS]
    files = sum(len(one.files) for one in result.images)
    console.result(
        data,
        columns=("image", *(LABELS.get(name, name) for name in names)),
        rows=[(one.image, *(one.figures.get(name) for name in names)) for one in shown],
        summary=_summary(f"{files} files in {result.out}", len(result.images), len(shown), result.source),
    )
    if inline:
        for one in shown:
            console.picture(one.files[1])


def reconstruct(
    path: Images,
    model: Model = None,
    config: Config = None,
    size: Size = None,
    out: Folder = Path("outputs/vqvae-reconstruct"),
    json: Json = False,
    quiet: Quiet = False,
    device: Device = None,
    batch_size: BatchSize = None,
) -> None:
    from uldm_cli.runs.vqvae_look import Request
    from uldm_cli.runs.vqvae_reconstruct import reconstruct

    _show_reconstructed(reconstruct(path, out, Request(model, config, device, size, batch_size)))


def _show_reconstructed(result: "vqvae_reconstruct.Result") -> None:
    from dataclasses import asdict

    from uldm_cli.runs.vqvae_reconstruct import FIGURES

    summaries = result.summaries()
    data = {
        "command": "vqvae reconstruct",
        "model": result.model.name,
        "out": result.out,
        "summary": {
            name: {"mean": one.mean, "min": one.least, "max": one.most, "worst": one.worst}
            for name, one in summaries.items()
        },
        "images": [
            {
                **{name: value for name, value in asdict(one).items() if name != "figures"},
                "original": one.original[::-1],
                "size": one.size[::-1],
                **one.figures,
            }
            for one in result.images
        ],
        "skipped": _skipped(result.source),
    }
    count = len(result.images)
    console.result(
        data,
        columns=("figure", "mean", "min", "max", "worst images" if count > 1 else "image"),
        rows=[(FIGURES[name], one.mean, one.least, one.most, ", ".join(one.worst)) for name, one in summaries.items()],
        summary=_summary(f"{_count(count, 'reconstruction')} in {result.out}", count, count, result.source),
    )


def codebook(
    model: Model = None,
    config: Config = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="PATH",
            help="Images to count over: a folder, .tar or .zip, or a kind of data set (default: what training kept).",
        ),
    ] = None,
    num: Annotated[
        int | None,
        typer.Option("--num", "-n", metavar="N", help="Count over N of them, evenly spread (default: all)."),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", metavar="", help="Draw every code, 256 a page, not the most used 256 alone.")
    ] = False,
    out: Folder = Path("viz_out"),
    form: Format = "png",
    dpi: Dpi = 150,
    font_size: FontSize = 9.0,
    show_inline: ShowInline = False,
    json: Json = False,
    quiet: Quiet = False,
    device: Device = None,
    batch_size: BatchSize = None,
) -> None:
    from uldm_cli.runs.draw.plot import Style
    from uldm_cli.runs.vqvae_codebook import codebook
    from uldm_cli.runs.vqvae_look import Request

    request = Request(model, config, device, batch_size=batch_size)
    style = Style(dpi, font_size)
    result = codebook(out, request, data=data, num=num, every=every, style=style, form=form)
    _show_codebook(result, inline=show_inline)


def _show_codebook(result: "vqvae_codebook.Result", *, inline: bool) -> None:
    usage = result.usage
    data: dict[str, Any] = {
        "command": "vqvae codebook",
        "model": result.model.name,
        "codes": result.size,
        "dim": result.dim,
        "files": result.files,
        "usage": None,
    }
    rows: list[tuple[str, object]] = [("codes", f"{result.size:,} of {result.dim} numbers")]
    if usage:
        data["usage"] = {
            "of": usage.of,
            "images": usage.images or None,
            "perplexity": usage.perplexity,
            "used": result.size - len(usage.dead),
            "dead": usage.dead,
            "counts": usage.counts,
            "skipped": [{"image": name, "reason": reason} for name, reason in usage.skipped],
        }
        rows += [
            ("used", f"{result.size - len(usage.dead):,}, {len(usage.dead):,} dead"),
            ("perplexity", f"{usage.perplexity:.1f}"),
            ("counted over", usage.of),
        ]
    rows += [("written", str(file)) for file in result.files]
    console.result(data, title=f"Codebook of {result.model.name}", rows=rows)
    if inline:
        for file in result.files:
            console.picture(file)


def latents(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Images, or folders of them.")],
    model: Model = None,
    config: Config = None,
    size: Size = None,
    scale: Annotated[
        float | None,
        typer.Option("--scale", metavar="X", help="The value drawn white (default: the largest magnitude)."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="A .png, .svg or .pdf (default: viz_out/NAME_latents.png; of several, viz_out/latents.png).",
            show_default=False,
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    dpi: Dpi = 150,
    font_size: FontSize = 9.0,
    show_inline: ShowInline = False,
    json: Json = False,
    quiet: Quiet = False,
    device: Device = None,
    batch_size: BatchSize = None,
) -> None:
    from uldm_cli.runs.draw.plot import Style
    from uldm_cli.runs.vqvae_latents import latents
    from uldm_cli.runs.vqvae_look import Request

    request = Request(model, config, device, size, batch_size)
    _show_latents(latents(images, out, request, scale=scale, style=Style(dpi, font_size)), inline=show_inline)


def _show_latents(result: "vqvae_latents.Latents", *, inline: bool) -> None:
    data = {
        "command": "vqvae latents",
        "model": result.model.name,
        "file": result.file,
        "images": result.images,
        "shape": result.shape,
        "scale": result.scale,
        "skipped": _skipped(result.source),
    }
    channels, height, width = result.shape
    of = f"{_count(len(result.images), 'image')}, {channels} channels of {width}x{height}"
    console.result(data, summary=f"{of}, white is {result.scale:.3g}: {result.file}")
    if inline:
        console.picture(result.file)


def interpolate(
    first: Annotated[Path, typer.Argument(metavar="A", help="The image to begin with.")],
    last: Annotated[Path, typer.Argument(metavar="B", help="The image to end with.")],
    steps: Annotated[
        int,
        typer.Option("--steps", metavar="N", help="Pictures, with both ends (default: 8).", show_default=False),
    ] = 8,
    model: Model = None,
    config: Config = None,
    size: Size = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="A .png, .svg or .pdf (default: viz_out/A_to_B.png).",
            show_default=False,
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    dpi: Dpi = 150,
    font_size: FontSize = 9.0,
    show_inline: ShowInline = False,
    json: Json = False,
    quiet: Quiet = False,
    device: Device = None,
) -> None:
    from uldm_cli.runs.draw.plot import Style
    from uldm_cli.runs.vqvae_latents import interpolate
    from uldm_cli.runs.vqvae_look import Request

    request = Request(model, config, device, size)
    result = interpolate(first, last, out, request, steps=steps, style=Style(dpi, font_size))
    width, height = result.size[::-1]
    data = {
        "command": "vqvae interpolate",
        "model": result.model.name,
        "file": result.file,
        "steps": result.steps,
        "size": [width, height],
    }
    console.result(data, summary=f"{result.steps} pictures of {width}x{height}: {result.file}")
    if show_inline:
        console.picture(result.file)


MOST_ROWS = 20  # of a table; --json has all
LABELS: Mapping[str, str] = {"codes_used": "codes used", "kl": "KL, nats", "psnr": "PSNR, dB", "l1": "L1"}


def _skipped(source: "Source") -> list[dict[str, str]]:
    return [{"image": name, "reason": reason} for name, reason in source.skipped]


def _summary(done: str, images: int, shown: int, source: "Source") -> str:
    left = f"; the first {shown} of {images} images are shown, --json has all" if shown < images else ""
    skipped = f"; {_count(len(source.skipped), 'image')} skipped" if source.skipped else ""
    return done + skipped + left


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
