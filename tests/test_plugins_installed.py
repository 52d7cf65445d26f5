"""Plugins as people get them: packages that pip installed, seen by `uldm` in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLUGINS = Path(__file__).resolve().parent / "plugins"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the three plugins."""
    folder = tmp_path_factory.mktemp("plugins")
    sources = shutil.copytree(PLUGINS, folder / "sources")  # a build must leave nothing in the repository
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(folder / "site")]
    packages = [str(sources / name) for name in ("good", "broken", "slow")]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *packages], check=True, timeout=200)
    return folder / "site"


@pytest.fixture
def with_plugins(site: Path, uldm: Callable) -> Callable:
    """Run `uldm ARGS` where the plugins are installed."""

    def run(*args: str, **env: str) -> object:
        return uldm(*args, env={"PYTHONPATH": os.pathsep.join([str(ROOT), str(site)]), **env})

    return run


def test_list_names_all_and_imports_none(with_plugins: Callable) -> None:
    began = time.monotonic()
    listed = with_plugins("plugins", "list", "--json")
    assert time.monotonic() - began < 30  # importing the slow one takes a minute
    assert (listed.code, listed.err) == (0, "")
    found = {(entry["distribution"], entry["kind"]): entry for entry in json.loads(listed.out)["entries"]}
    assert found["uldm-good", "euler"] == {
        "group": "samplers",
        "kind": "euler",
        "target": "uldm_good:Euler",
        "distribution": "uldm-good",
        "version": "0.3",
        "builtin": False,
        "status": "ok",
    }
    assert found["uldm-good", "ddim"]["status"] == "hidden by the built-in of this name"
    assert found["uldm-good", "old"]["status"].startswith("not used: ")
    assert found["uldm-good", "good.hello"]["group"] == "commands"
    assert {kind for distribution, kind in found if distribution == "uldm-broken"} == {
        "raises", "leaves", "nowhere", "a-text", "misnamed",
    }  # fmt: skip
    assert found["uldm-slow", "slow"]["version"] == "2.0"


def test_list_for_people(with_plugins: Callable) -> None:
    listed = with_plugins("plugins", "list")
    assert listed.out.rstrip().endswith("3 plugins installed; --all also lists what is built in")
    [line] = [line for line in listed.out.splitlines() if "euler" in line]
    assert line.split() == ["samplers", "euler", "uldm-good", "0.3", "uldm_good:Euler", "ok"]
    assert "scaled_linear" not in listed.out
    assert "scaled_linear" in with_plugins("plugins", "list", "--all").out


def test_a_plugins_sampler_is_a_kind_like_any_other(with_plugins: Callable) -> None:
    shown = with_plugins("config", "show", "ldm-sample", "sampler=euler", "sampler.steps=7")
    assert (shown.code, shown.err) == (0, "")
    assert "sampler:\n  kind: euler\n  steps: 7\n" in shown.out
    wrong = with_plugins("config", "show", "ldm-sample", "sampler=eulr")
    assert wrong.err == "error: sampler=eulr (command line): unknown sampler 'eulr'. Did you mean 'euler'?\n"


def test_a_plugins_sampler_samples(with_plugins: Callable, tiny_ldm: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(tiny_ldm), "sampler=euler", "--total-steps", "4", "--step-size", "2", "--outdir", "out"]
    sampled = with_plugins("ldm", "sample", *arguments, OMP_NUM_THREADS="1")
    assert sampled.code == 0, sampled.err
    assert {"image_step_2.png", "image_step_4.png"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_a_plugins_command(with_plugins: Callable) -> None:
    assert with_plugins("good", "hello", "--name", "you").out == "hello you\n"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("raises", "failed to load: ValueError: no such device. Repair or uninstall it"),
        ("leaves", "failed to load: SystemExit: bye. Repair"),
        ("nowhere", "failed to load: AttributeError: module 'uldm_broken' has no attribute 'Nothing'. Repair"),
        ("a-text", "is not a Spec subclass but 'no class'. Report it"),
        ("misnamed", "calls itself 'other'. Its `kind` must be the name of its entry point"),
    ],
)
def test_a_broken_plugin_is_named_when_it_is_used(with_plugins: Callable, kind: str, message: str) -> None:
    ended = with_plugins("config", "show", "ldm-sample", f"sampler={kind}")
    assert (ended.code, ended.out) == (3, "")
    assert ended.err.startswith(f"error: sampler '{kind}' of the plugin 'uldm-broken 1.0' {message}")
    assert ended.err.count("\n") == 1


def test_a_broken_or_slow_plugin_breaks_nothing_else(with_plugins: Callable) -> None:
    began = time.monotonic()
    assert with_plugins("config", "show", "ldm-sample", "sampler=ddim").code == 0
    assert "good" in with_plugins("--help").out
    assert time.monotonic() - began < 50


def test_plugins_can_be_disabled(with_plugins: Callable) -> None:
    disabled = with_plugins("config", "show", "ldm-sample", "sampler=euler", ULDM_DISABLE_PLUGINS="uldm-good")
    assert disabled.code == 2
    assert "sampler 'euler' of the plugin 'uldm-good 0.3' is disabled by the environment" in disabled.err
    assert "good" not in with_plugins("--help", ULDM_PLUGINS="0").out
