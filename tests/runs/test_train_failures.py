"""Training runs that meet damage, NaN, full disks and images that cannot be used: what was saved stays whole."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from uldm_cli.errors import ConfigError, UldmError, UsageError
from uldm_cli.formats.tensors import write_safetensors
from uldm_cli.runs import vqvae_train
from uldm_cli.runs.metrics import Means, read_lines
from uldm_cli.specs.autoencoder_training import AutoencoderTraining

# What fails


@pytest.mark.parametrize("damage", ["truncated", "one byte"])
@pytest.mark.parametrize("name", ["model", "state"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(training, name, damage, vqvae, tmp_path, capsys):
    folder = tmp_path / "run"
    training.run(vqvae(), tmp_path / "whole")
    training.interrupt(vqvae(), folder, 12)
    newest = folder / "checkpoints" / "step-00000012"
    file = newest / f"{name}.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content[:-10] if damage == "truncated" else content)
    training.run(vqvae(), folder)
    said = capsys.readouterr().err
    assert f"warning: {newest} is damaged and not used: {file}" in said
    assert "going on from step 10" in said
    shutil.rmtree(folder / "checkpoints" / "damaged-step-00000012")  # it was set aside, not removed
    assert training.outcome(folder) == training.outcome(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["truncated", "missing", "other step", "no checkpoint"])
@pytest.mark.parametrize("name", ["model", "state"])
def test_damage_to_the_only_checkpoint_is_told_in_a_dry_run_too(training, name, damage, vqvae, tmp_path):
    training.interrupt(vqvae(), tmp_path / "run", 3)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000003"
    file = checkpoint / f"{name}.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "missing":
        file.unlink()
    elif damage == "no checkpoint":
        write_safetensors(file, {"a": torch.zeros(1)}, {})
    else:
        training.interrupt(vqvae(), tmp_path / "other", 4)
        shutil.copy(tmp_path / "other" / "checkpoints" / "step-00000004" / file.name, file)
    with pytest.raises(ConfigError) as caught:
        vqvae_train.plan(vqvae(), tmp_path / "run", None)
    assert str(checkpoint) in caught.value.message
    assert caught.value.hint == f"No checkpoint is whole: remove {checkpoint.parent} to start again"


def test_a_checkpoint_of_another_config_is_named_by_its_tensors(training, vqvae, tmp_path):
    training.interrupt(vqvae(), tmp_path / "run", 3)
    wider = vqvae().model_dump()
    wider["autoencoder"]["codebook_size"] = 32
    training.interrupt(AutoencoderTraining.model_validate(wider), tmp_path / "wider", 3)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.copytree(tmp_path / "wider" / "checkpoints", tmp_path / "run" / "checkpoints")
    with pytest.raises(ConfigError, match=r"ema\.quantize\.embedding is \[32, 4\] in the file and \[16, 4\]"):
        training.run(vqvae(), tmp_path / "run")


def test_checkpoints_without_their_config_are_left_alone(training, vqvae, tmp_path):
    training.interrupt(vqvae(), tmp_path / "run", 3)
    (tmp_path / "run" / "train.yaml").unlink()
    with pytest.raises(ConfigError, match=r"holds checkpoints, but no train\.yaml"):
        training.run(vqvae(), tmp_path / "run")


def test_nan_is_named_and_the_last_good_checkpoint_stays(training, vqvae, tmp_path, monkeypatch):
    """Also where no line of metrics is due: a save must not put a spoilt model in the place of a good one."""
    folder = tmp_path / "run"
    spec = vqvae(log_every=1000, save_every=2)
    calls = iter(range(training.STEPS))

    def add(self, logs, add=Means.add):
        if next(calls) == 6:
            logs = logs | {"loss": torch.tensor(torch.nan)}
        add(self, logs)

    monkeypatch.setattr(Means, "add", add)
    with pytest.raises(UldmError) as caught:
        training.run(spec, folder)
    good = folder / "checkpoints" / "step-00000006"
    assert caught.value.message == f"loss became NaN or infinite by step 8; the last good checkpoint is {good}"
    assert caught.value.exit_code == 1
    assert f"begin from there with a smaller optim.lr: --init-from {good} --outdir NEW" in caught.value.hint
    assert training.steps_saved(folder) == [4, 6]
    monkeypatch.undo()
    training.run(vqvae(save_every=2, log_every=1000), tmp_path / "whole")
    training.run(spec, folder)
    assert training.outcome(folder) == training.outcome(tmp_path / "whole")


def test_a_learning_rate_that_is_far_too_large_is_told(training, vqvae, tmp_path):
    spec = vqvae(steps=40, save_every=40)
    spec = spec.model_copy(update={"optim": spec.optim.model_copy(update={"lr": 1e9})})
    says = r"20 steps in a row were skipped, the last, \d+: the gradient of 'autoencoder' is NaN or infinite; no checkp"
    with pytest.raises(UldmError, match=says):
        training.run(spec, tmp_path / "run")


def test_a_full_disk_leaves_what_was_saved_and_the_run_goes_on_later(training, vqvae, largest_file, tmp_path):
    folder = tmp_path / "run"
    training.run(vqvae(), tmp_path / "whole")
    training.interrupt(vqvae(), folder, 7)
    with largest_file(60_000), pytest.raises(UldmError, match="step 10 could not be saved: ") as caught:
        training.run(vqvae(), folder)
    assert caught.value.exit_code == 1
    assert caught.value.hint == "What was saved before is whole: the same command goes on from there"
    assert training.steps_saved(folder) == [5, 7]
    assert not list(folder.rglob(".*"))
    training.run(vqvae(), folder)
    assert training.outcome(folder) == training.outcome(tmp_path / "whole")


def test_a_full_disk_at_the_first_save_promises_nothing(training, vqvae, largest_file, tmp_path):
    with largest_file(60_000), pytest.raises(UldmError, match="step 5 could not be saved: ") as caught:
        training.run(vqvae(), tmp_path / "run")
    assert caught.value.hint == "Nothing had been saved before: the same command starts again"


def test_a_disk_without_room_for_a_line_is_told(training, vqvae, largest_file, tmp_path):
    folder = tmp_path / "run"
    spec = vqvae(picture_every=training.STEPS, save_every=training.STEPS)
    with largest_file(2000), pytest.raises(UldmError, match=r"metrics\.jsonl could not be written"):
        training.run(spec, folder)
    written = [line["step"] for line in read_lines(folder / "metrics.jsonl")]
    assert written == [3, 6, 9, 12, 15, 18][: len(written)] != []


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="only root can mount a small disk")
def test_a_disk_that_really_is_full(training, vqvae, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a small disk")
    try:
        with pytest.raises(UldmError, match=r"step \d+ could not be saved: (disk full|.*No space left on device)"):
            training.run(vqvae(save_every=2), disk / "run")
        assert training.steps_saved(disk / "run")
        subprocess.run(["mount", "-o", "remount,size=9m", str(disk)], check=True)
        training.run(vqvae(save_every=2), disk / "run")
        training.run(vqvae(save_every=2), tmp_path / "whole")
        assert training.outcome(disk / "run") == training.outcome(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Images that cannot be used


@pytest.fixture
def mixed(photos: Path, vqvae, tmp_path: Path):
    """A config on a copy of the images of which two are damaged: one in its header, one only in its pixels."""
    folder = tmp_path / "mixed"
    shutil.copytree(photos, folder)
    (folder / "a" / "00.png").write_bytes(b"no picture")
    whole = (folder / "b" / "01.png").read_bytes()
    (folder / "b" / "01.png").write_bytes(whole[: len(whole) // 2])

    def make(*, strict: bool = False, **train: object) -> AutoencoderTraining:
        spec = vqvae(**train)
        return spec.model_copy(update={"data": spec.data.model_copy(update={"root": str(folder), "strict": strict})})

    return make


def test_damaged_images_are_named_counted_and_skipped(training, mixed, tmp_path, capsys):
    result = training.run(mixed(), tmp_path / "run")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert [line.split(":")[1] for line in warnings] == [" skipped a/00.png", " skipped b/01.png"]
    assert warnings[0].endswith("(1 so far)")
    assert warnings[1].endswith("(2 so far)")
    assert result.skipped == 2


def test_strict_stops_at_a_damaged_image(training, mixed, tmp_path):
    with pytest.raises(UsageError, match=r"a/00\.png") as caught:
        training.run(mixed(strict=True), tmp_path / "run")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_images_of_which_none_can_be_decoded_leave_no_folder(training, mixed, tmp_path):
    spec = mixed()
    for path in Path(spec.data.root).rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UsageError, match="not one image of the data set can be decoded"):
        training.run(spec, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_many_damaged_images_are_counted(training, mixed, tmp_path, capsys):
    spec = mixed(steps=2)
    for path in sorted(Path(spec.data.root).rglob("*.png"))[:14]:
        path.write_bytes(b"no picture")
    assert training.run(spec, tmp_path / "run").skipped >= 14
    errors = capsys.readouterr().err
    assert errors.count("warning: skipped") == 10
    assert errors.count("from here on they are only counted") == 1
