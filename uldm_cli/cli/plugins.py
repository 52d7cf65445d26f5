"""`uldm plugins`: what is installed, from metadata alone; no plugin is imported."""

from dataclasses import asdict
from typing import Annotated

import typer

from uldm_cli import console, registry
from uldm_cli.cli.options import Command, Json, Quiet

app = typer.Typer(no_args_is_help=True)

Everything = Annotated[bool, typer.Option("--all", "-a", metavar="", help="Also what is built in.")]


@app.command("list", cls=Command, epilog="\nExample:\n  uldm plugins list --all\n")
def list_(everything: Everything = False, json: Json = False, quiet: Quiet = False) -> None:
    """List the plugins' samplers, models, data sets and commands, and what keeps any from being used."""
    entries = [entry for entry in registry.entries() if everything or not entry.builtin]
    plugins = {entry.distribution for entry in entries if not entry.builtin}
    console.result(
        {"entries": [asdict(entry) for entry in entries]},
        columns=("group", "kind", "distribution", "version", "target", "status"),
        rows=[
            (entry.group, entry.kind, entry.distribution, entry.version, entry.target, entry.status)
            for entry in entries
        ],
        summary=f"{len(plugins)} plugin{'s' * (len(plugins) != 1)} installed"
        + ("" if everything else "; --all also lists what is built in"),
    )
