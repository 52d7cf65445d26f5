"""`uldm convert zoo`: the published models, and getting them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from uldm_cli import console
from uldm_cli.cli.app import Group
from uldm_cli.cli.options import Command, Json, Quiet

if TYPE_CHECKING:
    from uldm_cli.runs.zoo import Entry

app = typer.Typer(cls=Group, help="Published models: what there is, and getting it.")

LIST_EXAMPLES = """
Examples:
  uldm convert zoo list
  uldm convert zoo list --json        with all mirrors, files and comments
"""
PULL_EXAMPLES = """
Examples:
  uldm convert zoo pull ffhq256
  uldm convert zoo pull ffhq256 --from ~/Downloads/ffhq.zip
  uldm ldm sample --model zoo:ffhq256
"""


@app.command("list", cls=Command, epilog=LIST_EXAMPLES)
def list_(json: Json = False, quiet: Quiet = False) -> None:
    """List the published models, with what was measured of them and where they are."""
    from uldm_cli.runs import zoo

    entries = zoo.entries()
    if json:
        console.result({"models": [zoo.as_json(entry) for entry in entries]})
        return
    autoencoders = [entry for entry in entries if entry.kind == "autoencoder"]
    models = [entry for entry in entries if entry.kind != "autoencoder"]
    console.result(
        {},
        title="Autoencoders",
        columns=("name", "model", "data", "rFID", "PSNR", "PSIM", "comment"),
        rows=[_autoencoder(entry) for entry in autoencoders],
    )
    console.result(
        {},
        title="Latent diffusion models",
        columns=("name", "task", "data", "model", "comment"),
        rows=[(entry.name, entry.task, entry.data, entry.model, entry.comment) for entry in models],
    )
    console.result(
        {},
        title="As they were sampled, and what was measured",
        columns=("name", "sampler", "steps", "eta", "guidance", "FID", "IS", "precision", "recall"),
        rows=[row for entry in models for row in _figures(entry)],
    )
    here = [entry.name for entry in entries if zoo.folder(entry.name).exists()]
    console.result(
        {},
        title="Where they are",
        columns=("name", "size", "address"),
        rows=[row for entry in entries for row in _places(entry)],
        summary=f"On this machine: {', '.join(here) or 'none yet'}",
    )


@app.command(cls=Command, epilog=PULL_EXAMPLES)
def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="One of `uldm convert zoo list`.", show_default=False)],
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="The archive or checkpoint, if you have downloaded it by hand."),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Download a published model, check and unpack it; a broken download goes on where it stopped.

    It is then called zoo:NAME wherever a model is named.

    Its sha256 is kept when it is pulled first, and checked when it is pulled again.
    """
    from uldm_cli.runs import zoo

    pulled = zoo.pull(name, source)
    if doubt := zoo.doubt(name, pulled):
        console.warn(doubt)
    console.result(
        {"name": name, "model": f"zoo:{name}", **vars(pulled)},
        summary=f"zoo:{name} is {pulled.path} (sha256 {pulled.sha256[:12]}...)",
    )


def _autoencoder(entry: "Entry") -> tuple[object, ...]:
    rfid, psnr, psnr_std, psim, psim_std = (
        f"{entry.figures[name]:.2f}" for name in ("rfid", "psnr", "psnr_std", "psim", "psim_std")
    )
    spreads = (f"{psnr} ± {psnr_std}", f"{psim} ± {psim_std}")
    return (entry.name, entry.model, entry.data, rfid, *spreads, entry.comment)


def _figures(entry: "Entry") -> list[tuple[object, ...]]:
    """A row for the model as it is, and one for the model guided by a classifier, if there are figures for that."""
    sampling = [entry.sampling.get(name) for name in ("sampler", "steps", "eta")]
    scale, classifier_scale = entry.sampling.get("guidance_scale"), entry.figures_guided.get("classifier_scale")
    rows = [(f"scale {scale:g}" if scale else None, entry.figures)] if entry.sampling else []
    rows += [(f"classifier, scale {classifier_scale:g}", entry.figures_guided)] if classifier_scale else []
    return [(entry.name, *sampling, guidance, *_measured(figures)) for guidance, figures in rows]


def _measured(figures: Mapping[str, float]) -> list[str | None]:
    names = ("fid", "is", "precision", "recall")
    return [f"{figures[name]:.2f}" if name in figures else None for name in names]


def _places(entry: "Entry") -> list[tuple[object, ...]]:
    """The rows of one model: its address, then the others, and the licence where it is known."""
    more = [*entry.mirrors]
    more += [f"hf://{entry.hub}"] if entry.hub else []
    more += [f"{what}: {url}" for what, url in entry.extras.items()]
    more += [f"licence: {entry.licence}"] if entry.licence else []
    return [(entry.name, entry.size, entry.url), *(("", None, line) for line in more)]
