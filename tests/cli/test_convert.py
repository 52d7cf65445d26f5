"""`uldm convert` as people call it."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import AutoencoderKL

Golden = Callable[[str], Path]


class Hostile:
    """What a pickle holds that would leave a file where it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.canary}",)


def test_a_hostile_pickle_is_named_and_not_run(uldm: Callable, tmp_path: Path) -> None:
    canary, file = tmp_path / "canary", tmp_path / "model.ckpt"
    file.write_bytes(pickle.dumps({"state_dict": {"a": [Hostile(canary)]}}, protocol=2))
    done = uldm("convert", "inspect", file)
    assert done.code == 2
    assert "system" in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not canary.exists()


def test_a_published_model_as_its_users_call_it(uldm: Callable, golden_checkpoint: Golden, tmp_path: Path) -> None:
    """The seed script's command line, with `uldm ldm sample` in front."""
    source = golden_checkpoint("uncond-vq")
    shutil.copy(source, tmp_path / "model.ckpt")
    shutil.copy(source.with_name("config.yaml"), tmp_path / "ffhq-ldm-vq-4.yaml")
    line = "--config ffhq-ldm-vq-4.yaml --checkpoint model.ckpt --total_steps 20 --step_size 4 --outdir 2025-03-25"
    done = uldm("ldm", "sample", *line.split(), "--seed", "1125", "--eta", "1.0", cwd=tmp_path)
    assert done.code == 0, done.err
    names = {path.name for path in (tmp_path / "2025-03-25").glob("*.png")}
    assert names == {f"{kind}_step_{n}.png" for kind in ("image", "latent") for n in (4, 8, 12, 16, 20)}


def test_there_and_back(uldm: Callable, golden_checkpoint: Golden, tmp_path: Path) -> None:
    done = uldm("convert", "to-diffusers", golden_checkpoint("uncond-vq"), "theirs", "--verify", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "relative difference" in done.out
    done = uldm("convert", "to-uldm", "theirs", "ours.safetensors", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert json.loads(done.out)["layout"] == "uldm"
    done = uldm("convert", "inspect", "ours.safetensors", "--json", cwd=tmp_path)
    report = json.loads(done.out)
    assert report["kind"] == "latent-diffusion"
    assert report["facts"]["images"] == "3x32x32"


def test_what_is_unusual_is_told_and_the_place_is_made(
    uldm: Callable, golden_checkpoint: Golden, tmp_path: Path
) -> None:
    done = uldm("convert", "to-uldm", golden_checkpoint("uncond-vq"), "new/ours.safetensors", cwd=tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / "new" / "ours.safetensors").exists()
    assert "not read, since they are no tensors: pytorch_lightning" in done.err


def test_an_autoencoder_of_diffusers_is_known_again(uldm: Callable, tmp_path: Path) -> None:
    AutoencoderKL(block_out_channels=(32,), sample_size=16).save_pretrained(tmp_path / "kl")
    assert uldm("convert", "to-compvis", "kl", "theirs", cwd=tmp_path).code == 0
    report = json.loads(uldm("convert", "inspect", "theirs", "--json", cwd=tmp_path).out)
    assert report["kind"] == "autoencoder"
    assert report["extra"] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("to-uldm", "fruits64", "x.pt"), "x.pt does not end with .safetensors"),
        (("to-uldm", "fruits64", "x.safetensors", "--dtype", "int8"), "--dtype int8 is unknown"),
        (("to-diffusers", "fruits64", "x", "--weights", "best"), "--weights best is unknown"),
        (("to-diffusers", "fruits64", "x"), "vqvae"),
        (("inspect", "nowhere.ckpt"), "there is no model 'nowhere.ckpt'"),
        (("inspect", "page.ckpt"), "page.ckpt"),
        (("inspect", "empty.ckpt"), "empty.ckpt"),
        (("inspect", "half.ckpt"), "half.ckpt"),
        (("to-uldm", "unknown", "x.safetensors"), "ldm.evil.Model"),
    ],
)
def test_one_line_for_each_mistake(
    arguments: tuple[str, ...], words: str, uldm: Callable, golden_checkpoint: Golden, tmp_path: Path
) -> None:
    source = golden_checkpoint("uncond-vq")
    (tmp_path / "page.ckpt").write_text("<!DOCTYPE html><html>no such file</html>")
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "half.ckpt").write_bytes(source.read_bytes()[:100_000])
    (tmp_path / "unknown").mkdir()
    shutil.copy(source, tmp_path / "unknown")
    (tmp_path / "unknown" / "config.yaml").write_text("model:\n  target: ldm.evil.Model\n  params: {}\n")
    before = sorted(tmp_path.iterdir())
    done = uldm("convert", *arguments, cwd=tmp_path)
    assert done.code == 2, done.err
    assert words in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_that_wants_a_condition_cannot_be_sampled_yet(
    uldm: Callable, golden_checkpoint: Golden, tmp_path: Path
) -> None:
    done = uldm("ldm", "sample", "--model", golden_checkpoint("class-cond"), cwd=tmp_path)
    assert done.code == 2
    assert "needs a condition" in done.err
