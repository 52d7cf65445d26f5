"""`uldm viz trajectory`, `schedule`, `noising` and `curves` as they are typed."""

import json
from functools import partial

import numpy as np
import pytest
from PIL import Image

from uldm_cli.__main__ import main
from uldm_cli.runs.files import write_png


@pytest.fixture
def viz(empty_folder, uldm_main):
    """Run `uldm viz ...` in this process, in an empty folder: exit code, stdout, stderr."""
    return partial(uldm_main, "viz")


@pytest.fixture
def run_folder(tmp_path):
    for step in (5, 10):
        (tmp_path / "run").mkdir(exist_ok=True)
        write_png(tmp_path / "run" / f"image_step_{step}.png", np.full((16, 16, 3), 20 * step, np.uint8))
    return tmp_path / "run"


@pytest.fixture
def photo(tmp_path):
    write_png(tmp_path / "photo.png", np.full((40, 40, 3), 99, np.uint8))
    return tmp_path / "photo.png"


@pytest.fixture
def training_folder(tmp_path):
    (tmp_path / "training").mkdir()
    lines = [{"step": step, "loss": 1 / step, "lr": 0.1} for step in (1, 2, 3)]
    (tmp_path / "training" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "training"


def test_a_film_from_sampling_to_gif_and_figure(viz, tiny_ldm, tmp_path):
    sampling = ["--model", tiny_ldm, "--total-steps", 6, "--step-size", 2, "--save", "image,trajectory"]
    assert main(["ldm", "sample", *map(str, sampling), "--outdir", "run", "-q"]) == 0
    code, out, err = viz("trajectory", "run", "--json", "--fps", "5")
    told = json.loads(out)
    assert code == 0, err
    assert (told["film"], told["figure"]) == ("run/trajectory.gif", "run/trajectory.png")
    assert (told["steps"], told["fps"], told["samples"]) == ([2, 4, 6], 5, [""])
    [course] = told["courses"]
    assert {name: len(course[name]) for name in ("norm", "log_snr", "change", "lpips")} == {
        "norm": 3,
        "log_snr": 3,
        "change": 2,
        "lpips": 3,
    }
    with Image.open("run/trajectory.gif") as film:
        assert film.n_frames == 3


def test_a_film_of_pictures_alone(viz, run_folder):
    code, out, err = viz("trajectory", run_folder, "--out", "dog.apng")
    assert code == 0
    assert "dog.apng" in out
    assert "2 pictures of one sample" in out
    assert "`uldm ldm sample --save image,trajectory` writes it" in err
    assert viz("trajectory", run_folder, "-q") == (0, "", "")


def test_schedules_by_words(viz):
    code, out, err = viz("schedule", "linear", "end=0.03", "cosine", "--dpi", 50)
    assert (code, err) == (0, "")
    assert "linear end=0.03" in out
    assert out.endswith("Written to schedules.png\n")
    with Image.open("schedules.png") as image:
        assert image.width == 350
    told = json.loads(viz("schedule", "linear", "timesteps=10", "--json", "--out", "a.pdf")[1])
    [schedule] = told["schedules"]
    assert (told["file"], schedule["timesteps"], len(schedule["betas"])) == ("a.pdf", 10, 10)


def test_an_image_is_noised(viz, photo):
    code, out, _ = viz("noising", photo, "--schedule", "linear", "--steps", "0,999", "--json", "--font-size", 7)
    told = json.loads(out)
    assert (code, told["file"]) == (0, "noising.png")
    assert [step["t"] for step in told["schedules"][0]["steps"]] == [0, 999]


def test_curves_of_a_run(viz, training_folder):
    code, out, _ = viz("curves", training_folder, "--log", "--terms", "loss,lr", "--out", "c.svg", "--json")
    told = json.loads(out)
    assert (code, told["file"]) == (0, "c.svg")
    assert [(last["term"], last["step"]) for last in told["last"]] == [("loss", 3), ("lr", 3)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trajectory"], "missing argument 'RUN'"),
        (["trajectory", "nowhere"], "nowhere does not exist"),
        (["trajectory", "run", "--what", "latent"], "Try --what image"),
        (["trajectory", "run", "--out", "film.avi"], "a film is written as .gif, .apng (or .png) or .mp4"),
        (["trajectory", "run", "--sample", "1"], "--sample 1: run has one sample, 0"),
        (["schedule", "lineer"], "unknown schedule 'lineer'. Did you mean 'linear'?"),
        (["schedule", "linear", "--dpi", "2"], "option '--dpi' got '2'"),
        (["noising", "run"], "run: cannot be read (Is a directory)"),
        (["noising", "photo.png", "--size", "4"], "option '--size' got '4'"),
        (["curves", "run"], "run has no metrics.jsonl"),
        (["curves", "training", "--terms", "los"], "Did you mean 'loss'?"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(viz, run_folder, photo, training_folder, tmp_path, args, message):
    before = sorted(tmp_path.rglob("*"))
    code, out, err = viz(*args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
