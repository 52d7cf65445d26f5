"""Training curves, out of the metrics of runs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from uldm_cli.errors import ConfigError
from uldm_cli.runs.curves import Request, moving_average, run
from uldm_cli.runs.draw.curves import Curve, draw_curves


@pytest.fixture
def metrics(tmp_path):
    """`metrics("a", {"loss": [3, 2]})` is the folder of a run that has logged this; further text follows the lines."""

    def write(name, figures, more=""):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        count = len(next(iter(figures.values())))
        lines = [{"step": 10 * (i + 1), "epoch": 1.0} | {k: v[i] for k, v in figures.items()} for i in range(count)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + more)
        return folder

    return write


def request(out, *runs, **given):
    return Request(tuple(runs), out / "curves.png", **given)


def test_the_curves_of_a_real_training(training, vqvae, tmp_path):
    training.run(vqvae(steps=6), tmp_path / "run")
    curves = run(request(tmp_path, tmp_path / "run"))
    assert {"loss", "l1", "codebook", "commitment", "perplexity", "usage"} <= set(curves)
    assert not {"step", "epoch", "lr", "images_per_second"} & set(curves)
    [loss] = curves["loss"]
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (list(loss.steps), list(loss.values)) == ([3, 6], [line["loss"] for line in lines])
    with Image.open(tmp_path / "curves.png") as image:
        assert image.text["title"] == "Training of run"


def test_runs_are_told_apart_and_keep_their_colours(metrics, tmp_path):
    a = metrics("x/train", {"loss": [3.0, 2.0], "usage": [0.5, 1.0]})
    b = metrics("y/train", {"loss": [4.0, 1.0], "lpips": [0.5, 0.4]})
    curves = run(request(tmp_path, a, b / "metrics.jsonl"))
    assert {term: [curve.run for curve in found] for term, found in curves.items()} == {
        "loss": [0, 1],
        "usage": [0],
        "lpips": [1],
    }
    with Image.open(tmp_path / "curves.png") as image:
        assert image.text["title"] == "Training of x/train, y/train"


def test_chosen_terms_only(metrics, tmp_path):
    folder = metrics("run", {"loss": [3.0, 2.0], "lr": [0.1, 0.2]})
    assert list(run(request(tmp_path, folder, terms=("lr",)))) == ["lr"]
    with pytest.raises(ConfigError, match=r"--terms: no run has logged 'los'. Did you mean 'loss'\?"):
        run(request(tmp_path, folder, terms=("los",)))


def test_the_average_begins_at_the_first_value_and_is_adams():
    assert moving_average([5.0, 5.0, 5.0], 0.9) == pytest.approx([5, 5, 5])
    m, expected = 0.0, []
    for n, value in enumerate([3.0, 1.0, 4.0], 1):
        m = 0.9 * m + 0.1 * value
        expected.append(m / (1 - 0.9**n))
    assert moving_average([3.0, 1.0, 4.0], 0.9) == pytest.approx(expected)
    assert moving_average([3.0, 1.0], 0.0) == [3, 1]
    assert moving_average([math.nan, 2.0, math.inf, 2.0], 0.5) == pytest.approx([math.nan, 2, 2, 2], nan_ok=True)


def test_short_runs_are_hardly_smoothed_and_long_ones_are(metrics, tmp_path):
    noise = np.random.default_rng(0).random(500).tolist()
    short, long = metrics("short", {"loss": noise[:10]}), metrics("long", {"loss": noise})
    first, second = run(request(tmp_path, short, long))["loss"]
    assert np.abs(np.subtract(first.average, first.values)).max() < 0.01
    assert np.std(second.average[20:]) < 0.5 * np.std(second.values)


def test_each_run_has_its_raw_curve_faint_behind_the_smoothed_one():
    curves = [Curve(0, (1, 2, 3), (3.0, 2.0, 1.0), (3.0, 2.5, 2.0)), Curve(1, (1, 2), (2.0, 1.0), (2.0, 1.0))]
    made = draw_curves({"loss": curves}, ["a", "b"], log=True)
    [axes] = made.axes
    faint, smooth, plain = axes.lines
    assert faint.get_alpha() < 0.5
    assert faint.get_zorder() <= smooth.get_zorder()
    assert faint.get_color() == smooth.get_color() != plain.get_color()
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in made.legends[0].get_texts()] == ["a", "b"]


def test_a_panel_with_zeros_stays_linear():
    panels = {"usage": [Curve(0, (1, 2), (0.0, 1.0), (0.0, 1.0))], "loss": [Curve(0, (1, 2), (9.0, 1e-5), (9.0, 1e-5))]}
    scales = [axes.get_yscale() for axes in draw_curves(panels, ["a"], log=True).axes]
    assert scales == ["linear", "log"]


def test_half_a_line_at_the_end_is_left_out(metrics, tmp_path, capsys):
    folder = metrics("run", {"loss": [3.0, 2.0]}, '{"step": 30, "lo')
    [curve] = run(request(tmp_path, folder))["loss"]
    assert curve.steps == (10, 20)
    assert "metrics.jsonl:3 is half a line, and left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json\n", r"metrics.jsonl:3: expected a line of metrics, a JSON mapping with `step`"),
        ("[1]\n", r"metrics.jsonl:3: expected a line"),
        ('{"loss": 1}\n', r"metrics.jsonl:3: expected a line"),
        ('{"step": 1, "loss": "low"}\n', r'metrics.jsonl:3: loss is "low", not a number'),
    ],
)
def test_a_line_that_cannot_be_read_is_named(metrics, tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        run(request(tmp_path, metrics("run", {"loss": [3.0, 2.0]}, text)))
    assert not (tmp_path / "curves.png").exists()


def test_what_is_no_training_run(metrics, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere does not exist. Name the folder"):
        run(request(tmp_path, tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"has no metrics.jsonl. Name the folder"):
        run(request(tmp_path, tmp_path))
    empty = metrics("empty", {"loss": []})
    with pytest.raises(ConfigError, match="has no line yet"):
        run(request(tmp_path, empty))
    folder = metrics("run", {"loss": [1.0]})
    with pytest.raises(ConfigError, match="named twice"):
        run(request(tmp_path, folder, Path(f"{folder}/metrics.jsonl")))
    with pytest.raises(ConfigError, match="--smooth 1: expected a weight"):
        run(request(tmp_path, folder, smooth=1.0))
    with pytest.raises(ConfigError, match="a plot is written as"):
        run(Request((folder,), tmp_path / "curves.jpg"))
