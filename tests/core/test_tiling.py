"""Decoding in tiles: sizes, seams, and that no more than a tile is decoded at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from uldm_cli.core.blocks import Conv2d, Upsample
from uldm_cli.core.tiling import decode_tiled
from uldm_cli.errors import UsageError
from uldm_cli.specs import autoencoders


def latents(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def pointwise(z: Tensor) -> Tensor:
    """Two channels out of three, four times the size."""
    return torch.sin(z[:, :2]).repeat_interleave(4, 2).repeat_interleave(4, 3)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.data())
def test_a_pointwise_decoder_gives_what_it_gives_of_the_whole(height: int, width: int, tile: int, data) -> None:
    overlap = data.draw(st.integers(0, tile - 1))
    z = latents(2, 3, height, width)
    image = decode_tiled(pointwise, z, tile, overlap)
    assert image.shape == (2, 2, 4 * height, 4 * width)
    torch.testing.assert_close(image, pointwise(z), rtol=1e-5, atol=1e-6)


def seam(tiled: Tensor, whole: Tensor) -> float:
    """The largest jump that tiling adds between two columns of pixels, as a share of a usual one."""
    return ((tiled - whole).diff(dim=3).abs().mean((0, 1, 2)).max() / whole.diff(dim=3).abs().mean()).item()


@torch.no_grad()
def test_convolutions_do_not_show_where_tiles_meet() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Conv2d(3, 8, 3, padding=1), nn.SiLU(), Upsample(8), nn.SiLU(), Upsample(8))
    z = latents(1, 3, 37, 50)
    whole = model(z)
    tiled, abrupt = decode_tiled(model, z, tile=16, overlap=8), decode_tiled(model, z, tile=16, overlap=0)
    assert (tiled - whole).abs().mean() < 0.01 * whole.std()
    assert seam(tiled, whole) < 0.1
    assert seam(abrupt, whole) > 0.4


def test_tiles_are_blended_linearly() -> None:
    """The number of the tile as its image: over an overlap of 2 latents, 4 pixels, it rises evenly."""
    numbers = iter(range(10))

    def decode(z: Tensor) -> Tensor:
        return torch.full((1, 1, 2, 2 * z.shape[3]), float(next(numbers)))

    image = decode_tiled(decode, torch.zeros(1, 1, 1, 8), tile=5, overlap=2)
    expected = [0.0] * 6 + [0.125, 0.375, 0.625, 0.875] + [1.0] * 6
    torch.testing.assert_close(image[0, 0, 0], torch.tensor(expected))


def test_no_call_gets_more_than_a_tile_of_one_image() -> None:
    shapes = set()

    def decode(z: Tensor) -> Tensor:
        shapes.add(tuple(z.shape))
        return pointwise(z)

    decode_tiled(decode, latents(3, 3, 50, 11), tile=16, overlap=4)
    assert shapes == {(1, 3, 16, 11)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_images_have_the_decoders_dtype_and_no_gradient(dtype: torch.dtype) -> None:
    z = latents(1, 3, 20, 20).to(dtype).requires_grad_()
    image = decode_tiled(pointwise, z, tile=16, overlap=4)
    assert image.dtype == dtype
    assert not image.requires_grad


@pytest.mark.parametrize("overlap", [-1, 16])
def test_an_overlap_that_leaves_nothing_is_refused(overlap: int) -> None:
    with pytest.raises(UsageError, match=f"tiles of 16 latents cannot overlap by {overlap}"):
        decode_tiled(pointwise, latents(1, 3, 20, 20), 16, overlap)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_a_published_decoder(memory_format: torch.memory_format) -> None:
    """Its normalisation and attention differ from tile to tile, with random weights and small tiles very much so."""
    torch.manual_seed(0)
    spec = autoencoders.VQ(ch=32, num_res_blocks=1, ch_mult=(1, 2, 4), codebook_size=64)
    model = spec.build().eval().to(memory_format=memory_format)
    model.quantize.embedding.normal_()
    z = latents(1, 3, 40, 56).to(memory_format=memory_format)
    whole = model.from_latent(z)
    tiled = decode_tiled(model.from_latent, z, tile=32, overlap=16)
    assert tiled.shape == (1, 3, 160, 224)
    assert (tiled - whole).abs().mean() < 0.1 * whole.std()
    assert seam(tiled, whole) < 0.2
