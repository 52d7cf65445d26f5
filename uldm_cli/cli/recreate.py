"""`uldm viz recreate`: a picture again, from the picture itself."""

import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from uldm_cli import console
from uldm_cli.cli.options import Command, Device, Json, Outdir, Quiet, ShowInline
from uldm_cli.errors import ConfigError, UldmError

if TYPE_CHECKING:
    from uldm_cli.runs.calls import Call
    from uldm_cli.runs.recipe import Recipe
    from uldm_cli.runs.recreate import Recreated

EXAMPLES = """
Examples:
  uldm viz recreate outputs/ldm-sample/image_step_200.png    the same command again, for that sample
  uldm viz recreate figure3.png --model runs/old/model.safetensors --outdir again
  uldm viz recreate schedules.png                            the same command line again, in the folder it was given in

Only commands that draw are run again, and they write nothing outside of --outdir.
"""

# Commands whose line is run again: what `--out` is then where none was given; "" is the folder itself.
DRAWING = {
    "viz curves": "{name}",
    "viz lpips": "{name}",
    "viz nearest": "{name}",
    "viz noising": "{name}",
    "viz schedule": "{name}",
    "viz trajectory": "{stem}.gif",  # the film; the picture lies beside it
    "vqvae codebook": "",
    "vqvae diagram": "",
    "vqvae interpolate": "{name}",
    "vqvae latents": "{name}",
    "vqvae reconstruct": "",
    "vqvae visualize": "",
}

Picture = Annotated[Path, typer.Argument(metavar="PICTURE", help="A PNG that uldm has drawn.", show_default=False)]

Model = Annotated[
    str | None, typer.Option("--model", metavar="REF", help="Where the model is now, if not where it was.")
]


def add_to(app: typer.Typer) -> None:
    """The command `recreate`."""
    app.command(cls=Command, help="Make a picture again from what it carries.", epilog=EXAMPLES)(recreate)


def recreate(
    picture: Picture,
    model: Model = None,
    outdir: Outdir = None,
    show_inline: ShowInline = False,
    json: Json = False,
    quiet: Quiet = False,
    device: Device = None,
) -> None:
    from uldm_cli.runs import recreate as runs
    from uldm_cli.runs.outdir import default_outdir
    from uldm_cli.runs.recipe import read_call

    found = read_call(picture)
    flags = {"model": model, "device": device}
    if found is None:
        made = runs.recreate(picture, outdir, flags)
    else:
        made = _called_again(picture, *found, outdir or default_outdir("viz", "recreate"), flags)
        console.configure(json=json, quiet=quiet)
    _show(made)
    if show_inline:
        console.picture(made.file)


def _called_again(
    source: Path, call: "Call", recipe: "Recipe", outdir: Path, flags: dict[str, str | None]
) -> "Recreated":
    """Runs the command line that made a picture, with `outdir` to write to, and finds the picture among its results."""
    from uldm_cli.cli import app
    from uldm_cli.runs import recreate as runs
    from uldm_cli.runs.calls import current
    from uldm_cli.runs.files import read_picture, writable_folder

    if call.command not in DRAWING:
        raise ConfigError(
            f"{source} was made by `uldm {call.command}`, which cannot be run again from a picture",
            f"These can: {', '.join(DRAWING)}",
        )
    if source.resolve().is_relative_to(outdir.resolve()):
        raise ConfigError(f"{source} lies in {outdir}, and could be written over", "Give another --outdir")
    before = read_picture(source)
    arguments = _arguments(call, recipe.picture["name"], writable_folder(outdir, create=False), flags)
    console.note(f"running: uldm {call.command} {shlex.join(arguments)}")
    app.run([*call.command.split(), "--quiet", *arguments])
    this = current()
    written = [path for path in (this.pictures if this else ()) if path.name == recipe.picture["name"]]
    if not written:
        raise UldmError(f"the command line in {source} does not make the picture that it says it is")
    # Folders of inputs may give several of a name, in folders of their own.
    likeness = {path: runs.psnr(before, read_picture(path)) for path in written}
    file = max(written, key=lambda path: -math.inf if math.isnan(likeness[path]) else likeness[path])
    return runs.Recreated(source, file, recipe, likeness[file], model_changed=None)


def _arguments(call: "Call", name: str, outdir: Path, flags: dict[str, str | None]) -> list[str]:
    """What draws the picture `name` into `outdir`.

    What is added comes last, where it counts more than what a picture may say of the same options.
    """
    places = dict(call.places)
    if places.keys().isdisjoint(("--out", "--outdir")):
        places["--out"] = DRAWING[call.command].format(name=name, stem=Path(name).stem)
    added = [word for option, place in places.items() for word in (option, str(outdir / place))]
    added += [word for flag, value in flags.items() if value is not None for word in (f"--{flag}", value)]
    at = call.arguments.index("--") if "--" in call.arguments else len(call.arguments)
    return [*call.arguments[:at], *added, *call.arguments[at:]]


def _show(made: "Recreated") -> None:
    recipe = made.recipe
    data = {
        "command": "viz recreate",
        "source": made.source,
        "made_by": {"command": recipe.command, "version": recipe.version, **recipe.picture},
        "config": recipe.config or None,
        "file": made.file,
        "identical": made.identical,
        "psnr": None if made.identical else made.psnr,
        "model_changed": made.model_changed,
    }
    console.result(data, summary=f"{made.file}, by `uldm {recipe.command}`: {_likeness(made)} {made.source}")


def _likeness(made: "Recreated") -> str:
    if made.identical:
        return "identical to"
    return "another size than" if math.isnan(made.psnr) else f"PSNR {made.psnr:.1f} dB to"
