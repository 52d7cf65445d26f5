"""Which folder a run writes to."""

from pathlib import Path

import pytest

from uldm_cli.errors import ConfigError
from uldm_cli.runs.outdir import choose_outdir, default_outdir, difference_from, write_record
from uldm_cli.specs.autoencoder_training import AutoencoderTraining
from uldm_cli.specs.sampling import Sampling

RECORD = "sample.yaml"


def config(**fields):
    return Sampling.model_validate(fields)


@pytest.fixture
def default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return default_outdir("ldm", "sample")


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        (None, "outputs/ldm-sample"),
        ("runs/fast.yaml", "outputs/ldm-fast"),
        ("configs/fruits64/ldm.yaml", "outputs/ldm-fruits64"),
        ("configs/fruits64/vqvae.yaml", "outputs/ldm-vqvae"),
    ],
)
def test_the_default_folder_is_named_after_the_verb_or_the_config(path, folder):
    assert default_outdir("ldm", "sample", path and Path(path)) == Path(folder)


def test_a_config_beside_the_caller_is_named_after_its_folder(tmp_path, monkeypatch):
    (tmp_path / "apples").mkdir()
    monkeypatch.chdir(tmp_path / "apples")
    assert default_outdir("ldm", "sample", Path("ldm.yaml")) == Path("outputs/ldm-apples")


def test_choosing_writes_nothing(default, tmp_path):
    choose_outdir(None, default, RECORD, config())
    choose_outdir(Path("a/b/c"), default, RECORD, config())
    assert list(tmp_path.iterdir()) == []


def test_the_same_config_comes_back_to_its_folder(default):
    for seed, folder in [(1, "ldm-sample"), (2, "ldm-sample-2"), (3, "ldm-sample-3"), (2, "ldm-sample-2")]:
        chosen = choose_outdir(None, default, RECORD, config(seed=seed))
        assert chosen == Path("outputs") / folder
        write_record(chosen, RECORD, config(seed=seed))


def test_the_device_makes_no_other_run(default):
    write_record(default, RECORD, config(device="cpu"))
    assert choose_outdir(default, default, RECORD, config(device="auto")) == default


@pytest.mark.parametrize(
    ("fields", "difference"),
    [
        ({"sampler": {"kind": "ddim", "steps": 50}}, "sampler.steps is 200 there and 50 here"),
        ({"sampler": "ddpm", "step_size": 40}, "sampler.kind is ddim there and ddpm here"),
        ({"model": "a"}, "model is not set there and a here"),
        ({"save": "image"}, "save is ['image', 'latent'] there and ['image'] here"),
    ],
)
def test_a_folder_of_another_config_is_refused_with_the_first_difference(default, fields, difference):
    write_record(Path("here"), RECORD, config())
    with pytest.raises(ConfigError, match="--outdir here holds results of another config") as caught:
        choose_outdir(Path("here"), default, RECORD, config(**fields))
    assert difference in str(caught.value)
    assert caught.value.exit_code == 2


def test_another_record_in_the_folder_is_no_hindrance(default):
    write_record(default, "grid.yaml", config(seed=3))
    assert choose_outdir(default, default, RECORD, config(seed=4)) == default


@pytest.mark.parametrize("content", ["", "kind: [", "- 1\n", "\x00"])
def test_a_damaged_record_counts_as_another_config(default, content):
    default.mkdir(parents=True)
    (default / RECORD).write_text(content)
    assert difference_from(default / RECORD, config()) == "its sample.yaml cannot be read"


def test_a_field_that_only_one_of_them_has_differs(default):
    path = write_record(default, RECORD, config())
    path.write_text(path.read_text() + "colour: blue\n")
    assert difference_from(path, config()) == "colour is blue there and absent here"


@pytest.mark.parametrize("place", ["taken", "taken/below", "taken/below/deeper"])
def test_a_file_in_the_way_is_named(default, place):
    Path("taken").write_text("")
    with pytest.raises(ConfigError, match="taken is a file"):
        choose_outdir(Path(place), default, RECORD, config())


def test_where_a_training_runs_and_what_it_tells_make_no_other_run(tmp_path: Path) -> None:
    first, elsewhere, longer = (
        AutoencoderTraining.model_validate({"train": {"steps": 10} | other})
        for other in ({}, {"device": "cpu", "workers": 0, "keep": 3, "trackers": ["wandb"]}, {"steps": 11})
    )
    record = write_record(tmp_path, "train.yaml", first)
    assert difference_from(record, elsewhere) is None
    assert difference_from(record, longer) == "train.steps is 10 there and 11 here"
