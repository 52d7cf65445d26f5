"""Conversions through the functions of the command: from the files of one layout to those of another, and back."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LDMPipeline
from PIL import Image
from torch import Tensor

from uldm_cli.errors import ConfigError, UsageError
from uldm_cli.formats.detect import open_checkpoint, open_tensors
from uldm_cli.runs.convert import compare, convert
from uldm_cli.runs.inspect import inspect
from uldm_cli.runs.models import resolve
from uldm_cli.runs.sample import run
from uldm_cli.specs.samplers import DDIM
from uldm_cli.specs.sampling import Sampling

FAMILIES = sorted(path.name for path in (Path(__file__).parents[1] / "golden" / "compvis").iterdir())
Golden = Callable[[str], Path]


def published(path: Path) -> dict[str, Tensor]:
    """What PyTorch itself reads from a checkpoint that is known to be harmless; foreign classes become `object`."""

    class Harmless(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            foreign = module.startswith("pytorch_lightning")
            return type(name, (), {}) if foreign else super().find_class(module, name)

    module = type("harmless", (), {"Unpickler": Harmless, "load": pickle.load})
    loaded = torch.load(path, weights_only=False, pickle_module=module)
    state: dict[str, Tensor] = loaded["state_dict"]
    return state


@pytest.mark.parametrize("family", FAMILIES)
def test_published_to_ours_and_back_gives_every_tensor(family: str, golden_checkpoint: Golden, tmp_path: Path) -> None:
    source = golden_checkpoint(family)
    ours = tmp_path / "ours.safetensors"
    convert(str(source), "uldm", ours)
    convert(str(ours), "compvis", tmp_path / "back")
    before, after = published(source), published(tmp_path / "back" / "model.ckpt")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    file = resolve(str(ours))
    assert compare(file, resolve(str(tmp_path / "back"))) == dict.fromkeys(("latent", "image", "eps"), 0.0)


def test_diffusers_gives_the_same_picture(golden_checkpoint: Golden, tmp_path: Path) -> None:
    """From the same generator's seed: its own pipeline on the folder that was written, ours on what was published."""
    source = golden_checkpoint("uncond-vq")
    convert(str(source), "diffusers", tmp_path / "theirs", verify=True)
    pipeline = LDMPipeline.from_pretrained(tmp_path / "theirs")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    [theirs] = pipeline(generator=[generator], num_inference_steps=20, eta=0.0).images
    sampling = Sampling(model=str(source), sampler=DDIM(steps=20, eta=0), seed=5, step_size=0)
    [(_, path)] = run(sampling, tmp_path / "ours").files
    with Image.open(path) as ours:
        difference = (np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)) / 255
    assert np.square(difference).mean() <= 1e-6  # a PSNR of 60 dB


def test_another_type_of_numbers(golden_checkpoint: Golden, tmp_path: Path) -> None:
    source = golden_checkpoint("uncond-kl")
    done = convert(str(source), "uldm", tmp_path / "half.safetensors", dtype="fp16", verify=True)
    assert done.differences is not None
    assert 0 < max(done.differences.values()) < 2e-2
    half, whole = open_checkpoint(done.path), open_checkpoint(source)
    weights = [name for name in half.tensors if not name.startswith("kept.")]
    assert {half.tensors[name].dtype for name in weights} == {"F16"}
    kept = [name for name in half.tensors if name.startswith("kept.")]
    assert all(torch.equal(half.tensors[name].read(), whole.tensors[name].read()) for name in kept)


def test_what_is_there_stays(golden_checkpoint: Golden, tmp_path: Path) -> None:
    place = tmp_path / "taken.safetensors"
    place.write_text("mine")
    with pytest.raises(UsageError, match=r"taken\.safetensors exists already"):
        convert(str(golden_checkpoint("uncond-vq")), "uldm", place)
    assert place.read_text() == "mine"


@pytest.mark.parametrize(
    ("family", "layout", "word"),
    [("uncond-kl", "diffusers", "num_heads"), ("inpaint", "diffusers", "conditioning"), (None, "compvis", "vqvae")],
)
def test_what_a_layout_cannot_hold_is_named(
    family: str | None, layout: str, word: str, golden_checkpoint: Golden, tmp_path: Path
) -> None:
    source = str(golden_checkpoint(family)) if family else None
    with pytest.raises(ConfigError, match=word):
        convert(source, layout, tmp_path / "x")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_inspecting_says_what_a_checkpoint_is(golden_checkpoint: Golden) -> None:
    report = inspect(str(golden_checkpoint("uncond-kl")))
    assert (report.layout, report.kind) == ("compvis", "latent-diffusion")
    assert {part.name for part in report.parts} == {"autoencoder", "backbone", "ema", "kept"}
    assert (report.facts["images"], report.facts["latents"]) == ("3x16x16", "4x8x8")
    assert report.facts["weights"].startswith("ema, raw")
    assert any("ModelCheckpoint" in name for name in report.skipped)


def test_inspecting_without_a_config_tells_of_the_tensors(golden_checkpoint: Golden, tmp_path: Path) -> None:
    alone = tmp_path / "alone.ckpt"
    alone.write_bytes(golden_checkpoint("uncond-vq").read_bytes())
    report = inspect(str(alone))
    assert (report.layout, report.kind) == ("tensors", None)
    assert sum(part.tensors for part in report.parts) == len(open_tensors(alone))
    assert "--config" in report.warnings[0]


def test_inspecting_reads_no_weights(golden_checkpoint: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers, and the schedule's thousand numbers, which are compared with the config."""
    from uldm_cli.formats.tensors import MappedFile

    read, elements = [], MappedFile.elements

    def counted(file: MappedFile, begin: int, count: int, dtype: str) -> Tensor:
        read.append(count)
        return elements(file, begin, count, dtype)

    monkeypatch.setattr(MappedFile, "elements", counted)
    assert inspect(str(golden_checkpoint("uncond-vq"))).kind == "latent-diffusion"
    assert sum(read) <= 1000
