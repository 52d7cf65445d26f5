"""Training from a latent cache: the same as from images, without any image; and what is refused."""

import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch

from uldm_cli.core import rng
from uldm_cli.core.data import open_images, stream
from uldm_cli.core.diffusing import training_latents
from uldm_cli.core.training import to_float
from uldm_cli.errors import ConfigError
from uldm_cli.formats.native import load_tensors, read_header
from uldm_cli.runs import latent_cache, ldm_train, vqvae_encode
from uldm_cli.runs.latent_cache import open_cache, read_index
from uldm_cli.runs.metrics import read_lines
from uldm_cli.runs.models import load_autoencoder, resolve
from uldm_cli.specs.diffusion_training import DiffusionTraining
from uldm_cli.specs.encoding import Encoding


@pytest.fixture
def images(photos: Path, tmp_path: Path) -> Path:
    """A copy of the images, which a test may take away."""
    return Path(shutil.copytree(photos, tmp_path / "images"))


@pytest.fixture
def encoded(training, images: Path, tmp_path: Path):
    """Encodes the images in a folder of its own: `encoded(autoencoder, flip=False)`."""

    def make(autoencoder: Path, folder: str = "latents", *, flip: bool = True, **fields: object) -> Path:
        data = {"kind": "images", "root": str(images), "size": 16, "flip": flip}
        quick = {"shard_size": 8, "batch_size": 8, "workers": 0, "device": "cpu"}
        spec = Encoding.model_validate({"autoencoder": str(autoencoder), "data": data, **quick, **fields})
        vqvae_encode.run(vqvae_encode.plan(spec, tmp_path / folder))
        return tmp_path / folder

    return make


def changed(spec: DiffusionTraining, **fields: object) -> DiffusionTraining:
    return DiffusionTraining.model_validate({**spec.model_dump(), **fields})


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_lines(folder / "metrics.jsonl")]


# The same training


@pytest.mark.parametrize(("kind", "precision"), [("vq", "fp32"), ("kl", "fp32"), ("kl", "fp64")])
def test_latents_train_what_images_train(
    training, encoded, images, autoencoder, kl_file, ldm, kind, precision, tmp_path
):
    model = autoencoder if kind == "vq" else kl_file
    folder = encoded(model)
    data = {"kind": "images", "root": str(images), "size": 16, "flip": True}
    known = {"autoencoder": str(model), "scale_factor": read_index(folder).scale_factor}
    spec = changed(ldm(log_every=1, steps=6, precision=precision), **known)
    training.run(changed(spec, data=data), tmp_path / "images-run")
    shutil.rmtree(images)  # they are not opened any more
    training.run(changed(spec, latents=str(folder)), tmp_path / "latents-run")
    one, other = losses(tmp_path / "images-run"), losses(tmp_path / "latents-run")
    assert len(one) == 6
    assert other == pytest.approx(one, abs=1e-5)
    runs = [resolve(str(tmp_path / name)).path for name in ("images-run", "latents-run")]
    first, second = (load_tensors(path, "backbone.") for path in runs)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=2e-4)
    assert read_header(runs[0]).config == read_header(runs[1]).config


def test_each_sample_is_the_latent_of_its_image(encoded, images, kl_file):
    """Mirrored and drawn alike."""
    folder, size = encoded(kl_file), {"batch_size": 8, "seed": 3}
    module = load_autoencoder(resolve(str(kl_file), "autoencoder"))
    pictures = stream(open_images(images, size=16), **size)
    latents = stream(open_cache(folder, read_index(folder), flip=True), **size)
    least = torch.inf
    for picture, latent in islice(zip(pictures, latents, strict=True), 5):
        number = picture.number
        assert torch.equal(latent.number, number)
        assert torch.equal(latent.label, picture.label)
        mirrored = rng.coin(3, rng.STREAM_FLIP, number)[:, None, None, None]
        plain = to_float(picture.image)
        seen = torch.where(mirrored, plain.flip(3), plain)
        draws = {"number": number, "seed": 3, "shape": (4, 8, 8)}
        expected = training_latents(module, seen, **draws)
        torch.testing.assert_close(
            training_latents(module, latent.image, **draws, cached=True), expected, rtol=0, atol=1e-5
        )
        others = training_latents(module, seen.flip(3), **draws)
        least = min(least, float((others - expected).abs().amax((1, 2, 3)).min()))
    assert least > 0.01


def test_damaged_images_train_alike(training, encoded, images, autoencoder, ldm, tmp_path):
    for name in ("a/04.png", "b/19.png"):
        content = (images / name).read_bytes()
        (images / name).write_bytes(content[: len(content) // 2])
    folder = encoded(autoencoder)
    spec = changed(ldm(log_every=1, steps=6), scale_factor=1.0)
    data = {"kind": "images", "root": str(images), "size": 16, "flip": True}
    training.run(changed(spec, data=data), tmp_path / "images-run")
    training.run(changed(spec, latents=str(folder)), tmp_path / "latents-run")
    assert losses(tmp_path / "latents-run") == pytest.approx(losses(tmp_path / "images-run"), abs=1e-5)


def test_what_is_left_open_comes_from_the_cache(training, encoded, autoencoder, ldm, tmp_path, capsys):
    folder = encoded(autoencoder)
    spec = changed(ldm(steps=2), autoencoder=None, latents=str(folder))
    plan = ldm_train.plan(spec, tmp_path / "run", None)
    assert (plan.config.autoencoder, plan.config.data.size, plan.config.data.flip) == (str(autoencoder), 16, True)
    told = ldm_train.preview(plan)
    assert (told.images, told.details["read from"]) == (training.IMAGES, str(folder))
    ldm_train.run(plan)
    scale = read_index(folder).scale_factor
    assert f"scale factor {scale:.5f}, measured on all latents in {folder}" in capsys.readouterr().err
    assert read_header(resolve(str(tmp_path / "run")).path).config["scale_factor"] == scale


def test_a_stopped_run_goes_on_bit_for_bit(training, encoded, images, autoencoder, ldm, tmp_path):
    spec = changed(ldm(steps=8), latents=str(encoded(autoencoder)))
    shutil.rmtree(images)
    training.run(spec, tmp_path / "whole")
    training.interrupt(spec, tmp_path / "stopped", 4)
    training.run(spec, tmp_path / "stopped")
    assert training.outcome(tmp_path / "stopped") == training.outcome(tmp_path / "whole")


def test_a_run_goes_on_where_the_autoencoder_was_trained_on(training, encoded, autoencoder, ldm, tmp_path):
    """The reference leads to other weights by then; the run's own are still those that made the latents."""
    run = tmp_path / "autoencoder"
    shutil.copytree(autoencoder, run)
    spec = changed(ldm(steps=4), autoencoder=str(run), latents=str(encoded(run)))
    training.interrupt(spec, tmp_path / "run", 2)
    shutil.rmtree(sorted((run / "checkpoints").iterdir())[-1])
    training.run(spec, tmp_path / "run")
    assert training.steps_saved(tmp_path / "run")[-1] == 4


def test_a_finished_run_loads_no_autoencoder_to_compare(training, encoded, autoencoder, ldm, tmp_path, monkeypatch):
    spec = changed(ldm(steps=2), latents=str(encoded(autoencoder)))
    training.run(spec, tmp_path / "run")
    monkeypatch.delattr(latent_cache, "load_autoencoder")
    assert training.run(spec, tmp_path / "run").computed == 0


def test_an_autoencoder_that_was_moved_is_asked_for(training, encoded, autoencoder, ldm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Path(shutil.copytree(autoencoder, tmp_path / "autoencoder"))
    folder = encoded(run)
    run.rename(tmp_path / "moved")
    hint = refused(
        changed(ldm(), autoencoder=None, latents=str(folder)),
        tmp_path / "run",
        f"the autoencoder that made {folder} is not where it was: there is no model '{run}'",
    )
    assert hint == "Name it: autoencoder=PATH"
    plan = ldm_train.plan(changed(ldm(), autoencoder=str(tmp_path / "moved"), latents=str(folder)), None, None)
    assert plan.start == 0


# What is refused


def refused(spec: DiffusionTraining, folder: Path, says: str) -> str:
    with pytest.raises(ConfigError) as caught:
        ldm_train.run(ldm_train.plan(spec, folder, None))
    assert says in caught.value.message
    assert not folder.exists()
    return str(caught.value.hint)


def test_latents_of_another_autoencoder(training, encoded, autoencoder, ldm, tmp_path):
    """Of the same architecture, with other weights: those of an earlier step."""
    folder = encoded(autoencoder)
    other = sorted((autoencoder / "checkpoints").iterdir())[0]
    spec = changed(ldm(), autoencoder=str(other), latents=str(folder))
    says = f"{folder} holds the latents of another autoencoder: of {autoencoder} (hash "
    hint = refused(spec, tmp_path / "run", says)
    again = f"uldm vqvae encode {folder / 'encode.yaml'} --model {other} --outdir NEW"
    assert hint == f"Encode the images with this one: {again}"


def test_a_half_written_cache(training, encoded, autoencoder, ldm, tmp_path):
    folder = encoded(autoencoder)
    (folder / "index.json").unlink()
    (folder / "latents-00002.safetensors").unlink()
    spec = changed(ldm(), latents=str(folder))
    hint = refused(spec, tmp_path / "run", f"{folder} is half-written: 2 files of latents, and no index.json")
    assert f"uldm vqvae encode {folder / 'encode.yaml'} --outdir {folder}" in hint


def test_a_truncated_file(training, encoded, autoencoder, ldm, tmp_path):
    path = encoded(autoencoder) / "latents-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "uldm vqvae encode" in refused(
        changed(ldm(), latents=str(path.parent)), tmp_path / "run", f"{path} is truncated"
    )


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"size": 32}, "data.size was 16, and is 32"),
        ({"root": "elsewhere"}, "data.root was "),
        ({"flip": True}, "holds no latents of mirrored images, and data.flip is true"),
    ],
)
def test_images_that_were_not_encoded(training, encoded, images, autoencoder, ldm, asked, says, tmp_path):
    folder = encoded(autoencoder, flip=False)
    data = {"kind": "images", "root": str(images), "size": 16, "flip": False, **asked}
    refused(changed(ldm(), latents=str(folder), data=data), tmp_path / "run", says)


def test_one_orientation_of_both_may_be_asked_for(training, encoded, images, autoencoder, ldm, tmp_path):
    data = {"kind": "images", "root": str(images), "size": 16, "flip": False}
    known = {"scale_factor": 1.0, "data": data}
    training.run(changed(ldm(log_every=1, steps=4), latents=str(encoded(autoencoder)), **known), tmp_path / "both")
    training.run(changed(ldm(log_every=1, steps=4), **known), tmp_path / "images-run")
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "images-run"), abs=1e-5)
