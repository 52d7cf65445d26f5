"""Noise schedules and the forward process, as pictures."""

import math
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from uldm_cli import registry
from uldm_cli.core.images import ImageError
from uldm_cli.core.schedules import cosine_betas
from uldm_cli.errors import ConfigError, PluginError
from uldm_cli.runs.draw.noising import draw_noised
from uldm_cli.runs.draw.schedules import draw_tables
from uldm_cli.runs.files import write_png
from uldm_cli.runs.noising import Request
from uldm_cli.runs.noising import run as noise
from uldm_cli.runs.viz_schedule import read_schedules, run, tabulated
from uldm_cli.specs.base import Spec


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3)).astype(np.uint8)
    write_png(tmp_path / "photo.png", pixels)
    return tmp_path / "photo.png"


def test_words_are_kinds_followed_by_their_settings():
    found = read_schedules(["linear", "end=0.03", "timesteps=500", "cosine", "linear"])
    assert [named.name for named in found] == ["linear end=0.03 timesteps=500", "cosine", "linear"]
    assert (found[0].spec.end, found[0].spec.timesteps, found[2].spec.end) == (0.03, 500, 0.02)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lienar"], r"unknown schedule 'lienar'. Did you mean 'linear'\?"),
        (["end=0.03"], "end=0.03 comes before the schedule that it is of. Write: linear end=0.03"),
        (["linear", "edn=0.03"], "unknown key 'edn'"),
        (["linear", "end=2"], "end=2"),
    ],
)
def test_words_that_mean_nothing(words, message):
    with pytest.raises(ConfigError, match=message):
        read_schedules(words)


def test_a_table_is_what_the_schedule_says():
    [named] = read_schedules(["cosine", "timesteps=100"])
    table = tabulated(named)
    betas = cosine_betas(100)
    np.testing.assert_allclose(table.betas, betas, rtol=1e-3, atol=1e-6)
    signal = torch.cumprod(1 - betas, 0).numpy()
    np.testing.assert_allclose(table.alphas_cumprod, signal, rtol=1e-5)
    np.testing.assert_allclose(table.log_snr, np.log(signal / (1 - signal)), rtol=1e-3, atol=1e-4)
    assert table.even == next(t for t in range(100) if signal[t] <= 0.5)


def test_all_kinds_are_drawn_where_none_is_named(tmp_path):
    tables = run([], [], tmp_path / "schedules.png")
    assert [table.name for table in tables] == ["scaled_linear", "linear", "cosine", "sigmoid"]
    with Image.open(tmp_path / "schedules.png") as image:
        assert image.text["title"] == "Noise schedules: scaled_linear, linear, cosine, sigmoid"


def test_a_schedule_without_signal_at_its_end_is_drawn(tmp_path):
    """Its last log SNR is minus infinity."""
    (table,) = run(["linear", "zero_terminal_snr=true"], [], tmp_path / "schedules.png")
    assert (table.alphas_cumprod[-1], table.log_snr[-1], table.betas[-1]) == (0, -math.inf, 1)
    assert np.isfinite(table.log_snr[:-1]).all()


def test_a_model_s_schedule_is_drawn_beside_others(tiny_ldm, tmp_path):
    tables = run(["scaled_linear", "timesteps=100"], [str(tiny_ldm)], tmp_path / "schedules.svg")
    assert (tables[0].alphas_cumprod == tables[1].alphas_cumprod).all()
    assert (tmp_path / "schedules.svg").read_bytes()[:5] == b"<?xml"


def test_equal_schedules_are_both_seen_and_lengths_are_made_comparable():
    tables = [tabulated(named) for named in read_schedules(["linear", "linear", "linear", "timesteps=50"])]
    signal, _, betas = draw_tables(tables).axes
    assert [line.get_linestyle() for line in signal.lines] == ["-", "--", "-"]
    assert signal.get_xlabel() == "t / T"
    assert [line.get_xdata()[-1] for line in signal.lines] == [1, 1, 1]
    assert betas.get_yscale() == "log"
    assert draw_tables(tables[:2]).axes[0].get_xlabel() == "timestep t"


class Plugin(Spec):
    """A schedule that does not preserve the variance, and offers no more than it has to."""

    kind: Literal["uldm-test-exploding"] = "uldm-test-exploding"
    broken: bool = False

    def build(self):
        if self.broken:
            raise ImportError("no module named 'tables'")

        class Exploding:
            T = 10

            def alpha(self, t):
                return 1.0

            def sigma(self, t):
                return 0.1 * (t + 1)

        return Exploding()


def test_plugins_schedules_are_drawn_too(monkeypatch, tmp_path):
    monkeypatch.setitem(registry.BUILTIN["schedules"], "uldm-test-exploding", f"{__name__}:Plugin")
    monkeypatch.setattr(
        registry, "load", lambda group, kind, load=registry.load: Plugin if "test" in kind else load(group, kind)
    )
    [table] = run(["uldm-test-exploding"], [], tmp_path / "schedules.png")
    np.testing.assert_allclose(table.log_snr, [-2 * math.log(0.1 * (t + 1)) for t in range(10)], atol=1e-12)
    assert (table.betas == 0).all()
    with pytest.raises(PluginError, match="schedule 'uldm-test-exploding' of uldm failed to build: ImportError"):
        run(["uldm-test-exploding", "broken=true"], [], tmp_path / "broken.png")
    assert not (tmp_path / "broken.png").exists()


def test_noising_is_the_forward_process_with_one_noise(photo, tmp_path):
    out = tmp_path / "noising.png"
    rows = noise(Request(photo, out, ("linear", "scaled_linear end=0.03"), "0,400,999", size=32, seed=3))
    assert [[noised.t for noised in row] for row in rows] == [[0, 400, 999]] * 2
    x = torch.from_numpy(rows[0][0].picture.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
    eps = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(3))
    for row, named in zip(rows, read_schedules(["linear", "scaled_linear", "end=0.03"]), strict=True):
        schedule = named.spec.build()
        expected = schedule.alpha(400) * x + schedule.sigma(400) * eps
        drawn = torch.from_numpy(row[1].picture.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
        assert (drawn - expected.clamp(-1, 1)).abs().max() < 0.1  # what t = 0 itself is noised by
        assert row[1].log_snr == pytest.approx(2 * math.log(schedule.alpha(400) / schedule.sigma(400)))
    with Image.open(out) as image:
        assert image.text["title"] == "photo.png, noised by linear, scaled_linear end=0.03 with seed 3"


def test_no_signal_to_noise_is_minus_zero(photo, tmp_path):
    rows = noise(Request(photo, tmp_path / "noising.png", ("cosine",), steps="500"))
    assert -0.05 < rows[0][0].log_snr < 0
    [panel] = draw_noised(rows, ["cosine"]).axes
    assert panel.get_xlabel() == "ln SNR +0.0"


def test_timesteps_and_size_by_default(photo, tmp_path):
    [row] = noise(Request(photo, tmp_path / "noising.png", ("linear timesteps=100",)))
    assert [noised.t for noised in row] == [0, 10, 25, 50, 99]
    assert row[0].picture.shape == (48, 48, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": "0,1000"}, "--steps 1000: scaled_linear has the timesteps 0 to 999"),
        ({"steps": "0,-1"}, "--steps 0,-1: expected timesteps with commas between"),
        ({"steps": ",".join("1" * 21)}, "21 are more than the 20 that fit"),
        ({"schedules": ("lienar",)}, r"Did you mean 'linear'\?"),
        ({"schedules": ("linear cosine",)}, "expected one schedule"),
        ({"schedules": ("",)}, "expected one schedule"),
        ({"out": "noising.jpg"}, "a plot is written as"),
    ],
)
def test_noising_that_cannot_be(photo, tmp_path, given, message):
    with pytest.raises(ConfigError, match=message):
        noise(Request(photo, tmp_path / given.pop("out", "noising.png"), **given))
    assert not list(tmp_path.glob("noising*"))


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "photo.png").write_text("no picture")
    with pytest.raises(ImageError, match=r"photo.png: not an image"):
        noise(Request(tmp_path / "photo.png", tmp_path / "noising.png"))
    with pytest.raises(ImageError, match=r"other.png: cannot be read \(No such file"):
        noise(Request(tmp_path / "other.png", tmp_path / "noising.png"))
