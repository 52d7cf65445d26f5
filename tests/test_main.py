import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import uldm_cli
from uldm_cli import __main__ as entry
from uldm_cli import __version__
from uldm_cli.errors import PluginError

PACKAGE_PARENT = Path(uldm_cli.__file__).resolve().parent.parent
# Imports the entry, runs it with the arguments, then names which of some modules got loaded.
LOADED = """
import sys
from uldm_cli.__main__ import main
code = main(sys.argv[1:])
heavy = {"typer", "rich", "pydantic", "torch", "numpy", "yaml"}
print("loaded:", *sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


def loaded(*args: str) -> set[str]:
    """Which heavy modules a call of `uldm` imports."""
    command = [sys.executable, "-c", LOADED, *args]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE_PARENT, check=True)
    return set(ended.stderr.rpartition("loaded:")[2].split())


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version_is_answered_before_anything_heavy_loads(flag: str, uldm: Callable) -> None:
    assert uldm(flag).out == f"uldm {__version__}\n"
    assert loaded(flag) == set()


def test_help_loads_no_torch_no_pydantic_and_no_yaml() -> None:
    assert loaded("--help") == {"typer", "rich"}


@pytest.mark.parametrize("group", ["vqvae", "ldm", "viz", "config", "plugins"])
def test_help_of_a_group_and_its_commands_loads_nothing_heavy(group: str) -> None:
    from uldm_cli.cli.app import builtin_group

    assert loaded(group, "--help") == {"typer", "rich"}
    for command in builtin_group(group).commands:
        assert loaded(group, command, "--help") == {"typer", "rich"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["lmd"], "unknown command 'uldm lmd'. Did you mean 'uldm ldm'?"),
        (["ldm", "smaple"], "unknown command 'uldm ldm smaple'. Did you mean 'uldm ldm sample'?"),
        (["xyzzy"], "unknown command 'uldm xyzzy'. 'uldm --help' lists them"),
        (["--verison"], "unknown option '--verison' of 'uldm'. Did you mean '--version'?"),
        (["ldm", "sample", "--totl_steps", "3"], "of 'uldm ldm sample'. Did you mean '--total-steps'?"),
        (["ldm", "sample", "--total-steps", "many"], "option '--total-steps' got 'many': "),
        (["ldm", "sample", "--total-steps"], "option '--total-steps' needs a value"),
        (["ldm", "sample", "--jsn"], "Did you mean '--json'?"),
        (["ldm", "sample", "--dry_run=1"], "option '--dry_run' takes no value"),
    ],
)
def test_wrong_calls_get_one_line_and_exit_2(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("cause", "code", "line"),
    [
        (PluginError("sampler 'heun' of 'heun 1.0' failed to load"), 3, "sampler 'heun' of 'heun 1.0' failed to load"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a.png"),
            1,
            "disk full while writing a.png. Free some space",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "a.png"), 1, "a.png: Permission denied"),
        (MemoryError(), 1, "out of memory. Try a smaller --batch-size"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 1, "out of memory. Try a smaller --batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8"), 1, "out of memory. Try a smaller --batch-size"),
        (ValueError("bad\nthing"), 1, "internal error: ValueError: bad thing. Set ULDM_DEBUG=1 for the traceback"),
    ],
)
def test_every_failure_is_one_line_with_its_exit_code(
    cause: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(args: list[str]) -> int:
        raise cause

    monkeypatch.setattr(entry, "_run", fail)
    monkeypatch.setattr(entry, "_discard_stdout", lambda: None)  # pytest still needs it
    assert entry.main([]) == code
    err = capsys.readouterr().err
    assert err.startswith(f"error: {line}")
    assert err.count("\n") == 1


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: list[str]) -> int:
        raise ValueError("bad")

    monkeypatch.setattr(entry, "_run", fail)
    monkeypatch.setenv("ULDM_DEBUG", "1")
    assert entry.main([]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("error: internal error: ValueError: bad. Set ULDM_DEBUG=1 for the traceback\n")


def run_with_stdout(path: str) -> subprocess.CompletedProcess[str]:
    with open(path, "w") as stdout:
        command = [sys.executable, "-m", "uldm_cli", "--version"]
        return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=PACKAGE_PARENT)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_below_stdout_is_one_line() -> None:
    ended = run_with_stdout("/dev/full")
    assert ended.returncode == 1
    assert ended.stderr == "error: disk full while writing the output. Free some space, then run again\n"


def test_a_reader_that_went_away_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "uldm_cli", "--version"]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=PACKAGE_PARENT)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_ctrl_c_ends_with_130_and_one_line(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    code = f"""
import pathlib, sys, time
import uldm_cli
from uldm_cli import __main__ as entry
def work(args):
    pathlib.Path({str(ready)!r}).touch()
    time.sleep(60)
entry._run = work
sys.exit(entry.main([]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, cwd=PACKAGE_PARENT)
    while not ready.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == (None, "error: interrupted\n")
    assert process.returncode == 130


def test_under_torchrun_only_rank_zero_answers(uldm: Callable) -> None:
    assert uldm("--version", env={"RANK": "0", "WORLD_SIZE": "2"}).out == f"uldm {__version__}\n"
    silent = uldm("--version", env={"RANK": "1", "WORLD_SIZE": "2"})
    assert (silent.code, silent.out, silent.err) == (0, "", "")


def test_several_processes_are_refused_before_they_write_over_each_other(uldm: Callable, tmp_path: Path) -> None:
    ended = uldm("ldm", "sample", env={"WORLD_SIZE": "2", "RANK": "0"}, cwd=tmp_path)
    assert (ended.code, list(tmp_path.iterdir())) == (2, [])
    assert ended.err == (
        "error: `uldm ldm sample` runs in one process, and 2 were started. Start it without torchrun or accelerate\n"
    )


@pytest.mark.parametrize(("given", "code"), [("", 0), ("1", 0), ("many", 2), ("0", 2)])
def test_a_number_of_processes_that_is_none(given: str, code: int, uldm: Callable) -> None:
    ended = uldm("config", "show", "ldm-sample", env={"WORLD_SIZE": given})
    assert ended.code == code
    assert (f"WORLD_SIZE={given} in the environment is no number of processes" in ended.err) == (code != 0)
