"""Training in two processes: what one would have done, and told and written once."""

import os
import shutil
import signal

import pytest
import torch

from uldm_cli.core.engine import Engine
from uldm_cli.errors import ConfigError, UldmError, UsageError
from uldm_cli.formats.native import load_tensors
from uldm_cli.runs import ldm_train, vqvae_train
from uldm_cli.runs.metrics import read_lines

SHARDED = {"ACCELERATE_USE_FSDP": "true"}
"""What `accelerate launch --use_fsdp` sets."""


def assert_alike(training, one, two, tolerance):
    """Figures and weights of two runs agree; so does what they saved to go on."""
    lines = [read_lines(folder / "metrics.jsonl") for folder in (one, two)]
    assert len(lines[0]) == len(lines[1]) > 3
    for a, b in zip(*lines, strict=True):
        timed = ("images_per_second", "data_wait")
        assert {k: v for k, v in a.items() if k not in timed} == pytest.approx(
            {k: v for k, v in b.items() if k not in timed}, rel=tolerance, abs=tolerance
        )
    newest = [folder / "checkpoints" / f"step-{training.steps_saved(folder)[-1]:08}" for folder in (one, two)]
    for name in ("model.safetensors", "state.safetensors"):
        a, b = (load_tensors(folder / name) for folder in newest)
        assert a.keys() == b.keys()
        for key, value in a.items():
            error = (value.double() - b[key].double()).abs().max().item() if value.numel() else 0.0
            assert error <= tolerance * max(1.0, value.double().abs().max().item()), key


def undropped(spec):
    """Without dropout, which alone draws a process and a micro-batch at a time."""
    if not hasattr(spec, "backbone"):
        return spec
    return spec.model_copy(update={"backbone": spec.backbone.model_copy(update={"dropout": 0.0})})


@pytest.mark.parametrize("command", ["vqvae", "gan", "ldm"])
def test_two_processes_train_as_one_and_one_goes_on(training, start_two, finish, command, request, tmp_path):
    """In float64 50 steps within 1e-6; the second half again in one process."""
    spec = undropped(request.getfixturevalue(command)(steps=50, save_every=25, log_every=5, precision="fp64"))
    training.run(spec, tmp_path / "one")
    finish(start_two(spec, tmp_path / "two"))
    assert_alike(training, tmp_path / "one", tmp_path / "two", 1e-6)
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000050")
    assert training.run(spec, tmp_path / "two").computed == 25
    assert_alike(training, tmp_path / "one", tmp_path / "two", 1e-6)


def test_two_processes_with_half_of_the_weights_each_train_as_one_and_one_goes_on(
    training, start_two, finish, ldm, tmp_path
):
    """In micro-batches, with averages of several widths; then one process goes on, and two with what one began."""
    profiles = {"accumulate": 2, "ema_profiles": [0.05, 0.1]}
    spec = undropped(ldm(steps=20, save_every=10, log_every=5, precision="fp64", **profiles))
    training.run(spec, tmp_path / "one")
    finish(start_two(spec, tmp_path / "two", **SHARDED))
    assert_alike(training, tmp_path / "one", tmp_path / "two", 1e-6)
    [first, *_], [second, *_] = ((tmp_path / name / "ema").iterdir() for name in ("one", "two"))
    assert load_tensors(first).keys() == load_tensors(second).keys()
    for name in ("one", "two"):
        assert sorted(path.name for path in (tmp_path / name / "pictures").iterdir()) == [
            "samples_0000010.png",
            "samples_0000020.png",
        ]
        shutil.rmtree(tmp_path / name / "checkpoints" / "step-00000020")
    assert training.run(spec, tmp_path / "two").computed == 10
    finish(start_two(spec, tmp_path / "one", **SHARDED))
    assert_alike(training, tmp_path / "one", tmp_path / "two", 1e-6)


@pytest.mark.gpu
def test_two_accelerators_with_half_of_the_weights_each_train_as_one(training, start_two, finish, ldm, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("there are no two CUDA devices")
    spec = undropped(ldm(steps=10, log_every=1, precision="fp64", device="cuda"))
    training.run(spec, tmp_path / "one")
    finish(start_two(spec, tmp_path / "two", **SHARDED))
    assert_alike(training, tmp_path / "one", tmp_path / "two", 1e-6)


def test_weights_that_are_shared_out_are_computed_with_in_bfloat16(start_two, finish, ldm, tmp_path):
    processes = start_two(ldm(steps=2, log_every=1, picture_every=2, precision="bf16"), tmp_path / "run", **SHARDED)
    finish(processes)
    assert "parameters, bf16" in processes[0].log.read_text()
    [line, _] = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert 0.5 < line["loss"] < 2
    model = load_tensors(next((tmp_path / "run" / "checkpoints").iterdir()) / "model.safetensors")
    assert {value.dtype for name, value in model.items() if name.startswith("backbone.")} == {torch.float32}


@pytest.mark.parametrize(
    ("train", "message", "hint"),
    [
        ({"compile": True}, "train.compile does not work with FSDP yet", "Leave one of them out"),
        ({"precision": "fp16"}, "fp16 is not supported with FSDP", "Take train.precision=bf16"),
    ],
)
def test_what_cannot_be_shared_out(ldm, tmp_path, monkeypatch, train, message, hint):
    for name, value in ({"WORLD_SIZE": "2"} | SHARDED).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        ldm_train.plan(ldm(**train), tmp_path / "run", None)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_an_autoencoder_is_not_shared_out(vqvae, tmp_path, monkeypatch):
    for name, value in ({"WORLD_SIZE": "2"} | SHARDED).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        vqvae_train.plan(vqvae(), tmp_path / "run", None)
    assert caught.value.message == "an autoencoder is not trained with FSDP: it is small"
    assert caught.value.hint == "Launch with DDP"


def test_in_float32_the_first_steps_agree(training, start_two, finish, vqvae, tmp_path):
    spec = vqvae(steps=5, log_every=1)
    training.run(spec, tmp_path / "one")
    finish(start_two(spec, tmp_path / "two"))
    assert_alike(training, tmp_path / "one", tmp_path / "two", 1e-4)


def test_micro_batches_make_the_step_of_the_whole_batch(training, ldm, tmp_path):
    spec = undropped(ldm(steps=10, log_every=1, precision="fp64"))
    training.run(spec, tmp_path / "one")
    spec = spec.model_copy(update={"train": spec.train.model_copy(update={"accumulate": 4})})
    training.run(spec, tmp_path / "four")
    assert_alike(training, tmp_path / "one", tmp_path / "four", 1e-9)


def test_only_the_main_process_speaks(training, start_two, finish, vqvae, tmp_path):
    first, second = start_two(vqvae(), tmp_path / "run")
    finish([first, second])
    assert "step 3/20" in first.log.read_text()
    assert second.log.read_text() == ""


def test_a_signal_to_one_process_stops_both_and_saves(training, start_two, vqvae, tmp_path):
    spec = vqvae(steps=100_000, log_every=1, save_every=100_000, picture_every=100_000)
    first, second = start_two(spec, tmp_path / "run")
    first.wait_for_lines(2)
    os.kill(second.process.pid, signal.SIGTERM)
    assert (first.exit_code(), second.exit_code()) == (130, 130), first.log.read_text()
    [step] = training.steps_saved(tmp_path / "run")
    assert f"saved step {step}; the same command goes on from there" in first.log.read_text()


@pytest.fixture
def one_damaged(vqvae, photos, tmp_path):
    """Makes configs on a copy of the images, of which one cannot be decoded: it has a header."""
    shutil.copytree(photos, tmp_path / "damaged")
    whole = (tmp_path / "damaged" / "b" / "01.png").read_bytes()
    (tmp_path / "damaged" / "b" / "01.png").write_bytes(whole[: len(whole) // 2])

    def make(*, strict: bool = False, **train):
        spec = vqvae(**train)
        data = {"root": str(tmp_path / "damaged"), "strict": strict}
        return spec.model_copy(update={"data": spec.data.model_copy(update=data)})

    return make


def test_images_that_any_process_cannot_read_are_named(start_two, finish, one_damaged, tmp_path):
    """With 8 of 20 images a step and three epochs, both meet it."""
    processes = start_two(one_damaged(), tmp_path / "run")
    finish(processes)
    said = processes[0].log.read_text()
    assert said.count("warning: skipped b/01.png: ") == 1
    assert "1 image was skipped" in said


def test_strict_stops_whichever_process_meets_the_image(start_two, one_damaged, tmp_path):
    """That one says so: the first, or in other orders of the images the second."""
    met = set()
    for seed in range(4):
        processes = start_two(one_damaged(strict=True, seed=seed), tmp_path / f"run{seed}")
        codes = [process.exit_code() for process in processes]
        first, second = (process.log.read_text() for process in processes)
        if "error: b/01.png: cannot be decoded" in first:
            met.add(0)
            assert codes[0] == 2
            assert "b/01.png" not in second
        else:
            met.add(1)
            assert codes == [1, 1]
            assert second.startswith("rank 1: error: b/01.png: cannot be decoded")
            assert "error: the connection to another process of this run broke. What that one said" in first
    assert met == {0, 1}


def test_a_batch_that_processes_cannot_share_is_refused(vqvae, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError) as caught:
        vqvae_train.plan(vqvae(), tmp_path / "run", None)
    assert caught.value.message == (
        "train.batch_size 8 cannot be shared out among 3 processes with 1 micro-batches each"
    )
    assert caught.value.hint == "Take 6 or 9"


def test_half_of_what_a_launcher_sets_is_refused(training, vqvae, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError) as caught:
        training.run(vqvae(), tmp_path / "run")
    missing = "LOCAL_RANK, MASTER_ADDR, MASTER_PORT"
    assert caught.value.message == f"WORLD_SIZE is 2, but {missing} are not set"
    assert not (tmp_path / "run").exists()


def test_a_world_that_accelerate_does_not_see_is_refused(monkeypatch):
    """The launcher says two; a state that was made before says one."""
    Engine("cpu", "fp32")
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UldmError, match="the launcher started 2 processes, but accelerate sees 1, torch 1"):
        Engine("cpu", "fp32")
