"""Pulling models from a real server (tests/conftest.py) that stands in for the publishers'."""

import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from uldm_cli.errors import ConfigError, UldmError, UsageError
from uldm_cli.runs import zoo
from uldm_cli.runs.files import sha256_of

NAME = "ffhq256"


def checkpoint(value: float = 1.0) -> bytes:
    """What torch writes: a zip, but not an archive."""
    content = io.BytesIO()
    torch.save({"state_dict": {"w": torch.full((1000,), value)}}, content)
    return content.getvalue()


def archive(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, data in files.items():
            file.writestr(name, data)
    return content.getvalue()


CKPT = checkpoint()
ARCHIVE = archive({"model.ckpt": CKPT})


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where pulled models go."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "uldm" / "models"


@pytest.fixture
def serve(server: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Have the server publish this content as ffhq256, under this path; `facts` are more of its entry."""
    published = zoo.entries()

    def change(content: bytes, path: str = "ffhq.zip", **facts: Any) -> Any:
        server.content = content
        facts = {"url": server.url(path), **facts}
        changed = [replace(one, **facts) if one.name == NAME else one for one in published]
        monkeypatch.setattr(zoo, "entries", lambda: changed)
        return server

    return change


def test_pulls_unpacks_and_resolves(serve: Callable[..., Any], models: Path) -> None:
    server = serve(archive({"model.ckpt": CKPT, "config.yaml": b"model: theirs"}))
    pulled = zoo.pull(NAME)
    assert pulled.path == zoo.resolve(NAME) == models / NAME / "model.ckpt"
    assert pulled.path.read_bytes() == CKPT
    assert (models / NAME / "config.yaml").read_bytes() == b"model: theirs"
    assert (pulled.sha256, pulled.bytes, pulled.source) == (sha256_of(pulled.path), len(CKPT), server.url("ffhq.zip"))
    assert json.loads((models / f"{NAME}.json").read_text())["sha256"] == pulled.sha256
    assert sorted(path.name for path in models.iterdir()) == [NAME, f"{NAME}.json"]
    assert zoo.pull(NAME) == pulled
    assert len(server.requests) == 1


def test_a_bare_checkpoint_gets_its_config(serve: Callable[..., Any], models: Path) -> None:
    serve(CKPT, "model.ckpt")
    assert zoo.pull(NAME).path.read_bytes() == CKPT
    text = (models / NAME / "config.yaml").read_text()
    assert yaml.safe_load(text) == zoo.config_of(NAME)


def test_an_archive_with_a_folder_and_another_name(serve: Callable[..., Any], models: Path) -> None:
    serve(archive({"ffhq/last.ckpt": CKPT, "__MACOSX/ffhq/._last.ckpt": b"x"}))
    assert zoo.pull(NAME).path == zoo.resolve(NAME) == models / NAME / "ffhq" / "last.ckpt"
    assert (models / NAME / "ffhq" / "config.yaml").exists()


def test_a_broken_connection_is_resumed_by_a_later_pull(
    serve: Callable[..., Any], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(ARCHIVE)
    server.headers = {"ETag": '"1"'}
    server.breaks = 1
    with monkeypatch.context() as patch:
        patch.setattr("uldm_cli.fetch.ATTEMPTS", 1)
        with pytest.raises(UldmError, match=r"broke after \d+ of \d+ bytes.*--from FILE"):
            zoo.pull(NAME)
    assert not zoo.folder(NAME).exists()
    zoo.pull(NAME)
    assert zoo.resolve(NAME).read_bytes() == CKPT
    assert [wanted for _, wanted in server.requests] == [None, f"bytes={len(ARCHIVE) // 2}-"]


def test_a_redirect_is_followed_and_a_mirror_tried(serve: Callable[..., Any], server: Any) -> None:
    serve(ARCHIVE, "gone", mirrors=(server.url("to?file:///etc/passwd"), server.url("to?/there")))
    zoo.pull(NAME)
    assert [path for path, _ in server.requests] == ["/gone", "/to?file:///etc/passwd", "/to?/there", "/there"]


def test_a_redirect_to_a_file_is_refused(serve: Callable[..., Any], models: Path) -> None:
    serve(b"", "to?file:///etc/passwd")
    with pytest.raises(UldmError, match="Redirection to url 'file:///etc/passwd' is not allowed"):
        zoo.pull(NAME)
    assert not list(models.iterdir())


def test_a_web_page_is_named_as_such(serve: Callable[..., Any], models: Path, tmp_path: Path) -> None:
    serve(b"<html>log in", "page")
    with pytest.raises(UldmError, match="a web page instead of the file"):
        zoo.pull(NAME)
    (tmp_path / "page.html").write_bytes(b"\n<!DOCTYPE html><html>log in")
    with pytest.raises(ConfigError, match="is a web page"):
        zoo.pull(NAME, tmp_path / "page.html")
    assert not list(models.iterdir())


@pytest.mark.parametrize(
    ("facts", "match"),
    [
        ({"bytes": 7}, f"{len(CKPT)} bytes instead of 7"),
        ({"sha256": "0" * 64}, "its sha256 begins with .*, expected 000000000000"),
    ],
)
def test_not_what_was_published(serve: Callable[..., Any], models: Path, facts: Any, match: str) -> None:
    serve(ARCHIVE, **facts)
    with pytest.raises(ConfigError, match=f"is not what was published as {NAME}: {match}"):
        zoo.pull(NAME)
    assert not list(models.iterdir())


def test_another_file_than_was_pulled_first(serve: Callable[..., Any], models: Path, tmp_path: Path) -> None:
    serve(ARCHIVE)
    path = zoo.pull(NAME).path
    path.write_bytes(checkpoint(2.0))
    with pytest.raises(ConfigError, match=f"is not what was pulled first as {NAME}: its sha256"):
        zoo.pull(NAME)
    for file in path.parent.iterdir():
        file.unlink()
    path.parent.rmdir()
    other = tmp_path / "other.ckpt"
    other.write_bytes(checkpoint(3.0))
    with pytest.raises(ConfigError, match=rf"is not what was pulled first .*remove .*{NAME}\.json"):
        zoo.pull(NAME, other)
    assert other.exists()
    (models / f"{NAME}.json").unlink()
    assert zoo.pull(NAME, other).path.read_bytes() == checkpoint(3.0)


def test_a_damaged_record(models: Path) -> None:
    (models / NAME).mkdir(parents=True)
    (models / NAME / "model.ckpt").write_bytes(CKPT)
    (models / f"{NAME}.json").write_text("[]")
    with pytest.raises(ConfigError, match=rf"{NAME}\.json is damaged"):
        zoo.pull(NAME)


@pytest.mark.parametrize(("inside", "match"), [("../evil.ckpt", "points outside"), ("x", "without a checkpoint")])
def test_a_hostile_archive_leaves_nothing(serve: Callable[..., Any], models: Path, inside: str, match: str) -> None:
    serve(archive({inside: CKPT}))
    with pytest.raises(ConfigError, match=match):
        zoo.pull(NAME)
    assert not list(models.iterdir())


def test_several_checkpoints(serve: Callable[..., Any], models: Path) -> None:
    serve(archive({"a.ckpt": CKPT, "b.ckpt": CKPT}))
    with pytest.raises(ConfigError, match=r"one checkpoint model\.ckpt, and holds a\.ckpt, b\.ckpt"):
        zoo.pull(NAME)
    serve(archive({"a.ckpt": CKPT, "model.ckpt": CKPT}))
    assert zoo.pull(NAME).path.name == "model.ckpt"


@pytest.mark.parametrize("content", [ARCHIVE, CKPT])
def test_by_hand(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setenv("ULDM_OFFLINE", "1")
    file = tmp_path / "Downloads.bin"
    file.write_bytes(content)
    pulled = zoo.pull(NAME, file)
    assert (pulled.path.read_bytes(), pulled.source) == (CKPT, str(file))
    assert file.read_bytes() == content
    with pytest.raises(UsageError, match="already"):
        zoo.pull(NAME, file)
    assert not server.requests


def test_put_in_place_by_hand(models: Path) -> None:
    (models / NAME).mkdir(parents=True)
    (models / NAME / "model.ckpt").write_bytes(CKPT)
    assert zoo.pull(NAME).bytes == len(CKPT)
    assert (models / NAME / "config.yaml").exists()
    assert (models / f"{NAME}.json").exists()


def test_a_download_put_in_place_by_hand(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULDM_OFFLINE", "1")
    with pytest.raises(UldmError, match=rf"by other means and run .*--from FILE`, or put it at {models}/{NAME}"):
        zoo.pull(NAME)
    models.mkdir(parents=True, exist_ok=True)
    (models / f"{NAME}.download").write_bytes(b"half")
    with pytest.raises(ConfigError, match="neither a zip nor a checkpoint"):
        zoo.pull(NAME)
    (models / f"{NAME}.download").write_bytes(CKPT)
    assert zoo.pull(NAME).path.read_bytes() == CKPT


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "cannot be read"),
        (b"", "neither a zip nor a checkpoint"),
        (CKPT[:-100], "truncated or damaged"),
        (archive({"readme.txt": b"hi"}), r"a zip without a checkpoint \(\.ckpt\)\. It holds: readme\.txt"),
    ],
)
def test_files_that_are_no_model(tmp_path: Path, models: Path, content: bytes | None, match: str) -> None:
    file = tmp_path / "file"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=match):
        zoo.pull(NAME, file)
    assert not list(models.iterdir())


def test_nothing_is_half_unpacked_when_it_is_interrupted(
    serve: Callable[..., Any], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(ARCHIVE)
    with monkeypatch.context() as patch:
        patch.setattr(zoo, "sha256_of", lambda path: os.kill(os.getpid(), 2))
        with pytest.raises(KeyboardInterrupt):
            zoo.pull(NAME)
    assert [path.name for path in models.iterdir()] == [f"{NAME}.download"]
    server = serve(b"gone")
    server.requests.clear()
    zoo.pull(NAME)
    assert not server.requests


def test_unwritable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UldmError, match=r"ffhq256 of the zoo cannot be stored: .*file"):
        zoo.pull(NAME)


def test_not_pulled_and_not_known() -> None:
    with pytest.raises(ConfigError, match=r"is not on this machine. Run: uldm convert zoo pull ffhq256"):
        zoo.resolve(NAME)
    with pytest.raises(ConfigError, match=r"no model 'fhq256'. Did you mean 'ffhq256'?"):
        zoo.resolve("fhq256")
    with pytest.raises(ConfigError, match="zoo list"):
        zoo.pull("../../etc")


def test_the_list_is_whole() -> None:
    """Every model that is known to be published, with the figures of it; needs the list they were taken from."""
    assets = os.environ.get("ULDM_TEST_ASSETS")
    if not assets:
        pytest.skip("ULDM_TEST_ASSETS is not set")
    published = yaml.safe_load((Path(assets) / "zoo.yaml").read_text().partition("shapes:")[0])
    ours = {one.name: one for one in zoo.entries()}
    assert ours.keys() == published["autoencoders"].keys() | published["models"].keys()
    for name, facts in published["autoencoders"].items():
        figures = ours[name].figures
        assert (ours[name].url, figures["rfid"], ours[name].train_steps) == tuple(
            facts[key] for key in ("url", "rfid", "train_steps")
        )
        for figure in ("psnr", "psim"):
            assert f"{figures[figure]:.2f} +/- {figures[f'{figure}_std']:.2f}" == facts[figure]
    for name, facts in published["models"].items():
        one, guided = ours[name], facts.get("guided", {})
        facts = facts | facts.get("unguided", {})
        assert (one.url, one.task, one.hub or facts.get("hub")) == (facts["url"], facts["task"], one.hub)
        assert {*one.mirrors} == {facts[key] for key in ("also",) if key in facts}
        assert {key: facts.get(key) for key in one.figures} == one.figures
        assert guided == one.figures_guided
        assert {key: one.sampling[key] for key in ("steps", "eta") if key in facts} == {
            key: facts[key] for key in ("steps", "eta") if key in facts
        }
