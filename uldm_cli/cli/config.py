"""`uldm config`: show, check and begin configs."""

from pathlib import Path
from typing import Annotated

import typer

from uldm_cli import console
from uldm_cli.cli.options import Command, Json, Quiet
from uldm_cli.errors import UsageError

app = typer.Typer(no_args_is_help=True)

Kind = Annotated[
    str,
    typer.Argument(
        metavar="KIND", help="ldm-sample, ldm-explain, ldm-train, vqvae-train or vqvae-encode.", show_default=False
    ),
]

SHOW_EXAMPLES = """
Examples:
  uldm config show ldm-sample sampler=ddpm           the defaults of `uldm ldm sample`, with another sampler
  uldm config show my.yaml train.steps=9             what a file comes to
"""


@app.command(cls=Command, epilog=SHOW_EXAMPLES)
def show(
    target: Annotated[
        str, typer.Argument(metavar="FILE|KIND", help="A YAML file, or a kind for its defaults.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Single settings.", show_default=False)
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print a config with every default written out."""
    from uldm_cli.runs.configs import resolve_config
    from uldm_cli.specs.load import dump_yaml

    config = resolve_config(target, overrides or [])
    if json:
        console.result(config.model_dump(mode="json"))
    else:
        console.text(dump_yaml(config))


@app.command(cls=Command, epilog="\nExample:\n  uldm config validate configs/*.yaml\n")
def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="YAML files.", show_default=False)],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check files; the first mistake of each is named with its line."""
    from uldm_cli.runs.configs import validate_configs

    kinds = [(str(path), config.model_dump()["kind"]) for path, config in validate_configs(files)]
    console.result(
        {"files": [{"path": path, "kind": kind} for path, kind in kinds]},
        columns=("file", "kind"),
        rows=kinds,
        summary="valid" if len(kinds) == 1 else f"all {len(kinds)} are valid",
    )


@app.command(cls=Command, epilog="\nExample:\n  uldm config new ldm-train --out my.yaml\n")
def new(
    kind: Kind,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write to this new file, with its schema beside it.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Begin a config: every default, with comments."""
    from uldm_cli.runs.configs import new_config, write_new_config

    if out is None and json:
        console.result({"yaml": new_config(kind)})
        return
    if out is None:
        console.text(new_config(kind))
        return
    written = write_new_config(kind, out)
    console.result({"files": written}, summary=f"wrote {' and '.join(map(str, written))}")


@app.command(cls=Command, epilog="\nExample:\n  uldm config schema ldm-train > ldm-train.schema.json\n")
def schema(
    kind: Annotated[str | None, typer.Argument(metavar="KIND", help="Of which command.", show_default=False)] = None,
    all_: Annotated[
        Path | None, typer.Option("--all", metavar="FOLDER", help="Write those of every command to this folder.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print the JSON schema of a config, by which editors complete and check it."""
    from uldm_cli.runs.configs import schema_text, write_schemas

    if (kind is None) == (all_ is None):
        raise UsageError("give a KIND, or --all FOLDER", "'uldm config schema --help' explains")
    if kind is not None:
        console.text(schema_text(kind))
    elif all_ is not None:
        written = write_schemas(all_)
        console.result({"files": written}, summary=f"wrote {len(written)} schemas to {all_}")
