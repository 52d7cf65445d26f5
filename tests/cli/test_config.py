"""`uldm config` on the commands' real configs."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from uldm_cli import registry
from uldm_cli.runs.configs import config_class
from uldm_cli.specs.load import load_config
from uldm_cli.specs.yamlfile import parse_yaml

ROOT = Path(__file__).resolve().parents[2]
KINDS = list(registry.BUILTIN["commands"])
YAMLS = sorted((ROOT / "configs").rglob("*.yaml"))


pytestmark = pytest.mark.usefixtures("empty_folder")

Result = tuple[int, str, str]


@pytest.fixture
def config(uldm_main: Callable[..., Result]) -> Callable[..., Result]:
    """Run `uldm config ARGS`; its exit code, stdout and stderr."""
    return partial(uldm_main, "config")


@pytest.mark.parametrize("kind", KINDS)
def test_show_prints_defaults_that_load_again(config: Callable[..., Result], kind: str) -> None:
    code, out, err = config("show", kind)
    assert (code, err) == (0, "")
    assert out.startswith(f"kind: {kind}\n")
    Path("shown.yaml").write_text(out)
    assert config("show", "shown.yaml") == (0, out, "")


def test_show_applies_overrides(config: Callable[..., Result]) -> None:
    out = config("show", "ldm-sample", "sampler=ddpm", "sampler.steps=90", "step_size=30")[1]
    assert parse_yaml(out)["sampler"] == {"kind": "ddpm", "steps": 90, "variance": "posterior"}


def test_show_as_json(config: Callable[..., Result]) -> None:
    code, out, _ = config("show", "ldm-sample", "--json")
    assert code == 0
    assert json.loads(out)["sampler"]["kind"] == "ddim"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ldm-sampel"], "'ldm-sampel' is neither a YAML file nor a kind of config. Did you mean 'ldm-sample'?"),
        (["ldm-sample", "sampler.etta=1"], "sampler.etta=1 (command line): unknown key 'etta'. Did you mean 'eta'?"),
        (["missing.yaml"], "missing.yaml: no such file"),
        (["."], ".: a folder, expected a YAML file"),
    ],
)
def test_show_refuses(config: Callable[..., Result], arguments: list[str], message: str) -> None:
    assert config("show", *arguments) == (2, "", f"error: {message}\n")


def test_validate_looks_at_the_kind(config: Callable[..., Result]) -> None:
    Path("a.yaml").write_text("kind: ldm-sample\nseed: 3\n")
    Path("b.yaml").write_text("kind: vqvae-train\n")
    code, out, _ = config("validate", "a.yaml", "b.yaml", "--json")
    assert code == 0
    assert json.loads(out) == {
        "files": [{"path": "a.yaml", "kind": "ldm-sample"}, {"path": "b.yaml", "kind": "vqvae-train"}]
    }
    assert config("validate", "a.yaml")[1].splitlines()[-1] == "valid"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 3\n", f"a.yaml: no `kind` that says which command it is for. There are: {', '.join(KINDS)}"),
        ("\nkind: 3\n", f"a.yaml:2: no `kind` that says which command it is for. There are: {', '.join(KINDS)}"),
        ("kind: ldm-trian\n", "a.yaml:1: 'ldm-trian' is no kind of config. Did you mean 'ldm-train'?"),
        ("kind: ldm-sample\nseed: x\n", "a.yaml:2: seed: expected a whole number, got 'x'"),
    ],
)
def test_validate_refuses(config: Callable[..., Result], text: str, message: str) -> None:
    Path("a.yaml").write_text(text)
    assert config("validate", "a.yaml") == (2, "", f"error: {message}\n")


def test_validate_names_the_first_mistake_of_every_file(config: Callable[..., Result]) -> None:
    for name, text in {"a": "kind: ldm-sample\n", "b": "kind: x\n", "c": "kind: ldm-sample\nsede: 1\n"}.items():
        Path(f"{name}.yaml").write_text(text)
    code, out, err = config("validate", "a.yaml", "b.yaml", "c.yaml")
    assert (code, out) == (2, "")
    assert err.startswith("error: 2 of 3 files: b.yaml:1: 'x' is no kind of config.")
    assert "; c.yaml:2: sede: unknown key 'sede' (value 1). Did you mean 'seed" in err


@pytest.mark.parametrize("kind", KINDS)
def test_new_config_holds_the_defaults_and_says_what_they_are(config: Callable[..., Result], kind: str) -> None:
    assert config("new", kind, "--out", "my.yaml")[0] == 0
    text = Path("my.yaml").read_text()
    assert text.splitlines()[0] == f"# yaml-language-server: $schema={kind}.schema.json"
    assert json.loads(Path(f"{kind}.schema.json").read_text())["title"] == config_class(kind).__name__
    model = config_class(kind)
    assert load_config(model, Path("my.yaml")) == load_config(model, None)
    for name in model.model_fields:
        assert re.search(rf"^(# )?{name}:", text, re.MULTILINE), name
    assert config("new", kind)[1] == text


def test_new_config_of_a_field_without_a_default(config: Callable[..., Result]) -> None:
    """Such a field is commented out, also deep inside."""
    from uldm_cli.specs.datasets import Images
    from uldm_cli.specs.describe import template

    text = template(Images, "x.json")
    assert "\n# the folder, .tar or .zip; or the folder of an LMDB\n# root: ...  (required)\n" in text


def test_new_overwrites_nothing(config: Callable[..., Result]) -> None:
    Path("my.yaml").write_text("mine")
    Path("ldm-sample.schema.json").write_text("mine")
    code, out, err = config("new", "ldm-sample", "--out", "my.yaml")
    assert (code, out, err) == (2, "", "error: my.yaml exists. Remove it, or choose another --out\n")
    assert config("new", "ldm-sample", "--out", "deep/er.yaml")[0] == 0
    assert config("new", "ldm-sample", "--out", "other.yaml")[1] == "wrote other.yaml\n"
    assert {Path(name).read_text() for name in ("my.yaml", "ldm-sample.schema.json")} == {"mine"}
    assert config("new", "ldm-smaple")[2] == "error: 'ldm-smaple' is no kind of config. Did you mean 'ldm-sample'?\n"


def test_schema_of_one_and_of_all(config: Callable[..., Result]) -> None:
    code, out, _ = config("schema", "ldm-sample")
    assert code == 0
    assert json.loads(out)["properties"]["sampler"]["anyOf"][0]["enum"] == ["ddim", "ddpm", "plms"]
    assert config("schema", "--all", "s")[0] == 0
    assert {path.name for path in Path("s").iterdir()} == {f"{kind}.json" for kind in KINDS}
    assert Path("s/ldm-sample.json").read_text() == out


@pytest.mark.parametrize("arguments", [[], ["ldm-sample", "--all", "s"]])
def test_schema_wants_one_or_all(config: Callable[..., Result], arguments: list[str]) -> None:
    message = "error: give a KIND, or --all FOLDER. 'uldm config schema --help' explains\n"
    assert config("schema", *arguments) == (2, "", message)


def test_schemas_in_the_documentation_are_up_to_date(config: Callable[..., Result]) -> None:
    """If this fails: uldm config schema --all docs/schema"""
    config("schema", "--all", "s")
    committed = {path.name: path.read_text() for path in (ROOT / "docs/schema").iterdir()}
    assert {path.name: path.read_text() for path in Path("s").iterdir()} == committed


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_configs_of_the_project_are_valid_and_name_their_schema(config: Callable[..., Result], path: Path) -> None:
    code, _, err = config("validate", str(path))
    assert (code, err) == (0, "")
    header = re.match(r"# yaml-language-server: \$schema=(\S+)\n", path.read_text())
    assert header, "the first line must name the schema"
    kind = parse_yaml(path.read_text())["kind"]
    assert (path.parent / header[1]).resolve() == ROOT / "docs/schema" / f"{kind}.json"


@pytest.mark.parametrize("command", ["show", "validate", "new", "schema"])
def test_help_ends_with_an_example(config: Callable[..., Result], command: str) -> None:
    assert f"\n  uldm config {command} " in config(command, "--help")[1]


def test_a_config_loads_no_torch() -> None:
    code = "import sys; from uldm_cli.__main__ import main; main(); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "config", "show", "ldm-train"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
