import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pytest
import typer

from uldm_cli import console, registry
from uldm_cli.__main__ import main
from uldm_cli.cli import app, options
from uldm_cli.cli.options import Command
from uldm_cli.errors import UldmError

EXAMPLES = """
Examples:
  uldm demo sample --total-steps 20    # [as written]
"""


@pytest.fixture(autouse=True)
def _demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group `uldm demo` whose commands show how they were called."""
    group = typer.Typer()

    @group.command(cls=Command, epilog=EXAMPLES)
    def sample(
        arguments: options.Arguments = None,
        model: options.Model = None,
        total_steps: options.TotalSteps = None,
        step_size: options.StepSize = None,
        eta: options.Eta = None,
        num: options.Num = None,
        outdir: options.Outdir = None,
        json: options.Json = False,
        quiet: options.Quiet = False,
    ) -> None:
        """Sample."""
        given = {name: value for name, value in locals().items() if value not in (None, False)}
        console.result(given, summary=" ".join(f"{name}={value}" for name, value in given.items()))

    @group.command(cls=Command)
    def train(
        run_name: Annotated[str, typer.Option("--run_name")] = "",
        scale: Annotated[float, typer.Option("--scale", "-c")] = 1.0,
        json: options.Json = False,
    ) -> None:
        console.result({"run_name": run_name, "scale": scale})

    @group.command(cls=Command)
    def fail(json: options.Json = False) -> None:
        raise UldmError("no model", "Train one")

    module = ModuleType("uldm_cli.cli.demo")
    module.app = group  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(app.GROUPS, "demo", "A demonstration.")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]):
    """Run `uldm demo ARGS --json` and return its document."""

    def run(*args: str) -> dict[str, object]:
        assert main(["demo", *args, "--json"]) == 0
        given = json.loads(capsys.readouterr().out)
        given.pop("json", None)
        return given

    return run


@pytest.mark.parametrize("args", [[], ["--help"]])
def test_a_group_called_alone_shows_its_help(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *args]) == 0
    out, err = capsys.readouterr()
    assert all(word in out for word in ("Usage: uldm demo", "A demonstration.", "sample", "train"))
    assert err == ""


def test_help_shows_arguments_options_and_examples_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "sample", "--help"]) == 0
    out = capsys.readouterr().out
    assert "Usage: uldm demo sample [CONFIG] [KEY=VALUE]... [OPTIONS]" in out
    assert "--total-steps" in out
    assert out.endswith(EXAMPLES)


def test_underscores_in_flags_are_dashes_and_values_stay(call) -> None:
    given = call("sample", "--total_steps=200", "--step_size", "40", "--outdir", "--my_dir", "--model=a_b=c_d")
    assert given == {"total_steps": 200, "step_size": 40, "outdir": "--my_dir", "model": "a_b=c_d"}


def test_positions_and_flags_mix_in_any_order(call) -> None:
    given = call("sample", "sampler.eta=0", "-n", "3", "~optim.decay", "--eta", "-1", "cond_stage.x_y=[1, 2]")
    assert given == {"arguments": ["sampler.eta=0", "~optim.decay", "cond_stage.x_y=[1, 2]"], "num": 3, "eta": -1}


def test_after_two_dashes_everything_is_a_position(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "sample", "--json", "--", "--total_steps=3", "-n"]) == 0
    assert json.loads(capsys.readouterr().out)["arguments"] == ["--total_steps=3", "-n"]


@pytest.mark.parametrize(
    ("args", "given"),
    [
        (["a=1", "--config", "c.yaml"], {"arguments": ["c.yaml", "a=1"]}),
        (["--config=c.yaml", "a=1"], {"arguments": ["c.yaml", "a=1"]}),
        (["--checkpoint", "m.safetensors"], {"model": "m.safetensors"}),
        (
            ["-r", "m.ckpt", "-l", "out", "-c", "7", "-e0.5"],
            {"model": "m.ckpt", "outdir": "out", "total_steps": 7, "eta": 0.5},
        ),
        (["--ddim_steps", "50", "--ddim_eta=0.0"], {"total_steps": 50, "eta": 0.0}),
        (["--custom_steps", "50", "--n_samples", "4"], {"total_steps": 50, "num": 4}),
        (["--logdir", "out", "-n3"], {"outdir": "out", "num": 3}),
        (["-qn3"], {"quiet": True, "num": 3}),
    ],
)
def test_the_spellings_of_other_scripts_are_understood(args: list[str], given: dict[str, object], call) -> None:
    got = call("sample", *args)
    got.setdefault("eta", given.get("eta"))  # 0.0 counts as left out in the demonstration
    assert {name: value for name, value in got.items() if value is not None} == given


def test_an_alias_never_hides_what_a_command_declares(call) -> None:
    assert call("train", "-c", "2", "--run_name", "a_b") == {"run_name": "a_b", "scale": 2}
    assert call("train", "--scale", "3") == {"run_name": "", "scale": 3}


def test_an_alias_counts_only_where_its_option_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "train", "--n_samples", "3"]) == 2
    assert "unknown option '--n-samples' of 'uldm demo train'" in capsys.readouterr().err
    assert main(["demo", "train", "-e", "3"]) == 2
    assert "unknown option '-e' of 'uldm demo train'" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--total_steps", "-n", "--config", "-c"])
def test_a_flag_without_its_value_is_named_as_it_was_written(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "sample", flag]) == 2
    assert capsys.readouterr().err == f"error: option '{flag}' needs a value\n"


def test_errors_follow_json(capsys: pytest.CaptureFixture[str]) -> None:
    for args, code in ((["demo", "fail", "--json"], 1), (["demo", "sample", "--json", "--what"], 2)):
        assert main(args) == code
        assert json.loads(capsys.readouterr().out)["exit_code"] == code


def test_quiet_prints_no_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "sample", "-q"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed distribution with commands: a function, a typer.Typer, one that raises and one that is nothing."""
    (tmp_path / "acme.py").write_text(
        """
import typer
from typing import Annotated

def hello(name: Annotated[str, typer.Option("--first-name")] = "you") -> None:
    from uldm_cli import console
    console.text(f"hello {name}")

tools = typer.Typer(help="Tools.")

@tools.command()
def count() -> None:
    hello("count")

@tools.command()
def add() -> None:
    hello("add")

nothing = 3

def unreadable(what: complex | bytes) -> None: ...
"""
    )
    (tmp_path / "acme_broken.py").write_text("raise RuntimeError('no licence')")
    info = tmp_path / "acme-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(
        "[uldm.commands.v1]\n"
        "demo.hello = acme:hello\n"
        "hello = acme:hello\n"
        "tools = acme:tools\n"
        "party.dance = acme:hello\n"
        "demo.broken = acme_broken:run\n"
        "demo.nothing = acme:nothing\n"
        "demo.unreadable = acme:unreadable\n"
        "demo.sample = acme_broken:run\n"
        "ldm = acme_broken:run\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    registry._plugins.cache_clear()
    yield tmp_path
    for name in ("acme", "acme_broken"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("plugins")
def test_help_lists_plugins_without_importing_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert main(["demo", "--help"]) == 0
    out = capsys.readouterr().out
    for name in ("hello", "tools", "party", "broken"):
        assert f"│ {name} " in out
    assert "From the plugin acme 1.2." in out
    assert not {"acme", "acme_broken"} & set(sys.modules)


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["hello"], "hello you"),
        (["demo", "hello", "--first_name", "Ada"], "hello Ada"),
        (["party", "dance"], "hello you"),
        (["tools", "count"], "hello count"),
    ],
)
def test_a_plugins_command_runs(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 0
    assert capsys.readouterr().out == f"{said}\n"


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "command 'demo.broken' of the plugin 'acme 1.2' failed to load: RuntimeError: no licence"),
        ("nothing", "is a int"),
        ("unreadable", "cannot be built"),
    ],
)
def test_a_broken_command_exits_3_with_its_distribution(
    name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", name]) == 3
    err = capsys.readouterr().err
    assert message in err
    assert "acme 1.2" in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("plugins")
def test_built_in_commands_keep_their_names(call) -> None:
    assert call("sample", "-n", "2") == {"num": 2}
    assert "acme_broken" not in sys.modules


@pytest.mark.usefixtures("plugins")
def test_plugins_can_be_turned_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ULDM_PLUGINS", "0")
    assert main(["hello"]) == 2
    assert "unknown command 'uldm hello'" in capsys.readouterr().err


@pytest.mark.parametrize("group", ["vqvae", "ldm", "config", "plugins"])
def test_every_built_in_command_is_one_that_knows_the_spellings(group: str) -> None:
    commands = app.builtin_group(group).commands
    assert commands
    for name, command in commands.items():
        assert isinstance(command, Command), name
        assert command.help, name
        assert {"json", "quiet"} <= {param.name for param in command.params}, name
