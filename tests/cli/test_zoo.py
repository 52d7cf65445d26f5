import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from uldm_cli.__main__ import main
from uldm_cli.runs import zoo


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_list_names_every_model_and_address(capsys: pytest.CaptureFixture[str]) -> None:
    (zoo.folder("kl-f8")).mkdir(parents=True)
    assert main(["convert", "zoo", "list"]) == 0
    out, err = capsys.readouterr()
    words = re.split(r"\s+", out)
    for entry in zoo.entries():
        assert words.count(entry.name) >= 2
        assert {entry.url, *entry.mirrors} <= {*words}
    assert "27.43 ± 4.26" in out
    assert "classifier, scale 10" in out
    assert "On this machine: kl-f8" in out
    assert err == ""


def test_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "zoo", "list", "--json"]) == 0
    models = {model["name"]: model for model in json.loads(capsys.readouterr().out)["models"]}
    assert [*models] == [entry.name for entry in zoo.entries()]
    faces = models["celeba256"]
    assert faces["figures"] == {"fid": 5.11, "is": 3.29, "precision": 0.72, "recall": 0.49}
    assert faces["sampling"] == {"sampler": "ddim", "steps": 200, "eta": 0}
    assert (faces["hub"], faces["folder"]) == ("CompVis/ldm-celebahq-256", None)


def test_quiet_list_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "zoo", "list", "-q"]) == 0
    assert capsys.readouterr() == ("", "")


def test_pull_by_hand_as_a_user_does(uldm: Callable, golden_checkpoint: Callable, tmp_path: Path) -> None:
    file = golden_checkpoint("uncond-vq")
    ended = uldm("convert", "zoo", "pull", "ffhq256", "--from", str(file), "--json")
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    assert Path(document["path"]).read_bytes() == Path(file).read_bytes()
    assert document["model"] == "zoo:ffhq256"
    assert zoo.resolve("ffhq256") == Path(document["path"])
    again = uldm("convert", "zoo", "pull", "ffhq256")
    assert again.code == 0
    assert again.out.startswith(f"zoo:ffhq256 is {document['path']} (sha256 {document['sha256'][:12]}")


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["ffhq"], 2, "the zoo has no model 'ffhq'. Did you mean 'ffhq256'?"),
        (["ffhq256"], 1, "ULDM_OFFLINE forbids downloading it"),
        (["ffhq256", "--from", "nowhere.zip"], 2, "nowhere.zip cannot be read (No such file or directory)"),
    ],
)
def test_errors_are_one_line(
    args: list[str], code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ULDM_OFFLINE", "1")
    assert main(["convert", "zoo", "pull", *args]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


def test_the_group_called_alone_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "zoo"]) == 0
    assert "pull" in capsys.readouterr().out
