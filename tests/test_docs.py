"""The plugin that docs/plugins.md shows installs and samples as written."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_FILE = re.compile(r"^`(?P<name>[\w./-]+)`[^\n]*\n\n```\w+\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder into which pip has installed the package of the page."""
    source = tmp_path / "source"
    for found in _FILE.finditer((ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")):
        path = source / found["name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found["code"], encoding="utf-8")
    (source / "uldm_euler" / "__init__.py").touch()
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(tmp_path / "site")]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True, timeout=200)
    return tmp_path / "site"


def test_the_plugin_of_the_page_samples(site: Path, uldm: Callable, tmp_path: Path) -> None:
    env = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(site)])}
    ended = uldm("ldm", "sample", "--sampler", "euler", "--total-steps", "4", "--json", env=env, cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["sampler"] == {"kind": "euler", "steps": 4}
    assert (tmp_path / "outputs" / "ldm-sample" / "image_step_4.png").exists()


def test_euler_of_the_page_is_ddim_without_noise(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDIM with eta 0 is Euler's method in the variables x / alpha and sigma / alpha (Song et al. 2021, eq. 14)."""
    import torch

    from uldm_cli.core.samplers import Prediction
    from uldm_cli.specs.samplers import DDIM
    from uldm_cli.specs.schedules import ScaledLinear

    monkeypatch.syspath_prepend(str(site))
    from uldm_euler.sampler import Euler

    def denoise(x: torch.Tensor, t: int) -> Prediction:
        eps = torch.tanh(x * (1 + t / 1000))
        return Prediction((x - schedule.sigma(t) * eps) / schedule.alpha(t), eps)

    schedule, x = ScaledLinear().build(), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    *_, ours = Euler(10)(denoise, x, schedule, lambda step, draw: x)
    *_, theirs = DDIM(steps=10, eta=0.0).build()(denoise, x, schedule, lambda step, draw: x)
    torch.testing.assert_close(ours.x, theirs.x, rtol=1e-4, atol=1e-4)
