"""The registry on distributions made of metadata alone, as an installer would leave them."""

import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from uldm_cli import registry
from uldm_cli.errors import ConfigError, PluginError

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a distribution with entry points, `group="name = target"`, and a module `<name>_module`."""
    monkeypatch.syspath_prepend(tmp_path)

    def add(name: str, version: str = "1.0", code: str = "thing = 'the thing'\n", **groups: str) -> None:
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        points = "".join(f"[uldm.{group}.v1]\n{lines}\n" for group, lines in groups.items())
        (info / "entry_points.txt").write_text(points)
        (tmp_path / f"{name}_module.py").write_text(code)
        registry._plugins.cache_clear()

    return add


@pytest.fixture(autouse=True)
def _forget_modules() -> None:
    for name in [name for name in sys.modules if name.endswith("_module")]:
        del sys.modules[name]


def test_every_builtin_kind_loads_and_is_named_so() -> None:
    for group, table in registry.BUILTIN.items():
        for kind in table:
            assert registry.load(group, kind).model_fields["kind"].default == kind


def test_groups_and_table_agree() -> None:
    assert set(registry.BUILTIN) == {*registry.GROUPS, "commands"}


@pytest.mark.parametrize(("kind", "hint"), [("dim", "Did you mean 'ddim'?"), ("zzz", "There are: ddim, ddpm, plms")])
def test_unknown_kind(kind: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        registry.load("samplers", kind)
    assert str(caught.value) == f"unknown sampler '{kind}'. {hint}"


def test_unknown_kind_of_an_empty_group() -> None:
    with pytest.raises(ConfigError, match=r"unknown analysis 'x'\. There are: none is installed"):
        registry.load("analyses", "x")


def test_plugin_is_found_and_loaded(install: Install) -> None:
    install("foo", samplers="heun = foo_module:thing")
    assert registry.kinds("samplers") == ["ddim", "ddpm", "plms", "heun"]
    assert registry.load("samplers", "heun") == "the thing"
    assert registry.owner("samplers", "heun") == "the plugin 'foo 1.0'"
    assert registry.owner("samplers", "ddim") == "uldm"


def test_listing_imports_nothing(install: Install) -> None:
    install("foo", code="raise RuntimeError('imported')", samplers="heun = foo_module:thing")
    [entry] = [entry for entry in registry.entries() if not entry.builtin]
    assert entry == registry.Entry("samplers", "heun", "foo_module:thing", "foo", "1.0")
    assert "foo_module" not in sys.modules


def test_builtin_kinds_need_no_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda: pytest.fail("scanned the installed distributions"))
    registry.load("samplers", "ddim")


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("raise ValueError('no device\\nat all')", "ValueError: no device"),
        ("raise RuntimeError", "RuntimeError"),
        ("import sys; sys.exit('bye')", "SystemExit: bye"),
        ("import not_installed_anywhere", "ModuleNotFoundError: No module named 'not_installed_anywhere'"),
        ("def broken(:", "SyntaxError: invalid syntax (foo_module.py, line 1)"),
        ("other = 1", "AttributeError: module 'foo_module' has no attribute 'thing'"),
    ],
)
def test_plugin_that_does_not_load(install: Install, code: str, cause: str) -> None:
    install("foo", "0.1", code=code, samplers="heun = foo_module:thing")
    with pytest.raises(PluginError) as caught:
        registry.load("samplers", "heun")
    assert caught.value.message == f"sampler 'heun' of the plugin 'foo 0.1' failed to load: {cause}"
    assert caught.value.hint == "Repair or uninstall it, or set ULDM_DISABLE_PLUGINS=heun"
    assert caught.value.exit_code == 3


def test_interrupt_while_a_plugin_loads_stays_one(install: Install) -> None:
    install("foo", code="raise KeyboardInterrupt", samplers="heun = foo_module:thing")
    with pytest.raises(KeyboardInterrupt):
        registry.load("samplers", "heun")


def test_builtin_wins_over_a_plugin_of_its_name(install: Install) -> None:
    install("foo", samplers="ddim = foo_module:thing")
    assert registry.load("samplers", "ddim").__name__ == "DDIM"
    assert registry.kinds("samplers") == ["ddim", "ddpm", "plms"]
    [entry] = [entry for entry in registry.entries() if not entry.builtin]
    assert entry.status == "hidden by the built-in of this name"


def test_two_plugins_with_one_kind(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("foo", samplers="heun = foo_module:thing")
    install("bar", samplers="heun = bar_module:thing")
    with pytest.raises(PluginError, match=r"offered by several plugins: 'bar 1\.0', 'foo 1\.0'"):
        registry.load("samplers", "heun")
    assert {entry.status for entry in registry.entries() if not entry.builtin} == {
        "conflict: several plugins offer this name"
    }
    monkeypatch.setenv("ULDM_DISABLE_PLUGINS", "x, foo")
    assert registry.load("samplers", "heun") == "the thing"


@pytest.mark.parametrize(
    ("name", "value"),
    [("ULDM_PLUGINS", "0"), ("ULDM_DISABLE_PLUGINS", "heun"), ("ULDM_DISABLE_PLUGINS", "foo,bar")],
)
def test_disabled_plugins(install: Install, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    install("foo", samplers="heun = foo_module:thing", commands="foo.greet = foo_module:thing")
    assert [entry.kind for entry in registry.commands()] == ["foo.greet"]
    monkeypatch.setenv(name, value)
    assert "heun" not in registry.kinds("samplers")
    with pytest.raises(ConfigError, match=r"sampler 'heun' of the plugin 'foo 1\.0' is disabled by the environment"):
        registry.load("samplers", "heun")
    assert "disabled by the environment" in {entry.status for entry in registry.entries()}


def test_entry_points_for_another_api_are_listed_and_not_used(install: Install, tmp_path: Path) -> None:
    install("foo")
    (tmp_path / "foo-1.0.dist-info" / "entry_points.txt").write_text("[uldm.samplers.v9]\nheun = foo_module:thing\n")
    registry._plugins.cache_clear()
    [entry] = [entry for entry in registry.entries() if not entry.builtin]
    assert (entry.group, entry.status) == ("uldm.samplers.v9", "not used: uldm looks for groups like uldm.samplers.v1")
    assert registry.kinds("samplers") == ["ddim", "ddpm", "plms"]


def test_entry_point_with_extras(install: Install) -> None:
    install("foo", samplers="heun = foo_module:thing [extra]")
    assert registry.load("samplers", "heun") == "the thing"


def test_importing_the_registry_loads_no_metadata() -> None:
    code = "import sys, uldm_cli.registry; print('importlib.metadata' in sys.modules, 'pydantic' in sys.modules)"
    ended = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["False", "False"]
