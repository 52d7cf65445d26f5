"""Training autoencoders: against a discriminator, from a trained one, with other perceptual networks; and warnings."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from uldm_cli.core.images import to_uint8
from uldm_cli.core.lpips import drawn_features
from uldm_cli.errors import ConfigError
from uldm_cli.formats.native import load_tensors
from uldm_cli.runs import perceptual, vqvae_train
from uldm_cli.runs.draw import grid
from uldm_cli.runs.draw.grid import squeezed
from uldm_cli.runs.metrics import read_lines
from uldm_cli.runs.models import load_autoencoder, resolve
from uldm_cli.specs.autoencoder_training import AutoencoderTraining, Loss


def changed(spec: AutoencoderTraining, **fields: object) -> AutoencoderTraining:
    return AutoencoderTraining.model_validate({**spec.model_dump(), **fields})


def job_of(spec: AutoencoderTraining, folder: Path) -> vqvae_train.AutoencoderJob:
    return vqvae_train.AutoencoderJob(vqvae_train.plan(spec, folder, None))


def weights(folder: Path, part: str = "model") -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").glob("step-*"))
    return load_tensors(newest / "model.safetensors", f"{part}.")


# Against a discriminator


def test_a_line_of_metrics_has_every_term_from_where_it_starts(training, gan, tmp_path):
    training.run(gan(log_every=1, steps=6), tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    always = {"loss", "l1", "l2", "nll", "logvar", "codebook", "commitment", "psnr", "autoencoder_grad_norm"}
    later = {"generator", "d_weight", "discriminator", "logits_real", "logits_fake", "discriminator_grad_norm"}
    for line in lines:
        assert always <= line.keys()
        assert later & line.keys() == (later if line["step"] > 4 else set())
    assert lines[0]["nll"] == pytest.approx((lines[0]["l1"] + lines[0]["l2"]) / np.exp(0.1) + 0.1)
    assert lines[5]["logvar"] != lines[0]["logvar"]


def test_a_line_that_spans_the_start_has_means_over_the_steps_that_had_a_term(training, gan, tmp_path):
    training.run(gan(log_every=1, steps=6), tmp_path / "each")
    training.run(gan(log_every=6, steps=6), tmp_path / "all")
    each, [line] = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("each", "all"))
    assert line["discriminator"] == pytest.approx((each[4]["discriminator"] + each[5]["discriminator"]) / 2)
    assert line["l1"] == pytest.approx(sum(one["l1"] for one in each) / 6)


@pytest.mark.parametrize("command", ["gan", "kl"])
def test_what_was_trained_loads_and_the_picture_showed_it(training, command, request, tmp_path, monkeypatch):
    """KL autoencoders are shown by the mean of their latents."""
    drawn = []

    def draw(rows, labels, draw_grid=grid.draw_grid):
        drawn.append(rows)
        return draw_grid(rows, labels)

    monkeypatch.setattr(grid, "draw_grid", draw)
    training.run(request.getfixturevalue(command)(steps=2, picture_every=2), tmp_path / "run")
    model = load_autoencoder(resolve(str(tmp_path / "run"), "autoencoder"))
    [(images, recon)] = drawn
    assert len(images) == len(recon) == 8
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = to_uint8(model.from_latent(model.to_latent(x)))
    assert abs(np.stack(recon).astype(int) - expected).max() <= 1
    assert expected.std() > 5
    assert {name.split(".")[0] for name in weights(tmp_path / "run")} == set(dict(model.named_children()))


def test_channels_beyond_the_third_are_left_out_of_the_picture():
    four, two = np.zeros((2, 8, 8, 4), np.uint8), np.ones((1, 8, 8, 2), np.uint8)
    four[..., 3] = 9
    shown = squeezed(four)
    assert [picture.shape for picture in shown] == [(8, 8, 3)] * 2
    assert not shown[0].any()
    assert squeezed(two)[0].shape == (8, 8)


def test_more_than_three_channels_are_trained_on(training, gan, tmp_path):
    (tmp_path / "planes").mkdir()
    generator = np.random.default_rng(0)
    for number in range(8):
        np.save(tmp_path / "planes" / f"{number}.npy", generator.integers(0, 255, (5, 16, 16), np.uint8))
    spec = gan(steps=6, picture_every=6)
    autoencoder = {**spec.autoencoder.model_dump(), "in_channels": 5}
    data = {"kind": "images", "root": str(tmp_path / "planes"), "size": 16, "channels": 5}
    training.run(changed(spec, autoencoder=autoencoder, data=data), tmp_path / "run")
    with Image.open(tmp_path / "run" / "pictures" / "recon_0000006.png") as picture:
        assert picture.mode == "RGB"


def test_a_dry_run_tells_of_the_discriminator_and_the_perceptual_loss(training, gan, grey_vqvae, tmp_path):
    details = vqvae_train.preview(vqvae_train.plan(gan(), tmp_path / "a", None)).details
    assert details["discriminator"] == "853 parameters, sees 22 pixels, from step 5"
    details = vqvae_train.preview(vqvae_train.plan(gan(steps=4), tmp_path / "b", None)).details
    assert details["discriminator"].endswith("never: it would start after step 4")
    details = vqvae_train.preview(vqvae_train.plan(grey_vqvae(), tmp_path / "c", None)).details
    assert details == {"perceptual loss": "LPIPS 0.1 (AlexNet)"}


# From a trained one


def test_a_frozen_encoder_stays_bit_for_bit_in_the_average_too(training, gan, autoencoder, tmp_path):
    spec = changed(gan(), init_from=str(autoencoder), freeze="encoder")
    line = training.run(spec, tmp_path / "run").line
    assert not {"codebook", "commitment", "perplexity", "usage"} & line.keys()
    before = weights(autoencoder, "ema")
    for part in ("model", "ema"):
        after = weights(tmp_path / "run", part)
        same = {name.split(".")[0] for name, value in after.items() if torch.equal(value, before[name])}
        other = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
        assert {"encoder", "quant_conv", "quantize"} <= same
        assert other == {"decoder", "post_quant_conv"}


def test_a_run_that_began_with_another_model_goes_on_without_it(training, gan, autoencoder, tmp_path):
    spec = changed(gan(), init_from=str(autoencoder))
    training.run(spec, tmp_path / "whole")
    training.interrupt(spec, tmp_path / "stopped", 7)
    moved = autoencoder.rename(autoencoder.with_name("moved"))
    try:
        training.run(spec, tmp_path / "stopped")
    finally:
        moved.rename(autoencoder)
    assert training.outcome(tmp_path / "stopped") == training.outcome(tmp_path / "whole")


def test_a_model_of_another_config_is_told_apart(training, gan, autoencoder, tmp_path):
    spec = changed(gan(), init_from=str(autoencoder))
    spec = changed(spec, autoencoder={**spec.autoencoder.model_dump(), "codebook_size": 32})
    with pytest.raises(ConfigError) as caught:
        training.run(spec, tmp_path / "run")
    assert caught.value.message == f"init_from={autoencoder} is another autoencoder: it has codebook_size 16"
    assert not (tmp_path / "run").exists()


# Warnings


def test_a_discriminator_that_wins_is_told_once(training, gan, tmp_path):
    job = job_of(gan(), tmp_path / "run")
    line = {"step": 50, "epoch": 0.5, "discriminator": 0.4}
    assert job.warnings(line) == []
    [said] = job.warnings({**line, "discriminator": 0.03})
    assert said.startswith("the discriminator wins: its loss was 0.03 (one that cannot tell has 1)")
    assert job.warnings({**line, "discriminator": 0.01}) == []
    assert job.warnings({"step": 50, "epoch": 0.5}) == []


def test_a_codebook_that_collapses_is_told_once_and_only_of_whole_epochs(training, vqvae, tmp_path):
    job = job_of(vqvae(), tmp_path / "run")
    line = {"step": 50, "epoch": 0.5, "counted_epoch": 1, "usage": 0.1}
    assert job.warnings(line) == []
    assert job.warnings({**line, "epoch": 1.5, "usage": 0.3}) == []
    [said] = job.warnings({**line, "epoch": 2.5, "counted_epoch": 2})
    assert said.startswith("the codebook collapses: in epoch 2 only 10.0% of its 16 codes were used")
    assert job.warnings({**line, "epoch": 3.5, "counted_epoch": 3}) == []


def test_an_epoch_with_fewer_latents_than_codes_is_no_collapse(training, vqvae, tmp_path):
    """20 images of 8x8 latents choose among 20 times as many codes: 5 % is all that there can be."""
    spec = vqvae()
    job = job_of(changed(spec, autoencoder={**spec.autoencoder.model_dump(), "codebook_size": 25600}), tmp_path / "r")
    line = {"step": 50, "epoch": 1.5, "counted_epoch": 1}
    assert job.warnings({**line, "usage": 0.04}) == []
    assert len(job.warnings({**line, "usage": 0.009})) == 1


def test_warnings_reach_the_user(training, gan, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vqvae_train, "WON", 10.0)
    training.run(gan(log_every=2), tmp_path / "run")
    assert capsys.readouterr().err.count("warning: the discriminator wins: its loss was") == 1


# The perceptual loss


@pytest.fixture
def squeeze(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is made to be the published one."""
    published = perceptual.PUBLISHED["squeeze"]
    file = tmp_path / "weights" / published.url.rsplit("/", 1)[1]
    file.parent.mkdir()
    torch.save(drawn_features("squeeze"), file)
    mine = replace(published, sha256=hashlib.sha256(file.read_bytes()).hexdigest(), size=file.stat().st_size)
    monkeypatch.setattr(perceptual, "PUBLISHED", {**perceptual.PUBLISHED, "squeeze": mine})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("ULDM_OFFLINE", "1")
    return file


def loss(**fields: object) -> Loss:
    return Loss.model_validate({"lpips": 1.0, "lpips_net": "squeeze", **fields})


def test_weights_from_an_offline_folder_are_verified(squeeze):
    metric = vqvae_train.load_loss_metric(loss(lpips_weights=str(squeeze.parent)))
    assert (metric.module.net, metric.module.checked) == ("squeeze", False)
    assert metric.described == "LPIPS 0.1 (SqueezeNet 1.1)"
    torch.save({**drawn_features("squeeze"), "more": torch.zeros(1)}, squeeze)
    with pytest.raises(ConfigError, match=r"is not the published file: its SHA-256 is .* name the file itself"):
        vqvae_train.load_loss_metric(loss(lpips_weights=str(squeeze.parent)))
    metric = vqvae_train.load_loss_metric(loss(lpips_weights=str(squeeze)))
    assert metric.sha256 == hashlib.sha256(squeeze.read_bytes()).hexdigest()
    assert metric.sha256 in metric.described


def test_weights_that_are_not_there_are_told_with_the_config_that_changes_it(squeeze):
    with pytest.raises(ConfigError) as caught:
        vqvae_train.load_loss_metric(loss())
    assert caught.value.message == "loss.lpips_net=squeeze: its weights are not on this machine"
    size = perceptual.PUBLISHED["squeeze"].size / 1e6
    assert caught.value.hint == (
        f"loss.lpips_auto_download=true fetches them ({size:.0f} MB), loss.lpips_weights takes a file or a folder"
    )
    with pytest.raises(ConfigError, match=r"holds no squeezenet1_1-b8a52dc0\.pth"):
        vqvae_train.load_loss_metric(loss(lpips_weights=str(squeeze.parent.parent)))
    with pytest.raises(ConfigError, match="is a folder, and the network alex is embedded"):
        vqvae_train.load_loss_metric(loss(lpips_weights=str(squeeze.parent), lpips_net="alex"))


def test_a_dry_run_downloads_nothing(squeeze, grey_vqvae, tmp_path):
    spec = changed(grey_vqvae(), loss=loss(lpips_auto_download=True).model_dump())
    details = vqvae_train.preview(vqvae_train.plan(spec, tmp_path / "run", None)).details
    assert details["perceptual loss"] == "LPIPS by squeeze, whose weights will be downloaded"


def test_a_run_goes_on_with_the_same_perceptual_loss_only(training, squeeze, grey_vqvae, tmp_path, capsys):
    spec = changed(grey_vqvae(steps=3), loss=loss(lpips_weights=str(squeeze)).model_dump())
    training.interrupt(spec, tmp_path / "run", 1)
    recorded = load_tensors(max((tmp_path / "run" / "checkpoints").glob("step-*")) / "state.safetensors")
    digest = hashlib.sha256(squeeze.read_bytes()).digest()
    assert bytes(recorded["optimizer.task.lpips_sha256"].tolist()) == digest
    other = {name: 2 * value for name, value in drawn_features("squeeze").items()}
    torch.save(other, squeeze)
    with pytest.raises(ConfigError, match="the perceptual loss has other weights than those that this run began with"):
        training.run(spec, tmp_path / "run")
