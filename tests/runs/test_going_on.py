"""Runs that go on where something has changed around them: models that are gone or newer, images that have moved."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from uldm_cli.errors import ConfigError, UsageError
from uldm_cli.fetch import alone
from uldm_cli.runs import ldm_train, vqvae_train
from uldm_cli.runs import train as runs_train
from uldm_cli.runs.metrics import read_lines
from uldm_cli.specs.autoencoder_training import AutoencoderTraining
from uldm_cli.specs.diffusion_training import DiffusionTraining
from uldm_cli.specs.load import load_config


def changed(spec, **fields):
    return type(spec).model_validate(spec.model_dump() | fields)


def begun_with(kind, runs, reference, folder, spec):
    """A config as the command makes it for `--init-from`, with the loop of `spec`."""
    base = runs.base_config(str(reference), folder)
    return changed(load_config(kind, None, base=base), train=spec.train.model_dump(), optim=spec.optim.model_dump())


@pytest.fixture
def owned(autoencoder: Path, tmp_path: Path) -> Path:
    """A copy of the autoencoder's run, which a test may take away."""
    shutil.copytree(autoencoder, tmp_path / "owned")
    return tmp_path / "owned"


def test_a_diffusion_run_goes_on_without_its_autoencoder(training, ldm, owned, tmp_path):
    spec = changed(ldm(), autoencoder=str(owned))
    training.run(spec, tmp_path / "whole")
    training.interrupt(spec, tmp_path / "stopped", 7)
    owned.rename(tmp_path / "elsewhere")
    seen = ldm_train.preview(ldm_train.plan(spec, tmp_path / "stopped", None))
    assert (seen.details["autoencoder"], seen.plan.start) == (str(owned), 7)
    training.run(spec, tmp_path / "stopped")
    assert training.outcome(tmp_path / "stopped") == training.outcome(tmp_path / "whole")
    with pytest.raises(ConfigError, match="there is no model"):  # a new run does need it
        training.run(spec, tmp_path / "new")


def test_a_diffusion_run_goes_on_without_the_model_that_it_began_with(training, ldm, tmp_path):
    training.run(ldm(steps=2), tmp_path / "first")
    spec = begun_with(DiffusionTraining, ldm_train, tmp_path / "first", tmp_path / "run", ldm(steps=4))
    training.interrupt(spec, tmp_path / "run", 2)
    shutil.rmtree(tmp_path / "first")
    again = begun_with(DiffusionTraining, ldm_train, tmp_path / "first", tmp_path / "run", ldm(steps=4))
    assert again == spec
    assert training.run(again, tmp_path / "run").computed == 2
    with pytest.raises(ConfigError, match="there is no model"):
        ldm_train.base_config(str(tmp_path / "first"), tmp_path / "new")


def test_an_autoencoders_run_goes_on_without_the_model_that_it_began_with(training, vqvae, owned, tmp_path):
    spec = begun_with(AutoencoderTraining, vqvae_train, owned, tmp_path / "run", vqvae(steps=4))
    training.interrupt(spec, tmp_path / "run", 2)
    shutil.rmtree(owned)
    again = begun_with(AutoencoderTraining, vqvae_train, owned, tmp_path / "run", vqvae(steps=4))
    assert training.run(again, tmp_path / "run").computed == 2


def test_the_newest_autoencoder_is_for_new_runs(training, ldm, autoencoder, tmp_path, monkeypatch, capsys):
    """A run that is not finished goes on with its own; after it, the newest one makes another run."""
    monkeypatch.chdir(tmp_path)
    first, second, run = (Path("outputs") / name for name in ("vqvae-first", "vqvae-second", "ldm-train"))
    shutil.copytree(autoencoder, first)
    spec = changed(ldm(steps=4), autoencoder=None)
    training.interrupt(spec, run, 2)
    shutil.copytree(autoencoder, second)
    for path, age in ((first, 100), (second, 0)):
        for checkpoint in (path / "checkpoints").iterdir():
            os.utime(checkpoint, (checkpoint.stat().st_mtime - age,) * 2)
    capsys.readouterr()
    plan = ldm_train.plan(spec, None, None)
    assert (plan.folder, plan.start, plan.config.autoencoder) == (run, 2, str(first))
    assert f"autoencoder: {first}, with which the run in {run} began" in capsys.readouterr().err
    ldm_train.run(plan)
    plan = ldm_train.plan(spec, None, None)
    assert (plan.folder.name, plan.start, plan.config.autoencoder) == ("ldm-train-2", 0, str(second))
    assert ldm_train.plan(spec, run, None).finished


def test_a_run_goes_on_in_micro_batches(training, vqvae, gan, tmp_path):
    """Except with a discriminator, whose batch norm sees them singly."""
    for name, make in (("plain", vqvae), ("gan", gan)):
        training.interrupt(make(), tmp_path / name, 7)
    assert training.run(vqvae(accumulate=2), tmp_path / "plain").computed == 13
    with pytest.raises(ConfigError, match=r"train\.accumulate is 1 there and 2 here"):
        training.run(gan(accumulate=2), tmp_path / "gan")


# Images


def of(spec, root):
    return changed(spec, data=spec.data.model_dump() | {"root": str(root)})


def test_images_may_move(training, vqvae, photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "here")
    training.run(of(vqvae(), tmp_path / "here"), tmp_path / "whole")
    training.interrupt(of(vqvae(), tmp_path / "here"), tmp_path / "run", 7)
    (tmp_path / "here").rename(tmp_path / "there")
    capsys.readouterr()
    training.run(of(vqvae(), tmp_path / "there"), tmp_path / "run")
    said = capsys.readouterr().err
    assert f"of {tmp_path / 'run'}, with the images of {tmp_path / 'there'} where it was {tmp_path / 'here'}" in said
    assert "their order is another" not in said
    outcomes = [training.outcome(tmp_path / name)["metrics"] for name in ("run", "whole")]
    assert outcomes[0] == outcomes[1]


def test_other_names_are_told(training, vqvae, photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "here")
    spec = of(vqvae(), tmp_path / "here")
    training.interrupt(spec, tmp_path / "run", 7)
    (tmp_path / "here" / "a" / "00.png").rename(tmp_path / "here" / "a" / "zz.png")
    training.run(spec, tmp_path / "run")
    assert "was saved with images of other names than there are now: their order is another" in capsys.readouterr().err


@pytest.mark.parametrize("name", [".", "outputs/run"])
def test_a_run_among_its_own_images_is_refused(training, vqvae, photos, tmp_path, name):
    shutil.copytree(photos, tmp_path / "here")
    with pytest.raises(ConfigError, match=r"the run's own pictures would be trained on") as caught:
        training.run(of(vqvae(), tmp_path / "here"), tmp_path / "here" / name)
    assert caught.value.hint == "Give an --outdir elsewhere"
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["a", "b"]


def test_a_run_among_images_of_which_it_reads_a_list_sees_none_of_its_own(training, vqvae, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "here")
    names = [path.relative_to(photos).as_posix() for path in photos.rglob("*.png")]
    (tmp_path / "list.txt").write_text("\n".join(names))
    spec = vqvae(steps=2)
    spec = changed(
        spec, data=spec.data.model_dump() | {"root": str(tmp_path / "here"), "split_file": str(tmp_path / "list.txt")}
    )
    assert training.run(spec, tmp_path / "here" / "run").computed == 2


def test_two_trainings_in_one_folder_are_refused(training, vqvae, tmp_path):
    training.interrupt(vqvae(), tmp_path / "run", 7)
    before = training.outcome(tmp_path / "run")
    with alone(tmp_path / "run" / ".lock", "trains"), pytest.raises(UsageError) as caught:
        training.run(vqvae(), tmp_path / "run")
    assert caught.value.message == f"another process trains in {tmp_path / 'run'}"
    assert training.outcome(tmp_path / "run") == before
    assert training.run(vqvae(), tmp_path / "run").computed == 13
    assert not list((tmp_path / "run").glob(".*"))


def test_what_another_process_trained_meanwhile_stays(training, vqvae, tmp_path):
    """It ended between the look at the folder and the beginning."""
    training.interrupt(vqvae(), tmp_path / "run", 7)
    plan = vqvae_train.plan(vqvae(), tmp_path / "run", None)
    training.run(vqvae(), tmp_path / "run")
    before = training.outcome(tmp_path / "run")
    plan = replace(plan, checkpoint=sorted((tmp_path / "run" / "checkpoints").iterdir())[0])
    with pytest.raises(UsageError, match=r"another process has trained in .*run meanwhile\. Run this once more"):
        vqvae_train.run(plan)
    assert training.outcome(tmp_path / "run") == before


# The best


def test_another_figure_may_become_the_best_ones(training, vqvae, tmp_path):
    """What was best by one figure says nothing about another."""
    training.interrupt(vqvae(save_every=3, best="psnr"), tmp_path / "run", 7)
    training.run(vqvae(save_every=3, best="loss"), tmp_path / "run")
    lines = {line["step"]: line["loss"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")}
    since = {step: loss for step, loss in lines.items() if step > 7}
    best = min(since, key=since.__getitem__)
    assert os.readlink(tmp_path / "run" / "checkpoints" / "best") == f"step-{best:08}"


def test_a_single_batch_is_no_figure(training, vqvae, tmp_path):
    """A save between two lines, as SIGUSR1 asks for, is compared with nothing."""
    training.run(vqvae(steps=8, log_every=4, save_every=1, best="loss"), tmp_path / "run")
    lines = {line["step"]: line["loss"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")}
    best = min(lines, key=lines.__getitem__)
    assert lines.keys() == {4, 8}
    assert os.readlink(tmp_path / "run" / "checkpoints" / "best") == f"step-{best:08}"


def test_where_the_best_was_damaged_the_next_one_is(training, vqvae, tmp_path, monkeypatch):
    """It had pushed out the one before it, of which the checkpoint that is gone back to still tells."""
    spec = vqvae(steps=6, save_every=1, log_every=1, best="loss")
    steps = iter(range(1, 10))
    monkeypatch.setattr(runs_train, "is_better", lambda *_: next(steps) in (1, 4))
    training.interrupt(spec, tmp_path / "run", 4)
    monkeypatch.setattr(runs_train, "is_better", lambda name, value, than: than is None)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert (os.readlink(checkpoints / "best"), training.steps_saved(tmp_path / "run")) == ("step-00000004", [3, 4])
    model = checkpoints / "best" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    training.run(spec, tmp_path / "run")
    assert os.readlink(checkpoints / "best") == "step-00000004"  # made again, and held against nothing
    assert (checkpoints / "best" / "model.safetensors").exists()
