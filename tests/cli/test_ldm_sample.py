"""`uldm ldm sample` and `uldm ldm grid` as they are typed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def ldm(empty_folder, uldm_main, tiny_ldm):
    """Run `uldm ldm VERB --model TINY ...` in this process, in an empty folder: exit code, stdout, stderr."""

    def run(verb, *args, model=tiny_ldm):
        return uldm_main("ldm", verb, *(["--model", model] if model else []), *args)

    return run


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def size_of(path):
    with Image.open(path) as image:
        image.load()
        return image.size


def contents(folder):
    return {name: (Path(folder) / name).read_bytes() for name in names(folder)}


def test_the_issue_s_command_with_underscores(ldm):
    code, out, err = ldm(
        "sample", "--total_steps", 20, "--step_size", 4, "--outdir", "out", "--seed", 1125, "--eta", "1.0"
    )
    steps = (4, 8, 12, 16, 20)
    assert code == 0, err
    assert names("out") == sorted(
        ["sample.yaml"] + [f"{kind}_step_{n}.png" for kind in ("image", "latent") for n in steps]
    )
    assert size_of("out/image_step_20.png") == size_of("out/latent_step_20.png") == (32, 32)
    assert "image_step_4.png ... image_step_20.png" in out
    assert "1 sample of 20 steps in" in out
    assert "steps/s" in err


def test_json_tells_what_was_made(ldm):
    code, out, _ = ldm("sample", "--total-steps", 4, "--step-size", 2, "-n", 2, "--seed", 7, "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["steps"], told["logged"], told["seeds"]) == (4, [2, 4], [7, 8])
    assert told["sampler"] == {"kind": "ddim", "steps": 4, "spacing": "auto", "eta": 1.0}
    assert told["outdir"] == "outputs/ldm-sample"
    assert (told["computed"], told["device"]) == (2, "cpu")
    assert told["seconds"] > 0
    assert {file["path"] for file in told["files"]} | {told["config"]} == {
        f"outputs/ldm-sample/{name}" for name in names("outputs/ldm-sample")
    }


def test_quiet_says_nothing(ldm):
    assert ldm("sample", "--total-steps", 2, "--step-size", 0, "-q") == (0, "", "")
    assert names("outputs/ldm-sample") == ["00000.png", "sample.yaml"]


def test_a_dry_run_tells_the_plan_and_writes_nothing(ldm):
    code, out, _ = ldm("sample", "--total-steps", 20, "-n", 20, "--dry-run")
    assert code == 0
    assert "To be written to outputs/ldm-sample" in out
    assert "20 samples of 20 steps in 2 batches" in out
    assert not Path("outputs").exists()


def test_the_same_command_twice_is_the_same_run(ldm):
    args = ("--total-steps", 4, "--step-size", 2, "--seed", 7, "-n", 3, "--batch-size", 2)
    assert ldm("sample", *args)[0] == 0
    before = contents("outputs")
    assert ldm("sample", *args)[0] == 0
    assert contents("outputs") == before


def test_a_config_names_the_folder_and_a_flag_wins(ldm):
    Path("fast.yaml").write_text("kind: ldm-sample\nsampler: {kind: ddim, steps: 9, eta: 0}\nstep_size: 3\nseed: 4\n")
    assert ldm("sample", "fast.yaml", "seed=5", "sampler.eta=0.5", "--total-steps", 6)[0] == 0
    record = Path("outputs/ldm-fast/sample.yaml").read_text()
    assert "seed: 5" in record
    assert "steps: 6" in record
    assert "eta: 0.5" in record
    assert "image_step_3.png" in names("outputs/ldm-fast")


def test_the_model_may_stand_in_the_config(ldm, tiny_ldm):
    Path("a.yaml").write_text(f"model: {tiny_ldm}\nstep_size: 0\n")
    assert ldm("sample", "--config", "a.yaml", "sampler.steps=2", model=None)[0] == 0
    assert ldm("sample", f"model={tiny_ldm}", "sampler.steps=2", "step_size=0", model=None)[0] == 0


def test_a_model_s_own_defaults_lie_below_the_command_line(ldm, tiny_ldm):
    from dataclasses import replace

    from uldm_cli.formats.native import load_tensors, read_header, save

    header = read_header(tiny_ldm)
    own = {"sampler": {"kind": "ddim", "steps": 6, "eta": 0.0}, "step_size": 3}
    parts = {part: load_tensors(tiny_ldm, f"{part}.") for part in ("autoencoder", "backbone", "ema")}
    save(Path("own.safetensors"), replace(header, config={**header.config, "sample": own}), parts)
    code, out, err = ldm("sample", "--json", "--eta", 1, model="own.safetensors")
    assert code == 0, err
    told = json.loads(out)
    assert told["sampler"] == {"kind": "ddim", "steps": 6, "spacing": "auto", "eta": 1.0}
    assert told["logged"] == [3, 6]


def test_the_spellings_of_older_scripts(ldm, tiny_ldm):
    code, out, err = ldm(
        "sample", "-r", tiny_ldm, "-c", 4, "-e", 0, "-l", "out", "--n_samples", 2, "--json", model=None
    )
    assert code == 0, err
    told = json.loads(out)
    assert (told["steps"], told["sampler"]["eta"], told["outdir"], len(told["seeds"])) == (4, 0.0, "out", 2)


def test_a_model_may_stand_in_the_place_of_the_config(ldm, tiny_ldm):
    args = ("--total-steps", 2, "--step-size", 0, "--json")
    for words in (["--config", tiny_ldm], [tiny_ldm]):
        code, out, err = ldm("sample", *words, *args, model=None)
        assert code == 0, err
        assert json.loads(out)["model"]["name"] == str(tiny_ldm)
    Path("empty").mkdir()
    assert "empty" in ldm("sample", "--config", "empty", model=None)[2]


def test_the_yaml_of_a_published_checkpoint_needs_its_checkpoint(ldm):
    Path("ffhq.yaml").write_text("model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n")
    code, out, err = ldm("sample", "--config", "ffhq.yaml", model=None)
    assert (code, out) == (2, "")
    assert err == "error: ffhq.yaml describes a published checkpoint, and none is given. Name it with --checkpoint\n"


def test_plms(ldm):
    code, out, err = ldm("sample", "--sampler", "plms", "--total-steps", 10, "--step-size", 5, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["sampler"] == {"kind": "plms", "steps": 10, "spacing": "auto"}
    assert told["logged"] == [5, 10]


def test_the_published_spacing_counts_the_steps_that_it_makes(ldm):
    args = ("--total_steps", 40, "--step_size", 20, "--spacing", "compvis", "--save", "image")
    code, out, err = ldm("sample", *args, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["steps"], told["logged"]) == (50, [20, 40, 50])
    assert names("outputs/ldm-sample") == [*(f"image_step_{n}.png" for n in (20, 40, 50)), "sample.yaml"]
    assert "1 sample of 50 steps" in ldm("sample", *args, "--dry-run")[1]
    assert ldm("grid", *args)[0] == 0
    assert "image_step(20,40,50).png" in names("outputs/ldm-grid")


@pytest.mark.parametrize("flags", [("--height", 48, "--width", 64), ("--H", 48, "--W", 64)])
def test_images_of_another_size(ldm, flags):
    code, _, err = ldm("sample", "--total-steps", 2, "--step-size", 1, "--save", "image,latent,latent-diff", *flags)
    assert code == 0, err
    pictures = list(Path("outputs/ldm-sample").glob("*.png"))
    assert len(pictures) == 5
    assert {size_of(path) for path in pictures} == {(64, 48)}
    assert ldm("grid", "--total-steps", 2, "--step-size", 1, "-n", 2, *flags)[0] == 0


def test_draws_of_the_published_code_follow_each_other(ldm):
    """The first batch of a run is the same however many follow it, and depends on the size of the batch."""
    args = ("--total-steps", 4, "--step-size", 0, "--rng", "compvis", "--seed", 3)

    def pictures(folder, *more):
        code, _, err = ldm("sample", *args, "--outdir", folder, *more)
        assert code == 0, err
        return [data for name, data in contents(folder).items() if name.endswith(".png")]

    four = pictures("four", "-n", 4, "--batch-size", 2)
    assert len(set(four)) == 4
    assert pictures("two", "-n", 2, "--batch-size", 2) == four[:2]
    assert pictures("whole", "-n", 4, "--batch-size", 4)[:2] != four[:2]
    with Image.open("four/00003.png") as image:
        told = {name: text for name, text in image.text.items() if name != "uldm"}
        assert told == {"rng": "compvis", "seed": "3", "sample": "3", "step": "4"}


def test_grid(ldm):
    code, out, err = ldm("grid", "--total-steps", 20, "--step-size", 4, "--seed", 1125, "-n", 4)
    assert code == 0, err
    assert names("outputs/ldm-grid") == [
        "grid.yaml",
        "image_step(4,8,12,16,20).png",
        "latent_step(4,8,12,16,20).png",
    ]
    assert "image_step(4,8,12,16,20).png" in out
    width, height = size_of("outputs/ldm-grid/image_step(4,8,12,16,20).png")
    assert (width // 32, height // 32) == (5, 4)


@pytest.mark.parametrize("verb", ["sample", "grid"])
@pytest.mark.parametrize(
    ("args", "says"),
    [
        (
            ["--total-steps", "20", "--step-size", "21"],
            "--step-size 21: a step size of 21 is greater than the total of 20",
        ),
        (["--step_size", "-1"], "--step-size -1: expected a number of at least 0"),
        (["--total-steps", "0"], "--total-steps 0: expected a number of at least 1"),
        (["--total-steps", "-5"], "--total-steps -5: expected a number of at least 1"),
        (["--total-steps", "2.5"], "--total-steps"),
        (["--eta", "0.5", "--sampler", "plms"], "--eta does not apply to sampler 'plms'"),
        (["--spacing", "compvis", "--sampler", "ddpm"], "--spacing does not apply to sampler 'ddpm'"),
        (["--spacing", "quad"], "--spacing quad"),
        (
            ["--spacing", "compvis", "--total-steps", "30"],
            "The nearest that work: 25 (it makes 25) and 34 (it makes 50)",
        ),
        (
            ["--spacing", "compvis", "--total-steps", "40", "--step-size", "51"],
            "--step-size 51: it is greater than the",
        ),
        (["--total-steps", "9", "--height", "50"], "--height 50: expected a multiple of 8"),
        (["--width", "-8"], "--width -8: expected a number of at least 1"),
        (["--rng", "global"], "--rng global"),
        (["--rng", "compvis", "--seeds", "1-4"], "--rng compvis: compvis draws for a whole batch at once"),
        (["--rng", "compvis", "--deterministic"], "so it cannot go with --deterministic"),
        (["--rng", "compvis", "--resume", "--total-steps", "9"], "--resume: with --rng compvis"),
        (["some.ckpt"], "two models, "),
        (["--total-steps", "101"], "101 steps are more than the 100 timesteps of"),
        (["--sampler", "ddpm", "--eta", "1"], "--eta does not apply to"),
        (["--sampler", "dimm"], "dimm"),
        (["sampler=dimm"], "dimm"),
        (["sampler.etta=1"], "etta"),
        (["--stepsize", "4"], "unknown option '--stepsize'"),
        (["--num", "0"], "--num 0: expected a number of at least 1"),
        (["--batch-size", "0"], "--batch-size 0: expected a number of at least 1"),
        (["--seeds", "0-9", "-n", "3"], "--num 3: 3 samples are asked for here"),
        (["--seeds", "9-0"], "runs backwards"),
        (["--save", "imag"], "did you mean 'image'"),
        (["--save", "npz"], "npz"),
        (["--show", "eps"], "--show eps"),
        (["--device", "gpu"], "--device gpu"),
        (["--precision", "fp16"], "--precision fp16"),
        (["--total-steps", "9", "--outdir", "taken"], "taken is a file"),
        (["--total-steps", "9", "--outdir", "taken/below"], "taken is a file"),
        (["nothing.yaml"], "nothing.yaml"),
        (["empty.yaml"], "empty.yaml"),
        (["other.yaml"], "uldm ldm train"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(ldm, verb, args, says):
    Path("taken").write_text("")
    Path("empty.yaml").write_text("")
    Path("other.yaml").write_text("kind: ldm-train\n")
    there = names(".")
    code, out, err = ldm(verb, *args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err
    assert names(".") == there


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("missing.safetensors", "there is no model 'missing.safetensors'"),
        ("short.safetensors", "short.safetensors is truncated"),
        ("folder", "folder holds no model that uldm knows"),
        ("text.txt", "text.txt is not a checkpoint of PyTorch"),
        ("frutis64", "fruits64"),
        ("autoencoder.safetensors", "is an autoencoder, and a latent diffusion model is needed"),
    ],
)
def test_a_model_that_cannot_be_sampled_from_is_one_line(ldm, tiny_ldm, reference, says):
    from uldm_cli.formats.checkpoint import Header
    from uldm_cli.formats.native import load_tensors, read_header, save

    Path("short.safetensors").write_bytes(tiny_ldm.read_bytes()[:-1000])
    Path("folder").mkdir()
    Path("text.txt").write_text("hello")
    header = read_header(tiny_ldm)
    autoencoder = {key: header.config[key] for key in ("autoencoder", "image_size")}
    parts = {"model": load_tensors(tiny_ldm, "autoencoder.")}
    save(Path("autoencoder.safetensors"), Header("autoencoder", autoencoder), parts)
    code, out, err = ldm("sample", model=reference)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert says in err
    assert not Path("outputs").exists()


def test_bad_input_is_found_before_torch_is_imported(uldm, tiny_ldm):
    ended = uldm(
        *("ldm", "sample", "--model", str(tiny_ldm), "--total-steps", "101", "--step-size", "5"),
        python=("-X", "importtime"),
    )
    assert ended.code == 2
    assert "pydantic" in ended.err
    assert not any(line.rstrip().endswith((" torch", " numpy", " PIL")) for line in ended.err.splitlines())


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bytes(uldm, tiny_ldm, tmp_path):
    args = ["--model", str(tiny_ldm), "--total-steps", "20", "--step-size", "10", "-n", "30", "--batch-size", "2"]
    args += ["--save", "image,latent,image-diff", "--device", "cpu"]
    assert uldm("ldm", "sample", *args, "--outdir", "whole").code == 0
    killed = subprocess.Popen(
        [sys.executable, "-m", "uldm_cli", "ldm", "sample", *args, "--outdir", "out"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    first, until = tmp_path / "out/00005/image_step_20.png", time.monotonic() + 120
    while not first.exists() and killed.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = len(names(tmp_path / "out"))
    assert done < len(names(tmp_path / "whole")), "it was over before it could be killed"
    resumed = uldm("ldm", "sample", *args, "--outdir", "out", "--resume", "--json")
    assert json.loads(resumed.out)["computed"] < 30
    for leftover in (tmp_path / "out").rglob(".*.tmp"):
        leftover.unlink()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_an_interrupted_run_exits_130_and_leaves_only_whole_files(tiny_ldm, tmp_path):
    args = ["--model", str(tiny_ldm), "--total-steps", "100", "--step-size", "1", "-n", "50", "--batch-size", "1"]
    running = subprocess.Popen(
        [sys.executable, "-m", "uldm_cli", "ldm", "sample", *args, "--outdir", "out"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    first, until = tmp_path / "out/00000/image_step_1.png", time.monotonic() + 120
    while not first.exists() and running.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert err.strip().splitlines()[-1] == "error: interrupted"
    files = names(tmp_path / "out")
    assert not [name for name in files if name.endswith(".tmp")]
    for name in files:
        if name.endswith(".png"):
            size_of(tmp_path / "out" / name)
