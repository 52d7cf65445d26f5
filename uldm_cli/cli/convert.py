"""`uldm convert`: models from one layout to another, and the published ones."""

import typer

from uldm_cli.cli import zoo

app = typer.Typer(no_args_is_help=True)
app.add_typer(zoo.app, name="zoo")
