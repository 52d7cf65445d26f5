"""LPIPS with the embedded weights, against the authors' package and their example images."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from uldm_cli import assets
from uldm_cli.core.images import decode_image
from uldm_cli.core.lpips import LPIPS
from uldm_cli.errors import UldmError
from uldm_cli.formats.native import load_tensors


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return load_tensors(assets.path("lpips-alex.safetensors"))


@pytest.fixture(scope="module")
def lpips(weights) -> LPIPS:
    return LPIPS(weights)


def images(height: int = 64, width: int = 48, channels: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, change = torch.rand(2, 4, channels, height, width, generator=generator) * 2 - 1
    share = torch.tensor([0.0, 0.1, 0.5, 1.0]).view(4, 1, 1, 1)
    return first, (1 - share) * first + share * change


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision", "ignore::UserWarning:lpips")
def test_equals_the_authors_package(lpips: LPIPS, weights: dict[str, Tensor]) -> None:
    """Its linear layers come with the package, so those that are embedded are checked too."""
    from lpips import LPIPS as Theirs

    theirs = Theirs(net="alex", pnet_rand=True, verbose=False)
    names = {name: f"features.{name.split('.', 1)[1]}" for name in theirs.net.state_dict()}
    theirs.net.load_state_dict({name: weights[ours].float() for name, ours in names.items()})
    for height, width in ((64, 48), (31, 31), (33, 100)):
        pair = images(height, width)
        with torch.no_grad():
            ours, expected = lpips(*pair), theirs(*pair)
        assert ours.shape == (4, 1, 1, 1)
        assert expected[3] > 0.05
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif("ULDM_TEST_ASSETS" not in os.environ, reason="ULDM_TEST_ASSETS names no folder with lpips' images")
@pytest.mark.parametrize(("name", "distance"), [("p0", 0.7219), ("p1", 0.1376)])
def test_the_authors_example(lpips: LPIPS, name: str, distance: float) -> None:
    folder = Path(os.environ["ULDM_TEST_ASSETS"]) / "data" / "lpips"
    reference, other = (decode_image(folder / f"ex_{n}.png").float()[None] / 127.5 - 1 for n in ("ref", name))
    assert lpips(reference, other).item() == pytest.approx(distance, abs=1e-3)


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


@pytest.mark.parametrize("name", ["features.3.bias", "lin4.model.1.weight"])
def test_a_missing_weight_is_an_error(weights: dict[str, Tensor], name: str) -> None:
    kept = {key: value for key, value in weights.items() if key != name}
    with pytest.raises(UldmError, match="the LPIPS weights do not fit") as caught:
        LPIPS(kept)
    assert name.removesuffix(".model.1.weight") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_weight_of_another_shape_or_too_many_are_errors(weights: dict[str, Tensor]) -> None:
    with pytest.raises(UldmError, match=r"features\.0\.bias"):
        LPIPS(weights | {"features.0.bias": torch.zeros(63)})
    with pytest.raises(UldmError, match="classifier"):
        LPIPS(weights | {"classifier.1.weight": torch.zeros(1)})
