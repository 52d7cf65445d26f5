"""Training latent diffusion models: the scale of latents, every loss, and beginning with another model."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from uldm_cli.core import diffusing
from uldm_cli.errors import ConfigError
from uldm_cli.formats.checkpoint import Header
from uldm_cli.formats.native import load_tensors, read_header, save
from uldm_cli.runs import ldm_train
from uldm_cli.runs.models import load_latent_diffusion, resolve
from uldm_cli.runs.plan import make_plan
from uldm_cli.specs.diffusion_training import DiffusionTraining
from uldm_cli.specs.load import load_config
from uldm_cli.specs.models import AutoencoderModel
from uldm_cli.specs.sampling import Sampling

LAST = "checkpoints/step-00000002/model.safetensors"


def changed(spec: DiffusionTraining, **fields: object) -> DiffusionTraining:
    return DiffusionTraining.model_validate(spec.model_dump() | fields)


@pytest.fixture
def everything(ldm: Callable[..., DiffusionTraining]) -> Callable[..., DiffusionTraining]:
    """Makes configs with all that can be on."""

    def make(**train: object) -> DiffusionTraining:
        schedule = {"kind": "sigmoid", "timesteps": 20, "zero_terminal_snr": True}
        return changed(
            ldm(**train), schedule=schedule, target="v", learned_variance=True, loss={"weighting": "min-snr"}
        )

    return make


@pytest.fixture
def kl(photos: Path, tmp_path: Path) -> Path:
    """An autoencoder whose latents are drawn, untrained, of the photos."""
    shape = {"kind": "kl", "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "resolution": 16, "attn_resolutions": []}
    model = AutoencoderModel.model_validate({"autoencoder": shape, "image_size": 16})
    torch.manual_seed(0)
    module = model.build()
    data = {"kind": "images", "root": str(photos), "size": 16}
    header = Header("autoencoder", model.model_dump(mode="json"), {"data": data})
    save(tmp_path / "kl.safetensors", header, {"model": module.state_dict()})
    return tmp_path / "kl.safetensors"


# Every loss


def test_with_everything_on_an_interrupted_run_ends_as_one_that_was_not(training, everything, tmp_path, capsys):
    spec = everything(steps=8, save_every=2, picture_every=8)
    training.run(spec, tmp_path / "whole")
    assert "min-snr gives the last timestep, where sampling begins, no weight" in capsys.readouterr().err
    training.interrupt(spec, tmp_path / "stopped", 5)
    training.run(spec, tmp_path / "stopped")
    assert training.outcome(tmp_path / "stopped") == training.outcome(tmp_path / "whole")
    line = training.outcome(tmp_path / "whole")["metrics"][-1]
    assert {"loss", "denoising", "vlb"} <= line.keys()


def test_what_was_trained_is_sampled_from_as_the_file_says(training, everything, tmp_path):
    """From the last timestep on, with the variance that it has learned."""
    training.run(everything(steps=2), tmp_path / "run")
    file = resolve(str(tmp_path / "run"))
    assert file.header.config["learned_variance"]
    model = load_latent_diffusion(file)
    told = {"model": str(tmp_path / "run"), "sampler": {"kind": "ddpm", "steps": 6, "variance": "learned"}}
    plan = make_plan(Sampling.model_validate(told | {"step_size": 1}), tmp_path / "out", tmp_path, "sample.yaml")
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    steps = list(plan.spec.sampler.build()(model.denoiser, x, model.schedule, lambda step, draw: torch.zeros_like(x)))
    assert (steps[0].t, len(steps)) == (19, 6)
    assert steps[-1].x.isfinite().all()


def test_a_variance_that_was_not_learned_is_told_before_sampling(tiny_ldm, tmp_path):
    spec = Sampling.model_validate({"model": str(tiny_ldm), "sampler": {"kind": "ddpm", "variance": "learned"}})
    spec = spec.model_copy(update={"sampler": spec.sampler.model_copy(update={"steps": 10})})
    with pytest.raises(ConfigError, match=r"sampler\.variance learned: .* has learned no variance"):
        make_plan(spec, tmp_path / "out", tmp_path, "sample.yaml")


def test_latents_of_a_kl_autoencoder_are_drawn_and_their_spread_measured(training, ldm, kl, tmp_path):
    """The spread of draws, over their means' and their own deviations."""
    spec = changed(ldm(), autoencoder=str(kl))
    job = ldm_train.DiffusionJob(ldm_train.plan(spec, tmp_path / "run", None))
    images = torch.stack([job.dataset[i][0] for i in range(training.IMAGES)]).float() / 127.5 - 1
    with torch.no_grad():
        mean, logvar = job.model.autoencoder.moments(images)
    spread = (mean.var(correction=0) + logvar.exp().mean()).sqrt()
    assert job.config.scale_factor == pytest.approx(1 / spread.item(), rel=0.02)
    assert logvar.exp().mean() > 0.1 * mean.var()  # so that it matters
    training.run(changed(ldm(steps=1), autoencoder=str(kl)), tmp_path / "run")
    assert (tmp_path / "run" / "pictures" / "samples_0000001.png").exists()


# The scale factor


@pytest.fixture
def measured(ldm, tmp_path, training) -> float:
    return ldm_train.DiffusionJob(ldm_train.plan(ldm(), tmp_path / "measured", None)).config.scale_factor


@pytest.mark.parametrize(("off", "told"), [(1.0, False), (1.4, False), (0.6, True), (3.0, True)])
def test_a_scale_factor_that_is_somewhat_off_is_told(training, ldm, measured, off, told, tmp_path, capsys):
    training.run(changed(ldm(steps=1), scale_factor=off * measured), tmp_path / "run")
    said = capsys.readouterr().err
    assert ("brings the latents of" in said) == told
    if told:
        found = re.search(r"deviation of (\S+) instead of 1: measured on 20 images it would be (\S+);", said)
        assert [float(figure) for figure in found.groups()] == pytest.approx([off, measured], rel=0.02)
    assert resolve(str(tmp_path / "run")).header.config["scale_factor"] == off * measured


@pytest.mark.parametrize("off", [0.2, 5.0])
def test_a_scale_factor_of_another_autoencoder_is_refused(training, ldm, measured, off, autoencoder, tmp_path):
    with pytest.raises(ConfigError) as caught:
        training.run(changed(ldm(), scale_factor=off * measured), tmp_path / "run")
    assert caught.value.message.startswith(f"scale_factor {off * measured:.5g} brings the latents of {autoencoder} to")
    assert caught.value.hint == "scale_factor=null has it measured; or name the autoencoder that it is of"
    assert not (tmp_path / "run").exists()


# Beginning with another model


@pytest.fixture
def first(training, ldm, tmp_path) -> Path:
    """The folder of a finished run."""
    training.run(ldm(steps=2, picture_every=9, save_every=2), tmp_path / "first")
    return tmp_path / "first"


def begun_with(reference: Path | str, *overrides: str) -> DiffusionTraining:
    return load_config(DiffusionTraining, None, overrides, base=ldm_train.base_config(str(reference)))


def small(*more: str) -> list[str]:
    return ["train.device=cpu", "train.precision=fp32", "train.workers=0", "train.batch_size=8", "train.steps=1", *more]


def test_all_of_a_model_is_taken_over(first, ldm, photos):
    spec = begun_with(first)
    header = read_header(first / LAST)
    assert (spec.init_from, spec.autoencoder) == (str(first), str(first))
    assert spec.scale_factor == header.config["scale_factor"]
    assert (spec.backbone, spec.schedule, spec.target) == (ldm().backbone, ldm().schedule, "eps")
    assert spec.data is not None
    assert spec.data.root == str(photos)
    assert begun_with(first, "target=v", "schedule=cosine", "scale_factor=null").scale_factor is None


def test_it_begins_with_the_averaged_weights(training, first, tmp_path, capsys):
    spec = begun_with(first, *small())
    job = ldm_train.DiffusionJob(ldm_train.plan(spec, tmp_path / "second", None))
    average = load_tensors(first / LAST, "ema.")
    for name, value in job.module.state_dict().items():
        assert torch.equal(value, average[name])
        assert torch.equal(job.trainer.ema.state[name], average[name])
    for name, value in job.model.autoencoder.state_dict().items():
        assert torch.equal(value, load_tensors(first / LAST, "autoencoder.")[name])
    assert f"begins with the weights of {first}" in capsys.readouterr().err


def test_a_resumed_run_does_not_begin_again(training, first, tmp_path):
    """And needs the model that it began with no more."""
    spec = begun_with(first, *small("train.steps=4", "train.save_every=1"))
    training.run(spec, tmp_path / "whole")
    training.interrupt(spec, tmp_path / "stopped", 2)
    header = read_header(first / LAST)
    parts = {part: load_tensors(first / LAST, f"{part}.") for part in ("autoencoder", "backbone", "ema")}
    save(first / LAST, header, parts | {"ema": {name: 2 * value for name, value in parts["ema"].items()}})
    training.run(spec, tmp_path / "stopped")
    assert training.outcome(tmp_path / "stopped") == training.outcome(tmp_path / "whole")
    assert resolve(str(tmp_path / "stopped")).header.training["init_from"] == str(first)


def test_another_network_is_told_by_its_tensors(training, first, tmp_path):
    with pytest.raises(ConfigError) as caught:
        training.run(begun_with(first, *small("learned_variance=true")), tmp_path / "second")
    assert "was made for another config: 2 tensors differ, first ema.out.2.weight is [4, 32" in str(caught.value)
    assert not (tmp_path / "second").exists()


def test_another_network_is_told_by_its_settings_before_anything_is_computed(first, tmp_path):
    with pytest.raises(ConfigError) as caught:
        ldm_train.plan(begun_with(first, *small("backbone.model_channels=64")), tmp_path / "second", None)
    assert caught.value.message == f"init_from={first} has another network: it has model_channels 32"
    assert caught.value.hint == "Leave the backbone's settings out, and they are taken from there"


def test_the_scale_is_measured_in_small_batches_and_on_no_image_twice(training, ldm, tmp_path, monkeypatch, capsys):
    sizes = []

    def latents(autoencoder, image, *args, plain=diffusing.training_latents, **options):
        sizes.append(len(image))
        return plain(autoencoder, image, *args, **options)

    monkeypatch.setattr(diffusing, "training_latents", latents)
    ldm_train.DiffusionJob(ldm_train.plan(ldm(batch_size=6), tmp_path / "run", None))
    assert sizes == [6, 6, 6, 6]  # the last four of 24 are of the next epoch, and left out
    assert f"measured on {training.IMAGES} images" in capsys.readouterr().err


def test_the_embedded_model_needs_only_images(photos):
    spec = begun_with("fruits64", f"data.root={photos}")
    assert spec.data is not None
    assert (spec.data.kind, spec.data.size, spec.data.root) == ("images", 64, str(photos))
    spec.check_fit(ldm_train.model_config(resolve("fruits64"), AutoencoderModel).autoencoder, "fruits64")


def test_a_model_that_does_not_say_its_images_takes_any_of_its_size(tiny_ldm, photos):
    spec = begun_with(tiny_ldm, f"data.root={photos}")
    assert spec.data is not None
    assert (spec.data.kind, spec.data.size, spec.data.channels) == ("images", 32, 3)


def test_a_conditional_model_is_refused(golden_checkpoint):
    with pytest.raises(ConfigError, match=r"needs a condition \(crossattn\), and training gives none yet"):
        ldm_train.base_config(str(golden_checkpoint("class-cond")))
