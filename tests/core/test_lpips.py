"""LPIPS with the embedded weights, against the authors' package and their example images."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from uldm_cli import assets
from uldm_cli.core.images import decode_image
from uldm_cli.core.lpips import (
    LPIPS,
    NETS,
    Net,
    NetLinLayer,
    ScalingLayer,
    drawn_features,
    full_precision,
    spatial_average,
)
from uldm_cli.errors import UldmError, UsageError
from uldm_cli.formats.native import load_tensors

ASSETS = Path(os.environ.get("ULDM_TEST_ASSETS", ""))
needs_assets = pytest.mark.skipif(
    "ULDM_TEST_ASSETS" not in os.environ, reason="ULDM_TEST_ASSETS names no folder with lpips' images"
)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return load_tensors(assets.path("lpips-alex.safetensors"))


@pytest.fixture(scope="module")
def lpips(weights) -> LPIPS:
    return LPIPS(weights, "alex")


def of(net: Net) -> LPIPS:
    """With the trained linear weights, and for want of trained features drawn ones."""
    return LPIPS(drawn_features(net) | linear(net), net)


def linear(net: Net) -> dict[str, Tensor]:
    embedded = load_tensors(assets.path(f"lpips-{net}.safetensors"))
    return {name: value for name, value in embedded.items() if name.startswith("lin")}


def images(height: int = 64, width: int = 48, channels: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, change = torch.rand(2, 4, channels, height, width, generator=generator) * 2 - 1
    share = torch.tensor([0.0, 0.1, 0.5, 1.0]).view(4, 1, 1, 1)
    return first, (1 - share) * first + share * change


def package(lpips: LPIPS, **options: object) -> torch.nn.Module:
    """The authors' class over the same features; its linear weights come with the package."""
    from lpips import LPIPS as Theirs

    theirs = Theirs(net=lpips.net, pnet_rand=True, verbose=False, **options)
    features = lpips.features.state_dict()
    theirs.net.load_state_dict({name: features[name.split(".", 1)[1]] for name in theirs.net.state_dict()})
    return theirs


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision", "ignore::UserWarning:lpips")
@pytest.mark.parametrize("net", NETS)
def test_equals_the_authors_package(net: Net, lpips: LPIPS) -> None:
    """Its linear weights come with the package, so those that are embedded are checked too."""
    ours = lpips if net == "alex" else of(net)
    distances, maps = package(ours), package(ours, spatial=True)
    for height, width in ((64, 48), (31, 31), (33, 70)):
        pair = images(height, width)
        with torch.no_grad():
            expected, expected_map = distances(*pair), maps(*pair)
            torch.testing.assert_close(ours(*pair), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(ours(*pair, spatial=True), expected_map, rtol=1e-5, atol=1e-5)
        assert ours(*pair).shape == (4, 1, 1, 1)
        assert expected_map.shape == (4, 1, height, width)
        assert expected[3] > 0.05


@needs_assets
@pytest.mark.filterwarnings("ignore::UserWarning:torchvision", "ignore::UserWarning:lpips")
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_equals_the_authors_package_with_trained_features(net: Net, lpips: LPIPS) -> None:
    """On their photographs, and the spatial map too."""
    ours = lpips if net == "alex" else LPIPS(vgg_features() | linear("vgg"))
    pair = [torch.cat([a, b]) for a, b in zip(example("p0"), example("p1"), strict=True)]
    with torch.no_grad():
        torch.testing.assert_close(ours(*pair), package(ours)(*pair), rtol=1e-5, atol=1e-5)
        expected = package(ours, spatial=True)(*pair)
        torch.testing.assert_close(ours(*pair, spatial=True), expected, rtol=1e-5, atol=1e-5)
    assert expected.max() > 0.5


@needs_assets
@pytest.mark.parametrize(("name", "distance"), [("p0", 0.7219), ("p1", 0.1376)])
def test_the_authors_example(lpips: LPIPS, name: str, distance: float) -> None:
    assert lpips(*example(name)).item() == pytest.approx(distance, abs=1e-4)


@needs_assets
@pytest.mark.parametrize(("name", "distance"), [("p0", 0.5686), ("p1", 0.4217)])
def test_the_authors_example_with_vgg(name: str, distance: float) -> None:
    assert LPIPS(vgg_features() | linear("vgg"))(*example(name)).item() == pytest.approx(distance, abs=1e-4)


def vgg_features() -> dict[str, Tensor]:
    return load_tensors(ASSETS / "weights" / "vgg16-imagenet-features.safetensors")


def example(name: str) -> list[Tensor]:
    return [decode_image(ASSETS / "data" / "lpips" / f"ex_{n}.png").float()[None] / 127.5 - 1 for n in ("ref", name)]


@pytest.mark.parametrize("net", NETS)
def test_the_smallest_images(net: Net) -> None:
    lpips = of(net)
    least = lpips.backbone.smallest
    a, b = images(least, least + 3)
    assert torch.isfinite(lpips(a, b)).all()
    with pytest.raises(UsageError, match=f"of {least} pixels a side or more, not {least + 3}x{least - 1}"):
        lpips(a[:, :, 1:], b[:, :, 1:])


@pytest.mark.parametrize("net", NETS)
def test_vectors_are_as_far_apart_as_the_images(net: Net) -> None:
    lpips = of(net)
    a, b = images(32, 40)
    apart = (lpips.embed(a) - lpips.embed(b)).square().sum(1)
    torch.testing.assert_close(apart, lpips(a, b).flatten(), rtol=1e-4, atol=1e-6)


def test_full_precision_ends_with_its_block() -> None:
    before = torch.backends.cudnn.allow_tf32
    with full_precision():
        assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.enabled
    assert torch.backends.cudnn.allow_tf32 == before


def test_drawn_features_are_the_same_every_time() -> None:
    one, two = drawn_features("squeeze"), drawn_features("squeeze")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_images_from_0_to_1(lpips: LPIPS) -> None:
    a, b = images()
    torch.testing.assert_close(lpips(a / 2 + 0.5, b / 2 + 0.5, normalize=True), lpips(a, b), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("worst", "normalize"), [(255.0, False), (-1.0, True), (float("nan"), False)])
def test_values_outside_of_the_range_are_refused(lpips: LPIPS, weights, worst: float, normalize: bool) -> None:
    a, b = (x / 2 + 0.5 for x in images())
    b[2, 1, 0, 0] = worst
    with pytest.raises(UsageError, match=r"LPIPS was given values from .*, and takes -?\d to 1"):
        lpips(a, b, normalize=normalize)
    assert LPIPS(weights, "alex", checked=False)(a, b).shape == (4, 1, 1, 1)


def test_images_of_different_shapes_are_refused(lpips: LPIPS) -> None:
    a, b = images()
    with pytest.raises(UsageError, match="images of one shape"):
        lpips(a, b[:, :1])


def test_is_symmetric_and_zero_for_equal_images(lpips: LPIPS) -> None:
    a, b = images()
    distances = lpips(a, b).flatten()
    assert distances[0] == 0
    assert (distances.diff() > 0).all()  # the more is changed, the farther
    torch.testing.assert_close(lpips(b, a).flatten(), distances)


def test_grey_is_colour_with_equal_channels(lpips: LPIPS) -> None:
    a, b = images(channels=1)
    torch.testing.assert_close(lpips(a, b), lpips(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)))


def test_pairs_do_not_mix(lpips: LPIPS) -> None:
    a, b = images()
    alone = torch.cat([lpips(a[i : i + 1], b[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(lpips(a, b), alone, rtol=1e-4, atol=1e-6)


def test_gradients_reach_the_images_and_not_the_weights(lpips: LPIPS) -> None:
    a, b = images()
    a.requires_grad_()
    lpips(a, b).sum().backward()
    assert a.grad[1:].any()
    assert all(p.grad is None and not p.requires_grad for p in lpips.parameters())
    assert not lpips.training


def test_gradients_are_finite_where_no_feature_is_left() -> None:
    """As on an even background: all ReLUs may be 0 there, and the slope of a root at 0 is infinite."""
    weights = drawn_features("squeeze") | linear("squeeze")
    dead = {name: value - 1000 * (name == "features.0.bias") for name, value in weights.items()}
    a, b = (image.requires_grad_() for image in images(32, 32))
    distance = LPIPS(dead, "squeeze")(a, b).sum()
    distance.backward()
    assert torch.isfinite(distance)
    assert not a.grad.any()


def test_low_precisions_keep_the_order_and_float64_is_kept(lpips: LPIPS, weights) -> None:
    a, b = images()
    with torch.autocast("cpu", torch.bfloat16):
        low = lpips(a, b).flatten()
    torch.testing.assert_close(low, lpips(a, b).flatten(), rtol=0.05, atol=0.01)
    high = LPIPS(weights, "alex").double()(a.double(), b.double())
    assert high.dtype == torch.float64
    torch.testing.assert_close(high.float(), lpips(a, b), rtol=1e-4, atol=1e-6)


def test_its_parts() -> None:
    """A mean over places; ImageNet's scale; a weighted sum over channels, with weights of the authors' name."""
    x = torch.arange(24.0).view(2, 3, 2, 2)
    assert spatial_average(x)[1, 2, 0, 0] == x[1, 2].mean()
    grey = ScalingLayer()(torch.zeros(1, 3, 1, 1)).flatten()
    torch.testing.assert_close(grey, torch.tensor([0.030 / 0.458, 0.088 / 0.448, 0.188 / 0.450]))
    layer = NetLinLayer(3)
    layer.load_state_dict({"model.1.weight": torch.tensor([1.0, 0.0, 2.0]).view(1, 3, 1, 1)})
    torch.testing.assert_close(layer(x), x[:, :1] + 2 * x[:, 2:])


@pytest.mark.parametrize("name", ["features.3.bias", "lin4.model.1.weight"])
def test_a_missing_weight_is_an_error(weights: dict[str, Tensor], name: str) -> None:
    kept = {key: value for key, value in weights.items() if key != name}
    with pytest.raises(UldmError, match="the LPIPS weights do not fit") as caught:
        LPIPS(kept, "alex")
    assert name.removesuffix(".model.1.weight") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_weight_of_another_shape_or_too_many_are_errors(weights: dict[str, Tensor]) -> None:
    with pytest.raises(UldmError, match=r"features\.0\.bias"):
        LPIPS(weights | {"features.0.bias": torch.zeros(63)}, "alex")
    with pytest.raises(UldmError, match="classifier"):
        LPIPS(weights | {"classifier.1.weight": torch.zeros(1)}, "alex")
