"""What a run keeps: the newest checkpoints, the best one, one that was asked for; and what it says and tracks."""

import os
import shutil
import signal
import time

import pytest
import torch

from uldm_cli.core.data import streams
from uldm_cli.core.training import RunningNorm, Trainer
from uldm_cli.errors import ConfigError, UldmError
from uldm_cli.runs import train as runs_train
from uldm_cli.runs import train_plan, vqvae_train
from uldm_cli.runs.metrics import read_lines


def test_so_many_checkpoints_stay(training, vqvae, tmp_path):
    training.run(vqvae(save_every=2, keep=4), tmp_path / "run")
    assert training.steps_saved(tmp_path / "run") == [14, 16, 18, 20]


@pytest.mark.parametrize(("name", "better"), [("psnr", max), ("loss", min)])
def test_the_best_checkpoint_stays_and_is_linked(training, vqvae, tmp_path, name, better):
    """A learning rate that falls to nothing and a metric that is watched at every save."""
    folder = tmp_path / "run"
    training.run(vqvae(save_every=2, log_every=2, best=name), folder)
    lines = {line["step"]: line[name] for line in read_lines(folder / "metrics.jsonl")}
    best = better(lines, key=lines.__getitem__)
    link = folder / "checkpoints" / "best"
    assert link.is_symlink()
    assert os.readlink(link) == f"step-{best:08}"
    assert (link / "model.safetensors").exists()
    assert training.steps_saved(folder) == sorted({best, 18, 20})


def test_the_best_is_remembered_by_a_run_that_goes_on(training, vqvae, tmp_path):
    spec = vqvae(save_every=2, log_every=2, best="l1")
    training.run(spec, tmp_path / "whole")
    training.interrupt(spec, tmp_path / "stopped", 7)
    training.run(spec, tmp_path / "stopped")
    links = [os.readlink(tmp_path / run / "checkpoints" / "best") for run in ("whole", "stopped")]
    assert links[0] == links[1]


def test_a_figure_that_does_not_exist_is_told_and_nothing_is_best(training, vqvae, tmp_path, capsys):
    training.run(vqvae(best="fid"), tmp_path / "run")
    said = capsys.readouterr().err
    assert said.count("warning: train.best=fid: no checkpoint is the best, as there is no such figure yet, but") == 1
    assert "psnr" in said
    assert not (tmp_path / "run" / "checkpoints" / "best").is_symlink()


def test_use_of_codes_is_compared_over_whole_epochs(training, vqvae, tmp_path):
    """20 images in batches of 8: the first epoch ends in step 3."""
    training.interrupt(vqvae(save_every=1, best="perplexity"), tmp_path / "run", 2)
    assert not (tmp_path / "run" / "checkpoints" / "best").is_symlink()
    training.run(vqvae(save_every=1, best="perplexity"), tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "best" / "model.safetensors").exists()


def test_what_was_saved_and_not_marked_is_marked_by_the_run_that_goes_on(training, vqvae, tmp_path):
    """As after a kill between the two."""
    spec = vqvae(save_every=2, log_every=2, best="loss")
    training.interrupt(spec, tmp_path / "run", 2)
    link = tmp_path / "run" / "checkpoints" / "best"
    link.unlink()
    training.interrupt(spec, tmp_path / "run", 1)
    assert link.is_symlink()


def test_a_signal_asks_to_save_and_the_run_goes_on(training, start, vqvae, tmp_path):
    spec = vqvae(steps=100_000, log_every=1, save_every=100_000, picture_every=100_000)
    process = start(spec, tmp_path / "run")
    process.wait_for_lines(2)
    os.kill(process.process.pid, signal.SIGUSR1)
    end = time.monotonic() + 60
    while not training.steps_saved(tmp_path / "run"):
        assert process.process.is_alive()
        assert time.monotonic() < end
        time.sleep(0.01)
    [step] = training.steps_saved(tmp_path / "run")
    process.wait_for_lines(step + 3)
    assert f"\nsaved step {step}\n" in process.log.read_text()


def spoil(monkeypatch, steps, value=torch.nan):
    """Gradients of these steps get a value that is wrong."""
    counted = iter(range(1, 10_000))

    def gradient(self, phase, inputs, plain=Trainer._gradient):
        loss, logs = plain(self, phase, inputs)
        if next(counted) in steps:
            for parameter in self._trained[phase]:
                if parameter.grad is not None:
                    parameter.grad.fill_(value)
            logs[f"{phase}_grad_norm"] = torch.tensor(value)
        return loss, logs

    monkeypatch.setattr(Trainer, "_gradient", gradient)


@pytest.mark.parametrize("command", ["vqvae", "ldm"])
def test_a_step_without_a_number_changes_nothing(training, command, request, tmp_path, monkeypatch, capsys):
    """Named, counted, and not saved; weights, averages and codebook are those of the step before."""
    spec = request.getfixturevalue(command)(steps=8, log_every=4, save_every=1, keep=10)
    spoil(monkeypatch, {5})
    training.run(spec, tmp_path / "run")
    said = capsys.readouterr().err
    assert said.count("warning: step 5 changed nothing: the gradient of") == 1
    assert "is NaN or infinite (1 so far)" in said
    assert training.steps_saved(tmp_path / "run") == [1, 2, 3, 4, 6, 7, 8]
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert "skipped_steps" not in lines[0]
    assert lines[1]["skipped_steps"] == 1
    assert lines[1]["loss"] == lines[1]["loss"]  # no NaN got into the mean


def test_skipped_steps_are_part_of_what_is_saved(training, vqvae, tmp_path, monkeypatch):
    spec = vqvae(save_every=4)
    with monkeypatch.context() as patch:
        spoil(patch, {6, 7})
        training.run(spec, tmp_path / "whole")
    with monkeypatch.context() as patch:
        spoil(patch, {6, 7})
        training.interrupt(spec, tmp_path / "stopped", 9)
    training.run(spec, tmp_path / "stopped")
    assert training.outcome(tmp_path / "stopped") == training.outcome(tmp_path / "whole")


def test_a_spike_is_skipped_once_there_is_an_average(training, vqvae, tmp_path, monkeypatch, capsys):
    spec = vqvae(steps=110, save_every=110, log_every=110, picture_every=110)
    spoil(monkeypatch, {50, 105}, value=1e6)
    training.run(spec, tmp_path / "run")
    said = capsys.readouterr().err
    assert "step 50 changed nothing" not in said  # there was no average yet to hold it against
    assert "step 105 changed nothing: the gradient of 'autoencoder' has the norm 1e+06, more than" in said


@pytest.mark.parametrize("value", [torch.nan, 1e6])
@pytest.mark.parametrize("command", ["gan", "ldm"])
def test_a_skipped_step_leaves_everything_as_it_was(training, command, value, request, tmp_path, monkeypatch):
    """Weights, averages, optimizers, codebook, discriminator: but not the spikes' part in the usual norm."""
    spec = request.getfixturevalue(command)(steps=12, save_every=100)
    states = []

    def after(self, record, stop, plain=runs_train._Run._after):
        job, trainer = self.job, self.job.trainer
        state = {f"m.{k}": v for k, v in job.module.state_dict().items()} | {
            f"o.{k}": v for k, v in trainer.state_dict().items()
        }
        state |= {f"e.{k}": v for k, v in trainer.ema.state.items()}
        states.append((record.fault, {k: v.clone() for k, v in state.items() if not k.endswith(".norm")}))
        plain(self, record, stop)

    monkeypatch.setattr(RunningNorm, "NEEDED", 5)
    monkeypatch.setattr(runs_train._Run, "_after", after)
    spoil(monkeypatch, {15 if command == "gan" else 9}, value)
    training.run(spec, tmp_path / "run")
    [skipped] = [i for i, (fault, _) in enumerate(states) if fault is not None]
    before, at, following = (states[i][1] for i in (skipped - 1, skipped, skipped + 1))
    assert [name for name in before if not torch.equal(before[name], at[name])] == []
    assert any(not torch.equal(at[name], following[name]) for name in at)


def test_a_spike_in_the_last_step_is_no_reason_not_to_finish(training, vqvae, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(RunningNorm, "NEEDED", 5)
    spoil(monkeypatch, {20}, value=1e6)
    training.run(vqvae(), tmp_path / "run")
    assert "step 20 changed nothing" in capsys.readouterr().err
    assert training.steps_saved(tmp_path / "run")[-1] == 20


def test_gradients_that_stay_large_become_the_usual_ones(training, vqvae, tmp_path, monkeypatch, capsys):
    """Else 20 skipped steps in a row would end a training that is healthy."""
    monkeypatch.setattr(RunningNorm, "NEEDED", 5)
    spoil(monkeypatch, set(range(10, 60)), value=100.0)
    training.run(vqvae(steps=60, save_every=60, picture_every=60), tmp_path / "run")
    skipped = capsys.readouterr().err.count("changed nothing")
    assert 0 < skipped < 20


def test_small_gradients_that_grow_are_no_spikes(training, vqvae, tmp_path, monkeypatch, capsys):
    """A discriminator that was sure has a gradient of zero."""
    monkeypatch.setattr(RunningNorm, "NEEDED", 5)
    spoil(monkeypatch, set(range(1, 12)), value=0.0)
    training.run(vqvae(), tmp_path / "run")
    assert "changed nothing" not in capsys.readouterr().err


def test_training_stops_after_so_many_and_what_was_good_stays(training, vqvae, tmp_path, monkeypatch):
    spec = vqvae(steps=60, save_every=2)
    spoil(monkeypatch, set(range(11, 60)))
    with pytest.raises(UldmError, match="20 steps in a row were skipped, the last, 30") as caught:
        training.run(spec, tmp_path / "run")
    assert "the last good checkpoint is" in caught.value.message
    assert training.steps_saved(tmp_path / "run") == [8, 10]
    monkeypatch.undo()
    assert training.run(vqvae(steps=60, save_every=2), tmp_path / "run").computed == 50


def test_figures_reach_tensorboard(training, vqvae, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    training.run(vqvae(trackers=("tensorboard",), steps=6), tmp_path / "run")
    [folder] = {path.parent for path in (tmp_path / "run" / "uldm").glob("events.*")}
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    tracked = [(event.step, event.value) for event in events.Scalars("loss")]
    assert tracked == [(line["step"], pytest.approx(line["loss"])) for line in lines]


def test_a_tracker_that_is_not_installed_is_refused(vqvae, tmp_path, monkeypatch):
    monkeypatch.setattr(train_plan, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"train\.trackers: wandb is not installed") as caught:
        vqvae_train.plan(vqvae(trackers=("wandb",)), tmp_path / "run", None)
    assert caught.value.hint == "pip install wandb, or leave it out"


def test_waiting_for_images_is_measured_and_told_once(training, vqvae, tmp_path, monkeypatch, capsys):
    def slow(self, numbers, plain=streams._ShuffledReader.read):
        time.sleep(0.1)
        return plain(self, numbers)

    monkeypatch.setattr(streams._ShuffledReader, "read", slow)
    training.run(vqvae(steps=9), tmp_path / "run")
    assert all(line["data_wait"] > 0.2 for line in read_lines(tmp_path / "run" / "metrics.jsonl"))
    said = capsys.readouterr().err
    assert said.count("warning: the network waited for images") == 1
    assert "more train.workers (now 0)" in said


def test_checkpoints_can_be_checked_by_hand(training, vqvae, tmp_path):
    import subprocess

    if not shutil.which("sha256sum"):
        pytest.skip("no sha256sum")
    result = training.run(vqvae(steps=1), tmp_path / "run")
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=result.checkpoint, check=True)
