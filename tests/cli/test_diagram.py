import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from uldm_cli.__main__ import main
from uldm_cli.errors import ConfigError
from uldm_cli.runs.diagram import Described, draw, read
from uldm_cli.specs.autoencoders import Autoencoder
from uldm_cli.specs.backbones import Backbone
from uldm_cli.specs.models import LatentDiffusionModel

GOLDEN = Path(__file__).parents[1] / "golden" / "compvis"
CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = ("--dpi", "50")


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def diagram(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    code = main(["vqvae", "diagram", *map(str, args), *SMALL, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    document: dict[str, Any] = json.loads(out)
    return document


def drawn(document: dict[str, Any]) -> list[str]:
    return [picture["path"] for picture in document["pictures"]]


def test_as_a_user_does_without_torch(uldm: Callable, tmp_path: Path) -> None:
    ended = uldm("vqvae", "diagram", python=("-X", "importtime"))
    assert ended.code == 0, ended.err
    assert not re.search(r"\| +torch$", ended.err, re.MULTILINE)
    for name in ("vqvae_architecture.png", "unet_architecture.png"):
        assert f"viz_out/{name}" in ended.out
        with Image.open(tmp_path / "viz_out" / name) as picture:
            assert picture.width > 700
            assert picture.text["title"].endswith(" of fruits64")
            assert json.loads(picture.text["config"])["kind"] in ("vqvae", "unet")
    assert "2,599,663" in ended.out


@pytest.mark.parametrize("name", ["fruits64/vqvae.yaml", "fruits64/ldm.yaml", "lsun-churches256/ldm.yaml"])
def test_configs_are_drawn(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The last with an autoencoder of the zoo, which is not here."""
    expected = ["autoencoder", "unet"] if name.endswith("ldm.yaml") else ["autoencoder"]
    assert [picture["part"] for picture in diagram(capsys, "--config", CONFIGS / name)["pictures"]] == expected


@pytest.mark.parametrize("family", sorted(path.name for path in GOLDEN.iterdir()))
def test_every_published_family_is_drawn(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = diagram(capsys, GOLDEN / family / "config.yaml", "--out", "a.svg")
    assert drawn(document) == ["a_autoencoder.svg", "a_unet.svg"]
    assert "</svg>" in Path("a_unet.svg").read_text()


def test_the_zoo_without_a_download(capsys: pytest.CaptureFixture[str]) -> None:
    document = diagram(capsys, "--model", "zoo:kl-f8", "--out", "a.pdf")
    assert drawn(document) == ["a.pdf"]
    assert Path("a.pdf").read_bytes().startswith(b"%PDF")
    [picture] = document["pictures"]
    assert picture["parameters"] == 83_653_863
    assert [stage["part"] for stage in picture["stages"]][6:8] == ["posterior", "latent"]
    assert sum(stage["parameters"] for stage in picture["stages"]) == picture["parameters"]


def test_a_checkpoint(tiny_ldm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = diagram(capsys, "--model", tiny_ldm, "--part", "unet", "--out", "new/folder")
    assert drawn(document) == ["new/folder/unet_architecture.png"]
    assert document["pictures"][0]["stages"][1]["channels"] == 32


def test_overrides_change_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    config = CONFIGS / "fruits64" / "vqvae.yaml"
    document = diagram(capsys, config, "autoencoder.attn_down=[false,true]")
    assert [stage["heads"] for stage in document["pictures"][0]["stages"]][1:4] == [None, 4, 4]


def test_a_sampling_config_names_its_model(tiny_ldm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("sample.yaml").write_text(f"kind: ldm-sample\nmodel: {tiny_ldm}\n")
    assert diagram(capsys, "sample.yaml")["model"] == str(tiny_ldm)


def test_training_takes_the_autoencoder_named_and_its_images_size(capsys: pytest.CaptureFixture[str]) -> None:
    Path("train.yaml").write_text("kind: ldm-train\nautoencoder: fruits64\n")
    document = diagram(capsys, "train.yaml")
    assert document["pictures"][1]["facts"][1] == "input 4×16×16"  # noqa: RUF001


def test_a_title_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    document = diagram(capsys, "--title", "Our model", "--part", "unet", "--out", "a.svg")
    assert document["model"] == "fruits64"
    assert ">Our model<" in Path("a.svg").read_text()


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vqvae", "diagram", "-q", "--part", "autoencoder", *SMALL]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["x=3"], "x=3 changes a config, and none is drawn. Name a YAML file before it"),
        (["nothing.yaml"], "nothing.yaml: no such file"),
        (["--model", "nothing"], "there is no model 'nothing'"),
        (["--model", "zoo:nothing"], "the zoo has no model 'nothing'"),
        (["--part", "vqvae"], "--part vqvae: there is no such part. Choose one of: autoencoder, unet"),
        (["--model", "zoo:kl-f8", "--part", "unet"], "kl-f8 is an autoencoder, and has no U-Net"),
        (["--out", "a.jpg"], "--out a.jpg: a plot is written as .png, .svg or .pdf"),
        (["--out", "file/a.png"], "is a file where a folder is needed"),
        (["file"], "file is no YAML file. A model is named by --model"),
        ([str(GOLDEN / "rdm" / "config.yaml"), "a=1"], "a=1 cannot change"),
        (["train.yaml"], "there is no trained autoencoder in outputs"),
        (["misfit.yaml"], "data.size: expected a multiple of 4, the autoencoder's factor, got 30"),
    ],
)
def test_wrong_input_is_one_line(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    Path("train.yaml").write_text("kind: ldm-train\n")
    data = "data: {kind: images, root: nowhere, size: 30}\n"
    Path("misfit.yaml").write_text(f"kind: ldm-train\nautoencoder: fruits64\n{data}")
    assert main(["vqvae", "diagram", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
    assert not Path("viz_out").exists()


class Other(Autoencoder):
    kind: str = "other"

    @property
    def factor(self) -> int:
        return 4


class Strange(Backbone):
    kind: str = "strange"


def test_an_unknown_kind_is_left_out_and_named(tiny_ldm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = read(None, model=str(tiny_ldm)).model
    assert isinstance(model, LatentDiffusionModel)
    changed = model.model_copy(update={"backbone": Strange()})
    [picture] = draw(Described("x", changed))
    assert picture.part == "autoencoder"
    message = (
        "warning: what backbones of the kind 'strange' are made of is not known here, so no picture of it is drawn"
    )
    assert capsys.readouterr().err.strip() == message
    with pytest.raises(ConfigError, match="autoencoders of the kind 'other'"):
        draw(Described("x", changed.model_copy(update={"autoencoder": Other()})))
