"""`uldm viz`: pictures of what runs made, and of what they are made with."""

import typer

app = typer.Typer(add_completion=False)
