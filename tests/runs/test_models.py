"""What a model reference leads to, and what is loaded from there."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from uldm_cli.errors import ConfigError
from uldm_cli.formats.checkpoint import Header
from uldm_cli.formats.native import load_tensors, read_header, save
from uldm_cli.runs.checkpoints import MODEL, Checkpoints
from uldm_cli.runs.models import (
    load_autoencoder,
    load_latent_diffusion,
    model_config,
    newest_autoencoder,
    planned_autoencoder,
    resolve,
)
from uldm_cli.specs.models import AutoencoderModel, LatentDiffusionModel


def parts_of(path):
    return {part: load_tensors(path, f"{part}.") for part in ("autoencoder", "backbone", "ema")}


@pytest.fixture(scope="module")
def autoencoder(tiny_ldm, tmp_path_factory) -> Path:
    """The autoencoder of tiny_ldm as a checkpoint of its own, whose raw weights are twice the averaged ones."""
    header = read_header(tiny_ldm)
    config = {name: header.config[name] for name in ("autoencoder", "image_size")}
    ema = load_tensors(tiny_ldm, "autoencoder.")
    path = tmp_path_factory.mktemp("models") / "autoencoder.safetensors"
    save(path, Header("autoencoder", config, step=7), {"ema": ema, "model": {k: 2 * v for k, v in ema.items()}})
    return path


def put_into_run(source, run, step=1):
    return Checkpoints(run).save(step, lambda folder: (folder / MODEL).write_bytes(source.read_bytes()))


def test_nothing_named_is_the_embedded_model():
    assert resolve(None).path == resolve("fruits64").path
    assert resolve(None).name == "fruits64"
    assert resolve(None).header.kind == "latent-diffusion"


def test_a_run_means_its_newest_checkpoint_and_one_of_them_itself(tiny_ldm, tmp_path):
    first, second = (put_into_run(tiny_ldm, tmp_path, step) for step in (1, 2))
    assert resolve(str(tmp_path)).path == second / MODEL
    assert resolve(str(first)).path == first / MODEL
    assert resolve(str(first / MODEL)).path == first / MODEL


def test_the_yaml_of_a_training_means_the_newest_checkpoint_of_its_run(tiny_ldm, empty_folder):
    config = Path("mine/ldm.yaml")
    config.parent.mkdir()
    config.write_text("kind: ldm-train\n")
    with pytest.raises(ConfigError) as caught:
        resolve("mine/ldm.yaml")
    assert caught.value.message == "mine/ldm.yaml has not been trained: outputs/ldm-mine holds no checkpoint"
    assert caught.value.hint == "Run: uldm ldm train mine/ldm.yaml"
    put_into_run(tiny_ldm, Path("outputs/ldm-mine"), 1)
    newest = put_into_run(tiny_ldm, Path("outputs/ldm-mine"), 2)
    assert resolve("mine/ldm.yaml").path == newest / MODEL


def test_an_autoencoder_can_be_planned_with_before_it_is_trained(autoencoder, empty_folder):
    config = Path("small.yaml")
    config.write_text("kind: vqvae-train\ndata: {kind: images, root: photos, size: 24, channels: 1}\n")
    planned = planned_autoencoder("small.yaml")
    assert planned.model.image_size == 24
    assert planned.command == "uldm vqvae train small.yaml"
    put_into_run(autoencoder, Path("outputs/vqvae-small"))
    assert planned_autoencoder("small.yaml") is None
    assert model_config(resolve("small.yaml", "autoencoder"), AutoencoderModel).image_size == 32

    config.write_text("kind: vqvae-train\ndata: {kind: images, root: photos, size: 24, channels: 1, sise: 3}\n")
    assert planned_autoencoder("small.yaml") is None  # it is trained, whatever became of its file
    (Path("outputs") / "vqvae-small").rename("elsewhere")
    with pytest.raises(ConfigError, match=r"^small\.yaml:2: data\.sise: unknown key 'sise'"):
        planned_autoencoder("small.yaml")


@pytest.mark.parametrize("text", ["kind: ldm-sample\n", "kind: [1]\n", "model: {target: ldm.models.autoencoder}\n"])
def test_another_yaml_is_no_run(text, empty_folder):
    Path("other.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"^other\.yaml is not a checkpoint of PyTorch or safetensors"):
        resolve("other.yaml")


def test_a_latent_diffusion_model_serves_as_its_autoencoder_but_not_the_other_way_round(tiny_ldm, autoencoder):
    assert resolve(str(tiny_ldm), "autoencoder").header.kind == "latent-diffusion"
    with pytest.raises(ConfigError) as caught:
        resolve(str(autoencoder))
    assert caught.value.message == f"{autoencoder} is an autoencoder, and a latent diffusion model is needed"
    assert caught.value.hint == f"Train one on it: uldm ldm train autoencoder={autoencoder}"


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("friuts64", "there is no model 'friuts64'", "Did you mean 'fruits64'?"),
        ("emtpy", "there is no model 'emtpy'", "Did you mean 'empty'?"),
        (
            "outputs/ldm-mnist",
            "there is no model 'outputs/ldm-mnist'",
            "Train it first. Name a file, a folder, zoo:NAME, hf://owner/name, or one of: fruits64",
        ),
        (
            "nothing",
            "there is no model 'nothing'",
            "Name a file, a folder, zoo:NAME, hf://owner/name, or one of: fruits64",
        ),
        ("", "the name of the model is empty", "Name a file, a folder, zoo:NAME, hf://owner/name, or one of: fruits64"),
        (
            "empty",
            "empty holds no model that uldm knows",
            "Name a checkpoint, a run's folder, or a folder of diffusers",
        ),
        ("zoo:ffhq265", "the zoo has no model 'ffhq265'", "Did you mean 'ffhq256'?"),
    ],
)
def test_what_is_no_model_is_told(name, message, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("outputs/vqvae-mnist").mkdir(parents=True)
    with pytest.raises(ConfigError) as caught:
        resolve(name)
    assert (caught.value.message, caught.value.hint) == (message, hint)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff" * 100])
def test_what_is_no_checkpoint_is_told(content, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        resolve(str(path))
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_a_truncated_checkpoint_is_told(tiny_ldm, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(tiny_ldm.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="is truncated"):
        resolve(str(path))


def test_a_config_that_this_version_cannot_read_is_told(tiny_ldm, tmp_path):
    header = read_header(tiny_ldm)
    config = {**header.config, "backbone": {**header.config["backbone"], "rope": True}}
    path = tmp_path / "newer.safetensors"
    save(path, replace(header, config=config), parts_of(tiny_ldm))
    with pytest.raises(ConfigError) as caught:
        model_config(resolve(str(path)), LatentDiffusionModel)
    assert caught.value.message == (
        f"{path} describes a model that cannot be built: backbone.rope: unknown key 'rope' (value true)"
    )
    assert caught.value.hint == "A newer uldm, or one with more plugins, may have written it"


def test_tensors_of_another_config_are_named(tiny_ldm, tmp_path):
    header = read_header(tiny_ldm)
    config = json.loads(json.dumps(header.config))
    config["autoencoder"]["codebook_size"] = 32
    path = tmp_path / "other.safetensors"
    save(path, replace(header, config=config), parts_of(tiny_ldm))
    with pytest.raises(ConfigError, match=r"autoencoder\.quantize\.embedding is \[64, 4\] in the file and \[32, 4\]"):
        load_latent_diffusion(resolve(str(path)))


def test_an_autoencoder_is_loaded_from_either_kind_of_checkpoint(tiny_ldm, autoencoder):
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    inside = load_autoencoder(resolve(str(tiny_ldm), "autoencoder"))
    alone = load_autoencoder(resolve(str(autoencoder), "autoencoder"))
    raw = load_autoencoder(resolve(str(autoencoder), "autoencoder"), weights="raw")
    with torch.no_grad():
        expected = inside.to_latent(images)
        assert torch.equal(alone.to_latent(images), expected)
        assert not torch.equal(raw.to_latent(images), expected)
    assert not inside.training


def test_weights_that_a_file_lacks_are_told(autoencoder, tmp_path):
    path = tmp_path / "x.safetensors"
    save(path, read_header(autoencoder), {"ema": load_tensors(autoencoder, "ema.")})
    with pytest.raises(ConfigError) as caught:
        load_autoencoder(resolve(str(path), "autoencoder"), weights="raw")
    assert (caught.value.message, caught.value.hint) == (f"{path} holds no raw weights", "It has: ema")


def test_a_loaded_model_only_computes(tiny_ldm):
    model = load_latent_diffusion(resolve(str(tiny_ldm)), precision="bf16")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {p.dtype for p in model.denoiser.backbone.parameters()} == {torch.bfloat16}
    assert not model.training
    assert (model.latent_shape, model.image_shape) == ((4, 8, 8), (3, 32, 32))


def test_ema_weights_by_default(tiny_ldm):
    stored = parts_of(tiny_ldm)
    for weights, part in (("ema", "ema"), ("raw", "backbone")):
        loaded = load_latent_diffusion(resolve(str(tiny_ldm)), weights=weights).denoiser.backbone.state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in stored[part].items())


def test_the_newest_autoencoder_is_the_one_that_was_saved_last(autoencoder, tmp_path):
    assert newest_autoencoder(tmp_path) is None
    for age, name in ((30, "vqvae-a"), (10, "vqvae-b"), (20, "vqvae-c"), (0, "ldm-a")):
        saved = put_into_run(autoencoder, tmp_path / name)
        when = saved.stat().st_mtime - age
        os.utime(saved, (when, when))
    (tmp_path / "vqvae-empty").mkdir()
    assert newest_autoencoder(tmp_path) == str(tmp_path / "vqvae-b")


def test_configs_of_both_kinds(tiny_ldm, autoencoder):
    for path in (tiny_ldm, autoencoder):
        model = model_config(resolve(str(path), "autoencoder"), AutoencoderModel)
        assert (model.image_shape, model.latent_shape) == ((3, 32, 32), (4, 8, 8))


def test_resolving_needs_no_torch(tiny_ldm):
    script = (
        "import sys\n"
        "from uldm_cli.runs.models import model_config, resolve\n"
        "from uldm_cli.specs.models import LatentDiffusionModel\n"
        f"model_config(resolve({str(tiny_ldm)!r}), LatentDiffusionModel)\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONPATH": root})


def test_an_empty_name_is_not_the_embedded_model() -> None:
    with pytest.raises(ConfigError, match=r"^the name of the model is empty"):
        resolve("")
