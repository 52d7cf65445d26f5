"""The patch discriminator: shapes, what a logit sees and start values."""

import pytest
import torch
from torch import Tensor, nn

from uldm_cli.core.discriminator import BatchNorm2d, PatchGAN, receptive_field
from uldm_cli.errors import UsageError

PUBLISHED = {
    "channels": (64, 128, 256, 512),
    "kernels": (4,) * 5,
    "strides": (2, 2, 2, 1, 1),
    "paddings": (1,) * 5,
}
NARROW = {"channels": (4, 4, 4), "kernels": (4,) * 4, "strides": (2, 2, 2, 1), "paddings": (1,) * 4}


def images(count: int = 2, channels: int = 3, size: int = 64) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("lists", "side", "field"), [({}, 7, 46), (PUBLISHED, 6, 70)])
def test_logits_and_receptive_field(lists, side, field) -> None:
    discriminator = PatchGAN(**lists)
    assert discriminator(images()).shape == (2, 1, side, side)
    assert discriminator.receptive_field == field


def test_logits_of_256_pixels_are_the_published_ones() -> None:
    assert PatchGAN(**PUBLISHED)(images(1, size=256)).shape == (1, 1, 30, 30)


@pytest.mark.parametrize(
    ("kernels", "strides"), [((4, 4, 4, 4), (2, 2, 2, 1)), ((4,) * 5, (2, 2, 2, 1, 1)), ((3, 5, 1), (1, 3, 2))]
)
def test_a_logit_sees_as_much_as_its_gradient_reaches(kernels, strides) -> None:
    """In evaluation, where the normalisation does not look at the rest of the batch."""
    torch.manual_seed(0)
    layers = len(kernels)
    discriminator = PatchGAN(1, (4,) * (layers - 1), kernels, strides, (1,) * layers).double().eval()
    x = images(1, 1, 128).double().requires_grad_()
    logits = discriminator(x)
    middle = logits.shape[2] // 2
    logits[0, 0, middle, middle].backward()
    rows = x.grad[0, 0].abs().sum(1).nonzero().flatten()
    assert (rows[0] > 0, rows[-1] < 127) == (True, True)  # else the border would cut it off
    assert len(rows) == rows[-1] - rows[0] + 1 == receptive_field(kernels, strides)


def test_layers_are_the_published_ones_by_name_and_shape() -> None:
    """`loss.discriminator.main.*` of the published checkpoints."""
    shapes = {"0.weight": (64, 3, 4, 4), "0.bias": (64,), "11.weight": (1, 512, 4, 4), "11.bias": (1,)}
    for conv, norm, before, width in ((2, 3, 64, 128), (5, 6, 128, 256), (8, 9, 256, 512)):
        shapes[f"{conv}.weight"] = (width, before, 4, 4)  # and no bias
        shapes |= {f"{norm}.{name}": (width,) for name in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"{norm}.num_batches_tracked"] = ()
    found = {name: tuple(value.shape) for name, value in PatchGAN(**PUBLISHED).state_dict().items()}
    assert found == {f"main.{name}": shape for name, shape in shapes.items()}


def test_layers_in_their_order() -> None:
    kinds = [type(layer) for layer in PatchGAN(1).main]
    inner = [nn.Conv2d, BatchNorm2d, nn.LeakyReLU]
    assert kinds == [nn.Conv2d, nn.LeakyReLU, *inner, *inner, nn.Conv2d]
    assert {layer.negative_slope for layer in PatchGAN(1).main if isinstance(layer, nn.LeakyReLU)} == {0.2}
    assert PatchGAN(5)(images(channels=5)).shape == (2, 1, 7, 7)


def test_start_values() -> None:
    torch.manual_seed(0)
    for layer in PatchGAN(**PUBLISHED).main:
        if isinstance(layer, nn.Conv2d):
            error = 4 * 0.02 / layer.weight.numel() ** 0.5
            assert abs(layer.weight.mean().item()) < error
            assert layer.weight.std().item() == pytest.approx(0.02, abs=error)
        elif isinstance(layer, nn.BatchNorm2d):
            assert layer.weight.mean().item() == pytest.approx(1, abs=0.01)
            assert layer.weight.std().item() == pytest.approx(0.02, abs=0.005)
            assert not layer.bias.any()


@pytest.mark.parametrize("name", ["kernels", "strides", "paddings"])
def test_lists_of_different_lengths_are_refused(name) -> None:
    with pytest.raises(UsageError, match=f"{name} have 3 entries. Its 3 channels need 4: one a convolution"):
        PatchGAN(3, **NARROW | {name: (1, 1, 1)})
