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

from uldm_cli.__main__ import main

SAMPLE = ("ldm", "sample", "--total-steps", "2", "--step-size", "1", "--save", "image", "--device", "cpu")


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run `uldm ...` in this process, in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        code = main(list(args))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_recreate(call, tiny_ldm, tmp_path):
    assert call(*SAMPLE, "--model", str(tiny_ldm), "--outdir", "run")[0] == 0
    code, out, _ = call("viz", "recreate", "run/image_step_2.png")
    assert code == 0
    assert out == "outputs/viz-recreate/image_step_2.png, by `uldm ldm sample`: identical to run/image_step_2.png\n"
    assert (tmp_path / "outputs/viz-recreate/sample.yaml").read_text() == (tmp_path / "run/sample.yaml").read_text()

    code, out, _ = call("viz", "recreate", "run/image_step_1.png", "--outdir", "again", "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["file"], told["identical"], told["psnr"]) == ("again/image_step_1.png", True, None)
    assert told["made_by"] == {"command": "ldm sample", "version": "0.1.0", "kind": "image", "step": "1"}
    assert told["config"]["model"] == str(tiny_ldm)
    assert call("viz", "recreate", "run/image_step_1.png", "--outdir", "again", "-q") == (0, "", "")


def test_a_picture_of_another_program_is_one_line(call, tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "plain.png")
    code, out, err = call("viz", "recreate", "plain.png")
    assert (code, out) == (2, "")
    assert err.startswith("error: plain.png does not say how it was made.")
    assert err.count("\n") == 1


def test_pictures_are_shown_in_a_terminal_only(call, tiny_ldm, tmp_path):
    args = (*SAMPLE, "--model", str(tiny_ldm), "--show-inline")
    code, out, _ = call(*args)
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
