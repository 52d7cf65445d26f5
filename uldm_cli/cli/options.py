"""What the commands share: the declarations of their options, and `Command`, which reads them as people write them.

    @app.command(cls=Command, epilog=EXAMPLES)
    def sample(arguments: Arguments = None, total_steps: TotalSteps = None, json: Json = False, quiet: Quiet = False):

An option left out is None, so that the config decides; `json` and `quiet` need no handling in the command.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand, TyperOption

from uldm_cli import console
from uldm_cli.errors import UsageError
from uldm_cli.runs.calls import PLACES, Call, running
from uldm_cli.runs.processes import processes

_MACHINE = "Machine"
_OUTPUT = "Output"
_SAMPLING = "Sampling"


def _settings(example: str) -> Any:
    return typer.Argument(
        metavar="CONFIG KEY=VALUE",
        help=f"A YAML file, then single settings: {example} (replaces the node), ~key (removes it).",
        show_default=False,
    )


Arguments = Annotated[list[str] | None, _settings("sampler.eta=0, sampler=ddpm")]
TrainArguments = Annotated[list[str] | None, _settings("train.steps=2000, data=mnist")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="REF", help="A .safetensors file, a run's folder, or an embedded model (default: fruits64)."
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="ema|raw",
        help="Which weights of the model: averaged, or as trained (default: ema, if there).",
    ),
]

TotalSteps = Annotated[
    int | None,
    typer.Option(
        "--total-steps",
        metavar="N",
        help="Steps of the sampler (default: 200; plms: 50; ddpm: 1000).",
        rich_help_panel=_SAMPLING,
    ),
]
StepSize = Annotated[
    int | None,
    typer.Option(
        "--step-size",
        metavar="N",
        help="Write every N-th step; 0: the end only (default: 40).",
        rich_help_panel=_SAMPLING,
    ),
]
Eta = Annotated[
    float | None,
    typer.Option(
        "--eta", metavar="X", help="DDIM's noise: 0 for none, 1 for DDPM's (default: 1).", rich_help_panel=_SAMPLING
    ),
]
Sampler = Annotated[
    str | None,
    typer.Option(
        "--sampler", metavar="KIND", help="The sampler: ddim, plms, ddpm or a plugin's.", rich_help_panel=_SAMPLING
    ),
]
Num = Annotated[
    int | None,
    typer.Option("--num", "-n", metavar="N", help="How many samples (default: 1).", rich_help_panel=_SAMPLING),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        metavar="N",
        help="Of the random numbers; sample i draws from seed + i (default: 1125; training: 0).",
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        metavar="",
        help="One sample at a time: the same bytes at any batch size.",
        rich_help_panel=_SAMPLING,
    ),
]

Outdir = Annotated[
    Path | None, typer.Option("--outdir", metavar="DIR", help="Where to write.", rich_help_panel=_OUTPUT)
]
Resume = Annotated[
    bool, typer.Option("--resume", metavar="", help="Go on from what is in the output folder.", rich_help_panel=_OUTPUT)
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        metavar="",
        help="Check the input and show the plan; compute and write nothing.",
        rich_help_panel=_OUTPUT,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", metavar="", help="The result as JSON on stdout.", rich_help_panel=_OUTPUT)
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", metavar="", help="Say nothing but warnings and errors.", rich_help_panel=_OUTPUT),
]

ShowInline = Annotated[
    bool,
    typer.Option("--show-inline", metavar="", help="Show the picture in the terminal, too.", rich_help_panel=_OUTPUT),
]
Dpi = Annotated[
    int,
    typer.Option(
        "--dpi",
        metavar="N",
        min=20,
        max=1200,
        help="Pixels an inch, of a PNG (default: 150).",
        show_default=False,
        rich_help_panel=_OUTPUT,
    ),
]
FontSize = Annotated[
    float,
    typer.Option(
        "--font-size",
        metavar="X",
        min=3,
        max=48,
        help="Of the labels, in points (default: 9).",
        show_default=False,
        rich_help_panel=_OUTPUT,
    ),
]

BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        metavar="N",
        help="Images computed at once (default: 16; training: 64).",
        rich_help_panel=_MACHINE,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps (default: auto).", rich_help_panel=_MACHINE
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="NAME",
        help="auto, fp32 or bf16 (default: fp32; training: auto).",
        rich_help_panel=_MACHINE,
    ),
]

GIVEN = "uldm_cli.given"  # in a context's `meta`: option -> the text that was given to it, for messages
_CALL = "uldm_cli.call"  # there, too: what is called
_TOLD = ("--json", "--quiet", "-q", "--show-inline")  # flags that change what is told, and not what is drawn
_POSITIONAL = ""  # an alias of the positional CONFIG
# Spellings of the scripts that people come from. Each counts only for a command that has the option it stands for.
_ALIASES = {
    "--config": _POSITIONAL,
    "--checkpoint": "--model",
    "--ddim-steps": "--total-steps",
    "--custom-steps": "--total-steps",
    "--ddim-eta": "--eta",
    "--scale": "--guidance-scale",
    "--n-samples": "--num",
    "--H": "--height",
    "--W": "--width",
    "--logdir": "--outdir",
}
# The letters mean this only where images are sampled: those scripts' trainers give them other meanings.
_SAMPLING_ALIASES = {"-c": "--total-steps", "-e": "--eta", "-r": "--model", "-l": "--outdir"}


class Command(TyperCommand):
    """A command that takes the spellings above, an underscore for a dash in any flag, and prints its epilog verbatim.

    Before anything is checked it sets the console to what `--json` and `--quiet` ask for, so that errors obey them too.
    """

    parallel: ClassVar[bool] = False
    """Whether several processes can share the work; else each would write what the others write."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Spell the flags as they are declared, then parse."""
        takes_value = {
            name: not (param.is_flag or param.count)
            for param in self.get_params(ctx)
            if isinstance(param, TyperOption)
            for name in (*param.opts, *param.secondary_opts)
        }
        spelling = _Spelling(takes_value, positional=self._takes_config())
        try:
            spelling.read(args)
        finally:
            console.configure(json="--json" in spelling.flags, quiet=not spelling.flags.isdisjoint({"-q", "--quiet"}))
        ctx.meta[GIVEN] = spelling.values
        ctx.meta[_CALL] = Call(ctx.command_path.partition(" ")[2], *spelling.without_places())
        return super().parse_args(ctx, spelling.arguments)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command, and lets the pictures that it draws say so."""
        if not self.parallel and (started := processes()) > 1:
            what = f"`{ctx.command_path}` runs in one process, and {started} were started"
            raise UsageError(what, "Start it without torchrun or accelerate")
        with running(ctx.meta[_CALL]):
            return super().invoke(ctx)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The line after "Usage: uldm ldm sample"."""
        if self._takes_config():
            return ["[CONFIG]", "[KEY=VALUE]...", "[OPTIONS]"]
        return super().collect_usage_pieces(ctx)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The help, with the examples below it just as they were written."""
        examples, self.epilog = self.epilog, None
        super().format_help(ctx, formatter)
        self.epilog = examples
        if examples:
            formatter.write(f"{examples.strip()}\n")

    def _takes_config(self) -> bool:
        return any(param.name == "arguments" and param.nargs == -1 for param in self.params)


def native_file(path: Path) -> Path:
    """A file to write a checkpoint of our own to.

    Raises:
        UsageError: it is not named like one.
    """
    if path.suffix != ".safetensors":
        raise UsageError(f"{path} does not end with .safetensors", "uldm's own checkpoints do")
    return path


class ParallelCommand(Command):
    """A command whose work several processes of torchrun or accelerate share."""

    parallel = True


class _Spelling:
    """Rewrites the arguments of one call: `arguments` are all of them, `flags` the options that occurred, `values`
    what was given to them.

    It walks as the parser will, so that a value is never taken for a flag.
    """

    def __init__(self, takes_value: Mapping[str, bool], *, positional: bool) -> None:
        self._takes_value = takes_value
        table = _ALIASES | (_SAMPLING_ALIASES if "--step-size" in takes_value else {})
        self._aliases = {
            alias: option
            for alias, option in table.items()
            if alias not in takes_value and (option in takes_value or (option == _POSITIONAL and positional))
        }
        self.arguments: list[str] = []
        self.flags: set[str] = set()
        self.values: dict[str, str] = {}

    def read(self, args: list[str]) -> None:
        rest = list(args)
        while rest:
            arg = rest.pop(0)
            if arg == "--":
                self.arguments += [arg, *rest]
                return
            if arg.startswith("--"):
                self._long(arg, rest)
            elif arg.startswith("-") and len(arg) > 1:
                self._short(arg, rest)
            else:
                self.arguments.append(arg)

    def without_places(self) -> tuple[list[str], dict[str, str]]:
        """The arguments without the options PLACES and the flags that only change what is told, and those options."""
        kept: list[str] = []
        places: dict[str, str] = {}
        rest = list(self.arguments)
        while rest:
            arg = rest.pop(0)
            if arg == "--":
                return [*kept, arg, *rest], places
            value = [rest.pop(0)] if self._takes_value.get(arg) else []
            if value and arg in PLACES:
                places[arg] = os.path.basename(os.path.abspath(value[0]))
            elif arg not in _TOLD:
                kept += [arg, *value]
        return kept, places

    def _long(self, arg: str, rest: list[str]) -> None:
        given, equals, value = arg.partition("=")
        name = given if given in self._takes_value else given.replace("_", "-")
        option = self._aliases.get(name, name)
        if option == _POSITIONAL:
            self.arguments.insert(0, value if equals else _take(rest, given))
        elif self._takes_value.get(option):
            self._value(option, value if equals else _take(rest, given))
        elif equals and option in self._takes_value:
            raise UsageError(f"option '{given}' takes no value")
        else:
            self.flags.add(option)
            self.arguments.append(option + equals + value)

    def _short(self, arg: str, rest: list[str]) -> None:
        """`-q`, `-n 3`, `-n3` or several in one word, `-qn3`."""
        for index, letter in enumerate(arg[1:], start=1):
            option = self._aliases.get(f"-{letter}", f"-{letter}")
            if option not in self._takes_value:
                self.arguments.append(f"-{arg[index:]}")
                return
            if self._takes_value[option]:
                self._value(option, arg[index + 1 :] or _take(rest, f"-{letter}"))
                return
            self.flags.add(option)
            self.arguments.append(option)

    def _value(self, option: str, value: str) -> None:
        self.flags.add(option)
        self.values[option] = value
        self.arguments += [option, value]


def _take(rest: list[str], given: str) -> str:
    """The next argument, whatever it looks like, as the value of the option that was spelt `given`."""
    if not rest:
        raise UsageError(f"option '{given}' needs a value")
    return rest.pop(0)
