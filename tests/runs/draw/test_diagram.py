"""Pictures of networks: every text has room of its own, whatever the network."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from uldm_cli.runs.architecture import Architecture, autoencoder_of, backbone_of
from uldm_cli.runs.diagram import read
from uldm_cli.runs.draw.diagram import BLOCK, architecture_figure
from uldm_cli.runs.draw.diagram_plan import in_short
from uldm_cli.runs.draw.plot import Style, save_figure
from uldm_cli.specs.models import LatentDiffusionModel

CONFIGS = Path(__file__).parents[3] / "configs"
DRAWABLE = [  # the others name an autoencoder that has to be trained first
    path for path in sorted(CONFIGS.rglob("*.yaml")) if "autoencoder: outputs/" not in path.read_text()
]
SMALL = Style(dpi=60)  # the size of letters hardly depends on it, the time does
NAMES = ("x", "outputs/" + "a very long name of a run, " * 20, "two\nlines \t \u6f22\u5b57 $a$ and $b_{")


def levels(count: int, **more: Any) -> LatentDiffusionModel:
    """An autoencoder and a U-Net of so many levels each, as wide and as large as it gets."""
    widths = [32 * 2 ** min(i, 6) for i in range(count + 1)]
    autoencoder = {
        "kind": "vqvae",
        "down_channels": widths,
        "mid_channels": [widths[-1], 2048, widths[-1]],
        "down_sample": [True] * count,
        "attn_down": [i % 2 == 1 for i in range(count)],
        "codebook_size": 1_048_576,
    }
    unet = {
        "kind": "unet",
        "channel_mult": [2 ** min(i, 5) for i in range(count)],
        "attention_resolutions": [2**i for i in range(count)],
        "use_spatial_transformer": True,
        "context_dim": 1280,
    }
    common = {"schedule": {"kind": "scaled_linear"}, "target": "x0", "scale_factor": 1.0, "image_size": 4 ** (count)}
    condition = {"conditioner": {"kind": "tokens"}, "conditioning": "hybrid", "concat_channels": 182}
    return LatentDiffusionModel.model_validate(
        {"autoencoder": autoencoder, "backbone": unet} | common | condition | more
    )


def both(model: Any, name: str) -> list[Architecture]:
    found = [autoencoder_of(model, name)]
    return [*found, backbone_of(model, name)] if isinstance(model, LatentDiffusionModel) else found


def check(figure: Figure) -> None:
    """No text meets another, or a shape, or the edge of the figure."""
    canvas = FigureCanvasAgg(figure)
    renderer = canvas.get_renderer()
    texts: list[tuple[str, Bbox]] = [
        (text.get_text(), text.get_window_extent(renderer)) for text in figure.findobj(Text) if text.get_text()
    ]
    shapes = [patch.get_window_extent(renderer) for patch in figure.findobj(Patch) if patch.get_gid() == BLOCK]
    assert len(texts) > 20
    assert len(shapes) > 8
    width, height = canvas.get_width_height()
    for words, box in texts:
        assert box.x0 > 2, words
        assert box.y0 > 2, words
        assert box.x1 < width - 2, words
        assert box.y1 < height - 2, words
        assert not any(overlap(box, shape) for shape in shapes), words
    for (one, first), (other, second) in combinations(texts, 2):
        assert not overlap(first, second), (one, other)


def overlap(one: Bbox, other: Bbox) -> bool:
    return one.x0 < other.x1 and other.x0 < one.x1 and one.y0 < other.y1 and other.y0 < one.y1


@pytest.mark.parametrize("count", range(3, 9))
def test_texts_have_room_at_any_number_of_levels(count: int) -> None:
    for architecture in both(levels(count), NAMES[count % len(NAMES)]):
        check(architecture_figure(architecture, SMALL))


@pytest.mark.parametrize(
    "name",
    [
        "ffhq256",
        "lsun_churches256",
        "cin256",
        "inpainting_big",
        "text2img-large",
        "rdm768x768",
        "vq-f4-noattn",
        "kl-f32",
    ],
)
def test_texts_have_room_in_published_models(name: str) -> None:
    for architecture in both(read(None, model=f"zoo:{name}").model, name):
        check(architecture_figure(architecture, SMALL))


@pytest.mark.parametrize("path", DRAWABLE, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_texts_have_room_in_every_config(path: Path) -> None:
    for architecture in both(read(path).model, str(path)):
        check(architecture_figure(architecture, SMALL))


@pytest.mark.parametrize(("font_size", "dpi"), [(4.0, 200), (9.0, 150), (30.0, 40)])
def test_texts_have_room_at_any_size(font_size: float, dpi: int) -> None:
    for architecture in both(levels(4), NAMES[1]):
        check(architecture_figure(architecture, Style(dpi, font_size)))


def test_very_many_blocks_stay_within_their_column() -> None:
    model = levels(3)
    wide = model.autoencoder.model_copy(update={"num_down_layers": 300})
    figure = architecture_figure(autoencoder_of(model.model_copy(update={"autoencoder": wide}), "x"), SMALL)
    check(figure)
    assert figure.get_size_inches()[0] < 16


def test_one_level_and_no_attention() -> None:
    unet = {"kind": "unet", "channel_mult": [1], "attention_resolutions": []}
    plain = {"conditioner": None, "conditioning": None, "concat_channels": 0, "image_size": 8}
    check(architecture_figure(backbone_of(levels(3, backbone=unet, **plain), "x"), SMALL))


def test_the_higher_the_larger_the_maps() -> None:
    from uldm_cli.runs.draw.diagram_plan import Ruler, make_plan

    plan = make_plan(autoencoder_of(levels(5), "x"), Ruler(SMALL))
    flows = {column.stage.side: column.flow for column in plan.columns}
    assert [flows[side] for side in sorted(flows)] == sorted(flows.values())
    assert len(set(flows.values())) == 6


def test_a_name_too_long_loses_its_middle_only() -> None:
    name = "first-" + "x" * 400 + "-last"
    figure = architecture_figure(replace(autoencoder_of(levels(3), ""), name=name), SMALL)
    title = figure.axes[0].texts[0].get_text()
    assert title.startswith("first-xx")
    assert title.endswith("xx-last")
    assert "\N{HORIZONTAL ELLIPSIS}" in title


def test_svg_keeps_its_text(tmp_path: Path) -> None:
    save_figure(architecture_figure(autoencoder_of(levels(3), "mine"), SMALL), tmp_path / "a.svg", {}, SMALL)
    content = (tmp_path / "a.svg").read_text()
    for words in (">mine<", ">1,048,576 codes<", ">residual block<", ">2048<"):
        assert words in content


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00k"), (9_996, "10.0k"), (99_960, "100k"), (999_600, "1.00M"), (274e6, "274M")],
)
def test_amounts_in_three_digits(amount: int, text: str) -> None:
    assert in_short(amount) == text
