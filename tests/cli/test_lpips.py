"""`uldm viz lpips`, as it is called."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from uldm_cli.__main__ import main

SMALL = ["--dummy", "--size", "32"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png", "one/x.png", "one/y.png", "two/x.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.linear_gradient("L").rotate(90 * len(name) + ord(name[-5])).save(name)


@pytest.mark.skipif("ULDM_TEST_ASSETS" not in os.environ, reason="ULDM_TEST_ASSETS names no folder with lpips' images")
@pytest.mark.parametrize(("name", "printed"), [("p0", "0.7219"), ("p1", "0.1376")])
def test_the_authors_example(name: str, printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(os.environ["ULDM_TEST_ASSETS"]) / "data" / "lpips"
    assert main(["viz", "lpips", str(folder / "ex_ref.png"), str(folder / f"ex_{name}.png"), "--net", "alex"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == printed
    with Image.open("lpips_heatmap.png") as heatmap:
        assert (heatmap.mode, heatmap.size) == ("L", (64, 64))


def test_images_by_options_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["viz", "lpips", "--img0", "a.png", "--img1", "b.png", "--json", *SMALL, "--out", "map.png"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["size"] == [32, 32]
    assert (document["heatmap"], document["weights"], document["net"]) == ("map.png", "drawn", "alex")
    assert document["distance"] > 0
    assert Path("map.png").exists()


def test_random_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["viz", "lpips", *SMALL]) == 0
    assert "two random images of seed 0 (32x32)" in capsys.readouterr().out


def test_folders(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["viz", "lpips", "one", "two", *SMALL]) == 0
    out, err = capsys.readouterr()
    assert "1 only in one: y.png" in err
    assert "mean" in out
    assert not Path("lpips_heatmap.png").exists()
    assert main(["viz", "lpips", "one", "two", "--json", *SMALL]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [pair["name"] for pair in document["pairs"]] == ["x"]
    assert document["only_in_first"] == ["y.png"]


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["viz", "lpips", "one", "two", "-q", *SMALL]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["a.png", "one"], "one is a folder and a.png is not"),
        (["a.png"], "a.png has nothing to be compared with"),
        (["a.png", "b.png", "--img1", "a.png"], "B and --img1 are both given"),
        (["a.png", "nowhere.png"], "nowhere.png: cannot be read (No such file or directory)"),
        (["a.png", "b.png", "--net", "alexnet"], "--net alexnet: no such network. Did you mean 'alex'?"),
        (["a.png", "b.png", "--size", "16"], "needs 31 a side. Give --size 64 or more"),
        (["a.png", "b.png", "--out", "map.jpg"], "--out map.jpg: the heatmap of two images is a .png"),
        (["a.png", "b.png", "--colormap", "jet"], "there is no colormap 'jet'"),
        (["a.png", "b.png", "--scale", "0"], "--scale 0 is not a difference"),
        (["a.png", "b.png", "--net", "vgg", "--weights-url", "vgg.pth"], "there is no checkpoint vgg.pth"),
    ],
)
def test_errors_are_one_line(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["viz", "lpips", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
    assert not Path("lpips_heatmap.png").exists()


def test_a_drawing_says_what_it_shows_and_a_stand_in_has_no_checksum() -> None:
    assert main(["viz", "lpips", "a.png", "b.png", *SMALL, "--out", "map.svg", "--font-size", "12"]) == 0
    drawn = Path("map.svg").read_text()
    assert ">b.png<" in drawn
    assert ">difference<" in drawn
    assert main(["viz", "lpips", "a.png", "b.png", *SMALL]) == 0
    with Image.open("lpips_heatmap.png") as heatmap:
        assert "weights_sha256" not in heatmap.info
