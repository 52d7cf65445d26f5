"""The autoencoders' layers, each against the sum written out."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from uldm_cli.core.blocks import (
    Conv2d,
    Downsample,
    GroupNorm,
    Pointwise,
    ResnetBlock,
    SelfAttention,
    Upsample,
    attention,
    norm,
)
from uldm_cli.errors import UsageError


def features() -> Tensor:
    return torch.randn(2, 8, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_of_each_head_over_all_positions(heads: int) -> None:
    torch.manual_seed(1)
    layer, x = SelfAttention(8, heads, 4), features()
    h = F.group_norm(x, 4, eps=1e-6)
    q, k, v = (conv(h).flatten(2) for conv in (layer.q, layer.k, layer.v))  # (N, C, HW)
    mixed = []
    for rows in torch.arange(8).chunk(heads):
        weight = torch.softmax(q[:, rows].transpose(1, 2) @ k[:, rows] / len(rows) ** 0.5, dim=-1)  # (N, to, from)
        mixed.append(v[:, rows] @ weight.transpose(1, 2))
    expected = x + layer.proj_out(torch.cat(mixed, dim=1).view_as(x))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("out", [8, 12])
def test_residual_block(out: int) -> None:
    torch.manual_seed(1)
    layer, x = ResnetBlock(8, out, 4), features()
    h = layer.conv1(F.silu(F.group_norm(x, 4, eps=1e-6)))
    h = layer.conv2(F.silu(F.group_norm(h, 4, eps=1e-6)))
    skip = x if out == 8 else F.conv2d(x, layer.nin_shortcut.weight, layer.nin_shortcut.bias)
    torch.testing.assert_close(layer(x), skip + h, rtol=1e-4, atol=1e-5)


def test_downsampling_pads_below_and_on_the_right() -> None:
    layer = Downsample(1)
    torch.nn.init.ones_(layer.conv.weight)
    torch.nn.init.zeros_(layer.conv.bias)
    image = torch.arange(16.0).view(1, 1, 4, 4)
    expected = torch.tensor([[image[..., :3, :3].sum(), image[..., :3, 2:].sum()], [image[..., 2:, :3].sum(), 50.0]])
    torch.testing.assert_close(layer(image)[0, 0], expected)  # 50 = 10 + 11 + 14 + 15


def test_upsampling_repeats_before_its_convolution() -> None:
    layer, x = Upsample(8), features()
    repeated = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(layer(x), layer.conv(repeated))


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=["bf16-weights", "fp32-weights"])
def test_bfloat16_is_normalised_in_float32(weights: torch.dtype) -> None:
    """Rounded once, at the end: values far from zero lose nothing on the way to their mean."""
    layer = GroupNorm(2, 8).to(weights)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = (features() + 30).bfloat16().contiguous(memory_format=torch.channels_last)
    out = layer(x)
    assert out.dtype == torch.bfloat16
    expected = F.group_norm(x.float(), 2, layer.weight.float(), layer.bias.float())
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected.bfloat16(), rtol=2**-7, atol=2**-8)
    with torch.no_grad():
        assert torch.equal(layer(x), out)


@pytest.mark.parametrize("size", [8, 40])
def test_gradients_of_a_norm_in_bfloat16(size: int) -> None:
    """Under autocast, of small maps and large ones: those of float32, rounded."""
    layer = GroupNorm(2, 8)
    torch.nn.init.normal_(layer.weight)
    generator = torch.Generator().manual_seed(0)
    x, upstream = (
        torch.randn(2, 8, size, size, generator=generator).bfloat16().contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    wanted = (x.requires_grad_(), layer.weight, layer.bias)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    found = torch.autograd.grad(out, wanted, upstream)
    expected = torch.autograd.grad(F.group_norm(x.float(), 2, layer.weight, layer.bias), wanted, upstream.float())
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    for ours, exact in zip(found, expected, strict=True):
        assert (ours.float() - exact.float()).norm() < 0.004 * exact.float().norm()


def test_float32_is_normalised_as_torch_does() -> None:
    layer = GroupNorm(2, 8)
    torch.nn.init.normal_(layer.weight)
    assert torch.equal(layer(features()), F.group_norm(features(), 2, layer.weight, layer.bias))


@pytest.mark.parametrize("training", [True, False])
def test_convolutions_of_every_kind_that_torch_has(training: bool) -> None:
    """Other padding than zeros, and images without a batch."""
    torch.manual_seed(0)
    layer, x = Conv2d(64, 64, 3, padding=1, padding_mode="circular").train(training), torch.randn(8, 64, 8, 8)
    plain = torch.nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular")
    plain.load_state_dict(layer.state_dict())
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(layer(x), plain(x))
            assert Conv2d(64, 64, 3).train(training)(x[0]).shape == (64, 6, 6)


@pytest.mark.parametrize("groups", [4, 8])
@pytest.mark.parametrize("offset", [0, 30])
def test_gradients_of_narrow_groups(groups: int, offset: int) -> None:
    """Of one channel and of two, which have a gradient of their own: as near to float64 as PyTorch's."""
    layer = GroupNorm(groups, 8)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    generator = torch.Generator().manual_seed(0)
    x, upstream = (
        torch.randn(4, 8, 20, 28, generator=generator).contiguous(memory_format=torch.channels_last) for _ in range(2)
    )
    wanted = (x.add_(offset).requires_grad_(), layer.weight, layer.bias)
    out = layer(x)
    assert torch.equal(out, F.group_norm(x, groups, layer.weight, layer.bias))
    assert "NarrowGroups" in type(out.grad_fn).__name__
    found, theirs = (
        torch.autograd.grad(y, wanted, upstream) for y in (out, F.group_norm(x, groups, layer.weight, layer.bias))
    )
    double = F.group_norm(x.double(), groups, layer.weight.double(), layer.bias.double())
    for a, b, exact in zip(found, theirs, torch.autograd.grad(double, wanted, upstream.double()), strict=True):
        assert (a - exact).norm() < 1.2 * (b - exact).norm() + 1e-6 * exact.norm()
    assert found[0].is_contiguous(memory_format=torch.channels_last)


def test_layers_that_cannot_be_divided() -> None:
    with pytest.raises(UsageError, match=r"^num_heads is 5\. It must divide the 16 channels that have attention$"):
        SelfAttention(16, 5, 4)
    with pytest.raises(UsageError, match=r"^norm_channels is 5\. It must divide every width, and 16 is one of them$"):
        norm(16, 5)


@pytest.mark.parametrize("geometry", [{}, {"padding": 1}, {"stride": 2, "padding": 1}, {"bias": False}], ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_packed_convolution(geometry: dict[str, int], layout: torch.memory_format) -> None:
    layer, x = Conv2d(8, 16, 3, **geometry), features().to(memory_format=layout)
    expected = layer(x)  # gradients are wanted, so PyTorch's own
    assert expected.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected.detach())
        torch.testing.assert_close(layer(x[:1]), expected[:1].detach())
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected.detach())


@torch.no_grad()
def test_packed_weights_follow_the_weights() -> None:
    layer, x = Conv2d(8, 8, 1), features()
    before = layer(x)
    copied = copy.deepcopy(layer)
    layer.weight.mul_(2)
    layer.bias.mul_(2)
    torch.testing.assert_close(layer(x), 2 * before)
    torch.testing.assert_close(copied(x), before)
    layer.load_state_dict(copied.state_dict())
    torch.testing.assert_close(layer(x), before)
    assert layer.double()(x.double()).dtype == torch.float64


def test_pointwise_is_a_one_tap_convolution() -> None:
    layer, x = Pointwise(8, 12), features()
    expected = F.conv2d(x, layer.weight[..., None], layer.bias)
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(("queries", "keys"), [(64, 64), (300, 7), (1024, 1024), (2048, 1025)])
def test_attention_in_bfloat16(queries: int, keys: int) -> None:
    """Few positions, another sequence, some heads at a time, and more scores than are worth keeping."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 5, length, 16, generator=generator) for length in (queries, keys, keys))
    exact = F.scaled_dot_product_attention(q, k, v)
    with torch.no_grad():
        error = attention(q.bfloat16(), k.bfloat16(), v.bfloat16()).float() - exact
    assert error.std() < 0.01 * exact.std()
    torch.testing.assert_close(attention(q, k, v), exact)


def test_gradients_of_attention_in_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(1, 5, 64, 16, generator=generator)
    exact = [torch.randn(1, 5, length, 16, generator=generator).requires_grad_() for length in (64, 30, 30)]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*exact), exact, upstream)
    found = torch.autograd.grad(attention(*rounded), rounded, upstream.bfloat16())
    for ours, wanted in zip(found, expected, strict=True):
        assert (ours.float() - wanted).norm() < 0.02 * wanted.norm()
