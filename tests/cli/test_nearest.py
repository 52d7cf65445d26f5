"""`uldm viz nearest`, as it is called."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from uldm_cli.__main__ import main


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("training").mkdir()
    for seed in range(5):
        colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(colours).resize((32, 32)).save(f"training/{seed}.png")
    Image.open("training/2.png").save("sample.png")


def test_table_and_picture(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["viz", "nearest", "sample.png", "--data", "training", "--k", "2"]) == 0
    out, _ = capsys.readouterr()
    assert "5 images of training at 32x32, LPIPS 0.1 (AlexNet); usual" in out
    assert "nearer than usual: 1 by pixels and 1 by LPIPS, of 1 samples; nearest.png" in out
    assert Path("nearest.png").exists()


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["viz", "nearest", "sample.png", "--data", "training", "--json", "--flip", "--out", "a/b.svg"]) == 0
    document = json.loads(capsys.readouterr().out)
    [sample] = document["samples"]
    assert sample["pixels"][0] == {"name": "2.png", "index": 2, "distance": 0.0, "mirrored": False}
    assert len(sample["lpips"]) == 4
    assert document["typical"]["count"] == 5
    assert document["nearer_than_typical"] == {"pixels": 1, "lpips": 1}
    assert Path("a/b.svg").exists()


def test_quiet_and_unreadable_training_images(capsys: pytest.CaptureFixture[str]) -> None:
    Path("training/broken.png").write_bytes(b"broken")
    assert main(["viz", "nearest", "sample.png", "--data", "training", "-q"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "warning: 1 image of training cannot be read and is left out: broken.png\n"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["sample.png"], "missing option '--data'"),
        (["sample.png", "--data", "trainning"], "--data trainning: there is no such file, folder or data set"),
        (
            ["sample.png", "--data", "training", "--out", "a.gif"],
            "--out a.gif: a plot is written as .png, .svg or .pdf",
        ),
        (["sample.png", "--data", "training", "--k", "6"], "--k 6: training holds 5 images"),
        (["other.png", "--data", "training"], "other.png: cannot be read (No such file or directory)"),
        (["sample.png", "--data", "training", "--size", "8"], "Give --size 32 or more"),
    ],
)
def test_errors_are_one_line(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["viz", "nearest", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
    assert not list(Path().glob("*nearest*"))
