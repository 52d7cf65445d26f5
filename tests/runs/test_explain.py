"""Looking at sampling, from the config to the files, with a very small model."""

import json
import re
from base64 import b64decode
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

from uldm_cli import registry
from uldm_cli.core.attention_maps import View, layer_maps, mean_map
from uldm_cli.core.noise import PerSampleNoise
from uldm_cli.core.saliency import box_mean, decoder, eps_energy, saliency, x0_energy
from uldm_cli.errors import UsageError
from uldm_cli.formats.checkpoint import Header
from uldm_cli.formats.native import load_tensors, read_header, save
from uldm_cli.runs.draw.explain import WIDEST, Bars, draw_sheet, enlarged, framed, layout
from uldm_cli.runs.explain import Pictures, Seen, _in_float32, run_explain
from uldm_cli.runs.explain_plan import plan_explain
from uldm_cli.runs.grid import run_grid
from uldm_cli.runs.models import load_latent_diffusion, resolve
from uldm_cli.runs.sample import plan_sample
from uldm_cli.runs.sheets import sheet_layout
from uldm_cli.runs.trajectory import walk
from uldm_cli.specs.explaining import Explaining
from uldm_cli.specs.load import load_config
from uldm_cli.specs.sampling import Sampling


@pytest.fixture
def common(tiny_ldm):
    return {"model": str(tiny_ldm), "device": "cpu", "sampler": {"kind": "ddim", "steps": 4}, "step_size": 2}


@pytest.fixture
def config(common):
    return lambda **fields: Explaining.model_validate(common | fields)


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def text_of(path):
    with Image.open(path) as image:
        return image.text


def steps_of(spec):
    """The model, and the steps of the first sample."""
    model = load_latent_diffusion(resolve(spec.model))
    return model, list(walk(model, spec.sampler, PerSampleNoise([spec.seed], model.latent_shape)))


def test_three_sheets_are_written_by_default(config, tmp_path):
    result = run_explain(config(), tmp_path)
    sheets = [f"{kind}_step(2,4).png" for kind in ("attention", "image", "saliency")]
    assert names(tmp_path) == sorted([*sheets, "explain.yaml"])
    assert [kind for kind, _ in result.files] == ["image", "saliency", "attention"]
    assert load_config(Explaining, tmp_path / "explain.yaml") == result.plan.spec
    about = text_of(tmp_path / sheets[0])
    assert about["title"].startswith("tiny.safetensors, DDIM, 4 steps, eta 1, seed 1125, attention received, ")
    assert about["seeds"] == "1125"


@pytest.mark.parametrize("kind", ["image", "saliency", "attention"])
def test_each_is_written_only_when_asked_for(config, tmp_path, kind):
    run_explain(config(save=kind), tmp_path)
    assert names(tmp_path) == sorted(["explain.yaml", f"{kind}_step(2,4).png"])


@pytest.mark.parametrize("fields", [{}, {"rng": "compvis"}, {"sampler": {"kind": "plms", "steps": 4}}, {"show": "x0"}])
def test_looking_changes_no_sample(config, common, tmp_path, fields):
    """Bit for bit, with every way of looking, at noise that later steps and samples depend on."""
    samples = {"num": 3, "batch_size": 2, **fields}
    ways = {"saliency": {"method": "smoothgrad", "samples": 2}, "attention": {"rollout": True}}
    run_explain(config(**samples, **ways, separate=True), tmp_path / "explain")
    run_grid(Sampling.model_validate(common | samples | {"save": "image"}), tmp_path / "grid")
    grid = pixels(tmp_path / "grid" / "image_step(2,4).png")
    for row in range(3):
        for column, step in enumerate((2, 4)):
            top, left = len(grid) - (3 - row) * 34, 2 + column * 34
            cell = grid[top : top + 32, left : left + 32]
            assert np.array_equal(pixels(tmp_path / "explain" / f"{row:05}" / f"image_step_{step}.png"), cell)


@pytest.mark.parametrize("asked", [{}, {"target": "eps"}, {"box": "4,8,12,6"}, {"method": "integrated", "samples": 3}])
def test_saliency_is_that_of_what_the_step_saw(config, tmp_path, asked):
    spec = config(saliency=asked, save="saliency", save_arrays=True)
    run_explain(spec, tmp_path)
    found = load_file(tmp_path / "saliency.safetensors")
    assert found.keys() == {"2/0", "4/0"}
    model, steps = steps_of(spec)
    scalar = eps_energy if asked.get("target") else x0_energy
    if "box" in asked:
        scalar = box_mean(decoder(model), (4, 8, 12, 6), (32, 32))
    how = {"method": spec.saliency.method, "samples": 3, "seed": spec.seed}
    for n in (2, 4):
        step = steps[n - 1]
        expected = saliency(model.denoiser, step.x_in, step.t, scalar, **how)[0].numpy()
        assert np.allclose(found[f"{n}/0"], expected, rtol=1e-4, atol=1e-6 * expected.max())
        assert expected.min() >= 0
        assert expected.max() > expected.min()


def test_attention_is_that_of_what_the_step_saw(config, tmp_path):
    spec = config(attention={"query": "20,4", "head": 0}, save="attention", save_arrays=True)
    run_explain(spec, tmp_path)
    found = load_file(tmp_path / "attention.safetensors")
    model, steps = steps_of(spec)
    view = View(head=0, query=(20, 4), image=(32, 32))
    for n in (2, 4):
        step = steps[n - 1]
        maps = layer_maps(model.denoiser.backbone, lambda: model.denoiser(step.x_in, step.t), (8, 8), view)  # noqa: B023
        expected = mean_map(maps)[0].numpy()
        assert np.allclose(found[f"{n}/0"], expected * expected.size, rtol=1e-4)
        assert found[f"{n}/0"].mean() == pytest.approx(1, abs=1e-5)


def test_a_sample_s_maps_do_not_depend_on_its_batch(config, tmp_path):
    smooth = {"saliency": {"method": "smoothgrad", "samples": 2}, "save": "saliency", "save_arrays": True}
    for size in (1, 2):
        run_explain(config(num=2, batch_size=size, **smooth), tmp_path / str(size))
    one, two = (load_file(tmp_path / str(size) / "saliency.safetensors") for size in (1, 2))
    assert one.keys() == two.keys() == {"2/0", "2/1", "4/0", "4/1"}
    assert all(np.allclose(one[name], two[name], rtol=1e-3) for name in one)
    assert not np.allclose(one["2/0"], one["2/1"])


def test_arrays_say_what_they_are(config, tmp_path):
    run_explain(config(save_arrays=True, num=2), tmp_path)
    with safe_open(tmp_path / "attention.safetensors", "np") as file:
        about = file.metadata()
    assert (about["names"], about["seeds"]) == ("step/sample", "1125,1126")
    assert json.loads(about["sampler"])["steps"] == 4
    assert "1 is an even share" in about["title"]


def test_separate_pictures_keep_their_scale(config, tmp_path):
    run_explain(config(num=2, separate=True, save_arrays=True, overlay={"scale_per": "row"}), tmp_path / "row")
    run_explain(config(num=2, separate=True, overlay={"scale_per": "step"}), tmp_path / "step")
    maps = load_file(tmp_path / "row" / "saliency.safetensors")

    def scale(folder, sample, step):
        about = text_of(tmp_path / folder / f"0000{sample}" / f"saliency_step_{step}.png")
        assert (about["step"], about["seed"]) == (str(step), str(1125 + sample))
        return [float(end) for end in about["scale"].split(" to ")]

    def ends(*keys):
        values = np.stack([maps[key] for key in keys])
        return pytest.approx([values.min(), values.max()], rel=1e-6)

    assert scale("row", 0, 2) == scale("row", 0, 4) == ends("2/0", "4/0")
    assert scale("row", 1, 4) == ends("2/1", "4/1")
    assert scale("step", 0, 2) == scale("step", 1, 2) == ends("2/0", "2/1")
    assert scale("step", 1, 4) == ends("4/0", "4/1")


def test_what_is_bright_in_a_corner_of_the_map_is_bright_there_in_the_picture(config, tmp_path):
    plan = plan_explain(config(overlay={"mode": "color", "colormap": "gray"}), tmp_path)
    corner = np.zeros((8, 8), np.float32)
    corner[0, 7] = 1
    black = np.zeros((32, 32, 3), np.uint8)
    pictures = Pictures(plan, "attention", Seen({0: [black, black]}, {"attention": {0: [corner, 0 * corner]}}))
    alone = pictures.alone(0, 0)
    assert alone.shape == (32, 32, 3)
    assert (alone[0, 31] == 255).all()
    assert not alone[8:].any()
    assert not alone[:, :24].any()
    assert not pictures.alone(0, 1).any()


@pytest.mark.parametrize("per", ["row", "step"])
def test_flat_maps_are_drawn_flat(config, tmp_path, per):
    plan = plan_explain(config(overlay={"mode": "color", "scale_per": per}), tmp_path)
    flat, grey = np.full((8, 8), 3, np.float32), np.full((32, 32, 3), 128, np.uint8)
    pictures = Pictures(plan, "saliency", Seen({0: [grey, grey]}, {"saliency": {0: [flat, flat]}}))
    alone = pictures.alone(0, 1)
    assert len(np.unique(alone.reshape(-1, 3), axis=0)) == 1
    assert pictures.sheet(plan.title("saliency")).shape[2] == 3
    assert pictures.scale_text(0, 1) == {"scale": "3 to 3"}


def test_many_steps_have_a_short_name_and_go_on_below(config, tmp_path):
    run_explain(config(sampler={"kind": "ddim", "steps": 100}, step_size=1, save="image"), tmp_path)
    assert names(tmp_path) == ["explain.yaml", "image_step(1..100x1).png"]
    assert pixels(tmp_path / "image_step(1..100x1).png").shape[1] < WIDEST + 100
    assert len(layout((64, 64), 1000).lines) > 10


@pytest.mark.parametrize(("size", "columns"), [((32, 32), 5), ((64, 64), 1), ((48, 96), 40), ((512, 512), 20)])
def test_a_layout_is_neither_too_small_to_read_nor_too_wide(size, columns):
    how = layout(size, columns)
    assert min(how.height, how.width) >= 64
    assert how.across * how.width <= WIDEST
    assert [column for line in how.lines for column in line] == list(range(columns))
    assert (how.height, how.width) == (size[0] * how.factor, size[1] * how.factor)


def test_every_picture_stands_in_the_sheet(tmp_path):
    how = layout((32, 32), 5)
    rows = [[np.full((32, 32), 40 * row + 9 * column, np.uint8) for column in range(5)] for row in range(2)]
    bars = Bars("step", [(0.0, 1.0)] * 5, "viridis")
    sheet = draw_sheet(how, [[enlarged(cell, how.factor) for cell in row] for row in rows], range(5), ["a"] * 90, bars)
    for value in (9, 40, 76):
        assert (sheet == value).all(2).sum() >= how.height * how.width


def test_a_frame_lies_around_the_pixels_that_are_meant():
    grey = np.full((60, 80, 3), 99, np.uint8)
    drawn = framed(grey, (3, 2, 5, 4), 6)
    assert (drawn[12:36, 18:48] == 99).all()
    for edge in (drawn[10, 16:50], drawn[37, 16:50], drawn[10:38, 16], drawn[10:38, 49]):
        assert (edge == 255).all()
    assert not drawn[[9, 11, 36, 38], 17:49].any()
    assert (framed(grey, (0, 0, 13, 10), 6)[:60, :78] == 99).all()


def test_resuming_computes_nothing_that_is_there(config, tmp_path):
    assert run_explain(config(), tmp_path, resume=True).computed == 1
    assert run_explain(config(), tmp_path, resume=True).computed == 0
    (tmp_path / "saliency_step(2,4).png").unlink()
    assert run_explain(config(), tmp_path, resume=True).computed == 1


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"saliency": {"box": "20,0,13,4"}}, "--saliency-box 20,0,13,4 reaches beyond the image. Images are 32 x 32"),
        ({"attention": {"query": "0,32"}}, "--attention-query 0,32 is outside the image"),
        ({"attention": {"resolution": 16}}, "--attention-resolution 16: there are no such maps. There are: 4x4"),
        ({"attention": {"layer": "input_blocks.0"}}, "input_blocks"),
        ({"attention": {"head": 9}}, "head"),
        ({"num": 5000, "step_size": 1}, "million pixels"),
    ],
)
def test_what_the_model_or_image_does_not_have_is_refused(config, tmp_path, fields, says):
    with pytest.raises(UsageError, match=says) as caught:
        run_explain(config(**fields), tmp_path / "out")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


@pytest.fixture
def no_attention(tiny_ldm, tmp_path, monkeypatch):
    """A model whose backbone, a plugin's, has no attention."""
    (tmp_path / "plain_backbone.py").write_text(
        "from typing import Literal\n"
        "from uldm_cli.specs.backbones import Backbone\n"
        "class Plain(Backbone):\n"
        "    kind: Literal['plain'] = 'plain'\n"
        "    def build(self, in_channels, out_channels):\n"
        "        from torch import nn\n"
        "        class Network(nn.Conv2d):\n"
        "            def forward(self, x, t):\n"
        "                return super().forward(x)\n"
        "        return Network(in_channels, out_channels, 3, padding=1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.BUILTIN["backbones"], "plain", "plain_backbone:Plain")
    header = read_header(tiny_ldm)
    generator = torch.Generator().manual_seed(0)
    channels = header.config["autoencoder"]["z_channels"]
    backbone = {"weight": torch.randn(channels, channels, 3, 3, generator=generator), "bias": torch.zeros(channels)}
    parts = {"autoencoder": load_tensors(tiny_ldm, "autoencoder."), "backbone": backbone}
    path = tmp_path / "plain.safetensors"
    save(path, Header("latent-diffusion", {**header.config, "backbone": {"kind": "plain"}}), parts)
    return str(path)


def test_attention_is_left_out_where_there_is_none(config, no_attention, tmp_path, capsys):
    result = run_explain(config(model=no_attention), tmp_path / "out")
    assert names(tmp_path / "out") == ["explain.yaml", "image_step(2,4).png", "saliency_step(2,4).png"]
    assert "has no attention: it is left out" in capsys.readouterr().err
    again = load_config(Explaining, tmp_path / "out" / "explain.yaml")
    assert plan_explain(again, tmp_path / "out").spec == result.plan.spec
    assert plan_explain(config(model=no_attention), tmp_path / "out").folder == tmp_path / "out"


@pytest.mark.parametrize("fields", [{"save": "attention"}, {"attention": {"rollout": True}}])
def test_attention_that_is_asked_for_has_to_be_there(config, no_attention, tmp_path, fields):
    with pytest.raises(UsageError, match=r"has no attention\. It has: image, saliency"):
        run_explain(config(model=no_attention, **fields), tmp_path / "out")


def test_a_rounded_model_is_looked_at_in_float32(config, tmp_path):
    model = load_latent_diffusion(resolve(config().model), precision="bf16")
    looked = _in_float32(model, compiled=False)
    assert {p.dtype for p in looked.parameters()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    run_explain(config(precision="bf16", save_arrays=True, saliency={"box": "0,0,9,9"}), tmp_path)
    for kind in ("saliency", "attention"):
        assert all(np.isfinite(values).all() for values in load_file(tmp_path / f"{kind}.safetensors").values())


def test_a_compiled_model_is_looked_at_uncompiled(config, monkeypatch):
    def compiled(*args):
        raise AssertionError("this is what was compiled")

    model = load_latent_diffusion(resolve(config().model))
    looked = _in_float32(model, compiled=True)
    backbone = model.denoiser.backbone
    monkeypatch.setattr(backbone, "_compiled_call_impl", compiled)
    twin = _in_float32(model, compiled=True)
    x = torch.zeros(1, *model.latent_shape)
    assert torch.equal(twin.denoiser(x, 5).eps, looked.denoiser(x, 5).eps)
    assert all(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    with pytest.raises(AssertionError, match="compiled"):
        model.denoiser(x, 5)


@pytest.mark.parametrize("per", ["row", "step"])
def test_a_sheet_for_print_keeps_its_text_and_its_pixels(config, tmp_path, per):
    spec = config(sheet={"format": "svg"}, overlay={"scale_per": per}, num=2, separate=True)
    result = run_explain(spec, tmp_path)
    assert "saliency_step(2,4).svg" in names(tmp_path)
    assert names(tmp_path / "00000") == [
        f"{kind}_step_{n}.png" for kind in ("attention", "image", "saliency") for n in (2, 4)
    ]
    svg = (tmp_path / "saliency_step(2,4).svg").read_text()
    texts = re.findall(r"<text[^>]*>([^<]*)", svg)
    assert {"step 2", "step 4"} < set(texts)
    assert ", ".join(texts).startswith("tiny.safetensors, DDIM, 4 steps, eta 1")
    assert len(texts) >= 7  # the ends of two scales, too
    pictures = [Image.open(BytesIO(b64decode(part))) for part in re.findall(r"base64,([^\"]*)", svg)]
    how = sheet_layout(result.plan, 2)
    assert [picture.size for picture in pictures].count((how.width, how.height)) == 4
    image = (tmp_path / "image_step(2,4).svg").read_text()
    first = Image.open(BytesIO(b64decode(re.search(r"base64,([^\"]*)", image)[1]))).convert("RGB")
    alone = enlarged(pixels(tmp_path / "00000" / "image_step_2.png"), how.factor)
    assert np.array_equal(np.asarray(first), alone)


def test_a_pdf_and_a_grid_of_it(config, common, tmp_path):
    run_explain(config(sheet={"format": "pdf"}, save="image"), tmp_path / "explain")
    spec = common | {"sheet": {"format": "pdf"}, "save": "image,latent-diff"}
    run_grid(Sampling.model_validate(spec), tmp_path / "grid")
    found = [tmp_path / "explain" / "image_step(2,4).pdf", *(tmp_path / "grid").glob("*.pdf")]
    assert len(found) == 3
    assert all(path.read_bytes().startswith(b"%PDF") for path in found)


def test_finer_sheets_are_as_large_in_print(config, tmp_path):
    sizes = []
    for dpi in (150, 300):
        run_explain(config(sheet={"dpi": dpi}, save="image"), tmp_path / str(dpi))
        with Image.open(tmp_path / str(dpi) / "image_step(2,4).png") as sheet:
            assert sheet.info["dpi"] == pytest.approx((dpi, dpi), abs=0.02)
            sizes.append(sheet.width)
    assert sizes[1] == pytest.approx(2 * sizes[0], abs=4)


def test_labels_as_large_as_asked_for(common):
    assert layout((64, 64), 4, dpi=300, font_size=12).font_size == 50
    assert layout((64, 64), 4, font_size=12).width == layout((64, 64), 4).width


def test_a_grid_for_print_has_a_title(common, tmp_path):
    spec = common | {"sheet": {"format": "svg"}, "save": "image,image-diff"}
    run_grid(Sampling.model_validate(spec), tmp_path)
    svg = (tmp_path / "image_diff_step(4-2).svg").read_text()
    assert "differences of the decoded state from -" in svg
    assert ">step 4-2<" in svg


def test_samples_alone_are_no_sheet(common, tmp_path):
    with pytest.raises(UsageError, match=r"sheet: .*Use `uldm ldm grid`"):
        plan_sample(Sampling.model_validate(common | {"sheet": {"format": "svg"}}), tmp_path)
