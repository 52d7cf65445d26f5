"""`uldm vqvae train` and `uldm ldm train` as they are typed."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from uldm_cli.cli import ldm, vqvae
from uldm_cli.formats.native import read_header
from uldm_cli.specs.yamlfile import read_yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "fruits64"
QUICK = (
    *("train.steps=4", "train.batch_size=8", "train.log_every=2", "train.save_every=2", "train.picture_every=4"),
    *("--device", "cpu", "--precision", "fp32"),
)
VQVAE = (
    *("autoencoder.down_channels=[8,8,8]", "autoencoder.mid_channels=[8,8]", "autoencoder.norm_channels=4"),
    *("autoencoder.num_heads=1", "autoencoder.codebook_size=16", *QUICK),
)
UNET = ("backbone.model_channels=32", "backbone.num_res_blocks=1", "schedule.timesteps=10", *QUICK)


pytestmark = pytest.mark.usefixtures("empty_folder", "fresh_accelerate")


def names(folder="."):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


def cells(out):
    """The two-column table that is shown, as a mapping."""
    return dict(re.findall(r"^  (\S.*?)  +(\S.*?) *$", out, re.MULTILINE))


# The way through


def test_an_autoencoder_then_a_diffusion_model_on_it_then_samples(uldm_main):
    code, out, err = uldm_main("vqvae", "train", *VQVAE)
    assert code == 0, err
    assert "Trained in outputs/vqvae-train" in out
    shown = cells(out)
    assert shown["step"] == "4"
    assert float(shown["PSNR, dB"]) > 0
    assert 0 < float(shown["codes used, % (epoch 1, so far)"]) <= 100
    assert "perplexity of the codes (epoch 1, so far)" in shown
    assert "step 2/4" in err

    code, out, err = uldm_main("ldm", "train", *UNET)
    assert code == 0, err
    assert "autoencoder: outputs/vqvae-train, the newest run (step 4 of 4)" in err
    assert re.search(r"scale factor \d\.\d+, measured on 1024 images", err)
    assert cells(out).keys() == {
        *("figure", "step", "epochs", "loss", "denoiser: norm of the gradient", "learning rate", "images/s"),
        "waiting for images, %",
    }
    record, _ = read_yaml(Path("outputs/ldm-train/train.yaml"))
    assert record["autoencoder"] == "outputs/vqvae-train"
    assert record["data"]["kind"] == "tiny"

    code, _, err = uldm_main(
        "ldm", "sample", "--model", "outputs/ldm-train", "--total-steps", 5, "--step-size", 0, "--device", "cpu"
    )
    assert code == 0, err
    with Image.open("outputs/ldm-sample/00000.png") as image:
        assert (image.size, image.mode) == ((32, 32), "L")


def test_wide_networks_in_float32_in_processes_of_their_own(uldm):
    """What plans a training imports modules where tensors have no memory, and the training computes with them."""
    quick = (*QUICK, "train.steps=2", "train.picture_every=2")
    wide = ("autoencoder.down_channels=[64,64,64]", "autoencoder.mid_channels=[64,64]")
    for command in (("vqvae", "train", *quick, *wide), ("ldm", "train", *quick, "backbone.model_channels=64")):
        ended = uldm(*command)
        assert ended.code == 0, ended.err
        assert 0 < float(cells(ended.out)["loss"]) < 10


def test_the_newest_run_may_be_unfinished(uldm_main):
    uldm_main("vqvae", "train", *VQVAE)
    shutil.rmtree("outputs/vqvae-train/checkpoints/step-00000004")
    _, _, err = uldm_main("ldm", "train", "--dry-run")
    assert "the newest run (step 2 of 4)" in err


def test_the_same_command_again_says_that_it_is_finished(uldm_main):
    first = json.loads(uldm_main("vqvae", "train", *VQVAE, "--json")[1])
    before = {name: Path(name).stat().st_mtime_ns for name in names()}
    code, out, _ = uldm_main("vqvae", "train", *VQVAE)
    assert code == 0
    longer = "to train longer, give --outdir outputs/vqvae-train and more train.steps"
    assert f"it was finished already: {first['model']}; {longer}; to train anew, another --outdir" in out
    assert cells(out)["step"] == "4"
    again = json.loads(uldm_main("vqvae", "train", *VQVAE, "--resume", "--json")[1])
    assert (first["computed"], again["computed"]) == (4, 0)
    assert again["values"] == first["values"]
    assert {name: Path(name).stat().st_mtime_ns for name in names()} == before


def test_json_is_one_document(uldm_main):
    code, out, err = uldm_main("vqvae", "train", *VQVAE, "--seed", 5, "--outdir", "mine", "--json")
    told = json.loads(out)
    assert code == 0, err
    assert told["outdir"] == "mine"
    assert told["model"] == "mine/checkpoints/step-00000004/model.safetensors"
    assert (told["steps"], told["computed"], told["skipped"]) == (4, 4, 0)
    assert {"step", "epoch", "loss", "psnr", "perplexity", "usage", "counted_epoch"} <= told["values"].keys()
    assert read_header(Path(told["model"])).training["train"]["seed"] == 5


def test_quiet_says_nothing(uldm_main):
    assert uldm_main("vqvae", "train", *VQVAE, "-q") == (0, "", "")


def test_another_config_gets_a_folder_of_its_own(uldm_main):
    uldm_main("vqvae", "train", *VQVAE)
    code, out, err = uldm_main("vqvae", "train", *VQVAE, "--seed", 1, "--dry-run")
    assert code == 0
    assert "To be trained in outputs/vqvae-train-2" in out
    told = "a new run in outputs/vqvae-train-2, as outputs/vqvae-train is another training: train.seed is 0 there and 1"
    assert told in err
    code, _, err = uldm_main("vqvae", "train", *VQVAE, "--seed", 1, "--outdir", "outputs/vqvae-train")
    assert code == 2
    assert "train.seed is 0 there and 1 here" in err


def test_a_config_names_the_folder_and_a_flag_wins(uldm_main):
    Path("mine.yaml").write_text("kind: vqvae-train\ntrain: {steps: 7, batch_size: 16, seed: 3}\n")
    told = json.loads(
        uldm_main("vqvae", "train", "mine.yaml", "train.seed=4", "--batch-size", 5, "--dry-run", "--json")[1]
    )
    assert (told["outdir"], told["steps"], told["batch_size"]) == ("outputs/vqvae-mine", 7, 5)


# Dry runs


def test_a_dry_run_tells_the_plan_and_writes_nothing(uldm_main):
    code, out, err = uldm_main("vqvae", "train", "--device", "cpu", "--precision", "fp32", "--dry-run")
    assert (code, err) == (0, "")
    assert "To be trained in outputs/vqvae-train" in out
    shown = cells(out)
    assert re.fullmatch(r"autoencoder, [\d,]+ parameters", shown["model"])
    assert shown["images an epoch"] == "3,200"
    assert re.fullmatch(r"[\d,]+ of \d+ images, [\d.]+ epochs", shown["steps"])
    assert (shown["goes on from"], shown["computed on"]) == ("nothing: a new run", "cpu, float32")
    assert out.splitlines()[-1] == "nothing was written"
    assert names() == []


def test_a_dry_run_of_a_diffusion_model(uldm_main):
    data = ("autoencoder=fruits64", "data=tiny", "data.channels=3", "data.size=64")
    code, out, err = uldm_main("ldm", "train", *data, "--dry-run", "--json")
    told = json.loads(out)
    assert (code, err) == (0, "")
    assert (told["autoencoder"], told["latents"]) == ("fruits64", "4 channels of 16x16")
    assert (told["images"], told["skipped"], told["start"], told["checkpoint"]) == (3200, 0, 0, None)
    assert told["epochs"] == told["steps"] * told["batch_size"] / 3200
    assert told["parameters"] > 100_000
    assert told["dry_run"] is True
    assert names() == []


@pytest.mark.parametrize("by", ["flag", "key", "yaml"])
def test_beginning_with_a_model_takes_all_of_it_that_is_not_given(by, uldm_main, photos):
    Path("a.yaml").write_text("kind: ldm-train\ninit_from: fruits64\n")
    named = {"flag": ("--init-from", "fruits64"), "key": ("init_from=fruits64",), "yaml": ("a.yaml",)}[by]
    code, out, err = uldm_main("ldm", "train", *named, f"data.root={photos}", "optim.lr=1e-4", "--dry-run", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["begins with"], told["autoencoder"], told["parameters"]) == ("fruits64", "fruits64", 9_157_252)


def test_a_dry_run_tells_where_it_goes_on_from(uldm_main):
    uldm_main("vqvae", "train", *VQVAE)
    shutil.rmtree("outputs/vqvae-train/checkpoints/step-00000004")
    before = names()
    out = uldm_main("vqvae", "train", *VQVAE, "--dry-run")[1]
    assert cells(out)["goes on from"] == "step 2, outputs/vqvae-train/checkpoints/step-00000002"
    assert names() == before


@pytest.mark.parametrize("name", ["vqvae", "ldm"])
def test_the_configs_of_the_embedded_model(name, uldm_main):
    """Their images are not in the repository; the error says how to name others."""
    code, _, err = uldm_main(name, "train", CONFIGS / f"{name}.yaml")
    assert code == 2
    assert "training.tar does not exist" in err
    assert "Other images are named by data.root=PATH" in err
    assert names() == []


@pytest.mark.parametrize("name", ["vqvae", "ldm"])
def test_the_configs_of_the_embedded_model_fit_it(name, uldm_main, photos):
    told = json.loads(
        uldm_main(name, "train", CONFIGS / f"{name}.yaml", f"data.root={photos}", "--dry-run", "--json")[1]
    )
    assert told["outdir"] == f"outputs/{name}-fruits64"
    assert told["images"] == 10
    if name == "ldm":
        header = read_header(ROOT / "uldm_cli" / "assets" / "fruits64.safetensors")
        config, _ = read_yaml(CONFIGS / "ldm.yaml")
        assert config["train"]["steps"] == header.step
        assert config["backbone"].items() <= header.config["backbone"].items()


@pytest.mark.parametrize("group", [vqvae, ldm])
def test_the_examples_in_the_help_work(group, uldm_main, photos, monkeypatch):
    text = vqvae.EXAMPLES if group is vqvae else ldm.TRAIN_EXAMPLES
    Path("configs").symlink_to(ROOT / "configs")
    for run in ("vqvae-train", "vqvae-mine"):
        assert uldm_main("vqvae", "train", *VQVAE, "--outdir", f"outputs/{run}")[0] == 0
    commands = re.findall(r"^  uldm (\S.*?)(?:   .*)?$", text, re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        images = [f"data.root={photos}"] if "configs/" in command else []
        code, _, err = uldm_main(*shlex.split(command), *images, "--dry-run")
        assert code == 0, f"{command}: {err}"


# Bad input: one line, exit 2, nothing written


@pytest.mark.parametrize("group", ["vqvae", "ldm"])
@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--stepps", "3"], "unknown option '--stepps'"),
        (["train.stepps=3"], "unknown key 'stepps'. Did you mean 'steps'?"),
        (["train.steps=0"], "train.steps=0 (command line): expected a number greater than 0"),
        (["train.steps=many"], "expected a whole number"),
        (["data=mnits"], "unknown dataset 'mnits'. Did you mean 'mnist'?"),
        (["data=images"], "data.root: missing"),
        (["--batch-size", "0"], "--batch-size 0: expected a number greater than 0"),
        (["--seed", "-1"], "--seed -1: expected a number of at least 0"),
        (["--precision", "fp8"], "--precision fp8: expected 'auto', 'fp32', 'bf16', 'fp16' or 'fp64'"),
        (["--device", "gpu"], "--device gpu: expected auto, cpu, mps, cuda, or cuda:1 and so on"),
        (["absent.yaml"], "absent.yaml"),
        (["empty.yaml"], "empty.yaml"),
        (["list.yaml"], "list.yaml"),
        (["tabs.yaml"], "tabs.yaml:2"),
        (["twice.yaml"], "twice.yaml:2"),
        (["target.yaml"], "target.yaml"),
        (["sample.yaml"], "uldm ldm sample"),
    ],
)
def test_bad_input_is_one_line(group, args, says, uldm_main):
    Path("empty.yaml").write_text("")
    Path("list.yaml").write_text("- 1\n")
    Path("tabs.yaml").write_text("train:\n\tsteps: 3\n")
    Path("twice.yaml").write_text("train: {steps: 3}\ntrain: {steps: 4}\n")
    Path("target.yaml").write_text("target: os.system\n")
    Path("sample.yaml").write_text("kind: ldm-sample\n")
    refused(uldm_main, says, group, "train", *args)


def refused(uldm_main, says, *args):
    before = names()
    code, out, err = uldm_main(*args)
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err
    assert names() == before


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["autoencoder.mid_channels=[64]"], "at least 2 items"),
        (["autoencoder.mid_channels=[64,64]"], "begins and ends with 128, the last of down_channels"),
        (["autoencoder.down_sample=[true]"], "expected 2 entries, one for each step from a width"),
        (["autoencoder.attn_down=[]"], "expected 2 entries, one for each step from a width"),
        (["autoencoder.quantizer=emma"], "unknown quantizer 'emma'. Did you mean 'ema'?"),
        (["data=images", "data.root=photos"], "data.channels: expected 1, the channels of the autoencoder's images"),
        (["data.size=30"], "data.size=30 (command line): expected a multiple of 4"),
        (["--resume"], "--resume: there is no run of this config in outputs/vqvae-train"),
        (["--outdir", "taken"], "taken is a file"),
        (["--outdir", "taken/below"], "taken is a file"),
    ],
)
def test_bad_input_of_an_autoencoder(args, says, uldm_main):
    Path("taken").write_text("")
    named = ["autoencoder=vqvae"] if args[0].startswith("autoencoder.") else []  # whose lists are known here
    refused(uldm_main, says, "vqvae", "train", *named, *args)


@pytest.mark.parametrize(
    ("root", "says"),
    [
        ("nowhere", "nowhere does not exist. Other images are named by data.root=PATH"),
        ("photo", "photo does not exist. Did you mean photos? Other images are named by data.root=PATH"),
        ("empty", "no images in empty"),
        ("text.txt", "text.txt is neither a folder nor a .tar or .zip of images"),
        ("junk", "none of the 2 images in junk is usable"),
        ("half", "not one image of the data set can be decoded"),
        ("cut.tar", "cut.tar is truncated or damaged"),
    ],
)
def test_bad_images(root, says, uldm_main, photos):
    for folder in ("empty", "junk", "half"):
        Path(folder).mkdir()
    Path("text.txt").write_text("text")
    for name in ("a.png", "b.jpg"):
        Path("junk", name).write_bytes(b"no picture")
    for path in photos.iterdir():
        Path("half", path.name).write_bytes(path.read_bytes()[:100])
    Path("cut.tar").write_bytes(b"a" * 700)
    small = ("data.size=16", "autoencoder.in_channels=3")
    refused(uldm_main, says, "vqvae", "train", "data=images", f"data.root={root}", *small, *VQVAE, "train.workers=0")


def test_strict_stops_at_a_damaged_image(uldm_main, photos):
    (photos / "3.png").write_bytes(b"no picture")
    images = ("data=images", f"data.root={photos}", "data.size=16", "autoencoder.in_channels=3", *VQVAE)
    refused(uldm_main, "3.png in photos", "vqvae", "train", *images, "data.strict=true")
    code, out, err = uldm_main("vqvae", "train", *images, "train.workers=0")
    assert code == 0
    assert "warning: skipped 3.png" in err
    assert "1 image was skipped" in out


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_writable(uldm_main):
    Path("locked").mkdir(mode=0o500)
    refused(uldm_main, "the folder locked is not writable", "vqvae", "train", "--outdir", "locked")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "there is no trained autoencoder in outputs. Run `uldm vqvae train` first, or name one: autoencoder=PATH"),
        (["autoencoder=friuts64"], "there is no model 'friuts64'. Did you mean 'fruits64'?"),
        (["autoencoder=empty"], "empty holds no model that uldm knows"),
        (["autoencoder=junk.safetensors"], "junk.safetensors is not a checkpoint of PyTorch"),
        (
            ["autoencoder=fruits64", "data=tiny"],
            "data.channels: expected 3, the channels of the autoencoder's images, got 1",
        ),
        (
            ["autoencoder=fruits64", 'data={"kind":"tiny","channels":3,"size":36}'],
            "backbone: its levels need latents whose side is a multiple of 2, and these are 9x9",
        ),
        (["backbone.num_heads=3"], "backbone.num_heads=3 (command line): 3 does not divide the width 128"),
        (["sample.steps=3"], "sample: steps: unknown key 'steps'"),
    ],
)
def test_bad_input_of_a_diffusion_model(args, says, uldm_main):
    Path("empty").mkdir()
    Path("junk.safetensors").write_text("junk")
    refused(uldm_main, says, "ldm", "train", *args)


def test_a_damaged_autoencoder_leaves_no_folder(uldm_main):
    uldm_main("vqvae", "train", *VQVAE)
    model = Path("outputs/vqvae-train/checkpoints/step-00000004/model.safetensors")
    model.write_bytes(model.read_bytes()[:-1])
    code, _, err = uldm_main("ldm", "train", *UNET)
    assert code == 2
    assert f"{model} is truncated" in err
    assert not Path("outputs/ldm-train").exists()
