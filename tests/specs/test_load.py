"""Loading configs: what wins, what is said of wrong input, and that nothing else than ConfigError comes out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, model_validator

from uldm_cli import registry
from uldm_cli.errors import ConfigError
from uldm_cli.specs.base import Slot, Spec, problem
from uldm_cli.specs.load import Flag, dump_yaml, load_config, parse_override, split_arguments
from uldm_cli.specs.yamlfile import MAX_BYTES, parse_yaml, to_yaml


class Ddim(Spec):
    """A sampler with eta."""

    kind: Literal["ddim"] = "ddim"
    steps: int = Field(200, gt=0)
    eta: float = Field(1.0, ge=0, le=1)


class Heun(Spec):
    """A sampler without eta."""

    kind: Literal["heun"] = "heun"
    steps: int = Field(30, gt=0)
    inner: Annotated[Spec, Slot("samplers")] = Ddim(steps=7)


class Optim(BaseModel):
    """A part that is no spec."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)


def _default_num(data: dict[str, Any]) -> int:
    return 2 * int(data["seed"])


class Top(Spec):
    """A command's config."""

    kind: Literal["ldm-sample"] = "ldm-sample"
    sampler: Annotated[Spec, Slot("samplers")] = Ddim(steps=100, eta=0.5)
    maybe: Annotated[Spec, Slot("samplers")] | None = None
    optim: Optim = Optim(lr=0.5)
    extra: Optim | None = None
    name: str = "me"
    device: Literal["cpu", "cuda"] = "cpu"
    slug: str = Field("a", pattern="^[a-z]+$", description="small letters.")
    either: int | list[int] = 1
    widths: tuple[int, ...] = Field((32, 64), min_length=1)
    stages: tuple[Annotated[Spec, Slot("samplers")], ...] = ()
    free: dict[str, Any] = Field(default_factory=dict)
    flag: bool = False
    seed: int = 0
    num: int = Field(default_factory=_default_num, ge=0)
    path: Path | None = None
    step_size: int = 10

    @model_validator(mode="after")
    def _step_size_fits(self) -> Self:
        steps = getattr(self.sampler, "steps", 0)
        if self.step_size > steps:
            raise problem(f"greater than the {steps} steps", "Choose a smaller one", path="step_size")
        return self


class Needs(Spec):
    """A config with a field that must be given."""

    kind: Literal["ldm-train"] = "ldm-train"
    root: str = Field(description="The folder.")
    count: int


@pytest.fixture(autouse=True)
def _kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"ddim": f"{__name__}:Ddim", "heun": f"{__name__}:Heun"}
    monkeypatch.setitem(registry.BUILTIN, "samplers", table)


@pytest.fixture
def yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write `x.yaml` into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes) -> Path:
        path = Path("x.yaml")
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def message(*args: Any, model: type[BaseModel] = Top, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(model, *args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.exit_code == 2
    return text


# What wins


def test_defaults_alone() -> None:
    assert load_config(Top, None) == Top()


def test_base_below_yaml_below_override_below_flag(yaml: Any) -> None:
    path = yaml("sampler: {steps: 20}\nseed: 2\nname: yaml\n")
    base = {"seed": 1, "name": "base", "device": "cuda", "sampler": {"eta": 0.1}}
    top = load_config(Top, path, ["seed=3", "name=override"], {"name": "flag", "device": None}, base)
    assert (top.seed, top.name, top.device, top.num) == (3, "flag", "cuda", 6)
    assert top.sampler == Ddim(steps=20, eta=0.1)


def test_mapping_without_kind_changes_the_default_node(yaml: Any) -> None:
    assert load_config(Top, yaml("sampler: {steps: 20}\n")).sampler == Ddim(steps=20, eta=0.5)
    assert load_config(Top, yaml("optim: {betas: [0, 0]}\n")).optim == Optim(lr=0.5, betas=(0, 0))


def test_a_node_that_says_its_kind_stands_alone(yaml: Any) -> None:
    assert load_config(Top, yaml("sampler: {kind: heun}\n")).sampler == Heun()
    assert load_config(Top, yaml("sampler: heun\n")).sampler == Heun()
    assert load_config(Top, yaml("sampler: {kind: ddim, steps: 20}\n")).sampler == Ddim(steps=20, eta=1.0)


def test_overrides_reach_through_defaults() -> None:
    assert load_config(Top, None, ["sampler.steps=9", "step_size=1"]).sampler == Ddim(steps=9, eta=0.5)
    assert load_config(Top, None, ["sampler=heun"]).sampler == Heun()
    assert load_config(Top, None, ["sampler.kind=heun"]).sampler == Heun()
    assert load_config(Top, None, ["sampler=heun", "sampler.inner.eta=0"]).sampler == Heun(inner=Ddim(steps=7, eta=0))
    assert load_config(Top, None, ['sampler={"eta": 0}']).sampler == Ddim(steps=100, eta=0)
    assert load_config(Top, None, ["optim.lr=3e-4"]).optim.lr == 3e-4
    assert load_config(Top, None, ["extra.lr=2"]).extra == Optim(lr=2)
    assert load_config(Top, None, ["maybe=heun"]).maybe == Heun()
    assert load_config(Top, None, ["free.a.b=[1]"]).free == {"a": {"b": [1]}}


def test_overrides_reach_into_lists(yaml: Any) -> None:
    assert load_config(Top, None, ["widths.1=16"]).widths == (32, 16)
    assert load_config(Top, None, ["~widths.0"]).widths == (64,)
    assert load_config(Top, None, ["widths=[1,2,3]"]).widths == (1, 2, 3)
    path = yaml("stages: [ddim, {kind: heun}]\n")
    assert load_config(Top, path, ["stages.1.inner.eta=0"]).stages == (Ddim(), Heun(inner=Ddim(steps=7, eta=0)))


def test_removing_goes_back_to_the_default(yaml: Any) -> None:
    path = yaml("seed: 5\nsampler: heun\nfree: {a: 1, b: 2}\n")
    top = load_config(Top, path, ["~seed", "~sampler", "~free.a", "~num"])
    assert (top.seed, top.sampler, top.free) == (0, Ddim(steps=100, eta=0.5), {"b": 2})


@pytest.mark.parametrize("value", ["007", "2024", "1e3", "true", "null ", "[1, 2]", "a=b", "", "3:30", '"quoted"'])
def test_text_fields_keep_what_was_typed(value: str) -> None:
    expected = json.loads(value) if value.startswith('"') else value
    assert load_config(Top, None, [f"name={value}"]).name == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [("flag=true", True), ("seed=3", 3), ("path=a b", Path("a b")), ("path=7", Path("7")), ("path=null", None)],
)
def test_values_are_json_else_text(text: str, value: Any) -> None:
    assert getattr(load_config(Top, None, [text]), text.partition("=")[0]) == value


def test_a_flag_may_set_a_node_and_another_a_field_of_it() -> None:
    flags = {"sampler.steps": 12, "sampler": "heun", "path": Path("p"), "widths": (1, 2)}
    top = load_config(Top, None, [], flags)
    assert (top.sampler, top.path, top.widths) == (Heun(steps=12), Path("p"), (1, 2))


# What is said of wrong input


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n\nsampler:\n  etta: 0.5\n", "x.yaml:4: sampler.etta: unknown key 'etta' (value 0.5). Did you mean 'eta'?"),
        (
            "sampler: {kind: heun, qqq: 1}",
            "x.yaml:1: sampler.qqq: unknown key 'qqq' (value 1). There are: steps, inner",
        ),
        ("seed: 1\nsampler: huen\n", "x.yaml:2: sampler: unknown sampler 'huen'. Did you mean 'heun'?"),
        ("sampler:\n  kind: q\n", "x.yaml:2: sampler.kind: unknown sampler 'q'. There are: ddim, heun"),
        ("sampler: 7\n", "x.yaml:1: sampler: expected a sampler: the name of a kind, or a mapping with `kind`, got 7"),
        ("seed: many", "x.yaml:1: seed: expected a whole number, got 'many'"),
        ("seed: 1.5", "x.yaml:1: seed: expected a whole number, got 1.5"),
        ("seed:", "x.yaml:1: seed: expected a whole number, got null"),
        ("seed: [1]", "x.yaml:1: seed: expected a whole number, got [1]"),
        ("flag: maybe", "x.yaml:1: flag: expected true or false, got 'maybe'"),
        ("name: 2024", "x.yaml:1: name: expected text, got 2024. Put it in quotes"),
        ("name: true", "x.yaml:1: name: expected text, got true. Put it in quotes"),
        ("path: [1]", "x.yaml:1: path: expected a path, got [1]"),
        ("device: cudda", "x.yaml:1: device: expected 'cpu' or 'cuda', got 'cudda'. Did you mean 'cuda'?"),
        ("device: 3", "x.yaml:1: device: expected 'cpu' or 'cuda', got 3"),
        ("slug: A1", "x.yaml:1: slug: expected small letters, got 'A1'"),
        ("either: x", "x.yaml:1: either: expected a whole number or a list, got 'x'"),
        ("widths: 3", "x.yaml:1: widths: expected a list, got 3"),
        ("widths: []", "x.yaml:1: widths: expected at least 1 item, got []"),
        ("widths:\n  - 1\n  - b\n", "x.yaml:3: widths.1: expected a whole number, got 'b'"),
        ("optim: 3", "x.yaml:1: optim: expected a mapping, got 3"),
        ("optim: {lr: 0}", "x.yaml:1: optim.lr: expected a number greater than 0, got 0"),
        ("sampler: {eta: 2}", "x.yaml:1: sampler.eta: expected a number of at most 1, got 2"),
        ("sampler: {eta: -1.5}", "x.yaml:1: sampler.eta: expected a number of at least 0, got -1.5"),
        ("\nstep_size: 150", "x.yaml:2: step_size: greater than the 100 steps. Choose a smaller one"),
        ("sampler: {steps: 5}", "x.yaml: step_size: greater than the 5 steps. Choose a smaller one"),
        (
            "sed: 1\nseed: b\nflag: c\n",
            "x.yaml:1: sed: unknown key 'sed' (value 1) (and 2 more: flag, seed). Did you mean 'seed'?",
        ),
    ],
)
def test_wrong_values_in_yaml(yaml: Any, text: str, expected: str) -> None:
    assert message(yaml(text)) == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sampler.etta=1", "sampler.etta=1 (command line): unknown key 'etta'. Did you mean 'eta'?"),
        ("samplr.eta=1", "samplr.eta=1 (command line): unknown key 'samplr'. Did you mean 'sampler'?"),
        ("sampler=huen", "sampler=huen (command line): unknown sampler 'huen'. Did you mean 'heun'?"),
        ("seed=many", "seed=many (command line): expected a whole number"),
        ("seed.x=1", "seed.x=1 (command line): seed is 0. Set it whole"),
        ("num.x=1", "num.x=1 (command line): num has no value that could be changed in part. Set it whole"),
        ("widths.2=1", "widths.2=1 (command line): '2' is no item of widths. Items: 0 to 1"),
        ("widths.-1=1", "widths.-1=1 (command line): '-1' is no item of widths. Items: 0 to 1"),
        ("stages.0.x=1", "stages.0.x=1 (command line): '0' is no item of stages. Items: none, it is empty"),
        ("widths.x.y=1", "widths.x.y=1 (command line): 'x' is no item of widths. Items: 0 to 1"),
        ("widths.0.y=1", "widths.0.y=1 (command line): widths.0 is 32. Set it whole"),
        (
            "maybe.steps=1",
            "maybe.steps=1 (command line): maybe is not given, so nothing in it can be changed. "
            "Choose its kind first: maybe=KIND",
        ),
        ("~sed", "~sed (command line): unknown key 'sed'. Did you mean 'seed'?"),
        ("~sampler.etta", "~sampler.etta (command line): unknown key 'etta'. Did you mean 'eta'?"),
        ("~seed=3", "'~seed=3' takes no value; write ~KEY"),
        ("seed", "'seed' has no value; write KEY=VALUE"),
        ("=3", "'=3': '' is not a key. Keys are words with dots between: sampler.steps=50"),
        ("a..b=3", "'a..b=3': 'a..b' is not a key. Keys are words with dots between: sampler.steps=50"),
        ("kind=ldm-train", "kind=ldm-train (command line): a config of `uldm ldm train`, not of `uldm ldm sample`. Run `uldm ldm train`"),  # noqa: E501
        ("step_size=150", "step_size=150 (command line): greater than the 100 steps. Choose a smaller one"),
        ('sampler={"kind": "heun", "stps": 1}', 'sampler={"kind": "heun", "stps": 1} (command line): sampler.stps: unknown key \'stps\' (value 1). Did you mean \'steps\'?'),  # noqa: E501
    ],
)  # fmt: skip
def test_wrong_overrides(override: str, expected: str) -> None:
    assert message(None, [override]) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"sampler": "heun", "sampler.eta": 1.0}, "--eta does not apply to sampler 'heun'"),
        ({"speed": 1}, "--speed does not apply to this command"),
        ({"sped.x": 1}, "--x does not apply to this command"),
        ({"sampler.steps": Flag("--total-steps", 0)}, "--total-steps 0: expected a number greater than 0"),
        ({"step_size": 150}, "--step-size 150: greater than the 100 steps. Choose a smaller one"),
        ({"sampler": "huen"}, "--sampler huen: unknown sampler 'huen'. Did you mean 'heun'?"),
        ({"sampler": "huen", "sampler.eta": 1}, "--sampler huen: unknown sampler 'huen'. Did you mean 'heun'?"),
        ({"device": "x"}, "--device x: expected 'cpu' or 'cuda'"),
        ({"widths": (1, "b")}, "--widths 1,b: widths.1: expected a whole number, got 'b'"),
        ({"seed": Flag("--seed", None), "num": -1}, "--num -1: expected a number of at least 0"),
    ],
)
def test_wrong_flags(flags: dict[str, object], expected: str) -> None:
    assert message(None, flags=flags) == expected


def test_missing_fields_say_what_they_are(yaml: Any) -> None:
    assert message(None, model=Needs) == "root: missing (and 1 more: count). Add root=VALUE: The folder"
    assert message(yaml("root: a"), model=Needs) == "x.yaml: count: missing. Add it, as count=VALUE on the command line"
    assert message(yaml("rot: a"), model=Needs).startswith(
        "x.yaml:1: rot: unknown key 'rot' (value 'a') (and 2 more: root, count)."
    )
    assert message(yaml("root: a\ncount: 1\n"), ["~root"], model=Needs).startswith("~root (command line): missing.")


def test_another_commands_config_is_named(yaml: Any) -> None:
    expected = "x.yaml:2: a config of `uldm vqvae train`, not of `uldm ldm sample`. Run `uldm vqvae train`"
    assert message(yaml("seed: 1\nkind: vqvae-train\n")) == expected
    assert message(yaml("kind: nothing")).startswith("x.yaml:1: kind 'nothing' names no command.")
    assert message(yaml("kind: [1]")).startswith("x.yaml:1: kind [1] names no command.")
    assert message(None, base={"kind": "ldm-train"}).startswith("the saved config: a config of `uldm ldm train`")
    assert load_config(Top, yaml("kind: ldm-sample")) == load_config(Top, yaml("seed: 0")) == Top()


def test_a_wrong_saved_config_says_so(yaml: Any) -> None:
    assert message(None, base={"seed": "x"}) == "the saved config: seed: expected a whole number, got 'x'"


# Files


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "x.yaml: holds nothing. `uldm config new` prints a complete config"),
        (b"# only a comment\n", "x.yaml: holds nothing. `uldm config new` prints a complete config"),
        (b"null\n", "x.yaml: holds nothing. `uldm config new` prints a complete config"),
        (b"\n- a\n- b\n", "x.yaml:2: expected `key: value` lines, found a list"),
        (b"just text", "x.yaml:1: expected `key: value` lines, found text"),
        (b"sampler:\n\tsteps: 3\n", "x.yaml:2: indented with a tab. YAML wants spaces"),
        (b"sampler:\n  \tsteps: 3\n", "x.yaml:2: indented with a tab. YAML wants spaces"),
        (b"seed: 1\nname: a\nseed: 2\n", "x.yaml:3: the key 'seed' stands twice (first in line 1)"),
        (b"optim:\n  lr: 1\n  lr: 2\n", "x.yaml:3: the key 'lr' stands twice (first in line 2)"),
        (
            b"sampler:\n  target: os.system\n",
            "x.yaml:2: `target: os.system` names Python code, which a config cannot. "
            "Write `kind: NAME`; `uldm plugins list` shows the kinds",
        ),
        (
            b"a: !!python/object/apply:os.system [ls]",
            "x.yaml:1: the tag !!python/object/apply:os.system is not allowed",
        ),
        (b"a: !x {}", "x.yaml:1: the tag !x is not allowed"),
        (b"a: !!binary aGk=", "x.yaml:1: the tag !!binary is not allowed. Write plain values"),
        (b"a: !!int many", "x.yaml:1: 'many' is not !!int"),
        (b"a: 1\n---\nb: 2\n", "x.yaml:2: a second document (---); expected one"),
        (b"a: [1, 2\nb: 3\n", "x.yaml:2: not YAML: "),
        (b"a: b: c\n", "x.yaml:1: not YAML: a `:` where no key can stand"),
        (b"a: *nowhere\n", "x.yaml:1: not YAML: found undefined alias 'nowhere'"),
        (b"[1, 2]: 3\n", "x.yaml:1: a list or mapping as a key; expected text"),
        (b"a: 1\nb: \x07\n", "x.yaml:2: the character "),
        (b"a: 1\nname: caf\xe9\n", "x.yaml:2: not UTF-8 text (byte 0xe9)"),
        (b"a: &a [*a]\n", "x.yaml:1: an alias (*) that stands for a value which holds it"),
        (b"a: " + b"[" * 3000 + b"]" * 3000, "x.yaml: nested too deeply"),
        (b"#" * (MAX_BYTES + 1), "x.yaml: larger than 1 MB, which no config is"),
    ],
)
def test_wrong_files(yaml: Any, text: bytes, expected: str) -> None:
    assert message(yaml(text)).startswith(expected)


def test_alias_bomb(yaml: Any) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
    assert ": more than 50000 values, counting what aliases (*) stand for" in message(yaml("\n".join(lines)))


def test_missing_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    Path("configs/train.yaml").touch()
    assert message(Path("configs/tarin.yaml")) == "configs/tarin.yaml: no such file. Did you mean 'configs/train.yaml'?"
    assert message(Path("configs/zz.yaml")) == "configs/zz.yaml: no such file"
    assert message(Path("config/x.yaml")) == "config/x.yaml: no such file; there is no folder config"
    assert message(Path("configs")) == "configs: a folder, expected a YAML file"
    assert message(Path("a\0b")).startswith("a\0b: cannot be read: ")


def test_scalars_follow_yaml_1_2(yaml: Any) -> None:
    path = yaml("free: {a: 3e-4, b: no, c: 1:30, d: 2024-01-01, e: 0x10, f: 010, g: .inf, h: ~, i: True, j: '1', k: }")
    assert load_config(Top, path).free == {
        "a": 3e-4, "b": "no", "c": "1:30", "d": "2024-01-01", "e": 16, "f": 10,
        "g": float("inf"), "h": None, "i": True, "j": "1", "k": None,
    }  # fmt: skip


def test_aliases_and_merges_work(yaml: Any) -> None:
    path = yaml("free:\n  a: &a {x: 1, y: 2}\n  b:\n    y: 3\n    <<: *a\n  c: *a\n  d: {<<: [{x: 5}, *a]}\n")
    free = load_config(Top, path).free
    assert (free["b"], free["c"], free["d"]) == ({"x": 1, "y": 3}, {"x": 1, "y": 2}, {"x": 5, "y": 2})


def test_byte_order_mark_and_windows_lines(yaml: Any) -> None:
    assert load_config(Top, yaml(b"\xef\xbb\xbfseed: 3\r\nname: b\r\n")).seed == 3


def test_dump_is_readable_and_complete(yaml: Any) -> None:
    text = dump_yaml(Top(sampler=Heun(), name="no", path=Path("a/b")))
    assert text.startswith("kind: ldm-sample\nsampler:\n  kind: heun\n  steps: 30\n  inner:\n    kind: ddim\n")
    assert "widths: [32, 64]\n" in text
    assert load_config(Top, yaml(text)) == Top(sampler=Heun(), name="no", path=Path("a/b"))


# Arguments


@pytest.mark.parametrize(
    ("arguments", "config", "overrides"),
    [
        ([], None, []),
        (["a=1", "~b"], None, ["a=1", "~b"]),
        (["x.yaml", "a=b.yaml"], "x.yaml", ["a=b.yaml"]),
        (["a=1", "missing.yml"], "missing.yml", ["a=1"]),
        (["name=1.yaml"], "name=1.yaml", []),
        (["plain"], "plain", []),
    ],
)
def test_split_arguments(yaml: Any, arguments: list[str], config: str | None, overrides: list[str]) -> None:
    Path("name=1.yaml").touch()
    Path("plain").touch()
    assert split_arguments(arguments) == (Path(config) if config else None, overrides)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["steps"], "'steps' is neither a YAML file nor KEY=VALUE. Write FILE.yaml, or a value as in sampler.steps=50"),
        (["trian"], "'trian' is neither a YAML file nor KEY=VALUE. Did you mean 'train.yaml'?"),
        (["a.yaml", "b.yaml"], "two configs, a.yaml and b.yaml; a command takes one"),
        (["."], "'.' is a folder; expected a YAML file or KEY=VALUE"),
    ],
)
def test_split_arguments_refuses(yaml: Any, arguments: list[str], expected: str) -> None:
    Path("train.yaml").touch()
    with pytest.raises(ConfigError) as caught:
        split_arguments(arguments)
    assert str(caught.value) == expected


# Any text at all

keys = st.sampled_from(
    ["sampler", "sampler.steps", "widths.0", "free.a", "kind", "maybe.x", "optim", "", "~", "~seed", "num"]
)
values = st.text() | st.sampled_from(
    ["heun", "{}", "[]", "null", "[" * 2000, "9" * 5000, '{"kind": "heun"}', "1e999", "[" * 400 + "]" * 400]
)
overrides = st.text() | st.builds(lambda key, value: f"{key}={value}", keys | st.text(), values)


def attempt(call: Callable[..., Any], *args: Any) -> Any:
    """What the call gives, or the ConfigError that it raises; any other exception is a failure."""
    try:
        return call(*args)
    except ConfigError as error:
        return error


@given(st.lists(overrides, max_size=4))
def test_any_override_is_taken_or_refused(texts: list[str]) -> None:
    assert isinstance(attempt(load_config, Top, None, texts), (Top, ConfigError))


@given(st.text())
def test_parsing_an_override_keeps_what_it_says(text: str) -> None:
    override = attempt(parse_override, text)
    if not isinstance(override, ConfigError):
        key = ".".join(override.path)
        assert text == (f"~{key}" if override.remove else f"{key}={override.raw}")


@given(st.text(alphabet=st.sampled_from("ab:-[]{}&*<!|>'\" \n#,?%@`~0.\\")))
def test_any_yaml_is_read_or_refused(text: str) -> None:
    assert isinstance(attempt(parse_yaml, text), (dict, ConfigError))


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=12
)


@given(st.dictionaries(st.text().filter(lambda key: key not in ("target", "_target_")), trees, min_size=1, max_size=4))
def test_yaml_written_is_read_back(data: dict[str, Any]) -> None:
    assert parse_yaml(to_yaml(data)) == data
