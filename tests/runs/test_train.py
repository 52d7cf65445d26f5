"""Training runs: resuming bit for bit, stopping on signals, and what a run leaves and says."""

import json
import os
import random
import shutil
import signal
import time

import pytest
import torch

from uldm_cli.errors import ConfigError, UldmError
from uldm_cli.formats.native import load_tensors, read_header, save
from uldm_cli.runs import ldm_train, vqvae_train
from uldm_cli.runs.metrics import read_lines

LONG = 60
"""Steps of a run that is not at its end before it is killed, on a busy machine either."""
CHECKPOINT = ("model.safetensors", "state.safetensors", "SHA256SUMS")


# Resuming


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("command", ["vqvae", "ldm"])
def test_a_killed_run_ends_as_one_that_was_never_killed(training, start, command, workers, request, tmp_path):
    spec = request.getfixturevalue(command)(workers=workers, steps=LONG)
    training.run(spec, tmp_path / "whole")
    process = start(spec, tmp_path / "killed")
    process.wait_for_lines(3)  # so it is in or after step 9
    process.kill()
    assert 5 <= training.steps_saved(tmp_path / "killed")[-1] < LONG
    training.run(spec, tmp_path / "killed")
    assert training.outcome(tmp_path / "killed") == training.outcome(tmp_path / "whole")


@pytest.mark.parametrize("command", ["gan", "ldm"])
def test_a_run_that_is_killed_anywhere_ten_times_ends_the_same(training, start, command, request, tmp_path):
    """Wherever it is: in a step, in a save, while it starts or reads what was saved."""
    spec = request.getfixturevalue(command)(workers=2, save_every=2, steps=LONG)
    training.run(spec, tmp_path / "whole")
    generator = random.Random(command)
    for count in (1, 1, 3, 4, 6, 7, 9, 10, 12, 13):
        process = start(spec, tmp_path / "killed")
        process.wait_for_lines(count)
        time.sleep(generator.uniform(0, 0.2))
        process.kill()
    training.run(spec, tmp_path / "killed")
    assert training.outcome(tmp_path / "killed") == training.outcome(tmp_path / "whole")


@pytest.mark.parametrize("command", ["vqvae", "gan", "kl", "ldm"])
@pytest.mark.parametrize("step", [1, 7])
def test_an_interrupted_run_saves_and_ends_as_one_that_was_not(training, command, step, request, tmp_path):
    spec = request.getfixturevalue(command)()
    training.run(spec, tmp_path / "whole")
    training.interrupt(spec, tmp_path / "stopped", step)
    assert training.steps_saved(tmp_path / "stopped")[-1] == step
    assert training.run(spec, tmp_path / "stopped").computed == training.STEPS - step
    assert training.outcome(tmp_path / "stopped") == training.outcome(tmp_path / "whole")


def test_the_diffusion_model_goes_on_with_the_autoencoder_that_it_began_with(training, ldm, autoencoder, tmp_path):
    moved = tmp_path / "autoencoder"
    shutil.copytree(autoencoder, moved)
    spec = ldm().model_copy(update={"autoencoder": str(moved)})
    training.run(spec, tmp_path / "whole")
    training.interrupt(spec, tmp_path / "stopped", 7)
    newest = moved / "checkpoints" / f"step-{training.STEPS:08}" / "model.safetensors"
    header = read_header(newest)
    other = {name: value * 2 for name, value in load_tensors(newest, "ema.").items()}
    save(newest, header, {"ema": other})
    training.run(spec, tmp_path / "stopped")
    assert training.outcome(tmp_path / "stopped") == training.outcome(tmp_path / "whole")


def test_a_run_without_a_checkpoint_starts_again(training, start, vqvae, tmp_path, capsys):
    training.run(vqvae(), tmp_path / "whole")
    process = start(vqvae(save_every=training.STEPS), tmp_path / "killed")
    process.wait_for_lines(1)
    process.kill()
    assert training.steps_saved(tmp_path / "killed") == []
    training.run(vqvae(save_every=training.STEPS), tmp_path / "killed", resume=True)
    assert "had saved no checkpoint: it starts again" in capsys.readouterr().err
    assert training.outcome(tmp_path / "killed")["metrics"] == training.outcome(tmp_path / "whole")["metrics"]


def test_half_a_line_of_metrics_is_dropped(training, vqvae, tmp_path):
    training.run(vqvae(), tmp_path / "whole")
    training.interrupt(vqvae(), tmp_path / "stopped", 7)
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 0.\n{"step": 12, "lo')
    training.run(vqvae(), tmp_path / "stopped")
    assert training.outcome(tmp_path / "stopped") == training.outcome(tmp_path / "whole")


def test_resuming_what_never_began_is_refused(training, vqvae, tmp_path):
    with pytest.raises(ConfigError, match="--resume: there is no run of this config in"):
        training.run(vqvae(), tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_stays_as_it_is(training, vqvae, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    first = training.run(vqvae(), folder)

    def state():
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}

    before = state()
    monkeypatch.setattr(vqvae_train.AutoencoderJob, "__init__", None)  # nothing is built
    again = training.run(vqvae(), folder)
    assert state() == before
    assert (first.computed, again.computed) == (training.STEPS, 0)
    assert again.line == first.line
    assert again.checkpoint == first.checkpoint == folder / "checkpoints" / f"step-{training.STEPS:08}"


def constant(spec):
    """The same at a learning rate that does not depend on the run's length."""
    return spec.model_copy(update={"optim": spec.optim.model_copy(update={"decay": "constant"})})


@pytest.mark.parametrize("command", ["gan", "ldm"])
def test_a_run_that_is_made_longer_ends_as_one_that_was_so_long(training, command, request, tmp_path, capsys):
    short, whole = (constant(request.getfixturevalue(command)(steps=steps)) for steps in (7, training.STEPS))
    training.run(whole, tmp_path / "whole")
    training.run(short, tmp_path / "longer")
    assert training.run(whole, tmp_path / "longer").computed == training.STEPS - 7
    told = f"going on from step 7 of {tmp_path / 'longer'}, to step {training.STEPS} where it was 7\n"
    assert told in capsys.readouterr().err
    longer, whole = (training.outcome(tmp_path / name) for name in ("longer", "whole"))
    last = f"checkpoints/step-{training.STEPS:08}/model.safetensors"
    assert longer[last] == whole[last]
    assert longer["train.yaml"] == whole["train.yaml"]


def test_a_longer_cosine_is_told(training, vqvae, tmp_path, capsys):
    training.run(vqvae(steps=2), tmp_path / "run")
    training.run(vqvae(steps=3), tmp_path / "run")
    assert "to step 3 where it was 2; the learning rate follows the cosine to there" in capsys.readouterr().err


def test_a_run_is_not_made_shorter_than_it_is(training, vqvae, tmp_path):
    training.run(vqvae(steps=3), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"has made 3 steps already, and train\.steps is 2"):
        training.run(vqvae(steps=2), tmp_path / "run")


def test_what_is_told_and_kept_may_change_on_the_way(training, vqvae, tmp_path):
    training.run(vqvae(), tmp_path / "whole")
    training.interrupt(vqvae(), tmp_path / "stopped", 7)
    training.run(vqvae(save_every=3, picture_every=4, keep=3), tmp_path / "stopped")
    assert len(training.steps_saved(tmp_path / "stopped")) == 3
    stopped, whole = (training.outcome(tmp_path / name) for name in ("stopped", "whole"))
    assert stopped["metrics"] == whole["metrics"]


def test_other_images_than_before_are_told(training, vqvae, photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    spec = vqvae()
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"root": str(tmp_path / "photos")})})
    training.interrupt(spec, tmp_path / "run", 7)
    next((tmp_path / "photos").rglob("*.png")).unlink()
    training.run(spec, tmp_path / "run")
    assert (
        f"was saved with {training.IMAGES} images, and there are {training.IMAGES - 1} now" in capsys.readouterr().err
    )


# Stopping


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_to_process_and_group_saves_and_the_same_command_goes_on(training, start, workers, vqvae, tmp_path):
    """As `timeout` and torchrun send it: the process gets two at once, and its readers one."""
    spec = vqvae(workers=workers, steps=100_000, log_every=1, save_every=100_000, picture_every=100_000)
    process = start(spec, tmp_path / "run")
    process.wait_for_lines(3)
    leader = process.process.pid or 0
    os.kill(leader, signal.SIGTERM)
    os.killpg(leader, signal.SIGTERM)
    assert process.exit_code() == 130
    [step] = training.steps_saved(tmp_path / "run")
    assert process.log.read_text().splitlines()[-2:] == [
        f"saved step {step}; the same command goes on from there",
        "error: interrupted",
    ]
    assert step == training.lines_written(tmp_path / "run") >= 3
    assert vqvae_train.plan(spec, tmp_path / "run", None).start == step


def test_a_stop_in_the_last_step_comes_too_late(training, vqvae, tmp_path):
    with training.signalled(training.STEPS):
        assert training.run(vqvae(), tmp_path / "run").computed == training.STEPS


def test_a_step_that_was_just_saved_is_not_saved_twice(training, vqvae, tmp_path):
    training.interrupt(vqvae(), tmp_path / "run", 10)
    assert training.steps_saved(tmp_path / "run") == [5, 10]


# What a run says


def test_lines_of_metrics_tell_over_which_epoch_the_codes_were_counted(training, vqvae, tmp_path):
    """20 images in batches of 8: the epochs end in the steps 3, 5, 8, 10."""
    training.run(vqvae(log_every=1, steps=10), tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["epoch"] for line in lines[:3]] == [0.4, 0.8, 1.2]
    assert [line["counted_epoch"] for line in lines] == [1, 1, 1, 1, 2, 2, 2, 3, 3, 4]
    figures = [(line["perplexity"], line["usage"]) for line in lines]
    assert figures[0] != figures[1]  # in the first epoch: so far
    assert figures[2] == figures[3]
    assert figures[4] == figures[5] == figures[6] != figures[7]
    assert {"loss", "l1", "l2", "psnr", "lr", "images_per_second", "autoencoder_grad_norm"} <= lines[0].keys()


def test_lines_are_means_over_the_steps_since_the_last(training, vqvae, tmp_path):
    training.run(vqvae(log_every=1, steps=6), tmp_path / "each")
    training.run(vqvae(log_every=3, steps=6), tmp_path / "third")
    each = [line["loss"] for line in read_lines(tmp_path / "each" / "metrics.jsonl")]
    third = [line["loss"] for line in read_lines(tmp_path / "third" / "metrics.jsonl")]
    assert third == pytest.approx([sum(each[:3]) / 3, sum(each[3:]) / 3])


def test_the_files_of_a_run(training, ldm, autoencoder, tmp_path):
    result = training.run(ldm(), tmp_path / "run")
    names = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    checkpoints = {f"checkpoints/step-{n:08}/{name}" for n in (15, 20) for name in CHECKPOINT}
    pictures = {f"pictures/samples_{n:07}.png" for n in (10, 20)}
    assert names == checkpoints | pictures | {"train.yaml", "metrics.jsonl"}
    header = read_header(result.checkpoint / "model.safetensors")
    assert (header.kind, header.step, header.weights) == ("latent-diffusion", training.STEPS, ("ema", "raw"))
    assert header.training["autoencoder"] == str(autoencoder)
    assert header.training["data"]["kind"] == "images"
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]) == result.line


def test_the_scale_brings_latents_to_unit_deviation(training, ldm, tmp_path):
    result = training.run(ldm(steps=1), tmp_path / "run")
    plan = ldm_train.plan(ldm(steps=1), tmp_path / "other", None)
    model = ldm_train.DiffusionJob(plan)
    images = torch.stack([model.dataset[i][0] for i in range(training.IMAGES)]).float() / 127.5 - 1
    assert model.model.encode(images).std().item() == pytest.approx(1, rel=0.02)
    scale = read_header(result.checkpoint / "model.safetensors").config["scale_factor"]
    assert scale == model.config.scale_factor


def test_an_autoencoder_without_a_spread_of_latents_is_refused(training, ldm, autoencoder, tmp_path):
    broken = tmp_path / "broken.safetensors"
    source = autoencoder / "checkpoints" / f"step-{training.STEPS:08}" / "model.safetensors"
    zero = {name: torch.zeros_like(value) for name, value in load_tensors(source, "ema.").items()}
    save(broken, read_header(source), {"ema": zero})
    with pytest.raises(UldmError, match=r"have the standard deviation 0\.0"):
        training.run(ldm().model_copy(update={"autoencoder": str(broken)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_perceptual_loss_takes_grey_images(training, grey_vqvae, tmp_path):
    assert 0 < training.run(grey_vqvae(steps=1), tmp_path / "run").line["lpips"] < 2


def test_a_learning_rate_that_never_gets_up_is_told(training, vqvae, tmp_path, capsys):
    spec = vqvae(steps=3)
    spec = spec.model_copy(update={"optim": spec.optim.model_copy(update={"warmup_steps": 30})})
    training.run(spec, tmp_path / "run")
    assert "the learning rate gets to 5e-05 of 0.0005: optim.warmup_steps is 30\n" in capsys.readouterr().err
    training.run(vqvae(steps=3), tmp_path / "other")
    assert "the learning rate" not in capsys.readouterr().err
