"""`uldm vqvae encode` as it is typed, and training on what it writes."""

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from uldm_cli.cli import vqvae_encode

SIZE = ("data.size=16", "--device", "cpu")
FRUITS = ("--model", "fruits64", "data=images", "data.root=photos", *SIZE, "workers=0")

pytestmark = pytest.mark.usefixtures("photos", "fresh_accelerate")


def names():
    return sorted(str(path) for path in Path().rglob("*") if "photos" not in path.parts)


def test_images_are_encoded_and_trained_on(uldm_main):
    code, out, err = uldm_main("vqvae", "encode", *FRUITS, "data.flip=true")
    assert code == 0, err
    assert re.search(r"latents +latents of 4x4x4, float32, both orientations: 5\.2 kB", out)
    assert re.search(r"scale factor +\d\.\d{5}", out)
    assert "encoded 10 images" in out
    assert re.search(r"encoding 10/10  [\d.]+ images/s  took 0:00:", err)
    for path in Path("photos").iterdir():
        path.unlink()
    quick = ("train.steps=2", "train.batch_size=4", "backbone.model_channels=32", "backbone.channel_mult=[1]")
    small = (
        "backbone.num_res_blocks=1",
        "backbone.attention_resolutions=[1]",
        "--device",
        "cpu",
        "--precision",
        "fp32",
    )
    code, _, err = uldm_main("ldm", "train", "latents=outputs/vqvae-encode", *quick, *small)
    assert code == 0, err
    assert "measured on all latents in outputs/vqvae-encode" in err
    code, _, err = uldm_main("ldm", "sample", "--model", "outputs/ldm-train", "--total-steps", 2, "--step-size", 0)
    assert code == 0, err
    with Image.open("outputs/ldm-sample/00000.png") as image:
        assert image.size == (16, 16)


def test_json_is_one_document_and_the_same_again_encodes_nothing(uldm_main):
    first = json.loads(uldm_main("vqvae", "encode", *FRUITS, "--json")[1])
    again = json.loads(uldm_main("vqvae", "encode", *FRUITS, "--json")[1])
    assert (first["encoded"], again["encoded"]) == (10, 0)
    assert (first["outdir"], first["files"], first["images"], first["skipped"]) == ("outputs/vqvae-encode", 1, 10, 0)
    assert (first["latent_shape"], first["posterior"], first["flip"]) == ([4, 4, 4], False, False)
    assert first["bytes"] == 10 * (4 * 4 * 4 * 4 + 8)
    changing = {"encoded", "seconds"}
    assert {k: v for k, v in first.items() if k not in changing} == {
        k: v for k, v in again.items() if k not in changing
    }
    assert "it was finished already, and every file is intact" in uldm_main("vqvae", "encode", *FRUITS)[1]


def test_quiet_says_nothing(uldm_main):
    assert uldm_main("vqvae", "encode", *FRUITS, "-q") == (0, "", "")


def test_a_dry_run_tells_the_plan_and_writes_nothing(uldm_main):
    code, out, err = uldm_main("vqvae", "encode", *FRUITS, "--dry-run")
    assert (code, err) == (0, "")
    assert "To be encoded in outputs/vqvae-encode" in out
    assert re.search(r"files +1 of 2,048 images, 0 are there", out)
    assert re.search(r"computed on +cpu, fp32", out)
    assert out.splitlines()[-1] == "nothing was written"
    told = json.loads(uldm_main("vqvae", "encode", *FRUITS, "--dry-run", "--json")[1])
    assert (told["images"], told["files_there"], told["dry_run"]) == (10, 0, True)
    assert names() == []


def test_the_examples_in_the_help_work(uldm_main):
    commands = re.findall(r"^  uldm (\S.*?)(?:   .*)?$", vqvae_encode.EXAMPLES, re.MULTILINE)
    assert [command.split()[:2] for command in commands] == [["vqvae", "encode"], ["vqvae", "encode"], ["ldm", "train"]]
    small = ("autoencoder.down_channels=[8,8,8]", "autoencoder.mid_channels=[8,8]", "autoencoder.norm_channels=4")
    quick = ("autoencoder.num_heads=1", "train.steps=2", "train.batch_size=4", "--device", "cpu", "--precision", "fp32")
    images = ("data=images", "data.root=photos", "data.size=16", "autoencoder.in_channels=3")
    assert uldm_main("vqvae", "train", *small, *quick, *images)[0] == 0
    for command, more in zip(commands, [[], ["data.size=16"], ["--dry-run"]], strict=True):
        code, _, err = uldm_main(*shlex.split(command), *more)
        assert code == 0, f"{command}: {err}"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "there is no trained autoencoder in outputs. Run `uldm vqvae train` first"),
        (["--model", "nowhere"], "there is no model 'nowhere'"),
        (["--model", "fruits64", "data=tiny"], "data.channels: expected 3, the channels of the autoencoder's images"),
        ([*FRUITS, "data.size=18"], "data.size: expected a multiple of 4"),
        ([*FRUITS, "data.root=nowhere"], "nowhere does not exist"),
        ([*FRUITS, "dtype=bf16"], "dtype=bf16 (command line): expected 'float32' or 'float16'"),
        ([*FRUITS, "shard_size=100"], "shard_size=100 (command line): expected a multiple of batch_size, 16"),
        ([*FRUITS, "--batch-size", "0"], "--batch-size 0: expected a number greater than 0"),
        ([*FRUITS, "--precision", "fp16"], "--precision fp16: expected 'fp32' or 'bf16'"),
        ([*FRUITS, "--outdir", "photos/0.png"], "photos/0.png is a file"),
        ([*FRUITS, "shard_sice=4"], "unknown key 'shard_sice'. Did you mean 'shard_size'?"),
    ],
)
def test_bad_input_is_one_line(args, says, uldm_main):
    code, out, err = uldm_main("vqvae", "encode", *args)
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err
    assert names() == []


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["latents=nowhere"], "there is no folder nowhere of latents. `uldm vqvae encode` makes one"),
        (["latents=photos"], "photos holds no latents: no index.json"),
        (["latents=outputs/vqvae-encode", "data=images", "data.root=photos"], "data.size was 16, and is 64"),
        (
            ["latents=outputs/vqvae-encode", "data=tiny"],
            "holds latents of other images: data.kind was images, and is tiny",
        ),
    ],
)
def test_bad_latents_are_one_line(args, says, uldm_main):
    assert uldm_main("vqvae", "encode", *FRUITS, "-q")[0] == 0
    before = names()
    code, out, err = uldm_main("ldm", "train", *args)
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1
    assert says in err
    assert names() == before
