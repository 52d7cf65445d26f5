"""Averages of any width, after a training: kept at its saves, also if it was stopped, and put together at the end."""

import json
import shutil

import pytest
import torch

from uldm_cli.core.ema import PowerEMA, Profiles
from uldm_cli.errors import ConfigError
from uldm_cli.formats.native import load_tensors, read_header
from uldm_cli.formats.tensors import read_raw_header
from uldm_cli.runs import ema
from uldm_cli.runs.models import load_latent_diffusion, resolve
from uldm_cli.specs.diffusion_training import DiffusionTraining

LAST = "checkpoints/step-00000020/model.safetensors"


@pytest.fixture
def widths(ldm):
    """Makes configs that keep averages of two widths."""

    def make(**train: object) -> DiffusionTraining:
        return ldm(save_every=2, picture_every=99, ema_profiles=[0.05, 0.2], **train)

    return make


def test_the_averages_of_a_stopped_run_are_those_of_one_that_was_not(training, widths, tmp_path):
    spec = widths(steps=8)
    training.run(spec, tmp_path / "whole")
    training.interrupt(spec, tmp_path / "stopped", 5)
    training.run(spec, tmp_path / "stopped")
    whole, stopped = training.outcome(tmp_path / "whole"), training.outcome(tmp_path / "stopped")
    stopped.pop("ema/step-00000005.safetensors", None)  # where it was stopped it has saved
    assert stopped == whole
    found = ema.snapshots(tmp_path / "whole")
    assert [(one.step, one.updates, one.sigmas) for one in found] == [(n, n, (0.05, 0.2)) for n in (2, 4, 6, 8)]


def test_a_run_without_widths_keeps_none(training, ldm, tmp_path):
    training.run(ldm(steps=1), tmp_path / "run")
    assert not (tmp_path / "run" / "ema").exists()
    with pytest.raises(ConfigError, match=r"holds no averages of several widths\. Train with train\.ema_profiles"):
        ema.make(tmp_path / "run", "latent-diffusion", 0.1, None, tmp_path / "out.safetensors")


def test_an_average_that_was_not_kept_is_that_which_training_would_have_tracked(
    training, widths, tmp_path, monkeypatch
):
    """The third width is tracked beside the two that are kept, and only compared."""
    tracked = []

    def follow(self, module, sigmas, init=Profiles.__init__):
        init(self, module, sigmas)
        tracked.append(PowerEMA(module, 0.1))

    def update(self, update=Profiles.update):
        update(self)
        tracked[-1].update()

    monkeypatch.setattr("uldm_cli.core.ema.Profiles.__init__", follow)
    monkeypatch.setattr("uldm_cli.core.ema.Profiles.update", update)
    training.run(widths(), tmp_path / "run")
    out = tmp_path / "made.safetensors"
    made = ema.make(tmp_path / "run", "latent-diffusion", 0.1, None, out)
    assert (made.path, made.step, made.averages) == (out, training.STEPS, 20)
    assert made.missed < 0.1  # 20 steps are few
    average, last = load_tensors(out, "ema."), load_tensors(tmp_path / "run" / LAST, "backbone.")
    [third] = tracked
    for name, value in third.state.items():
        moved = (last[name] - value).norm()
        assert (average[name] - value).norm() <= 0.1 * moved + 1e-5


def test_what_is_made_is_a_whole_model(training, widths, tmp_path):
    training.run(widths(steps=6), tmp_path / "run")
    out = tmp_path / "made.safetensors"
    made = ema.make(tmp_path / "run", "latent-diffusion", 0.05, 4, out)
    assert made.missed == pytest.approx(0, abs=1e-5)  # that width was kept
    header, source = read_header(out), read_header(tmp_path / "run/checkpoints/step-00000006/model.safetensors")
    assert (header.step, header.weights) == (4, ("ema",))
    assert (header.kind, header.config, header.training) == (source.kind, source.config, source.training)
    stored = load_tensors(tmp_path / "run" / "ema" / "step-00000004.safetensors", "0.")
    for name, value in load_tensors(out, "ema.").items():
        torch.testing.assert_close(value, stored[name], rtol=1e-4, atol=1e-6)
    model = load_latent_diffusion(resolve(str(out)))
    assert model.denoiser(torch.zeros(1, *model.latent_shape), 5).x0.isfinite().all()


def test_of_an_autoencoder_codes_are_averaged_and_counts_are_the_last(training, vqvae, tmp_path):
    training.run(vqvae(steps=4, save_every=2, ema_profiles=[0.05, 0.2]), tmp_path / "run")
    out = tmp_path / "made.safetensors"
    ema.make(tmp_path / "run", "autoencoder", 0.2, None, out)
    assert read_header(out).weights == ("ema",)
    stored = load_tensors(tmp_path / "run" / "ema" / "step-00000004.safetensors", "1.")
    found = load_tensors(out, "ema.")
    assert found.keys() == stored.keys()
    for name, value in stored.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
    assert {value.dtype for value in stored.values()} > {torch.float32}


@pytest.mark.parametrize(
    ("kind", "step", "says"),
    [
        ("latent-diffusion", 3, "--step 3: {run} holds no averages of it. There are those of 2, 4"),
        ("autoencoder", None, "{run} is of kind latent-diffusion, not autoencoder. Run `uldm ldm ema`"),
    ],
)
def test_what_cannot_be_made(training, widths, kind, step, says, tmp_path):
    run = tmp_path / "run"
    training.run(widths(steps=4), run)
    with pytest.raises(ConfigError) as caught:
        ema.make(run, kind, 0.1, step, tmp_path / "out.safetensors")
    assert str(caught.value) == says.format(run=run)
    (tmp_path / "there.safetensors").touch()
    with pytest.raises(ConfigError, match=r"is there already\. Name another --out"):
        ema.make(run, "latent-diffusion", 0.1, None, tmp_path / "there.safetensors")
    shutil.copy(run / "checkpoints/step-00000004/model.safetensors", run / "ema" / "step-00000002.safetensors")
    with pytest.raises(ConfigError, match=r"step-00000002\.safetensors holds no averages of a training"):
        ema.make(run, "latent-diffusion", 0.1, None, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_no_folder_of_a_run(tmp_path):
    with pytest.raises(ConfigError, match="is no folder of a training run with a checkpoint"):
        ema.make(tmp_path, "autoencoder", 0.1, None, tmp_path / "out.safetensors")


def test_the_file_says_what_it_holds(training, widths, tmp_path):
    training.run(widths(steps=2), tmp_path / "run")
    said = read_raw_header(tmp_path / "run" / "ema" / "step-00000002.safetensors")[0]["__metadata__"]
    assert json.loads(said["uldm-ema"]) == {"step": 2, "updates": 2, "sigmas": [0.05, 0.2]}
