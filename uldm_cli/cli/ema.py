"""`uldm ldm ema` and `uldm vqvae ema`: averaged weights of any width, after the training."""

from pathlib import Path
from typing import Annotated

import typer

from uldm_cli import console
from uldm_cli.cli.options import Command, Json, Quiet, native_file
from uldm_cli.specs.widths import NARROWEST, WIDEST

Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="The folder of a training with train.ema_profiles.", show_default=False)
]
SigmaRel = Annotated[
    float,
    typer.Option(
        "--sigma-rel",
        metavar="X",
        min=NARROWEST,
        max=WIDEST,
        help="Width of the average, as a share of the training: 0.05, say.",
        show_default=False,
    ),
]
Step = Annotated[
    int | None, typer.Option("--step", metavar="N", help="At which of the saved steps (default: the last).")
]
Out = Annotated[Path, typer.Option("--out", metavar="FILE", help="The .safetensors file to write.", show_default=False)]


def add_to(app: typer.Typer, group: str, kind: str) -> None:
    """Mounts the command in a group whose trainings make models of a kind."""
    examples = f"""
Examples:
  uldm {group} train train.ema_profiles=[0.05,0.1]             keeps averages of two widths
  uldm {group} ema outputs/{group}-train --sigma-rel 0.08 --out wide.safetensors
"""

    def ema(
        run: Run, sigma_rel: SigmaRel, out: Out, step: Step = None, json: Json = False, quiet: Quiet = False
    ) -> None:
        from uldm_cli.runs.ema import make

        made = make(run, kind, sigma_rel, step, native_file(out))
        data = {"command": f"{group} ema", "file": made.path, "step": made.step, "sigma_rel": sigma_rel}
        console.result(
            data | {"averages": made.averages, "missed": made.missed},
            summary=f"sigma_rel {sigma_rel:g} at step {made.step:,}, of {made.averages} averages "
            f"(their weights miss it by {made.missed:.1%}): {made.path}",
        )

    about = "Average the weights with another width, after the training."
    app.command("ema", cls=Command, help=about, epilog=examples)(ema)
