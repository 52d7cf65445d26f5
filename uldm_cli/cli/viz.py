"""`uldm viz`: pictures of what runs made, and of what they are made with."""

import typer

from uldm_cli.cli import curves, lpips, nearest, recreate, schedule, trajectory

app = typer.Typer(add_completion=False)
trajectory.add_to(app)
schedule.add_to(app)
curves.add_to(app)
lpips.add_to(app)
nearest.add_to(app)
recreate.add_to(app)
