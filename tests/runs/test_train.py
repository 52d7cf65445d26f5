"""Training runs: resuming bit for bit, interrupting, and what must stay whole when something fails."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from uldm_cli.errors import ConfigError, UldmError, UsageError
from uldm_cli.formats.native import load_tensors, read_header, save, save_tensors
from uldm_cli.runs import ldm_train, vqvae_train
from uldm_cli.runs.metrics import Means, read_lines
from uldm_cli.specs.load import dump_yaml
from uldm_cli.specs.training import AutoencoderTraining, DiffusionTraining

STEPS = 20
IMAGES = 20
BATCH = 8
RATES = {"images_per_second"}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads that share such small work wait for each other, for minutes where the machine has more to do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps the precision of a process's first run; other tests may have chosen another."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small coloured images, of two classes."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = np.kron(generator.integers(0, 255, (4, 4, 3)), np.ones((4, 4, 1))).astype(np.uint8)
        path = folder / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def common(**train: object) -> dict[str, object]:
    """`log_every` divides neither `save_every` nor `steps`: the means between two lines must survive, too."""
    settings = {"steps": STEPS, "batch_size": BATCH, "device": "cpu", "precision": "fp32", "workers": 0}
    every = {"log_every": 3, "save_every": 5, "picture_every": 10}
    return {"optim": {"warmup_steps": 2}, "train": settings | every | train}


@pytest.fixture
def vqvae(photos: Path) -> Callable[..., AutoencoderTraining]:
    def make(**train: object) -> AutoencoderTraining:
        widths = {"down_channels": [8, 8], "mid_channels": [8, 8], "down_sample": [True], "attn_down": [False]}
        counts = {"num_down_layers": 1, "num_up_layers": 1, "num_heads": 1, "norm_channels": 4, "codebook_size": 16}
        data = {"kind": "images", "root": str(photos), "size": 16, "flip": True}
        config = {"autoencoder": {"kind": "vqvae", **widths, **counts}, "data": data, **common(**train)}
        return AutoencoderTraining.model_validate(config)

    return make


@pytest.fixture(scope="module")
def autoencoder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished autoencoder's run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("autoencoder")
    run(vqvae.__wrapped__(photos)(), folder)  # type: ignore[attr-defined]  # the function behind the fixture
    return folder


@pytest.fixture
def ldm(autoencoder: Path) -> Callable[..., DiffusionTraining]:
    """With dropout, whose draws are the only ones from a generator that has a state."""

    def make(**train: object) -> DiffusionTraining:
        network = {"kind": "unet", "model_channels": 32, "channel_mult": [1], "num_res_blocks": 1, "dropout": 0.3}
        backbone = {"backbone": {**network, "attention_resolutions": [1]}}
        config = {"autoencoder": str(autoencoder), "schedule": {"kind": "scaled_linear", "timesteps": 20}, **backbone}
        return DiffusionTraining.model_validate({**config, **common(**train)})

    return make


Spec = AutoencoderTraining | DiffusionTraining


def run(spec: Spec, folder: Path, *, resume: bool = False):
    if isinstance(spec, AutoencoderTraining):
        return vqvae_train.run(vqvae_train.plan(spec, folder, None, resume=resume))
    return ldm_train.run(ldm_train.plan(spec, folder, None, resume=resume))


# Forked from one that has imported torch, which would take each of them seconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["uldm_cli.cli.app", "uldm_cli.core.tasks", "uldm_cli.core.engine", "PIL.PngImagePlugin"]
)
MAIN = """
import multiprocessing, os, sys, torch
from uldm_cli.__main__ import main
torch.set_num_threads(1)
os.setsid()
multiprocessing.set_start_method("fork", force=True)  # else its readers had a server of their own, and outlived it
log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(log, 1)
os.dup2(log, 2)
sys.exit(main(args))
"""


class Process:
    """The same run by the command line, in a process of its own."""

    def __init__(self, spec: Spec, folder: Path) -> None:
        self.folder, self.log = folder, folder.with_suffix(".log")
        config = folder.with_suffix(".yaml")
        config.write_text(dump_yaml(spec))
        group = "vqvae" if isinstance(spec, AutoencoderTraining) else "ldm"
        args = [group, "train", str(config), "--outdir", str(folder)]
        self.process = PROCESSES.Process(target=exec, args=(MAIN, {"args": args, "path": str(self.log)}))
        self.process.start()

    def wait_for_lines(self, count: int) -> None:
        """Until it has written so many lines of metrics."""
        end = time.monotonic() + 120
        while lines_written(self.folder) < count:
            assert self.process.is_alive(), self.log.read_text()
            assert time.monotonic() < end, "the process hangs"
            time.sleep(0.002)

    def kill(self) -> None:
        self.process.kill()
        assert self.exit_code() == -signal.SIGKILL

    def exit_code(self) -> int | None:
        self.process.join(60)
        return self.process.exitcode


def lines_written(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def outcome(folder: Path) -> dict[str, object]:
    """What a run made, for comparison: bytes of the files, and the metrics without the rates.

    A file that was being written when its process was killed keeps its temporary name, and is left out.
    """
    names = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp"]
    found: dict[str, object] = {str(p.relative_to(folder)): p.read_bytes() for p in names if p.name != "metrics.jsonl"}
    lines = read_lines(folder / "metrics.jsonl")
    found["metrics"] = [{name: value for name, value in line.items() if name not in RATES} for line in lines]
    return found


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


@contextmanager
def signalled(step: int, count: int = 1) -> Iterator[None]:
    """Inside, Ctrl-C is pressed in the given step of a run."""
    steps = iter(range(1, step + 1))

    def add(self, logs, add=Means.add):
        if next(steps, None) == step:
            for _ in range(count):
                signal.raise_signal(signal.SIGINT)
        add(self, logs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Means, "add", add)
        yield


def interrupt(spec: Spec, folder: Path, step: int) -> None:
    with signalled(step), pytest.raises(KeyboardInterrupt):
        run(spec, folder)


# Resuming


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("command", ["vqvae", "ldm"])
def test_a_killed_run_ends_as_one_that_was_never_killed(command, workers, request, tmp_path):
    spec = request.getfixturevalue(command)(workers=workers)
    run(spec, tmp_path / "whole")
    process = Process(spec, tmp_path / "killed")
    process.wait_for_lines(3)  # so it is half-way: in or after step 9 of 20
    process.kill()
    assert 5 <= steps_saved(tmp_path / "killed")[-1] < STEPS
    run(spec, tmp_path / "killed")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_a_run_that_is_killed_anywhere_again_and_again_ends_the_same(vqvae, tmp_path):
    spec = vqvae(workers=2, save_every=2)
    run(spec, tmp_path / "whole")
    generator = random.Random(0)
    for count in (1, 3, 5):
        process = Process(spec, tmp_path / "killed")
        process.wait_for_lines(count)
        time.sleep(generator.uniform(0, 0.05))
        process.kill()
    run(spec, tmp_path / "killed")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("command", ["vqvae", "ldm"])
@pytest.mark.parametrize("step", [1, 7])
def test_an_interrupted_run_saves_and_ends_as_one_that_was_not(command, step, request, tmp_path):
    spec = request.getfixturevalue(command)()
    run(spec, tmp_path / "whole")
    interrupt(spec, tmp_path / "stopped", step)
    assert steps_saved(tmp_path / "stopped")[-1] == step
    assert run(spec, tmp_path / "stopped").computed == STEPS - step
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_the_diffusion_model_goes_on_with_the_autoencoder_that_it_began_with(ldm, autoencoder, tmp_path):
    moved = tmp_path / "autoencoder"
    shutil.copytree(autoencoder, moved)
    spec = ldm().model_copy(update={"autoencoder": str(moved)})
    run(spec, tmp_path / "whole")
    interrupt(spec, tmp_path / "stopped", 7)
    newest = moved / "checkpoints" / f"step-{STEPS:08}" / "model.safetensors"
    header = read_header(newest)
    other = {name: value * 2 for name, value in load_tensors(newest, "ema.").items()}
    save(newest, header, {"ema": other})
    run(spec, tmp_path / "stopped")
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_a_run_without_a_checkpoint_starts_again(vqvae, tmp_path, capsys):
    run(vqvae(), tmp_path / "whole")
    process = Process(vqvae(save_every=STEPS), tmp_path / "killed")
    process.wait_for_lines(1)
    process.kill()
    assert steps_saved(tmp_path / "killed") == []
    run(vqvae(save_every=STEPS), tmp_path / "killed", resume=True)
    assert "had saved no checkpoint: it starts again" in capsys.readouterr().err
    assert outcome(tmp_path / "killed")["metrics"] == outcome(tmp_path / "whole")["metrics"]


def test_half_a_line_of_metrics_is_dropped(vqvae, tmp_path):
    run(vqvae(), tmp_path / "whole")
    interrupt(vqvae(), tmp_path / "stopped", 7)
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 0.\n{"step": 12, "lo')
    run(vqvae(), tmp_path / "stopped")
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_resuming_what_never_began_is_refused(vqvae, tmp_path):
    with pytest.raises(ConfigError, match="--resume: there is no run of this config in"):
        run(vqvae(), tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_stays_as_it_is(vqvae, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    first = run(vqvae(), folder)

    def state():
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}

    before = state()
    monkeypatch.setattr(vqvae_train.AutoencoderJob, "__init__", None)  # nothing is built
    again = run(vqvae(), folder)
    assert state() == before
    assert (first.computed, again.computed) == (STEPS, 0)
    assert again.line == first.line
    assert again.checkpoint == first.checkpoint == folder / "checkpoints" / f"step-{STEPS:08}"


def test_other_images_than_before_are_told(vqvae, photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    spec = vqvae()
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"root": str(tmp_path / "photos")})})
    interrupt(spec, tmp_path / "run", 7)
    next((tmp_path / "photos").rglob("*.png")).unlink()
    run(spec, tmp_path / "run")
    assert f"was saved with {IMAGES} images, and there are {IMAGES - 1} now" in capsys.readouterr().err


# Stopping


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_to_process_and_group_saves_and_the_same_command_goes_on(workers, vqvae, tmp_path):
    """As `timeout` and torchrun send it: the process gets two at once, and its readers one."""
    spec = vqvae(workers=workers, steps=100_000, log_every=1, save_every=100_000, picture_every=100_000)
    process = Process(spec, tmp_path / "run")
    process.wait_for_lines(3)
    leader = process.process.pid or 0
    os.kill(leader, signal.SIGTERM)
    os.killpg(leader, signal.SIGTERM)
    assert process.exit_code() == 130
    [step] = steps_saved(tmp_path / "run")
    assert process.log.read_text().splitlines()[-2:] == [
        f"saved step {step}; the same command goes on from there",
        "error: interrupted",
    ]
    assert step == lines_written(tmp_path / "run") >= 3
    assert vqvae_train.plan(spec, tmp_path / "run", None).start == step


def test_a_stop_in_the_last_step_comes_too_late(vqvae, tmp_path):
    with signalled(STEPS):
        assert run(vqvae(), tmp_path / "run").computed == STEPS


def test_a_step_that_was_just_saved_is_not_saved_twice(vqvae, tmp_path):
    interrupt(vqvae(), tmp_path / "run", 10)
    assert steps_saved(tmp_path / "run") == [5, 10]


# What fails


def test_damaged_state_is_named_and_the_checkpoint_before_is_whole(vqvae, tmp_path):
    folder = tmp_path / "run"
    run(vqvae(), tmp_path / "whole")
    interrupt(vqvae(), folder, 12)
    newest = folder / "checkpoints" / "step-00000012"
    state = newest / "state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ConfigError) as caught:
        run(vqvae(), folder)
    assert str(state) in caught.value.message
    assert caught.value.hint == f"Remove {newest} to go on from step-00000010"
    shutil.rmtree(newest)
    run(vqvae(), folder)
    assert outcome(folder) == outcome(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["truncated", "missing", "other step", "no checkpoint"])
@pytest.mark.parametrize("name", ["model", "state"])
def test_damage_to_the_only_checkpoint_is_told_in_a_dry_run_too(name, damage, vqvae, tmp_path):
    interrupt(vqvae(), tmp_path / "run", 3)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000003"
    file = checkpoint / f"{name}.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "missing":
        file.unlink()
    elif damage == "no checkpoint":
        save_tensors(file, {"a": torch.zeros(1)}, {})
    else:
        interrupt(vqvae(), tmp_path / "other", 4)
        shutil.copy(tmp_path / "other" / "checkpoints" / "step-00000004" / file.name, file)
    with pytest.raises(ConfigError) as caught:
        vqvae_train.plan(vqvae(), tmp_path / "run", None)
    assert str(checkpoint) in caught.value.message
    assert caught.value.hint == f"Remove {checkpoint} to go on from the beginning"


def test_a_checkpoint_of_another_config_is_named_by_its_tensors(vqvae, tmp_path):
    interrupt(vqvae(), tmp_path / "run", 3)
    wider = vqvae().model_dump()
    wider["autoencoder"]["codebook_size"] = 32
    interrupt(AutoencoderTraining.model_validate(wider), tmp_path / "wider", 3)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.copytree(tmp_path / "wider" / "checkpoints", tmp_path / "run" / "checkpoints")
    with pytest.raises(ConfigError, match=r"ema\.quantize\.embedding is \[32, 4\] in the file and \[16, 4\]"):
        run(vqvae(), tmp_path / "run")


def test_checkpoints_without_their_config_are_left_alone(vqvae, tmp_path):
    interrupt(vqvae(), tmp_path / "run", 3)
    (tmp_path / "run" / "train.yaml").unlink()
    with pytest.raises(ConfigError, match=r"holds checkpoints, but no train\.yaml"):
        run(vqvae(), tmp_path / "run")


def test_nan_is_named_and_the_last_good_checkpoint_stays(vqvae, tmp_path, monkeypatch):
    """Also where no line of metrics is due: a save must not put a spoilt model in the place of a good one."""
    folder = tmp_path / "run"
    spec = vqvae(log_every=1000, save_every=2)
    calls = iter(range(STEPS))

    def add(self, logs, add=Means.add):
        if next(calls) == 6:
            logs = logs | {"loss": torch.tensor(torch.nan)}
        add(self, logs)

    monkeypatch.setattr(Means, "add", add)
    with pytest.raises(UldmError) as caught:
        run(spec, folder)
    good = folder / "checkpoints" / "step-00000006"
    assert caught.value.message == f"loss became NaN or infinite by step 8; the last good checkpoint is {good}"
    assert caught.value.exit_code == 1
    assert steps_saved(folder) == [4, 6]
    monkeypatch.undo()
    run(vqvae(save_every=2, log_every=1000), tmp_path / "whole")
    run(spec, folder)
    assert outcome(folder) == outcome(tmp_path / "whole")


def test_a_learning_rate_that_is_far_too_large_is_told(vqvae, tmp_path):
    spec = vqvae()
    spec = spec.model_copy(update={"optim": spec.optim.model_copy(update={"lr": 1e9})})
    with pytest.raises(UldmError, match=r"loss .* became NaN or infinite by step \d+; no checkpoint had been saved"):
        run(spec, tmp_path / "run")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Inside, writing more than so many bytes to a file fails, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_what_was_saved_and_the_run_goes_on_later(vqvae, tmp_path):
    folder = tmp_path / "run"
    run(vqvae(), tmp_path / "whole")
    interrupt(vqvae(), folder, 7)
    with largest_file(60_000), pytest.raises(UldmError, match="step 10 could not be saved: ") as caught:
        run(vqvae(), folder)
    assert caught.value.exit_code == 1
    assert caught.value.hint == "What was saved before is whole: the same command goes on from there"
    assert steps_saved(folder) == [5, 7]
    assert not list(folder.rglob(".*"))
    run(vqvae(), folder)
    assert outcome(folder) == outcome(tmp_path / "whole")


def test_a_disk_without_room_for_a_line_is_told(vqvae, tmp_path):
    folder = tmp_path / "run"
    spec = vqvae(picture_every=STEPS, save_every=STEPS)
    with largest_file(1000), pytest.raises(UldmError, match=r"metrics\.jsonl could not be written"):
        run(spec, folder)
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [3, 6]


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="only root can mount a small disk")
def test_a_disk_that_really_is_full(vqvae, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a small disk")
    try:
        with pytest.raises(UldmError, match=r"step \d+ could not be saved: .*No space left on device"):
            run(vqvae(save_every=2), disk / "run")
        assert steps_saved(disk / "run")
        subprocess.run(["mount", "-o", "remount,size=9m", str(disk)], check=True)
        run(vqvae(save_every=2), disk / "run")
        run(vqvae(save_every=2), tmp_path / "whole")
        assert outcome(disk / "run") == outcome(tmp_path / "whole")
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


def test_damaged_images_are_named_counted_and_skipped(mixed, tmp_path, capsys):
    result = run(mixed(), tmp_path / "run")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert [line.split(":")[1] for line in warnings] == [" skipped a/00.png", " skipped b/01.png"]
    assert warnings[0].endswith("(1 so far)")
    assert warnings[1].endswith("(2 so far)")
    assert result.skipped == 2


def test_strict_stops_at_a_damaged_image(mixed, tmp_path):
    with pytest.raises(UsageError, match=r"a/00\.png") as caught:
        run(mixed(strict=True), tmp_path / "run")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_images_of_which_none_can_be_decoded_leave_no_folder(mixed, tmp_path):
    spec = mixed()
    for path in Path(spec.data.root).rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UsageError, match="not one image of the data set can be decoded"):
        run(spec, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_many_damaged_images_are_counted(mixed, tmp_path, capsys):
    spec = mixed(steps=2)
    for path in sorted(Path(spec.data.root).rglob("*.png"))[:14]:
        path.write_bytes(b"no picture")
    assert run(spec, tmp_path / "run").skipped >= 14
    errors = capsys.readouterr().err
    assert errors.count("warning: skipped") == 10
    assert errors.count("from here on they are only counted") == 1


# What a run says


def test_lines_of_metrics_tell_over_which_epoch_the_codes_were_counted(vqvae, tmp_path):
    """20 images in batches of 8: the epochs end in the steps 3, 5, 8, 10."""
    run(vqvae(log_every=1, steps=10), tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["epoch"] for line in lines[:3]] == [0.4, 0.8, 1.2]
    assert [line["counted_epoch"] for line in lines] == [1, 1, 1, 1, 2, 2, 2, 3, 3, 4]
    figures = [(line["perplexity"], line["usage"]) for line in lines]
    assert figures[0] != figures[1]  # in the first epoch: so far
    assert figures[2] == figures[3]
    assert figures[4] == figures[5] == figures[6] != figures[7]
    assert {"loss", "l1", "l2", "psnr", "lr", "images_per_second", "autoencoder_grad_norm"} <= lines[0].keys()


def test_lines_are_means_over_the_steps_since_the_last(vqvae, tmp_path):
    run(vqvae(log_every=1, steps=6), tmp_path / "each")
    run(vqvae(log_every=3, steps=6), tmp_path / "third")
    each = [line["loss"] for line in read_lines(tmp_path / "each" / "metrics.jsonl")]
    third = [line["loss"] for line in read_lines(tmp_path / "third" / "metrics.jsonl")]
    assert third == pytest.approx([sum(each[:3]) / 3, sum(each[3:]) / 3])


def test_the_files_of_a_run(ldm, autoencoder, tmp_path):
    result = run(ldm(), tmp_path / "run")
    names = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    checkpoints = {f"checkpoints/step-{n:08}/{name}.safetensors" for n in (15, 20) for name in ("model", "state")}
    pictures = {f"pictures/samples_{n:07}.png" for n in (10, 20)}
    assert names == checkpoints | pictures | {"train.yaml", "metrics.jsonl"}
    header = read_header(result.checkpoint / "model.safetensors")
    assert (header.kind, header.step, header.weights) == ("latent-diffusion", STEPS, ("ema", "raw"))
    assert header.training["autoencoder"] == str(autoencoder)
    assert header.training["data"]["kind"] == "images"
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]) == result.line


def test_the_scale_brings_latents_to_unit_deviation(ldm, tmp_path):
    result = run(ldm(steps=1), tmp_path / "run")
    plan = ldm_train.plan(ldm(steps=1), tmp_path / "other", None)
    model = ldm_train.DiffusionJob(plan)
    images = torch.stack([model.dataset[i][0] for i in range(IMAGES)]).float() / 127.5 - 1
    assert model.model.encode(images).std().item() == pytest.approx(1, rel=0.02)
    scale = read_header(result.checkpoint / "model.safetensors").config["scale_factor"]
    assert scale == model.config.scale_factor


def test_an_autoencoder_without_a_spread_of_latents_is_refused(ldm, autoencoder, tmp_path):
    broken = tmp_path / "broken.safetensors"
    source = autoencoder / "checkpoints" / f"step-{STEPS:08}" / "model.safetensors"
    zero = {name: torch.zeros_like(value) for name, value in load_tensors(source, "ema.").items()}
    save(broken, read_header(source), {"ema": zero})
    with pytest.raises(UldmError, match=r"have the standard deviation 0\.0"):
        run(ldm().model_copy(update={"autoencoder": str(broken)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_perceptual_loss_takes_grey_images(tmp_path):
    widths = {"down_channels": [8, 8], "mid_channels": [8, 8], "down_sample": [True], "attn_down": [False]}
    counts = {"num_down_layers": 1, "num_up_layers": 1, "num_heads": 1, "norm_channels": 4, "codebook_size": 16}
    config = {"autoencoder": {"kind": "vqvae", "in_channels": 1, **widths, **counts}, "loss": {"lpips": 0.5}}
    result = run(AutoencoderTraining.model_validate(config | common(steps=1)), tmp_path / "run")
    assert 0 < result.line["lpips"] < 2
