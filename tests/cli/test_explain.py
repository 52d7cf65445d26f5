"""`uldm ldm explain` as it is typed."""

import json
from pathlib import Path

import pytest

STEPS = ("--total_steps", 4, "--step_size", 2, "--device", "cpu")


@pytest.fixture
def explain(empty_folder, uldm_main, tiny_ldm):
    """Run `uldm ldm explain --model TINY ...` in this process, in an empty folder: exit code, stdout, stderr."""

    def run(*args, model=tiny_ldm):
        return uldm_main("ldm", "explain", *(["--model", model] if model else []), *args)

    return run


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def test_the_documented_flags(explain):
    code, out, err = explain(
        *(*STEPS, "-n", 2, "--seed", 7, "--eta", 0, "--save", "image,saliency,attention", "--separate"),
        *("--saliency-box", "4,4,8,8", "--saliency-method", "integrated", "saliency.samples=2"),
        *("--attention-query", "20,4", "--attention-resolution", 4, "--attention-head", 0),
        *("--overlay", "blend", "--alpha", 0.7, "--colormap", "viridis", "--scale-per", "row", "--save-arrays"),
    )
    assert code == 0, err
    sheets = [f"{kind}_step(2,4).png" for kind in ("image", "saliency", "attention")]
    own = [
        f"0000{i}/{kind}_step_{n}.png" for i in (0, 1) for kind in ("image", "saliency", "attention") for n in (2, 4)
    ]
    arrays = ["saliency.safetensors", "attention.safetensors"]
    assert names("outputs/ldm-explain") == sorted([*sheets, *own, *arrays, "explain.yaml"])
    assert "Written to outputs/ldm-explain" in out
    assert "2 samples of 4 steps in" in out
    assert "sampling and looking 20/20" in err
    record = Path("outputs/ldm-explain/explain.yaml").read_text()
    for line in ("kind: ldm-explain", "box: [4, 4, 8, 8]", "method: integrated", "samples: 2", "colormap: viridis"):
        assert line in record


def test_json_tells_what_was_made(explain):
    code, out, _ = explain(*STEPS, "--save", "saliency", "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["command"], told["steps"], told["logged"], told["seeds"]) == ("ldm explain", 4, [2, 4], [1125])
    assert told["files"] == [{"kind": "saliency", "path": "outputs/ldm-explain/saliency_step(2,4).png"}]
    assert (told["computed"], told["device"]) == (1, "cpu")


def test_a_dry_run_tells_the_plan_and_writes_nothing(explain):
    code, out, err = explain("--total-steps", 20, "--step-size", 5, "--dry-run")
    assert code == 0, err
    for kind in ("image", "saliency", "attention"):
        assert f"{kind}_step(5,10,15,20).png" in out
    assert not Path("outputs").exists()


def test_only_the_last_step(explain):
    code, _, err = explain("--total-steps", 2, "--step-size", 0, "--separate", "--save", "image,attention", "-q")
    assert (code, err) == (0, "")
    pictures = [f"{kind}_step{step}.png" for kind in ("image", "attention") for step in ("(2)", "_2")]
    assert names("outputs/ldm-explain") == sorted([*pictures, "explain.yaml"])


def test_a_config_in_yaml(explain):
    Path("mine.yaml").write_text(
        "kind: ldm-explain\nsampler: {kind: ddim, steps: 4}\nstep_size: 2\nsave: [saliency]\n"
        "saliency: {box: [0, 0, 9, 9]}\noverlay: {mode: color}\n"
    )
    code, out, err = explain("mine.yaml", "overlay.colormap=magma", "--json")
    assert code == 0, err
    assert json.loads(out)["outdir"] == "outputs/ldm-mine"
    record = Path("outputs/ldm-mine/explain.yaml").read_text()
    assert "box: [0, 0, 9, 9]" in record
    assert "colormap: magma" in record


def test_a_model_s_own_defaults_lie_below_but_not_what_sampling_saves(explain, tiny_ldm):
    from dataclasses import replace

    from uldm_cli.formats.native import load_tensors, read_header, save

    header = read_header(tiny_ldm)
    own = {"sampler": {"kind": "ddim", "steps": 6, "eta": 0.0}, "step_size": 3, "save": ["latent"]}
    parts = {part: load_tensors(tiny_ldm, f"{part}.") for part in ("autoencoder", "backbone", "ema")}
    save(Path("own.safetensors"), replace(header, config={**header.config, "sample": own}), parts)
    code, out, err = explain("--dry-run", "--json", model="own.safetensors")
    assert code == 0, err
    told = json.loads(out)
    assert (told["sampler"]["eta"], told["logged"]) == (0.0, [3, 6])
    assert [file["kind"] for file in told["files"]] == ["image", "saliency", "attention"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--save", "latent"], "'latent' is none of image, saliency, attention"),
        (["--save", "saliencey"], "did you mean 'saliency'?"),
        (["--save", "image,image"], "something is named twice"),
        (["--save", "image", "--save-arrays"], "--save-arrays"),
        (["--saliency-target", "x1"], "--saliency-target x1"),
        (["--saliency-target", "box"], "--saliency-target box: it is not said which box"),
        (["--saliency-target", "eps", "--saliency-box", "0,0,4,4"], "a box is given too, and the target is eps"),
        (["--saliency-box", "1,2,3"], "--saliency-box 1,2,3: expected 4 whole numbers with commas between"),
        (["--saliency-box", "0,0,0,4"], "--saliency-box 0,0,0,4: a box begins inside the image"),
        (["--saliency-box", "20,0,13,4"], "--saliency-box 20,0,13,4 reaches beyond the image. Images are 32 x 32"),
        (["--saliency-method", "grad"], "--saliency-method grad"),
        (["saliency.samples=0"], "saliency.samples"),
        (["saliency.sigma=nan"], "saliency.sigma"),
        (["--attention-query", "a,1"], "--attention-query a,1: expected 2 whole numbers"),
        (
            ["--attention-query", "-1,1"],
            "--attention-query -1,1: expected 2 whole numbers with commas between, and they count from 0",
        ),
        (["attention.query=[-1, 1]"], "pixels count from 0"),
        (["--format", "gif"], "--format gif"),
        (["--dpi", "5"], "--dpi 5"),
        (["--font-size", "48"], "--font-size 48: too large for pictures that are 1.3 inches wide"),
        (["--attention-query", "32,0"], "--attention-query 32,0 is outside the image. Images are 32 x 32 pixels"),
        (["--attention-resolution", "16"], "--attention-resolution 16: there are no such maps. There are: 4x4"),
        (["--attention-resolution", "8", "--attention-layer", "middle_block.1"], "There are: 4x4"),
        (["--attention-resolution", "big"], "--attention-resolution big"),
        (["--attention-layer", "input_blocks.0"], "--attention-layer input_blocks.0: there is no"),
        (["--attention-head", "9"], "--attention-head 9: not all"),
        (["--attention-head", "-1"], "--attention-head -1"),
        (["--attention-layer", "middle_block.1", "--attention-rollout"], "follows the attention through all layers"),
        (["--overlay", "mix"], "--overlay mix"),
        (["--alpha", "1.5"], "--alpha 1.5"),
        (["--colormap", "jet"], "--colormap jet"),
        (["--scale-per", "image"], "--scale-per image"),
        (["-n", "6000", "--step-size", "1"], "Ask for fewer samples with --num"),
        (["--total-steps", "101"], "101 steps are more than the 100 timesteps of"),
        (["--seed", "1", "--seeds", "1-2"], "--seed and --seeds are both given"),
        (["--eta", "1", "--sampler", "plms"], "--eta does not apply to sampler 'plms'"),
        (["other.yaml"], "a config of `uldm ldm sample`, not of `uldm ldm explain`"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(explain, args, says):
    Path("other.yaml").write_text("kind: ldm-sample\n")
    steps = [] if {"--total-steps", "--sampler"} & set(args) else ["--total-steps", "8"]
    code, out, err = explain(*steps, *args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err
    assert names(".") == ["other.yaml"]


def test_help_has_examples(explain):
    code, out, _ = explain("--help")
    assert code == 0
    assert "Examples:\n  uldm ldm explain " in out
    assert "--attention-rollout" in out


def test_bad_input_is_found_before_torch_is_imported(uldm, tiny_ldm):
    ended = uldm(
        *("ldm", "explain", "--model", str(tiny_ldm), "--total-steps", "9", "--saliency-box", "0,0,99,1"),
        python=("-X", "importtime"),
    )
    assert ended.code == 2
    assert "pydantic" in ended.err
    assert not any(
        line.rstrip().endswith((" torch", " numpy", " PIL", " matplotlib")) for line in ended.err.splitlines()
    )
