"""Pictures again, from what they say of themselves."""

import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from uldm_cli import __version__
from uldm_cli.errors import ConfigError
from uldm_cli.runs.explain import explain
from uldm_cli.runs.explain_plan import plan_explain
from uldm_cli.runs.files import read_picture
from uldm_cli.runs.grid import run_grid
from uldm_cli.runs.recipe import KEYWORD, read_recipe
from uldm_cli.runs.recreate import psnr, recreate
from uldm_cli.runs.sample import run
from uldm_cli.specs.explaining import Explaining
from uldm_cli.specs.load import load_config
from uldm_cli.specs.sampling import Sampling


@pytest.fixture
def config(tiny_ldm):
    def make(kind=Sampling, steps=6, **fields):
        sampler = {"kind": "ddim", "steps": steps, "eta": 1.0}
        given = {"model": str(tiny_ldm), "device": "cpu", "sampler": sampler, "step_size": 3}
        return kind.model_validate(given | fields)

    return make


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def again(picture, folder):
    """The picture made again in `folder`, after a check that it is the same, byte for byte."""
    made = recreate(picture, folder)
    assert made.identical
    assert not made.model_changed
    assert made.file.read_bytes() == picture.read_bytes()
    return made.file.relative_to(folder)


def relabelled(picture, path, change):
    """The same pixels in `path`, with what `change` makes of the recipe; None leaves it out."""
    with Image.open(picture) as image:
        text = change(json.loads(image.text[KEYWORD]))
        information = PngInfo()
        if text is not None:
            information.add_text(KEYWORD, text if isinstance(text, str) else json.dumps(text))
        image.save(path, pnginfo=information)
    return path


def test_a_recipe_holds_the_config_of_its_sample_alone(config, out):
    spec = config(seeds="3,7,9", save="image", batch_size=2)
    run(spec, out)
    recipe = read_recipe(out / "00001" / "image_step_3.png")
    assert (recipe.version, recipe.command) == (__version__, "ldm sample")
    alone = load_config(Sampling, None, base=recipe.config)
    assert alone == spec.model_copy(update={"seed": 7, "seeds": None, "num": 1})
    assert recipe.picture == {"kind": "image", "step": "3"}
    assert recipe.model["step"] == 3


def test_a_recipe_is_small(config, out):
    run(config(seeds=",".join(map(str, range(0, 400, 2))), num=200, steps=2, step_size=0), out)
    path, bare = out / "00100.png", out / "bare.png"
    with Image.open(path) as image:
        image.save(bare)
    assert path.stat().st_size - bare.stat().st_size < 700


@pytest.mark.parametrize("kind", ["image", "latent", "image-diff"])
def test_a_sample_of_several(config, out, tmp_path, kind):
    run(config(num=3, save="image,latent,image-diff", deterministic=True), out)
    name = "image_diff_6_minus_3.png" if kind == "image-diff" else f"{kind}_step_6.png"
    assert str(again(out / "00002" / name, tmp_path / "again")) == name


def test_final_images(config, out, tmp_path):
    run(config(num=2, step_size=0, show="x0", deterministic=True), out)
    assert str(again(out / "00001.png", tmp_path / "again")) == "00000.png"


def test_a_sample_drawn_as_part_of_a_batch(config, out, tmp_path):
    """The draws of such a sample follow those of the batches before, and the last batch is smaller."""
    run(config(num=5, batch_size=2, rng="compvis", save="image"), out)
    assert str(again(out / "00002" / "image_step_6.png", tmp_path / "again")) == "00002/image_step_6.png"
    assert len(list((tmp_path / "again").glob("0*"))) == 4
    again(out / "00004" / "image_step_6.png", tmp_path / "last")


def test_a_grid(config, out, tmp_path):
    run_grid(config(num=3, seed=5, save="image,latent-diff"), out)
    for name in ("image_step(3,6).png", "latent_diff_step(6-3).png"):
        assert str(again(out / name, tmp_path / "again")) == name


@pytest.mark.parametrize("per", ["row", "step"])
def test_sheets_and_maps_of_looking_inside(config, out, tmp_path, per):
    fields = {"num": 2, "separate": True, "deterministic": True, "overlay": {"scale_per": per}}
    explain(plan_explain(config(Explaining, **fields), out))
    again(out / "saliency_step(3,6).png", tmp_path / "sheet")
    assert recreate(out / "00001" / "attention_step_6.png", tmp_path / "alone").identical


def test_a_published_checkpoint(out, tmp_path, golden_checkpoint):
    folder = golden_checkpoint("uncond-vq").parent
    spec = {"model": str(folder), "device": "cpu", "sampler": {"kind": "ddim", "steps": 2}, "step_size": 1}
    run(Sampling.model_validate(spec | {"save": "image"}), out)
    again(out / "image_step_2.png", tmp_path / "again")


def test_a_model_that_changed_is_warned_of(config, out, tmp_path, tiny_ldm, capsys):
    model = tmp_path / "model.safetensors"
    shutil.copy(tiny_ldm, model)
    run(config(model=str(model), save="image"), out)
    content = bytearray(model.read_bytes())
    content[-3] ^= 1
    model.write_bytes(content)
    made = recreate(out / "image_step_6.png", tmp_path / "again")
    assert made.model_changed
    assert "model.safetensors is not the one that" in capsys.readouterr().err
    assert not recreate(out / "image_step_6.png", tmp_path / "moved", {"model": str(tiny_ldm)}).model_changed


def test_a_picture_that_was_edited_has_a_psnr(config, out, tmp_path):
    run(config(save="image"), out)
    path, edited = out / "image_step_6.png", tmp_path / "edited.png"
    with Image.open(path) as image:
        information = PngInfo()
        information.add_text(KEYWORD, image.text[KEYWORD])
        Image.fromarray(255 - np.asarray(image)).save(edited, pnginfo=information)
    made = recreate(edited, tmp_path / "again")
    assert not made.identical
    assert made.psnr == pytest.approx(psnr(255 - read_picture(path), read_picture(path)))


def test_psnr():
    a = np.zeros((2, 2), np.uint8)
    assert psnr(a, a) == math.inf
    assert psnr(a, a + np.uint8(255)) == 0
    assert psnr(a, a + np.uint8(1)) == pytest.approx(48.13, abs=0.01)
    assert math.isnan(psnr(a, np.zeros((3, 2), np.uint8)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda recipe: None, "does not say how it was made"),
        (lambda recipe: "{", "is not of this program"),
        (lambda recipe: "[" * 100_000, "is not of this program"),
        (lambda recipe: [recipe], "is not of this program"),
        (lambda recipe: recipe | {"config": "a"}, "is not of this program"),
        (lambda recipe: {"version": "0"}, "is not of this program"),
        (lambda recipe: recipe | {"version": "99.0"}, r"was made by uldm 99.0, and this is"),
        (lambda recipe: recipe | {"command": "ldm dance"}, "was made by `uldm ldm dance`, which cannot be run again"),
        (
            lambda recipe: recipe | {"config": {"kind": "ldm-train"}},
            "cannot be made again: .*config of `uldm ldm train`",
        ),
        (lambda recipe: recipe | {"config": recipe["config"] | {"model": "gone"}}, "again: there is no model 'gone'"),
        (lambda recipe: recipe | {"config": recipe["config"] | {"etta": 1}}, "again: .*unknown key 'etta'"),
    ],
)
def test_what_cannot_be_made_again(config, out, tmp_path, change, message):
    run(config(steps=2, step_size=2, save="image"), out)
    changed = relabelled(out / "image_step_2.png", tmp_path / "changed.png", change)
    with pytest.raises(ConfigError, match=rf"changed\.png .*{message}"):
        recreate(changed, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"text", "it is no picture, or damaged"), ("half", "it is no picture, or damaged")],
)
def test_what_is_no_picture(config, out, tmp_path, content, message):
    path = tmp_path / "odd.png"
    if content == "half":
        run(config(steps=2, step_size=2, save="image"), out)
        content = (out / "image_step_2.png").read_bytes()[:900]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"odd\.png cannot be read \({message}"):
        recreate(path, tmp_path / "again")
