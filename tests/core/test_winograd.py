"""Convolutions with fewer multiplications, against PyTorch's in float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uldm_cli.core import winograd
from uldm_cli.core.blocks import Conv2d, Upsample
from uldm_cli.core.memory import kept_for_backward, kept_transformed, shapes_only

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch is without MKL here")

Size = tuple[int, int, int, int, int]


def trained(size: Size, *, bias: bool = True, scale: int = 1) -> tuple[Conv2d, Tensor, Tensor]:
    """A layer, its input and a gradient of its output, if it doubles or not."""
    samples, inputs, outputs, height, width = size
    torch.manual_seed(0)
    layer = Conv2d(inputs, outputs, 3, padding=1, bias=bias)
    x = torch.randn(samples, inputs, height, width)
    return layer, x.requires_grad_(), torch.randn(samples, outputs, scale * height, scale * width)


def results(layer: nn.Conv2d, x: Tensor, upstream: Tensor, scale: int = 1) -> list[Tensor]:
    """The output, and the gradients of the input and of the parameters."""
    out = layer(x, scale=scale) if isinstance(layer, Conv2d) else layer(F.interpolate(x, scale_factor=scale))
    return [out.detach(), *torch.autograd.grad(out, [x, *layer.parameters()], upstream)]


def exact(layer: nn.Conv2d, x: Tensor, upstream: Tensor, scale: int = 1) -> list[Tensor]:
    """The same by PyTorch in float64."""
    double = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1, bias=layer.bias is not None).double()
    double.load_state_dict(layer.state_dict())
    return results(double, x.detach().double().requires_grad_(), upstream.double(), scale)


def agree(found: list[Tensor], expected: list[Tensor]) -> bool:
    errors = [float((a - b).abs().max() / b.std()) for a, b in zip(found, expected, strict=True)]
    assert all(a.dtype == torch.float32 for a in found)
    return max(errors) < 2e-4


SIZES = [(8, 64, 64, 8, 8), (9, 128, 64, 4, 16), (3, 64, 96, 12, 20), (32, 256, 192, 4, 4), (2, 96, 96, 64, 64)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_the_convolution_and_its_gradients(size: Size) -> None:
    """Wide and high, with patches that are kept, and in the last case made anew."""
    layer, x, upstream = trained(size)
    assert winograd.fits(x, layer)
    assert agree(results(layer, x, upstream), exact(layer, x, upstream))


@pytest.mark.parametrize("size", [*SIZES, (16, 64, 64, 2, 6), (16, 64, 96, 6, 2)], ids=str)
def test_of_a_doubled_image(size: Size) -> None:
    """It has to be the double that can be divided into tiles. The gradient of an input that was never made is right."""
    layer, x, upstream = trained(size, scale=2)
    assert winograd.fits(x, layer, 2)
    assert agree(results(layer, x, upstream, 2), exact(layer, x, upstream, 2))
    upsample = Upsample(64)
    upsample.conv = layer
    assert torch.equal(upsample(x), layer(x, scale=2))


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("kept", [0, 2**30])
def test_a_batch_in_parts(kept: int, scale: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, upstream = trained((9, 64, 64, 8, 8), scale=scale)
    monkeypatch.setattr(winograd, "_AT_ONCE", 2 * 4 * 36 * 4 * 128 * scale**2)
    monkeypatch.setattr(winograd, "_KEPT", kept)
    assert agree(results(layer, x, upstream, scale), exact(layer, x, upstream, scale))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_what_comes_out_is_channels_last(layout: torch.memory_format) -> None:
    layer, x, upstream = trained((8, 64, 64, 8, 8), bias=False)
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    found = results(layer, x, upstream.contiguous(memory_format=layout))
    assert agree(found, exact(layer, x, upstream))
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in found)


def test_weights_that_are_not_trained() -> None:
    layer, x, upstream = trained((8, 64, 64, 8, 8))
    expected = exact(layer, x, upstream)[1]
    layer.requires_grad_(requires_grad=False)
    [found] = torch.autograd.grad(layer(x), x, upstream)
    assert agree([found], [expected])


def test_what_comes_out_can_be_changed_in_place() -> None:
    """As what PyTorch's own convolution makes."""
    layer, x, upstream = trained((8, 64, 64, 8, 8))
    expected = torch.autograd.grad(layer(x).add(1).mul(2), x, upstream)
    found = torch.autograd.grad(layer(x).add_(1).mul_(2), x, upstream)
    assert torch.equal(*expected, *found)


def test_there_is_no_second_gradient() -> None:
    layer, x, upstream = trained((2, 64, 64, 16, 16))
    [first] = torch.autograd.grad(layer(x), x, upstream.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("size", "scale", "kept"),
    [(8, 1, 8 * 36 * 4 * 64), (64, 1, 8 * 64 * 64 * 64), (8, 2, 8 * 25 * 16 * 64), (64, 2, 8 * 64 * 64 * 64)],
)
def test_small_inputs_are_kept_transformed(size: int, scale: int, kept: int) -> None:
    """And large ones as they are, never doubled; the estimate of memory knows it."""
    layer, x, _ = trained((8, 64, 64, size, size))
    assert kept_for_backward(partial(layer, x, scale=scale)) == 4 * kept
    with shapes_only(torch.float32):
        planned = Conv2d(64, 64, 3, padding=1)
        one = partial(planned, torch.empty(1, 64, size, size), scale=scale)
        estimate = 8 * kept_for_backward(one) + kept_transformed(planned, one, 8)
    assert estimate == 4 * kept


def test_gradients_that_nobody_wants_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of a first layer's input, nor of a frozen kernel."""
    for name in ("_add_patches", "_transposed"):
        layer, x, upstream = trained((8, 64, 64, 8, 8))
        with monkeypatch.context() as patch:
            patch.delattr(winograd, name)
            (x if name == "_add_patches" else layer).requires_grad_(requires_grad=False)
            layer(x).backward(upstream)
            assert (x.grad is None) == (name == "_add_patches")


@pytest.mark.parametrize(
    ("inputs", "options"),
    [(64, {"stride": 2}), (64, {"padding": 0}), (64, {"groups": 2}), (64, {"dilation": 2}), (16, {}), (3, {})],
    ids=str,
)
def test_convolutions_it_is_not_for(inputs: int, options: dict[str, int]) -> None:
    assert not winograd.fits(torch.zeros(8, inputs, 8, 8), Conv2d(inputs, 64, 3, **{"padding": 1, **options}))


def test_only_training_in_float32_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else is computed is PyTorch's own, to the bit."""
    layer, x, _ = trained((8, 64, 64, 8, 8))
    plain = F.conv2d(x, layer.weight, layer.bias, padding=1)
    assert winograd.fits(x, layer)
    assert not torch.equal(layer(x), plain)
    assert not winograd.fits(x[..., :6], layer)
    assert not winograd.fits(x[:7], layer)
    assert not winograd.fits(x.double(), layer)
    with torch.no_grad():
        assert not winograd.fits(x, layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert not winograd.fits(x, layer)
    with shapes_only(torch.float32):
        assert not winograd.fits(torch.empty(x.shape), layer)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not winograd.fits(x, layer)
    assert not winograd.fits(x[..., :7], layer, 2)
    layer.eval()
    assert torch.equal(layer(x), plain)
    doubled = F.conv2d(F.interpolate(x, scale_factor=2), layer.weight, layer.bias, padding=1)
    assert torch.equal(layer(x, scale=2), doubled)
