"""`uldm ldm ema` and `uldm vqvae ema` as they are typed."""

import json
from pathlib import Path

import pytest
import torch

from uldm_cli.__main__ import main
from uldm_cli.core.ema import Profiles
from uldm_cli.formats.checkpoint import Header
from uldm_cli.formats.native import read_header, save
from uldm_cli.runs.ema import save_snapshot


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like that of a run, with averages of two widths at three steps."""
    monkeypatch.chdir(tmp_path)
    module = torch.nn.Linear(2, 3)
    profiles = Profiles(module, [0.05, 0.1])
    for step in range(1, 301):
        with torch.no_grad():
            module.weight.fill_(step)
        profiles.update()
        if step % 100 == 0:
            save_snapshot(tmp_path / "run", step, profiles.state_dict(), [0.05, 0.1])
    (tmp_path / "run/checkpoints/step-00000300").mkdir(parents=True)
    file = tmp_path / "run/checkpoints/step-00000300/model.safetensors"
    save(file, Header("autoencoder", {}, {}, 300), {"model": module.state_dict(), "ema": module.state_dict()})
    return Path("run")


def test_an_average_is_made(run, capsys):
    assert main(["vqvae", "ema", str(run), "--sigma-rel", "0.08", "--out", "made.safetensors"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("sigma_rel 0.08 at step 300, of 6 averages (their weights miss it by")
    assert said.err == ""
    assert read_header(Path("made.safetensors")).step == 300


def test_json(run, capsys):
    args = ["vqvae", "ema", str(run), "--sigma-rel", "0.1", "--step", "200", "--out", "made.safetensors", "--json"]
    assert main(args) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["missed"] == pytest.approx(0, abs=1e-5)
    del told["missed"]
    file = {"file": "made.safetensors", "step": 200}
    assert told == {"command": "vqvae ema", "sigma_rel": 0.1, "averages": 4, **file}


def test_an_average_far_from_what_was_kept_is_told(run, capsys):
    assert main(["vqvae", "ema", str(run), "--sigma-rel", "0.28", "--out", "made.safetensors"]) == 0
    assert "away from those of sigma_rel 0.28: it lies far from the widths" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--sigma-rel", "0.08", "--out", "made.pt"], "made.pt does not end with .safetensors"),
        (["--sigma-rel", "0.3", "--out", "made.safetensors"], "option '--sigma-rel' got '0.3'"),
        (["--out", "made.safetensors"], "--sigma-rel"),
        (["--sigma-rel", "0.08", "--step", "5", "--out", "made.safetensors"], "There are those of 100, 200, 300"),
    ],
)
def test_wrong_input_is_one_line(run, args, says, capsys):
    assert main(["vqvae", "ema", str(run), *args]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not list(Path().glob("made.*"))


def test_the_other_group_is_named(run, capsys):
    assert main(["ldm", "ema", str(run), "--sigma-rel", "0.08", "--out", "made.safetensors"]) == 2
    assert capsys.readouterr().err.endswith("is of kind autoencoder, not latent-diffusion. Run `uldm vqvae ema`\n")
