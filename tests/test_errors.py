import pickle
import subprocess
import sys

import pytest

from uldm_cli.errors import ConfigError, PluginError, UldmError, UsageError, nearest


def test_text_is_the_message_with_its_hint() -> None:
    assert str(UldmError("no model")) == "no model"
    assert str(UldmError("no model", "Train one")) == "no model. Train one"


@pytest.mark.parametrize(("kind", "code"), [(UldmError, 1), (UsageError, 2), (ConfigError, 2), (PluginError, 3)])
def test_exit_codes(kind: type[UldmError], code: int) -> None:
    assert kind("x").exit_code == code
    assert kind("x", exit_code=130).exit_code == 130


def test_errors_cross_a_process_border() -> None:
    error = pickle.loads(pickle.dumps(ConfigError("no model", "Train one", 7)))
    assert type(error) is ConfigError
    assert (error.message, error.hint, error.exit_code) == ("no model", "Train one", 7)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("etta", "eta"), ("DDIM", "ddim"), ("fashion_mnist", "fashion-mnist"), ("xyz", None), ("", None)],
)
def test_nearest(name: str, expected: str | None) -> None:
    assert nearest(name, ["eta", "steps", "ddim", "fashion-mnist"]) == expected


def test_nearest_keeps_the_spelling_of_the_option() -> None:
    assert nearest("readme.MD", ["README.md"]) == "README.md"
    assert nearest("a", []) is None


def test_importing_the_errors_loads_nothing() -> None:
    code = "import sys; before = set(sys.modules); import uldm_cli.errors; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.split() == ["uldm_cli", "uldm_cli.errors"]
