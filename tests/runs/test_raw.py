"""The numbers of trajectories: what sampling writes with `save=trajectory`, and reading it again."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from uldm_cli.core.denoiser import Denoiser
from uldm_cli.core.images import to_uint8
from uldm_cli.core.noise import PerSampleNoise
from uldm_cli.errors import ConfigError, UldmError
from uldm_cli.runs.grid import run_grid
from uldm_cli.runs.models import load_latent_diffusion, resolve
from uldm_cli.runs.raw import read_trajectory
from uldm_cli.runs.sample import run
from uldm_cli.runs.trajectory import walk
from uldm_cli.specs.sampling import Sampling


@pytest.fixture
def config(tiny_ldm):
    def make(**fields):
        sampler = {"kind": "ddim", "steps": 10, "eta": 1.0}
        given = {"step_size": 4, "save": "trajectory", "sampler": sampler, **fields}
        return Sampling.model_validate({"model": str(tiny_ldm), "device": "cpu", **given})

    return make


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps_of(spec, seeds):
    model = load_latent_diffusion(resolve(spec.model))
    return model, list(walk(model, spec.sampler, PerSampleNoise(seeds, model.latent_shape)))


def test_the_numbers_are_those_of_the_sampler(config, out):
    spec = config()
    result = run(spec, out)
    assert set(contents(out)) == {"sample.yaml", "trajectory.safetensors", "trajectory.npz"}
    assert [kind for kind, _ in result.files] == ["trajectory", "trajectory"]
    model, steps = steps_of(spec, [1125])
    logged = [steps[n - 1] for n in (4, 8, 10)]
    found = read_trajectory(out)
    assert found.steps == (4, 8, 10)
    assert found.timesteps == tuple(step.t for step in logged)
    assert (found.x_t == torch.cat([step.x for step in logged]).numpy()).all()
    assert (found.x0 == torch.cat([step.x0 for step in logged]).numpy()).all()
    assert (found.images == np.concatenate([to_uint8(model.decode(step.x)) for step in logged])).all()
    assert found.alphas == tuple(model.schedule.alpha(step.t) for step in logged)
    assert found.sigmas == tuple(model.schedule.sigma(step.t) for step in logged)
    assert found.about == {
        "format": "uldm-trajectory-1",
        "model": spec.model,
        "sampler": '{"kind": "ddim", "steps": 10, "spacing": "auto", "eta": 1.0}',
        "show": "x_t",
        "seed": "1125",
    }


def test_the_files_are_what_others_read(config, out):
    """safetensors' own reader and numpy's, without ours."""
    run(config(show="x0", save="image,trajectory"), out)
    with safe_open(out / "trajectory.safetensors", "numpy") as file:
        assert set(file.keys()) == {"x_t", "x0", "steps", "timesteps", "alphas", "sigmas"}
        assert file.get_tensor("x_t").dtype == np.float32
        assert file.get_tensor("steps").tolist() == [4, 8, 10]
    images = np.load(out / "trajectory.npz")["arr_0"]
    assert (images.shape, images.dtype) == ((3, 32, 32, 3), np.uint8)
    for image, n in zip(images, (4, 8, 10), strict=True):
        assert (image == np.asarray(Image.open(out / f"image_step_{n}.png"))).all()


def test_each_sample_of_a_batch_has_its_own(config, out):
    spec = config(num=3, batch_size=2, seed=7)
    run(spec, out)
    assert not list(out.glob("*.tmp"))
    for i in range(3):
        found = read_trajectory(out / f"{i:05}")
        _, steps = steps_of(spec, [7 + i])
        assert found.about["seed"] == str(7 + i)
        assert np.abs(found.x_t - torch.cat([steps[n - 1].x for n in found.steps]).numpy()).max() < 1e-4


def test_a_resumed_run_ends_as_one_that_was_never_stopped(config, tmp_path, monkeypatch):
    spec = config(num=5, batch_size=2)
    run(spec, tmp_path / "whole")
    left = iter(range(25))

    def stopped(self, x, t, forward=Denoiser.forward):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return forward(self, x, t)

    with monkeypatch.context() as patch:
        patch.setattr(Denoiser, "forward", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(spec, tmp_path / "out")
    assert run(spec, tmp_path / "out", resume=True).computed == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    (tmp_path / "out" / "00002" / "trajectory.npz").unlink()
    assert run(spec, tmp_path / "out", resume=True).computed == 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_logging_the_numbers_changes_no_picture(config, tmp_path):
    run(config(save="image,trajectory"), tmp_path / "a")
    run(config(save="image"), tmp_path / "b")
    drawn = [Image.open(tmp_path / name / "image_step_10.png").tobytes() for name in "ab"]
    assert drawn[0] == drawn[1]


def test_a_full_disk_is_one_error(config, out, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UldmError, match="disk full while writing"):
        run(config(), out)


def test_it_needs_logged_steps_and_is_no_grid(config, out):
    with pytest.raises(ValueError, match="'trajectory' needs logged steps"):
        config(step_size=0)
    with pytest.raises(ConfigError, match="save=trajectory: a grid is a picture"):
        run_grid(config(), out)


def test_damage_is_named(config, out):
    run(config(), out)
    archive, tensors = out / "trajectory.npz", out / "trajectory.safetensors"
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-100])
    with pytest.raises(ConfigError, match=r"trajectory.npz is not an archive of images, or damaged"):
        read_trajectory(out)
    np.savez(archive, np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(ConfigError, match=r"holds 2 images, and trajectory.safetensors tells of 3 steps"):
        read_trajectory(out)
    np.savez(archive, np.zeros((3, 4, 4)))
    with pytest.raises(ConfigError, match=r"expected images as uint8 \[N, H, W, C\], found float64 \[3, 4, 4\]"):
        read_trajectory(out)
    archive.unlink()
    with pytest.raises(ConfigError, match="there is no file"):
        read_trajectory(out)
    tensors.write_bytes(tensors.read_bytes()[:-8])
    with pytest.raises(ConfigError, match="truncated"):
        read_trajectory(out)
