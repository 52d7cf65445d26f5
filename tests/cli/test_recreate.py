"""`uldm viz recreate` as it is typed, and pictures in the terminal."""

import json
import os
import pty
import select
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

SAMPLE = ("ldm", "sample", "--total-steps", "2", "--step-size", "1", "--save", "image", "--device", "cpu")


pytestmark = pytest.mark.usefixtures("empty_folder")


def test_recreate(uldm_main, tiny_ldm, tmp_path):
    assert uldm_main(*SAMPLE, "--model", str(tiny_ldm), "--outdir", "run")[0] == 0
    code, out, _ = uldm_main("viz", "recreate", "run/image_step_2.png")
    assert code == 0
    assert out == "outputs/viz-recreate/image_step_2.png, by `uldm ldm sample`: identical to run/image_step_2.png\n"
    assert (tmp_path / "outputs/viz-recreate/sample.yaml").read_text() == (tmp_path / "run/sample.yaml").read_text()

    code, out, _ = uldm_main("viz", "recreate", "run/image_step_1.png", "--outdir", "again", "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["file"], told["identical"], told["psnr"]) == ("again/image_step_1.png", True, None)
    assert told["made_by"] == {"command": "ldm sample", "version": "0.1.0", "kind": "image", "step": "1"}
    assert told["config"]["model"] == str(tiny_ldm)
    assert uldm_main("viz", "recreate", "run/image_step_1.png", "--outdir", "again", "-q") == (0, "", "")


@pytest.mark.parametrize(
    ("args", "written"),
    [
        ("viz schedule linear end=0.03 cosine --dpi=40 --json", "schedules.png"),
        ("viz schedule cosine --dpi 40 --out of/mine.png", "of/mine.png"),
        ("viz lpips a.png b.png --dummy --size 32", "lpips_heatmap.png"),
        ("viz noising a.png --steps 0,500 --size 32 --dpi 40", "noising.png"),
        ("vqvae diagram --dpi 40", "viz_out/unet_architecture.png"),
        ("vqvae diagram --dpi 40 --outdir of/tiny.png --part unet", "of/tiny.png"),
        ("vqvae visualize --model MODEL --device cpu -- a.png", "viz_out/a_recon.png"),
        ("vqvae visualize a.png --model MODEL --device cpu --out of/looks", "of/looks/a_code_hist.png"),
    ],
)
def test_command_lines_are_run_again(uldm_main, tiny_ldm, tmp_path, args, written):
    for number, name in enumerate(("a.png", "b.png")):
        Image.linear_gradient("L").resize((64, 64)).rotate(90 * number).convert("RGB").save(name)
    words = [word.replace("MODEL", str(tiny_ldm)) for word in args.split()]
    code, _, err = uldm_main(*words)
    assert code == 0, err
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}

    code, out, err = uldm_main("viz", "recreate", written, "--outdir", "again", "--json")
    assert code == 0, err
    assert err.startswith(f"running: uldm {' '.join(words[:2])} ")
    told = json.loads(out)
    assert (told["identical"], told["model_changed"], told["config"]) == (True, None, None)
    assert told["made_by"]["command"] == " ".join(words[:2])
    assert told["file"].startswith("again/")
    after = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if tmp_path / "again" not in path.parents}
    assert after == before

    code, _, err = uldm_main("viz", "recreate", told["file"], "--outdir", "again")
    assert code == 2
    assert err.endswith("lies in again, and could be written over. Give another --outdir\n")


def test_what_a_command_line_needs_is_named(uldm_main, tmp_path):
    for name in ("a.png", "b.png"):
        Image.linear_gradient("L").resize((64, 64)).save(name)
    assert uldm_main("viz", "lpips", "a.png", "b.png", "--dummy", "-q") == (0, "", "")
    (tmp_path / "b.png").unlink()
    code, out, err = uldm_main("viz", "recreate", "lpips_heatmap.png", "-q")
    assert (code, out) == (2, "")
    assert "b.png" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"command": "vqvae train"}, "was made by `uldm vqvae train`, which cannot be run again"),
        ({"name": "../a.png"}, "is not of this program"),
        ({"places": {"--out": ".."}}, "is not of this program"),
        ({"places": {"--config": "a"}}, "is not of this program"),
        ({"arguments": [1]}, "is not of this program"),
        ({"version": "99.0"}, "was made by uldm 99.0"),
        ({"name": "other.png"}, "does not make the picture"),
        ({"arguments": ["cosine", "--out", "elsewhere.png"]}, None),
    ],
)
def test_a_strange_command_line_is_not_followed(uldm_main, tmp_path, change, message):
    assert uldm_main("viz", "schedule", "cosine", "--dpi", "40", "--out", "s.png")[0] == 0
    with Image.open("s.png") as image:
        said = json.loads(image.text["uldm"]) | change
        information = PngInfo()
        information.add_text("uldm", json.dumps(said))
        image.save("strange.png", pnginfo=information)
    code, _, err = uldm_main("viz", "recreate", "strange.png", "--outdir", "again", "-q")
    assert (code > 0) == bool(message)
    assert (message or "") in err
    assert {path.name for path in tmp_path.iterdir()} <= {"s.png", "strange.png", "again"}


def test_a_picture_of_another_program_is_one_line(uldm_main, tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "plain.png")
    code, out, err = uldm_main("viz", "recreate", "plain.png")
    assert (code, out) == (2, "")
    assert err.startswith("error: plain.png does not say how it was made.")
    assert err.count("\n") == 1


def test_pictures_are_shown_in_a_terminal_only(uldm_main, tiny_ldm, tmp_path):
    args = (*SAMPLE, "--model", str(tiny_ldm), "--show-inline")
    code, out, _ = uldm_main(*args)
    assert code == 0
    assert "\x1b" not in out

    shown = on_terminal(*args, cwd=tmp_path)
    assert shown.count("\x1b_Ga=T,f=100,c=9,") == 1


@pytest.mark.parametrize(
    ("args", "count"),
    [(("vqvae", "diagram", "--dpi", "50"), 2), (("viz", "nearest", "sample.png", "--data", "tiny", "--dpi", "50"), 1)],
)
def test_plots_are_shown_there_too(tmp_path, args, count):
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(tmp_path / "sample.png")
    assert on_terminal(*args, "--show-inline", cwd=tmp_path).count("\x1b_Ga=T,f=100,") == count


def on_terminal(*args, cwd):
    """What `uldm ARGS` writes to stdout where that is a Kitty of 80 columns."""
    leader, follower = pty.openpty()
    environment = os.environ | {"COLUMNS": "80", "TERM": "xterm-kitty"}
    command = [sys.executable, "-m", "uldm_cli", *args]
    process = subprocess.Popen(command, stdout=follower, stderr=subprocess.DEVNULL, env=environment, cwd=cwd)
    os.close(follower)
    shown = b""
    while process.poll() is None or select.select([leader], [], [], 0)[0]:
        if select.select([leader], [], [], 0.05)[0]:
            try:
                shown += os.read(leader, 65536)
            except OSError:  # Linux's way to say that the other end is closed
                break
    assert process.wait() == 0
    os.close(leader)
    return shown.decode()
