"""Sampling runs, from the config to the files, with a very small model."""

import errno
import io
import json
import os
import shutil
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from uldm_cli import registry
from uldm_cli.core.denoiser import Denoiser
from uldm_cli.core.images import to_uint8
from uldm_cli.core.latent import LatentDiffusion
from uldm_cli.core.noise import PerSampleNoise
from uldm_cli.errors import ConfigError, PluginError, UldmError, UsageError
from uldm_cli.formats.checkpoint import Header
from uldm_cli.formats.native import load_tensors, read_header, save
from uldm_cli.runs.draw.grid import GAP, LABEL
from uldm_cli.runs.draw.latents import draw_latent, signed_to_bytes
from uldm_cli.runs.grid import run_grid
from uldm_cli.runs.models import load_latent_diffusion, resolve
from uldm_cli.runs.plan import grid_name
from uldm_cli.runs.sample import run
from uldm_cli.runs.trajectory import walk
from uldm_cli.specs.base import Spec
from uldm_cli.specs.load import load_config
from uldm_cli.specs.models import LatentDiffusionModel
from uldm_cli.specs.sampling import Sampling


@pytest.fixture
def config(tiny_ldm):
    def make(steps=10, eta=1.0, **fields):
        sampler = fields.pop("sampler", {"kind": "ddim", "steps": steps, "eta": eta})
        return Sampling.model_validate({"model": str(tiny_ldm), "device": "cpu", "sampler": sampler, **fields})

    return make


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pictures(folder):
    return {name: data for name, data in contents(folder).items() if not name.endswith(".yaml")}


def pixels(source):
    return np.asarray(Image.open(io.BytesIO(source) if isinstance(source, bytes) else source))


def text_of(path):
    with Image.open(path) as image:
        return image.text


def psnr(a, b):
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return np.inf if error == 0 else 10 * np.log10(255**2 / error)


def steps_of(spec, seeds):
    """What the run should have drawn, straight from the core."""
    model = load_latent_diffusion(resolve(spec.model), weights=spec.weights)
    return model, list(walk(model, spec.sampler, PerSampleNoise(seeds, model.latent_shape)))


def test_one_sample_lies_flat_with_an_image_and_a_latent_a_logged_step(config, out):
    result = run(config(step_size=4), out)
    expected = {f"{kind}_step_{n}.png" for kind in ("image", "latent") for n in (4, 8, 10)}
    assert set(contents(out)) == expected | {"sample.yaml"}
    assert {path.name for _, path in result.files} == expected
    assert (result.computed, result.device) == (1, "cpu")


def test_pictures_are_the_decoded_state_and_its_tiled_channels(config, out):
    spec = config(step_size=4, seed=7)
    run(spec, out)
    model, steps = steps_of(spec, [7])
    for n in (4, 8, 10):
        state = steps[n - 1].x
        assert (pixels(out / f"image_step_{n}.png") == to_uint8(model.decode(state))[0]).all()
        assert (pixels(out / f"latent_step_{n}.png") == draw_latent(state[0].numpy(), (32, 32))).all()


def test_x0_draws_the_predicted_clean_latent(config, out):
    spec = config(step_size=4, show="x0")
    run(spec, out)
    model, steps = steps_of(spec, [1125])
    assert (pixels(out / "image_step_4.png") == to_uint8(model.decode(steps[3].x0))[0]).all()


def test_raw_weights_are_others(config, out, tmp_path):
    run(config(step_size=0), out)
    run(config(step_size=0, weights="raw"), tmp_path / "raw")
    assert pictures(out) != pictures(tmp_path / "raw")


def test_pictures_tell_their_seed_and_step(config, out):
    run(config(step_size=5, num=2, seed=30), out)
    told = text_of(out / "00001" / "latent_step_5.png")
    assert {name: told[name] for name in told if name != "uldm"} == {"seed": "31", "step": "5", "scale": "3"}


def test_the_record_is_the_config(config, out):
    spec = config(step_size=5, save="image")
    run(spec, out)
    assert load_config(Sampling, out / "sample.yaml") == spec


def test_differences_are_signed_and_tell_their_scale(config, out):
    spec = config(step_size=4, save="image-diff,latent-diff,latent")
    run(spec, out)
    names = [f"{kind}_diff_{pair}.png" for kind in ("image", "latent") for pair in ("8_minus_4", "10_minus_8")]
    assert {name for name in contents(out) if "diff_" in name} == set(names)
    scales = json.loads((out / "differences.json").read_text())
    assert set(scales) == set(names)

    model, steps = steps_of(spec, [1125])
    decoded = [model.decode(steps[n - 1].x).clamp(-1, 1)[0].permute(1, 2, 0).numpy() for n in (4, 8)]
    change = decoded[1] - decoded[0]
    scale = scales["image_diff_8_minus_4.png"]["scale"]
    assert scale == pytest.approx(np.abs(change).max())
    assert (pixels(out / "image_diff_8_minus_4.png") == signed_to_bytes(change, scale)).all()
    assert float(text_of(out / "image_diff_8_minus_4.png")["scale"]) == pytest.approx(scale)
    latent = (steps[9].x - steps[7].x)[0].numpy()
    scale = scales["latent_diff_10_minus_8.png"]["scale"]
    assert (pixels(out / "latent_diff_10_minus_8.png") == draw_latent(latent, (32, 32), scale)).all()


def test_one_logged_step_has_no_differences(config, out):
    run(config(step_size=10, save="image,image-diff"), out)
    assert set(contents(out)) == {"sample.yaml", "image_step_10.png"}


def test_ten_samples_in_batches_of_four_are_ten(config, out):
    run(config(steps=2, step_size=0, num=10, batch_size=4), out)
    assert set(pictures(out)) == {f"{i:05d}.png" for i in range(10)}


def test_the_same_command_writes_the_same_bytes(config, tmp_path):
    spec = config(step_size=5, num=3, batch_size=2, save="image,latent,image-diff,latent-diff")
    run(spec, tmp_path / "a")
    run(spec, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_batch_size_changes_no_picture_that_one_could_see(config, tmp_path):
    for size in (1, 2, 3):
        run(config(step_size=5, num=3, batch_size=size), tmp_path / str(size))
    one = pictures(tmp_path / "1")
    for size in ("2", "3"):
        other = pictures(tmp_path / size)
        assert other.keys() == one.keys()
        assert min(psnr(pixels(one[name]), pixels(other[name])) for name in one) >= 50


def test_deterministic_gives_the_same_bytes_at_any_batch_size(config, tmp_path):
    for size in (1, 3):
        run(config(step_size=5, num=3, batch_size=size, deterministic=True), tmp_path / str(size))
    assert pictures(tmp_path / "1") == pictures(tmp_path / "3")


def test_a_sample_is_its_seed_s_wherever_it_stands(config, tmp_path):
    run(config(step_size=0, num=3, seed=7, deterministic=True), tmp_path / "a")
    run(config(step_size=0, seeds="9,7", deterministic=True), tmp_path / "b")
    a, b = pictures(tmp_path / "a"), pictures(tmp_path / "b")
    assert (b["00000.png"], b["00001.png"]) == (a["00002.png"], a["00000.png"])


def test_logging_more_changes_no_sample(config, tmp_path):
    run(config(step_size=1, save="image,image-diff"), tmp_path / "all")
    run(config(step_size=0), tmp_path / "last")
    last = (tmp_path / "last" / "00000.png").read_bytes()
    assert (pixels(last) == pixels(tmp_path / "all" / "image_step_10.png")).all()


def test_ddpm_samples_too(config, out):
    run(config(sampler={"kind": "ddpm", "steps": 20}, step_size=20), out)
    assert (out / "image_step_20.png").exists()


def test_draws_of_the_published_code_are_those_of_the_global_generator(config, out):
    spec = config(steps=4, step_size=0, num=5, batch_size=2, save="npz", rng="compvis", seed=7)
    with torch.random.fork_rng():
        run(spec, out)
        model = load_latent_diffusion(resolve(spec.model))
        torch.manual_seed(7)
        expected = []
        for size in (2, 2, 1):
            shape = (size, *model.latent_shape)
            x = torch.randn(shape)
            *_, last = spec.sampler.build()(model.denoiser, x, model.schedule, lambda n, draw, s=shape: torch.randn(s))
            expected.append(to_uint8(model.decode(last.x)))
    assert (np.load(out / "samples.npz")["arr_0"] == np.concatenate(expected)).all()


def test_the_archive_holds_the_images_in_order(config, out):
    result = run(config(steps=2, step_size=0, num=5, batch_size=2, save="npz,image"), out)
    array = np.load(out / "samples.npz")["arr_0"]
    assert (array.shape, array.dtype) == ((5, 32, 32, 3), np.uint8)
    for i in range(5):
        assert (array[i] == pixels(out / f"{i:05d}.png")).all()
    assert ("npz", out / "samples.npz") in result.files
    assert not (out / "samples.parts").exists()


def test_the_archive_has_no_date_in_it(config, out):
    run(config(steps=2, step_size=0, save="npz"), out)
    [member] = zipfile.ZipFile(out / "samples.npz").infolist()
    assert (member.filename, member.date_time) == ("arr_0.npy", (1980, 1, 1, 0, 0, 0))


class Interrupted(Exception):
    pass


@contextmanager
def interrupted(calls):
    """Stops what runs inside after so many calls of the network, as a kill would."""
    left = iter(range(calls))

    def counted(self, x, t, forward=Denoiser.forward):
        if next(left, None) is None:
            raise Interrupted
        return forward(self, x, t)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Denoiser, "forward", counted)
        yield


@pytest.mark.parametrize(
    "fields", [{"step_size": 2, "save": "image,latent,image-diff"}, {"step_size": 0, "save": "image,npz"}]
)
def test_a_resumed_run_ends_as_one_that_was_never_stopped(config, tmp_path, fields):
    spec = config(steps=4, num=5, batch_size=2, **fields)
    run(spec, tmp_path / "whole")
    with interrupted(6), pytest.raises(Interrupted):
        run(spec, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tmp"))
    result = run(spec, tmp_path / "out", resume=True)
    assert result.computed == 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_resuming_a_finished_run_computes_nothing(config, out):
    spec = config(steps=2, step_size=0, num=3, save="npz,image")
    run(spec, out)
    before = contents(out)
    result = run(spec, out, resume=True)
    assert (result.computed, result.images_per_second) == (0, 0.0)
    assert contents(out) == before


def test_resuming_redoes_a_batch_that_lacks_a_file(config, out):
    spec = config(steps=2, step_size=0, num=4, batch_size=2)
    run(spec, out)
    before = contents(out)
    (out / "00003.png").unlink()
    assert run(spec, out, resume=True).computed == 2
    assert contents(out) == before


def test_resuming_with_a_whole_archive_makes_only_the_missing_picture(config, out):
    spec = config(steps=2, step_size=0, num=4, batch_size=2, save="npz,image")
    run(spec, out)
    before = contents(out)
    (out / "00000.png").unlink()
    assert run(spec, out, resume=True).computed == 2
    assert contents(out) == before


def test_resuming_trusts_no_file_that_is_older_than_the_run(config, out):
    spec = config(steps=2, step_size=0, num=2, batch_size=1)
    run(spec, out)
    os.utime(out / "00001.png", (0, 0))
    assert run(spec, out, resume=True).computed == 1


def test_resuming_with_a_changed_model_is_refused(config, tiny_ldm, tmp_path):
    model = tmp_path / "model.safetensors"
    shutil.copy(tiny_ldm, model)
    spec = config(steps=2, step_size=0, model=str(model))
    run(spec, tmp_path / "out")
    shutil.copy(tiny_ldm, model)
    with pytest.raises(UsageError, match="is newer than the run in"):
        run(spec, tmp_path / "out", resume=True)


def test_another_config_is_kept_apart(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(config(steps=2, step_size=0))
    run(config(steps=2, step_size=0, seed=1))
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["ldm-sample", "ldm-sample-2"]
    with pytest.raises(ConfigError, match="seed is 1125 there and 1 here"):
        run(config(steps=2, step_size=0, seed=1), tmp_path / "outputs" / "ldm-sample")


def test_more_steps_than_timesteps_are_refused(config, out):
    with pytest.raises(ConfigError, match="101 steps are more than the 100 timesteps of"):
        run(config(steps=101), out)
    assert not out.exists()


def test_a_model_that_does_not_fit_its_config_leaves_no_folder(config, tiny_ldm, tmp_path, out):
    header = read_header(tiny_ldm)
    wrong = replace(header, config={**header.config, "backbone": {**header.config["backbone"], "num_res_blocks": 2}})
    parts = {part: load_tensors(tiny_ldm, f"{part}.") for part in ("autoencoder", "backbone", "ema")}
    save(tmp_path / "wrong.safetensors", wrong, parts)
    with pytest.raises(ConfigError, match="tensors differ"):
        run(config(model=str(tmp_path / "wrong.safetensors")), out)
    assert not out.exists()


def test_a_failure_to_write_is_one_error(config, out, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UldmError, match="disk full while writing"):
        run(config(step_size=1), out)
    assert contents(out) == {}


def test_a_sample_that_is_not_a_number_is_an_error(config, out, monkeypatch):
    monkeypatch.setattr(LatentDiffusion, "decode", lambda self, z: torch.full((1, 3, 32, 32), torch.nan))
    with pytest.raises(UldmError, match="NaN"):
        run(config(), out)


def test_grey_models_write_grey_pictures(tiny_ldm, tmp_path, config, out):
    described = dict(resolve(str(tiny_ldm)).header.config)
    described["autoencoder"] = {**described["autoencoder"], "in_channels": 1}
    module = LatentDiffusionModel.model_validate(described).build()
    parts = {"autoencoder": module.autoencoder.state_dict(), "ema": module.denoiser.backbone.state_dict()}
    save(tmp_path / "grey.safetensors", Header("latent-diffusion", described), parts)
    run(config(model=str(tmp_path / "grey.safetensors"), steps=2, step_size=1, save="image,image-diff"), out)
    assert {pixels(path).shape for path in out.glob("*.png")} == {(32, 32)}


def test_a_grid_has_a_column_a_step_and_a_row_a_sample(config, tmp_path):
    fields = {"step_size": 4, "num": 4, "batch_size": 3, "deterministic": True}
    run_grid(config(**fields), tmp_path / "grid")
    run(config(**fields), tmp_path / "samples")
    assert set(contents(tmp_path / "grid")) == {"grid.yaml", "image_step(4,8,10).png", "latent_step(4,8,10).png"}
    for kind in ("image", "latent"):
        grid = pixels(tmp_path / "grid" / f"{kind}_step(4,8,10).png")
        assert grid.shape[:2] == (LABEL + GAP + 4 * (32 + GAP), GAP + 3 * (32 + GAP))
        for row in range(4):
            for column, n in enumerate((4, 8, 10)):
                top, left = LABEL + GAP + row * (32 + GAP), GAP + column * (32 + GAP)
                cell = pixels(tmp_path / "samples" / f"{row:05d}" / f"{kind}_step_{n}.png")
                assert (grid[top : top + 32, left : left + 32] == cell).all()


def test_a_grid_of_differences_has_one_scale(config, out):
    run_grid(config(step_size=4, num=2, save="image-diff,latent-diff"), out)
    names = {"image_diff_step(8-4,10-8).png", "latent_diff_step(8-4,10-8).png"}
    assert set(contents(out)) == names | {"grid.yaml", "grid_differences.json"}
    scales = json.loads((out / "grid_differences.json").read_text())
    assert set(scales) == names
    image = pixels(out / "image_diff_step(8-4,10-8).png")[LABEL:]
    assert {0, 255} & set(image.ravel().tolist())


def test_a_grid_needs_no_archive(config, out):
    with pytest.raises(ConfigError, match="npz"):
        run_grid(config(step_size=0, save="npz"), out)


def test_resuming_a_finished_grid_computes_nothing(config, out):
    spec = config(steps=2, step_size=1)
    run_grid(spec, out)
    assert run_grid(spec, out, resume=True).computed == 0
    next(out.glob("*.png")).unlink()
    assert run_grid(spec, out, resume=True).computed == 1


def test_long_names_of_grids_are_shortened():
    logged = (40, 80, 120, 160, 200)
    assert grid_name("image", logged, 40) == "image_step(40,80,120,160,200).png"
    assert grid_name("latent-diff", logged, 40) == "latent_diff_step(80-40,120-80,160-120,200-160).png"
    assert grid_name("image", tuple(range(5, 1001, 5)), 5) == "image_step(5..1000x5).png"
    assert grid_name("image-diff", tuple(range(5, 1001, 5)), 5) == "image_diff_step(10-5..1000-995x5).png"


def test_a_sampler_that_does_not_build_is_its_plugins_fault(config, out, monkeypatch):
    """A plugin imports its heavy part in `build`, so that is where a broken installation shows."""

    class Broken(Spec):
        kind: Literal["uldm-test-broken"] = "uldm-test-broken"
        steps: int = 4

        def build(self):
            raise ImportError("no module named 'torchsde'")

    monkeypatch.setattr(registry, "owner", lambda group, kind: "the plugin 'uldm-test 1.0'")
    with pytest.raises(PluginError, match=r"sampler 'uldm-test-broken' of the plugin 'uldm-test 1.0' failed to build"):
        run(config(sampler=Broken()), out)
    assert pictures(out) == {}


def test_a_header_whose_config_is_no_model_is_one_line(tiny_ldm, tmp_path, out):
    header, tensors = read_header(tiny_ldm), load_tensors(tiny_ldm)
    path = tmp_path / "odd.safetensors"
    for fault in ({"schedule": {}}, {"sample": [1]}, {"backbone": None}):
        save(
            path,
            Header(header.kind, header.config | fault),
            {"ema": {}, "backbone": {"x": next(iter(tensors.values()))}},
        )
        with pytest.raises(ConfigError) as caught:
            run(Sampling(model=str(path), weights="raw"), out)
        assert "odd.safetensors" in str(caught.value)
    assert not out.exists()
