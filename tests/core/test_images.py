"""Decoding and 8-bit conversion, on files made here by Pillow and on broken ones."""

import io
import pickle
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from uldm_cli.core.images import ImageError, check_header, decode_image, to_uint8
from uldm_cli.errors import UldmError


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def gradient(mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Image.Image:
    rows, columns = np.mgrid[: size[1], : size[0]]
    pixels = np.stack([rows * 10, columns * 10, (rows + columns) * 5], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header claims the size; it holds no pixels."""
    chunks = b""
    for kind, body in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", b""),
        (b"IEND", b""),
    ):
        chunks += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_rgb_png_is_exact() -> None:
    image = gradient()
    decoded = decode_image(encoded(image))
    assert decoded.dtype == torch.uint8
    assert decoded.shape == (3, 16, 24)
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "RGB", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_png_mode_becomes_grey_or_rgb(mode: str, channels: int) -> None:
    image = Image.new(mode, (12, 10)) if mode == "I;16" else gradient(mode, (12, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(encoded(image), channels).shape == (channels, 10, 12)


def test_transparency_shows_white() -> None:
    image = Image.new("RGBA", (4, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 128))
    assert decode_image(encoded(image))[:, 0].T[:3].tolist() == [[255, 0, 0], [255, 255, 255], [127, 127, 127]]


def test_transparent_palette_entry_shows_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((1, 0), 1)
    assert decode_image(encoded(image, transparency=0))[:, 0].T.tolist() == [[255, 255, 255], [10, 20, 30]]


def test_grey_with_alpha_over_white() -> None:
    image = Image.new("LA", (1, 1), (0, 0))
    assert decode_image(encoded(image), channels=1).item() == 255


def test_16_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 32_768, 65_535]], dtype=np.uint16)
    decoded = decode_image(encoded(Image.fromarray(values)), channels=1)
    assert decoded[0, 0].tolist() == [0, 1, 128, 255]


def test_deep_grey_of_other_formats() -> None:
    values = np.array([[0, 65_535, 300]], dtype=np.int32)
    assert decode_image(encoded(Image.fromarray(values), "TIFF"), channels=1)[0, 0].tolist() == [0, 255, 1]
    with pytest.raises(ImageError, match="outside of 16 bits"):
        decode_image(encoded(Image.fromarray(values * 2), "TIFF"))
    with pytest.raises(ImageError, match="floating-point"):
        decode_image(encoded(Image.fromarray(values.astype(np.float32)), "TIFF"))


def test_cmyk_jpeg() -> None:
    decoded = decode_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert decoded[0].float().mean() > 200
    assert decoded[1:].float().mean() < 60


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    decoded = decode_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert decoded[:, 0, 0].tolist() == [255, 0, 0]


def test_exif_orientation_is_applied() -> None:
    image = gradient()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    decoded = decode_image(encoded(image, "JPEG", exif=exif, quality=100, subsampling=0))
    turned = np.asarray(image.transpose(Image.Transpose.ROTATE_270)).astype(int)
    assert decoded.shape == (3, 24, 16)
    assert np.abs(decoded.permute(1, 2, 0).numpy() - turned).max() < 12


@pytest.mark.parametrize("shape", [(100, 40), (40, 100), (64, 64), (10, 30)])
def test_resizing_keeps_the_centre(shape: tuple[int, int]) -> None:
    image = Image.new("RGB", shape, "black")
    side = min(shape)
    left, top = (shape[0] - side) // 2, (shape[1] - side) // 2
    image.paste((255, 255, 255), (left, top, left + side, top + side))
    decoded = decode_image(encoded(image), size=32)
    assert decoded.shape == (3, 32, 32)
    assert decoded[:, 2:-2, 2:-2].min() > 240


def test_downscaling_is_antialiased() -> None:
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (64, 32))
    decoded = decode_image(encoded(Image.fromarray(stripes)), channels=1, size=16).float()
    assert decoded[0, 4:-4, 4:-4].sub(127.5).abs().max() < 8


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_truncated_file_is_named(format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = encoded(noise, format)
    with pytest.raises(ImageError, match=r"^cut\.x: ") as caught:
        decode_image(content[: len(content) // 2], name="cut.x")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_missing_file_and_text_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="No such file"):
        decode_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ImageError, match="not an image"):
        decode_image(tmp_path / "text.png")


def test_postscript_is_not_executed() -> None:
    eps = encoded(gradient(), "EPS")
    with pytest.raises(ImageError, match="not an image"):
        decode_image(eps)


@pytest.mark.parametrize("size", [(12_000, 9_000), (60_000, 60_000)])
def test_decompression_bomb(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="100 million pixels"):
        decode_image(huge_png(*size))


@pytest.mark.parametrize(
    ("size", "reason"), [((1, 1), "smaller than 8"), ((20_000, 10), "larger than 16384"), ((300, 7), "smaller than 8")]
)
def test_header_check_names_the_size(size: tuple[int, int], reason: str) -> None:
    with pytest.raises(ImageError, match=f"{size[0]}x{size[1]} pixels, {reason}"):
        check_header(io.BytesIO(huge_png(*size)), "x.png")


def test_header_check_reads_no_pixels() -> None:
    check_header(io.BytesIO(huge_png(5000, 5000)), "x.png")


def test_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ImageError("a.png", "is broken")))
    assert (error.name, error.reason, str(error), error.exit_code) == ("a.png", "is broken", "a.png: is broken", 2)


def test_to_uint8_inverts_the_8_bit_values() -> None:
    values = torch.arange(256)
    x = (values / 127.5 - 1).reshape(1, 1, 16, 16)
    assert np.array_equal(to_uint8(x)[0, :, :, 0].reshape(-1), values.numpy())


@given(st.floats(-3, 3, width=32))
def test_to_uint8_is_within_half_a_step(value: float) -> None:
    (pixel,) = to_uint8(torch.full((1, 1, 1, 1), value)).reshape(-1)
    assert abs(float(pixel) - min(max((value + 1) * 127.5, 0), 255)) <= 0.5 + 1e-4


def test_to_uint8_truncates_as_the_reference_on_request() -> None:
    x = torch.rand(2, 3, 4, 5) * 2.4 - 1.2
    reference = ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(to_uint8(x, "truncate"), reference)


def test_to_uint8_takes_bfloat16_and_infinity() -> None:
    x = torch.tensor([float("inf"), -float("inf"), 0.0, 1.0], dtype=torch.bfloat16).reshape(1, 1, 2, 2)
    assert to_uint8(x).reshape(-1).tolist() == [255, 0, 128, 255]


def test_to_uint8_refuses_nan() -> None:
    with pytest.raises(UldmError, match=r"NaN.*--precision fp32"):
        to_uint8(torch.full((1, 3, 2, 2), float("nan")))
