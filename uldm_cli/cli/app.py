"""The root of the command line. Its help comes from a table and from metadata; a group loads when it is called."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption
from typer.main import get_command, get_group

from uldm_cli import __version__, console, registry
from uldm_cli.cli.options import GIVEN, Command
from uldm_cli.errors import PluginError, UsageError, nearest

# Each is a module of this package with an `app`, a typer.Typer, whose commands are of the class Command.
GROUPS = {
    "vqvae": "Autoencoders: train a VQ-VAE, look inside one.",
    "ldm": "Latent diffusion: train a model, sample from it, see where it looks.",
    "viz": "Pictures: films of sampling, schedules, curves, distances; how one was made.",
    "convert": "Models between layouts; what is in one; the published ones.",
    "config": "Configs: show one, check one, begin one; the schemas behind them.",
    "plugins": "Plugins: what is installed.",
}


@dataclass(frozen=True)
class Lazy:
    """A command or group of which only the help line is known until `load` imports it."""

    help: str
    load: Callable[[], Any]


class Group(TyperGroup):
    """A group that lists its plugins' commands by metadata, shows its help when called alone, and knows near names."""

    def lazy(self) -> Mapping[str, Lazy]:
        """What can be called here besides `commands`, by name."""
        return _plugin_commands(self.name or "")

    def list_commands(self, ctx: Any) -> list[str]:
        """Every name, the plugins' last."""
        return [*self.commands, *(name for name in self.lazy() if name not in self.commands)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command for the help; for a lazy one a stand-in of its name and help line."""
        if cmd_name in self.commands:
            return self.commands[cmd_name]
        lazy = self.lazy().get(cmd_name)
        return lazy and TyperCommand(cmd_name, help=lazy.help)

    def get_help_option(self, ctx: Any) -> Any:
        """`--help`, False by default: its usual None would have Typer import Pydantic to see whether that is a bool."""
        option = super().get_help_option(ctx)
        if option:
            option.default = False
        return option

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """A group that is called alone shows its help."""
        return super().parse_args(ctx, args or ["--help"])

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command to call, loaded now."""
        name, rest = args[0], args[1:]
        if name in self.commands:
            return name, self.commands[name], rest
        lazy = self.lazy().get(name)
        if lazy:
            return name, lazy.load(), rest
        near = nearest(name, self.list_commands(ctx))
        hint = f"Did you mean '{ctx.command_path} {near}'?" if near else f"'{ctx.command_path} --help' lists them"
        raise UsageError(f"unknown command '{ctx.command_path} {name}'", hint)


class Root(Group):
    """`uldm` itself: the groups of the table, then what plugins add."""

    def lazy(self) -> Mapping[str, Lazy]:
        """The table first: a plugin cannot take the name of a built-in group."""
        builtin = {name: Lazy(line, partial(builtin_group, name)) for name, line in GROUPS.items()}
        return {**builtin, **{name: lazy for name, lazy in _plugin_commands("").items() if name not in builtin}}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """A built-in group without a look at the plugins, which takes time."""
        if args[0] in GROUPS:
            return args[0], builtin_group(args[0]), args[1:]
        return super().resolve_command(ctx, args)


# Without the options that install shell completions: they too would cost an import of Pydantic.
app = typer.Typer(cls=Root, add_completion=False)


def _show_version(asked: bool) -> None:
    if asked:
        console.text(f"uldm {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", metavar="", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Latent diffusion: train, sample, look inside every step, extend.

    Try: uldm ldm sample --total-steps 50 --step-size 10
    """


def run(args: list[str]) -> int:
    """Run `uldm` with these arguments and return its exit code.

    Raises UsageError for what the command line cannot mean, KeyboardInterrupt where a prompt was left, else what the
    command itself raised.
    """
    command = get_command(app)
    try:
        with command.make_context("uldm", args) as context:
            command.invoke(context)
    except typer.Exit as request:
        return request.exit_code
    except typer.Abort as abort:
        raise KeyboardInterrupt from abort
    except Exception as error:
        # Some releases of Typer raise Click's errors and some their own: both are known by this method.
        if hasattr(error, "format_message"):
            raise _usage_error(error) from error
        raise
    return 0


def _usage_error(error: Any) -> UsageError:
    """Typer's complaint as one line of ours, with the value that was given, or the nearest option that exists."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "uldm"
    if hasattr(error, "possibilities"):
        return _unknown_option(error.option_name, context)
    message = " ".join(error.format_message().split()).rstrip(".")
    given = context.meta.get(GIVEN, {}) if context else {}
    for option in getattr(getattr(error, "param", None), "opts", ()):
        if option in given:
            message = f"option '{option}' got '{given[option]}': {error.message.rstrip('.')}"
    return UsageError(message[:1].lower() + message[1:], f"'{path} --help' explains")


def _unknown_option(name: str, context: Any) -> UsageError:
    path = context.command_path
    options = [param for param in context.command.get_params(context) if isinstance(param, TyperOption)]
    near = nearest(name, [name for option in options if not option.hidden for name in option.opts])
    hint = f"Did you mean '{near}'?" if near else f"'{path} --help' lists them"
    return UsageError(f"unknown option '{name}' of '{path}'", hint)


def builtin_group(name: str) -> Group:
    """Import one group of the table."""
    group = get_group(import_module(f"uldm_cli.cli.{name}").app)
    return Group(name=name, commands=dict(group.commands), help=GROUPS[name])


def _plugin_commands(group: str) -> dict[str, Lazy]:
    """The commands that plugins add to `group`; "" is the root, which also gets the groups that only plugins have."""
    found: dict[str, Lazy] = {}
    for entry in registry.commands():
        owner, _, name = entry.kind.rpartition(".")
        line = f"From the plugin {entry.distribution} {entry.version}."
        if owner == group:
            found[name] = Lazy(line, partial(_plugin_command, entry.kind, name))
        elif not group and owner not in GROUPS:
            found.setdefault(owner, Lazy(line, partial(Group, name=owner)))
    return found


def _plugin_command(kind: str, name: str) -> TyperCommand | TyperGroup:
    """Import a plugin's command: a function becomes a command like ours, a typer.Typer is a group."""
    target = registry.load("commands", kind)
    if not callable(target):  # a typer.Typer is
        raise PluginError(
            f"command '{kind}' of {registry.owner('commands', kind)} is a {type(target).__name__}",
            "Its entry point must name a function or a typer.Typer",
        )
    try:
        command = get_group(target) if isinstance(target, typer.Typer) else _command_of(target)
    except (RuntimeError, TypeError, AssertionError) as cause:  # Typer's answers to a signature that it cannot read
        raise PluginError(f"command '{kind}' of {registry.owner('commands', kind)} cannot be built: {cause}") from cause
    command.name = name
    return command


def _command_of(function: Callable[..., Any]) -> Command:
    alone = typer.Typer(add_completion=False)
    alone.command(cls=Command)(function)
    [command] = get_group(alone).commands.values()
    assert isinstance(command, Command)
    return command
