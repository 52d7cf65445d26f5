"""Models named by their place on the hub. The network is the only thing that is not real here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects

from uldm_cli.errors import ConfigError, UldmError
from uldm_cli.formats.diffusers import local_folder

PICKLED = ("vqvae/diffusion_pytorch_model.bin",)
SAFE = ("unet/diffusion_pytorch_model.safetensors",)
CONFIGS = ("model_index.json", "unet/config.json", "vqvae/config.json", "scheduler/scheduler_config.json")
UNWANTED = ("README.md", "unet/diffusion_pytorch_model.bin", "unet/flax_model.msgpack", "notebook/big.bin")


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ULDM_OFFLINE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub with one model; the calls that it gets."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(repository: str, **options: Any) -> str:
        calls.append({"repository": repository, **options})
        for name in filter_repo_objects(
            [*CONFIGS, *SAFE, *PICKLED, *UNWANTED], allow_patterns=options["allow_patterns"]
        ):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return calls


def test_fetches_what_is_needed_and_prefers_safetensors(hub: list[dict[str, Any]]) -> None:
    folder = local_folder("hf://CompVis/ldm-celebahq-256@refs/pr/7")
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {*CONFIGS, *SAFE, *PICKLED}
    assert {(call["repository"], call["revision"]) for call in hub} == {("CompVis/ldm-celebahq-256", "refs/pr/7")}


@pytest.mark.parametrize("variable", ["ULDM_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_finds_what_was_fetched_before(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0" * 40
    snapshot = tmp_path / "models--owner--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()
    refs = tmp_path / "models--owner--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert local_folder("hf://owner/name") == snapshot
    with pytest.raises(UldmError, match="hf://owner/other is not on this machine, and downloading is forbidden"):
        local_folder("hf://owner/other")


@pytest.mark.parametrize("variable", ["ULDM_OFFLINE", "HF_HUB_OFFLINE"])
@pytest.mark.parametrize("value", ["", "0", "false", "no"])
def test_online(variable: str, value: str, hub: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    local_folder("hf://owner/name")
    assert not any(call["local_files_only"] for call in hub)


def http(kind: type[Exception]) -> Callable[[], Exception]:
    return lambda: kind("404 Client Error.\nlong text", response=Mock(headers={}))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("failure", "code", "words"),
    [
        (http(errors.RepositoryNotFoundError), 2, "the hub has no model owner/name"),
        (http(errors.GatedRepoError), 2, "for registered users only"),
        (http(errors.RevisionNotFoundError), 2, "has no such revision"),
        (http(errors.HfHubHTTPError), 1, "could not be fetched (404 Client Error.)"),
        (lambda: errors.LocalEntryNotFoundError("Got: ConnectError\nmore"), 1, "the hub cannot be reached"),
        (lambda: OSError(28, "No space left on device"), 1, "No space left on device"),
    ],
)
def test_failures_are_one_line(
    failure: Callable[[], Exception], code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=failure()))
    with pytest.raises(UldmError) as caught:
        local_folder("hf://owner/name@v1")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == code


@pytest.mark.parametrize("reference", ["hf://name", "hf://a/b/c", "hf://a/b@", "hf:///b", "hf://a/b c"])
def test_what_is_no_reference(reference: str) -> None:
    with pytest.raises(ConfigError, match="owner/name"):
        local_folder(reference)


def test_a_name_that_the_hub_does_not_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no model owner/\.\."):
        local_folder("hf://owner/..")
