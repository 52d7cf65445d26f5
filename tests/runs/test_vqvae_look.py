"""What the commands that look into an autoencoder write."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from uldm_cli import console
from uldm_cli.errors import ConfigError, UsageError
from uldm_cli.formats import native
from uldm_cli.formats.checkpoint import Header
from uldm_cli.runs.draw.overlay import colored
from uldm_cli.runs.vqvae_codebook import codebook
from uldm_cli.runs.vqvae_latents import interpolate, latents
from uldm_cli.runs.vqvae_look import Autoencoder, Request, Source, batches, choose
from uldm_cli.runs.vqvae_reconstruct import reconstruct
from uldm_cli.runs.vqvae_visualize import visualize
from uldm_cli.specs.models import AutoencoderModel

ASSETS = os.environ.get("ULDM_TEST_ASSETS")
FILES = ("_code_hist.png", "_loss.txt", "_recon.png", "_recon_indices.png")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(empty_folder: Path) -> None:
    console.configure(quiet=True)


@pytest.fixture
def request_(tiny_ldm: Path) -> Request:
    return Request(str(tiny_ldm), device="cpu")


def save(path: str, height: int = 32, width: int = 32, seed: int = 0, channels: int = 3) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 4 + 1, width // 4 + 1, channels), np.uint8)
    pixels = np.kron(pixels, np.ones((4, 4, 1), np.uint8))[:height, :width]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(path)
    return Path(path)


def names(folder: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def losses(path: Path | str) -> dict[str, float]:
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return {name: float(value) for name, value in lines}


def test_four_files_hold_what_the_model_makes_of_an_image(request_: Request) -> None:
    image = pixels(save("a.png"))
    visualize(Path("a.png"), Path("out"), request_)
    assert names("out") == [f"a{ending}" for ending in FILES]
    module = request_.open().module
    x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        recon, _, lost = module(x)
        indices = module.encode_with_indices(x)[2][0]
    drawn = pixels("out/a_recon.png")
    assert np.abs(drawn - ((recon[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()).max() < 0.51
    panels = pixels("out/a_recon_indices.png")
    top, times = 63, 8  # below the title and the labels; 32 pixels are enlarged to at least 240
    for column, expected in enumerate((image, drawn, colored(np.kron(indices, np.ones((4, 4))), (0, 63), "viridis"))):
        left = 2 + column * (times * 32 + 2)
        assert np.array_equal(panels[top : top + times * 32 : times, left : left + times * 32 : times], expected)
    figures = losses("out/a_loss.txt")
    assert figures["codebook"] == pytest.approx(float(lost["codebook_loss"]), rel=1e-4)
    assert figures["commitment"] == pytest.approx(float(lost["commitment_loss"]), rel=1e-4)
    counts = torch.bincount(indices.flatten(), minlength=64).double()
    share = counts[counts > 0] / counts.sum()
    assert figures["perplexity"] == pytest.approx(float((-share * share.log()).sum().exp()), rel=1e-6)
    assert figures["codes_used"] == int((counts > 0).sum())


def test_a_folder_keeps_names_apart_and_names_what_it_skips(
    request_: Request, capsys: pytest.CaptureFixture[str]
) -> None:
    save("in/a.png"), save("in/a.jpg", seed=1), save("in/b.webp", 45, 67), save("in/sub/b.png")
    save("in/grey.png", channels=1), Image.new("RGB", (1, 1)).save("in/dot.png")
    Path("in/cut.png").write_bytes(Path("in/a.png").read_bytes()[:200])
    console.configure()
    result = visualize(Path("in"), Path("in/out"), request_)
    stems = ["a.jpg", "a.png", "b", "grey", "sub/b"]
    assert names("in/out") == sorted(stem + ending for stem in stems for ending in FILES)
    assert {name for name, _ in result.source.skipped} == {"cut.png", "dot.png"}
    said = capsys.readouterr().err
    assert "a.jpg, a.png share their names" in said
    assert "skipped dot.png: 1x1 pixels" in said
    assert "b.webp of 67x45 pixels: its centre of 64x44 taken (multiples of 4 fit)" in said
    assert pixels("in/out/b_recon.png").shape == (44, 64, 3)
    again = visualize(Path("in"), Path("in/out"), request_)
    assert [one.image for one in again.images] == [one.image for one in result.images]


def test_an_image_is_the_same_alone_and_in_a_batch(request_: Request) -> None:
    for seed, (height, width) in enumerate([(32, 32), (32, 32), (16, 48), (32, 32)]):
        save(f"in/{seed}.png", height, width, seed)
    visualize(Path("in"), Path("together"), request_)
    visualize(Path("in"), Path("apart"), Request(request_.model, device="cpu", batch_size=1))
    for seed in range(4):
        near = pixels(f"together/{seed}_recon.png").astype(int) - pixels(f"apart/{seed}_recon.png")
        assert np.abs(near).max() <= 1
        assert losses(f"together/{seed}_loss.txt") == pytest.approx(losses(f"apart/{seed}_loss.txt"), rel=1e-3)


def test_batches_hold_pictures_of_one_size(request_: Request) -> None:
    model = request_.open()
    files = [save(f"in/{i}.png", *size) for i, size in enumerate([(32, 32)] * 3 + [(16, 16)] + [(32, 32)])]
    pictures = [model.fit(file, file.name) for file in files]
    assert [len(batch) for batch in batches(iter(pictures), None)] == [3, 1, 1]
    assert [len(batch) for batch in batches(iter(pictures), 2)] == [2, 1, 1, 1]


def test_a_model_without_a_codebook_shows_its_posterior(golden_checkpoint) -> None:
    save("a.png", 32, 40)
    asked = Request(str(golden_checkpoint("uncond-kl")), device="cpu")
    visualize(Path("a.png"), Path("out"), asked)
    assert names("out") == ["a_loss.txt", "a_posterior_hist.png", "a_recon.png", "a_recon_kl.png"]
    assert losses("out/a_loss.txt")["kl"] > 0
    with pytest.raises(ConfigError, match="has no codebook: it is of the kind 'kl'"):
        codebook(Path("pages"), asked)
    assert not Path("pages").exists()
    assert (
        latents([Path("a.png")], Path("l.png"), asked).shape
        == asked.open().look([asked.open().fit(Path("a.png"), "a")])[0].latent.shape
    )


def test_reconstructions_are_measured_as_they_are_written(request_: Request) -> None:
    for seed in range(3):
        save(f"in/{seed}.bmp", seed=seed)
    save("in/small.png", 16, 16)
    result = reconstruct(Path("in"), Path("out"), request_)
    assert names("out") == ["0.png", "1.png", "2.png", "small.png"]
    for one in result.images:
        difference = (pixels(f"in/{one.image}") / 255.0) - (pixels(one.file) / 255.0)
        assert one.figures["l1"] == pytest.approx(np.abs(difference).mean())
        assert one.figures["psnr"] == pytest.approx(-10 * math.log10((difference**2).mean()))
    summary = result.summaries(most=2)
    psnr = {one.image: one.figures["psnr"] for one in result.images}
    assert summary["psnr"].worst == sorted(psnr, key=lambda name: psnr[name])[:2]
    assert (summary["psnr"].least, summary["psnr"].most) == (min(psnr.values()), max(psnr.values()))
    assert summary["psnr"].mean == pytest.approx(sum(psnr.values()) / 4)
    distance = {one.image: one.figures["lpips"] for one in result.images if "lpips" in one.figures}
    assert set(distance) == {"0.bmp", "1.bmp", "2.bmp"}
    assert summary["lpips"].worst[0] == max(distance, key=lambda name: distance[name])


def test_nothing_replaces_what_is_read(request_: Request) -> None:
    original = save("in/a.png").read_bytes()
    save("in/b.jpg")
    with pytest.raises(ConfigError, match=r"in/a.png would replace an image"):
        reconstruct(Path("in"), Path("in"), request_)
    assert names("in") == ["a.png", "b.jpg"]
    assert Path("in/a.png").read_bytes() == original
    with pytest.raises(ConfigError, match="would replace an image"):
        latents([Path("in/a.png")], Path("in/a.png"), request_)


def test_codes_are_counted_over_images(request_: Request) -> None:
    for seed in range(4):
        save(f"in/{seed}.png", seed=seed)
    result = codebook(Path("out"), request_, data="in", every=True)
    module = request_.open().module
    images = np.stack([pixels(f"in/{seed}.png") for seed in range(4)])
    with torch.no_grad():
        indices = module.encode_with_indices(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1)[2]
    assert result.usage is not None
    assert result.usage.counts.tolist() == torch.bincount(indices.flatten(), minlength=64).tolist()
    assert result.usage.dead == sorted(set(range(64)) - set(indices.flatten().tolist()))
    assert names("out") == ["codebook_codes.png", "codebook_map.png", "codebook_usage.png"]
    some = codebook(Path("out"), request_, data="in", num=2).usage
    assert some is not None
    assert some.images == 2
    assert sum(some.counts) == 2 * 64
    assert some.counts.tolist() == torch.bincount(indices[[0, 2]].flatten(), minlength=64).tolist()


def test_without_images_an_ema_codebook_says_what_training_counted(request_: Request, golden_checkpoint) -> None:
    usage = codebook(Path("out"), request_).usage
    assert usage is not None
    kept = request_.open().module.quantize.cluster_size
    assert usage.counts.tolist() == pytest.approx(kept.tolist())
    assert usage.images == 0
    assert codebook(Path("other"), Request(str(golden_checkpoint("uncond-vq")), device="cpu")).usage is None
    assert names("other") == ["codebook_codes.png", "codebook_map.png"]


@pytest.mark.parametrize("quantizer", ["cosine", {"kind": "fsq", "levels": [4, 4, 3, 3]}], ids=str)
def test_codes_of_every_kind_are_drawn(quantizer: object) -> None:
    shape = {"down_channels": [8, 8], "mid_channels": [8, 8], "down_sample": [True], "attn_down": [False]}
    layers = {"norm_channels": 4, "num_heads": 1, "num_down_layers": 1, "num_up_layers": 1}
    given = {"kind": "vqvae", "codebook_size": 144, "quantizer": quantizer, **shape, **layers}
    model = AutoencoderModel.model_validate({"autoencoder": given, "image_size": 32})
    native.save(
        Path("model.safetensors"),
        Header("autoencoder", model.model_dump(mode="json")),
        {"model": model.build().state_dict()},
    )
    save("in/a.png")
    asked = Request("model.safetensors", device="cpu")
    result = codebook(Path("out"), asked, data="in")
    assert (result.size, result.dim) == (144, 4)
    assert result.usage is not None
    assert sum(result.usage.counts) == 16 * 16
    assert names("out") == ["codebook_codes.png", "codebook_map.png", "codebook_usage.png"]
    assert codebook(Path("unknown"), asked).usage is None
    visualize(Path("in/a.png"), Path("seen"), asked)
    assert names("seen") == [f"a{ending}" for ending in FILES]
    figures = losses("seen/a_loss.txt")
    assert figures["codes_used"] == sum(count > 0 for count in result.usage.counts)


def test_a_kind_of_data_set_can_be_counted_over(request_: Request) -> None:
    usage = codebook(Path("out"), request_, data="tiny", num=5).usage
    assert usage is not None
    assert (usage.images, usage.of) == (5, "5 images of tiny")


def test_latents_share_one_stated_scale(request_: Request) -> None:
    files = [save("a.png"), save("sub/a.png", 16, 64, seed=1)]
    result = latents(files, None, request_)
    model = request_.open()
    largest = max(model.look([model.fit(file, "x")])[0].latent.abs().max().item() for file in files)
    assert result.scale == pytest.approx(largest)
    assert result.file == Path("viz_out/latents.png")
    assert result.images == ["a.png", "sub/a.png"]
    with Image.open(result.file) as image:
        assert float(image.info["scale"]) == pytest.approx(largest)
    assert latents(files[:1], Path("b.svg"), request_, scale=2.0).scale == 2.0
    assert "white is 2, black -2" in Path("b.svg").read_text()
    with pytest.raises(UsageError, match="33 images, and at most 32"):
        latents([save(f"many/{i}.png") for i in range(33)], None, request_)


def test_between_two_images_lie_their_mixtures(request_: Request) -> None:
    save("a.png"), save("b.png", 40, 48, seed=1)
    result = interpolate(Path("a.png"), Path("b.png"), None, request_, steps=4)
    assert result.file == Path("viz_out/a_to_b.png")
    strip = pixels(result.file)
    times = 3
    top = strip.shape[0] - times * 32 - 2  # below the title and the labels
    assert strip.shape[1] == 4 * (times * 32 + 2) + 2
    visualize(Path("a.png"), Path("out"), request_)
    first = strip[top : top + times * 32 : times, 2 : 2 + times * 32 : times]
    assert np.abs(first.astype(int) - pixels("out/a_recon.png")).max() <= 1
    for steps in (1, 65):
        with pytest.raises(UsageError, match=f"--steps is {steps}"):
            interpolate(Path("a.png"), Path("b.png"), None, request_, steps=steps)


def test_which_autoencoder_is_meant(tiny_ldm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console.configure()
    assert choose(None, None).name == "fruits64"
    assert "embedded fruits64" in capsys.readouterr().err
    run = Path("outputs/vqvae-mine/checkpoints/step-00000003")
    run.mkdir(parents=True)
    (run / "model.safetensors").write_bytes(tiny_ldm.read_bytes())
    assert choose(None, None).name == "outputs/vqvae-mine"
    assert "outputs/vqvae-mine, the newest" in capsys.readouterr().err
    Path("mine.yaml").write_text("kind: vqvae-train\nautoencoder: {kind: vqvae, in_channels: 1}\n")
    with pytest.raises(ConfigError, match=r"outputs/vqvae-mine was not made with mine.yaml"):
        choose(None, Path("mine.yaml"))
    with pytest.raises(ConfigError, match=r"other.yaml has not been trained yet"):
        choose(None, Path("mine.yaml").rename("other.yaml"))
    Path("published.yaml").write_text("model:\n  target: ldm.models.autoencoder.AutoencoderKL\n  params: {}\n")
    with pytest.raises(ConfigError, match=r"none is given\. Name it with --checkpoint"):
        choose(None, Path("published.yaml"))


def test_a_training_config_goes_with_the_model_it_made(autoencoder: Path, vqvae) -> None:
    from uldm_cli.specs.load import dump_yaml

    Path("small.yaml").write_text(dump_yaml(vqvae()))
    assert Autoencoder(choose(str(autoencoder), Path("small.yaml")), "cpu").image_size == 16


def test_names_that_only_differ_once_their_endings_are_gone() -> None:
    for name in ("a.png", "a.jpg", "a.png.jpg"):
        save(f"in/{name}")
    stems = Source.of(Path("in")).stems
    assert len(set(stems.values())) == 3


@pytest.mark.skipif(not ASSETS, reason="ULDM_TEST_ASSETS is not set")
def test_real_photographs_by_the_embedded_model() -> None:
    folder = Path(str(ASSETS)) / "data" / "lpips"
    result = visualize(folder, Path("out"), Request(device="cpu"))
    assert names("out") == sorted(f"{stem}{ending}" for stem in ("ex_p0", "ex_p1", "ex_ref") for ending in FILES)
    assert all(one.figures["codes_used"] > 10 for one in result.images)
